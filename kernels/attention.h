/* Attention maps of a sample and their gradient, for one type of features. Includers define
 *   OF(name)   name with a suffix for the type,
 *   STORED     type of the features in memory; uint16_t for half precision,
 *   VALUE      type of computation, maps and statistics: float or double,
 *   BITS       unsigned integer of the size of VALUE,
 *   WIDENED, NARROWED   functions between vectors of STORED and of VALUE,
 *   LEAST_NORM, MOST_NORM   if a map's norm is between these, no power or sum of it left the range of VALUE,
 *   LEAST_PEAK   the smallest number whose reciprocal is finite. */

typedef VALUE OF(vector) __attribute__((vector_size(REGISTER)));
typedef BITS OF(bits) __attribute__((vector_size(REGISTER)));
typedef STORED OF(stored) __attribute__((vector_size(REGISTER / sizeof(VALUE) * sizeof(STORED))));
typedef STORED OF(unaligned)
    __attribute__((vector_size(REGISTER / sizeof(VALUE) * sizeof(STORED)), aligned(sizeof(STORED)), may_alias));
typedef VALUE OF(unaligned_values) __attribute__((vector_size(REGISTER), aligned(sizeof(VALUE)), may_alias));

#define VECTOR OF(vector)
#define LANES_OF_VALUE ((int)(REGISTER / sizeof(VALUE)))
#define VECTORS (GROUP / LANES_OF_VALUE) /* of a group, over which sums are taken */
#define SIGN ((BITS)1 << (8 * sizeof(BITS) - 1))

INLINE VECTOR OF(all)(VALUE value) { return value - (VECTOR){0}; }

/* Load `count` features, filled up with zeros. */
INLINE VECTOR OF(features)(const STORED *from, int64_t count) {
    OF(stored) given = {0};
    if (count >= LANES_OF_VALUE)
        given = *(const OF(unaligned) *)from;
    else
        memcpy(&given, from, count * sizeof(STORED));
    return WIDENED(given);
}

INLINE void OF(write_features)(STORED *to, VECTOR value, int64_t count) {
    OF(stored) result = NARROWED(value);
    if (count >= LANES_OF_VALUE)
        *(OF(unaligned) *)to = result;
    else
        memcpy(to, &result, count * sizeof(STORED));
}

INLINE VECTOR OF(values)(const VALUE *from, int64_t count) {
    if (count >= LANES_OF_VALUE) return *(const OF(unaligned_values) *)from;
    VECTOR value = {0};
    memcpy(&value, from, count * sizeof(VALUE));
    return value;
}

INLINE void OF(write_values)(VALUE *to, VECTOR value, int64_t count) {
    if (count >= LANES_OF_VALUE)
        *(OF(unaligned_values) *)to = value;
    else
        memcpy(to, &value, count * sizeof(VALUE));
}

INLINE VECTOR OF(magnitude)(VECTOR value) { return (VECTOR)((OF(bits))value & ~SIGN); }

/* Return value^power for values >= 0; power 0, of a derivative, gives 0 for 0. */
INLINE VECTOR OF(raised)(VECTOR value, double power) {
    if (power == 4) {
        VECTOR square = value * value;
        return square * square;
    }
    if (power == 3) return value * value * value;
    if (power == 0) return (VECTOR)((OF(bits))(value > OF(all)(0)) & (OF(bits))OF(all)(1));
    if (power == (int)power) { /* by products */
        VECTOR result = OF(all)(1);
        for (int left = power; left; left >>= 1, value *= value)
            if (left & 1) result *= value;
        return result;
    }
    for (int lane = 0; lane < LANES_OF_VALUE; lane++) value[lane] = pow(value[lane], power);
    return value;
}

/* Add (|f| / peak)^power of `count` rows of `width` features to the rows' `row_sums` and to the columns'
 * `column_sums`; a power of 0 leaves its sums out. */
INLINE void OF(add_rows)(const STORED *const *rows, int count, int64_t width, VALUE peak, double row_power,
                         double column_power, VALUE *row_sums, VALUE *column_sums) {
    VECTOR sums[ROWS][VECTORS];
    for (int row = 0; row < count; row++)
        for (int part = 0; part < VECTORS; part++) sums[row][part] = OF(all)(0);
    for (int64_t first = 0; first < width; first += GROUP)
        for (int part = 0; part < VECTORS; part++) {
            int64_t c = first + part * LANES_OF_VALUE, n = at_most(width - c, LANES_OF_VALUE);
            if (n <= 0) break;
            VECTOR total = OF(all)(0);
            for (int row = 0; row < count; row++) {
                VECTOR f = OF(magnitude)(OF(features)(rows[row] + c, n)), power = OF(all)(0);
                if (peak != 1) f /= OF(all)(peak);
                if (row_power) sums[row][part] += power = OF(raised)(f, row_power);
                if (column_power) total += column_power == row_power ? power : OF(raised)(f, column_power);
            }
            if (column_power) OF(write_values)(column_sums + c, OF(values)(column_sums + c, n) + total, n);
        }
    if (row_power)
        for (int row = 0; row < count; row++) {
            VALUE lanes[GROUP];
            memcpy(lanes, sums[row], sizeof lanes);
            for (int half = GROUP / 2; half; half /= 2)
                for (int lane = 0; lane < half; lane++) lanes[lane] += lanes[lane + half];
            row_sums[row] = lanes[0];
        }
}

/* Return row `row` of a sample, which is copied to `memory` unless its features are adjacent. */
INLINE const STORED *OF(row)(const STORED *x, Matrix m, int64_t row, STORED *memory) {
    const STORED *from = x + offset_of(m.rows, row);
    if (is_adjacent(m.columns)) return from;
    for (int64_t c = 0; c < m.columns.count; c += m.columns.run)
        for (int64_t i = 0; i < m.columns.run; i++)
            memory[c + i] = from[c / m.columns.run * m.columns.far + i * m.columns.near];
    return memory;
}

/* Compute the sums of one sample. `memory` holds ROWS rows if a row's features are not adjacent. */
INLINE void OF(sums_of_matrix)(const STORED *x, Matrix m, VALUE peak, double row_power, double column_power,
                               VALUE *row_sums, VALUE *column_sums, STORED *memory) {
    int64_t width = m.columns.count;
    if (column_power) memset(column_sums, 0, width * sizeof(VALUE));
    for (int64_t row = 0; row < m.rows.count; row += ROWS) {
        const STORED *rows[ROWS];
        int count = at_most(m.rows.count - row, ROWS);
        for (int i = 0; i < count; i++) rows[i] = OF(row)(x, m, row + i, memory + i * width);
        if (count == ROWS && !m.by_place) /* rows of a position are short: in turns they would escape the prefetcher */
            OF(add_rows)(rows, ROWS, width, peak, row_power, column_power, row_sums + row, column_sums);
        else
            for (int i = 0; i < count; i++)
                OF(add_rows)(rows + i, 1, width, peak, row_power, column_power, row_sums + row + i, column_sums);
    }
}

static void OF(sums_of_sample)(const STORED *x, Matrix m, VALUE peak, double row_power, double column_power,
                               VALUE *row_sums, VALUE *column_sums, STORED *memory) {
    if (row_power == 4 && column_power == 4 && peak == 1) /* the paper's powers, as constants */
        OF(sums_of_matrix)(x, m, 1, 4, 4, row_sums, column_sums, memory);
    else
        OF(sums_of_matrix)(x, m, peak, row_power, column_power, row_sums, column_sums, memory);
}

static VALUE OF(largest)(const STORED *x, Matrix m, STORED *memory) {
    VECTOR peaks = OF(all)(0);
    for (int64_t row = 0; row < m.rows.count; row++) {
        const STORED *own = OF(row)(x, m, row, memory);
        for (int64_t c = 0; c < m.columns.count; c += LANES_OF_VALUE) {
            VECTOR f = OF(magnitude)(OF(features)(own + c, at_most(m.columns.count - c, LANES_OF_VALUE)));
            OF(bits) larger = (OF(bits))(f > peaks);
            peaks = (VECTOR)((larger & (OF(bits))f) | (~larger & (OF(bits))peaks));
        }
    }
    VALUE peak = 0;
    for (int lane = 0; lane < LANES_OF_VALUE; lane++) peak = peaks[lane] > peak ? peaks[lane] : peak;
    return peak;
}

static double OF(norm)(const VALUE *map, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)map[i] * map[i];
    return sqrt(sum);
}

/* NaN is not: it remains NaN. */
INLINE int OF(is_unsafe)(double norm, double power) { return power && (norm < LEAST_NORM || norm > MOST_NORM); }

INLINE VALUE OF(to_unit_length)(VALUE *map, int64_t count, double norm) {
    VALUE factor = norm == 0 ? 1 : 1 / norm;
    for (int64_t i = 0; i < count; i++) map[i] *= factor;
    return factor;
}

/* Compute the maps of rows and of columns of one sample, the peak that features are divided by, and the factor that
 * each map was multiplied by. */
static void OF(maps_of_sample)(const STORED *x, Matrix m, double row_power, double column_power, int64_t normalize,
                               VALUE *row_map, VALUE *column_map, VALUE *peak, VALUE *row_factor,
                               VALUE *column_factor, STORED *memory) {
    int64_t rows = row_power ? m.rows.count : 0, columns = column_power ? m.columns.count : 0;
    *peak = *row_factor = *column_factor = 1;
    OF(sums_of_sample)(x, m, 1, row_power, column_power, row_map, column_map, memory);
    if (!normalize) return;
    double of_rows = OF(norm)(row_map, rows), of_columns = OF(norm)(column_map, columns);
    if (OF(is_unsafe)(of_rows, row_power) || OF(is_unsafe)(of_columns, column_power)) {
        VALUE largest = OF(largest)(x, m, memory);
        if (largest < LEAST_PEAK) { /* the sample counts as zero */
            memset(row_map, 0, rows * sizeof(VALUE));
            memset(column_map, 0, columns * sizeof(VALUE));
            return;
        }
        *peak = largest;
        OF(sums_of_sample)(x, m, *peak, row_power, column_power, row_map, column_map, memory);
        of_rows = OF(norm)(row_map, rows), of_columns = OF(norm)(column_map, columns);
    }
    *row_factor = OF(to_unit_length)(row_map, rows, of_rows);
    *column_factor = OF(to_unit_length)(column_map, columns, of_columns);
}

/* Compute the factors of (f / peak)^(p - 1) in the gradient of each feature: `factor` times the map's gradient, without
 * its component along the map if the map was normalised. */
static void OF(project)(const VALUE *gradient, const VALUE *map, int64_t count, VALUE factor, int64_t normalize,
                        VALUE *out) {
    double along = 0;
    if (normalize)
        for (int64_t i = 0; i < count; i++) along += (double)gradient[i] * map[i];
    for (int64_t i = 0; i < count; i++) out[i] = factor * (gradient[i] - (VALUE)along * map[i]);
}

INLINE void OF(gradient_of_row)(const STORED *x, int64_t width, VALUE peak, double row_power, double column_power,
                                VALUE row_weight, const VALUE *column_weights, STORED *out) {
    for (int64_t c = 0; c < width; c += LANES_OF_VALUE) {
        int64_t n = at_most(width - c, LANES_OF_VALUE);
        VECTOR f = OF(features)(x + c, n), relative = OF(magnitude)(f), gradient = OF(all)(0);
        if (peak != 1) relative /= OF(all)(peak);
        if (row_power && row_power == column_power)
            gradient = OF(raised)(relative, row_power - 1) * (row_weight + OF(values)(column_weights + c, n));
        else {
            if (row_power) gradient = OF(raised)(relative, row_power - 1) * row_weight;
            if (column_power) gradient += OF(raised)(relative, column_power - 1) * OF(values)(column_weights + c, n);
        }
        OF(write_features)(out + c, (VECTOR)((OF(bits))gradient ^ ((OF(bits))f & SIGN)), n);
    }
}

/* Write the gradient of one sample to `out`, which has strides of its own. `memory` holds two rows if a row's features
 * or gradients are not adjacent. */
static void OF(gradient_of_sample)(const STORED *x, Matrix m, VALUE peak, double row_power, double column_power,
                                   const VALUE *row_weights, const VALUE *column_weights, STORED *out, Matrix of_out,
                                   STORED *memory) {
    int64_t width = m.columns.count, run = of_out.columns.run;
    for (int64_t row = 0; row < m.rows.count; row++) {
        const STORED *own = OF(row)(x, m, row, memory);
        STORED *to = out + offset_of(of_out.rows, row), *result = is_adjacent(of_out.columns) ? to : memory + width;
        VALUE weight = row_power ? row_weights[row] : 0;
        if (row_power == 4 && column_power == 4 && peak == 1)
            OF(gradient_of_row)(own, width, 1, 4, 4, weight, column_weights, result);
        else
            OF(gradient_of_row)(own, width, peak, row_power, column_power, weight, column_weights, result);
        if (result == to) continue;
        for (int64_t c = 0; c < width; c += run)
            for (int64_t i = 0; i < run; i++) to[c / run * of_out.columns.far + i * of_out.columns.near] = result[c + i];
    }
}

/* Compute maps [B, M] and statistics [3, B] of features [B, C, H, W]. Maps, powers and factors are in the order
 * spatial, channel. `memory` is [threads, ROWS, columns] if features are not adjacent, else NULL. */
void OF(attention_forward)(const STORED *features, const int64_t *strides, VALUE *maps, VALUE *statistics,
                           STORED *memory, int64_t samples, int64_t channels, int64_t height, int64_t width,
                           double spatial_power, double channel_power, int64_t normalize, int64_t threads) {
    int64_t places = spatial_power ? height * width : 0, values = places + (channel_power ? channels : 0);
    Matrix m = matrix_of(strides, channels, height, width, has_adjacent_channels(strides, channels));
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        VALUE *spatial = maps + i * values, *channel = spatial + places, *peak = statistics + i;
        VALUE *of_spatial = peak + samples, *of_channel = of_spatial + samples;
        STORED *own = memory ? memory + omp_get_thread_num() * ROWS * m.columns.count : NULL;
        if (m.by_place)
            OF(maps_of_sample)(features + i * strides[0], m, spatial_power, channel_power, normalize, spatial, channel,
                               peak, of_spatial, of_channel, own);
        else
            OF(maps_of_sample)(features + i * strides[0], m, channel_power, spatial_power, normalize, channel, spatial,
                               peak, of_channel, of_spatial, own);
    }
}

/* Compute the gradient [B, C, H, W], of strides `out_strides`, from the gradient [B, M] of the maps. `weights` is
 * [threads, M]; `memory` is [threads, 2, columns] if features or gradients are not adjacent, else NULL. */
void OF(attention_backward)(const STORED *features, const int64_t *strides, const VALUE *gradient, const VALUE *maps,
                            const VALUE *statistics, STORED *out, const int64_t *out_strides, VALUE *weights,
                            STORED *memory, int64_t samples, int64_t channels, int64_t height, int64_t width,
                            double spatial_power, double channel_power, int64_t normalize, int64_t threads) {
    int64_t places = spatial_power ? height * width : 0, values = places + (channel_power ? channels : 0);
    int by_place = has_adjacent_channels(strides, channels);
    Matrix m = matrix_of(strides, channels, height, width, by_place);
    Matrix of_out = matrix_of(out_strides, channels, height, width, by_place);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        int64_t thread = omp_get_thread_num();
        const VALUE *of_maps = gradient + i * values, *own_maps = maps + i * values;
        VALUE peak = statistics[i], *spatial = weights + thread * values, *channel = spatial + places;
        STORED *own = memory ? memory + thread * 2 * m.columns.count : NULL;
        OF(project)(of_maps, own_maps, places, spatial_power * statistics[samples + i] / peak, normalize, spatial);
        OF(project)(of_maps + places, own_maps + places, values - places,
                    channel_power * statistics[2 * samples + i] / peak, normalize, channel);
        if (by_place)
            OF(gradient_of_sample)(features + i * strides[0], m, peak, spatial_power, channel_power, spatial, channel,
                                   out + i * out_strides[0], of_out, own);
        else
            OF(gradient_of_sample)(features + i * strides[0], m, peak, channel_power, spatial_power, channel, spatial,
                                   out + i * out_strides[0], of_out, own);
    }
}

#undef VECTOR
#undef LANES_OF_VALUE
#undef VECTORS
#undef SIGN
