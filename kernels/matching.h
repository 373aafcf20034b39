/* The squared distance of class means, for one type of vectors. Includers define OF(name), name with a suffix for the
 * type, and VALUE, float or double. */

/* Compute the mean of `count` rows of `width` values, in double; `order`: the rows' numbers, NULL for all in order. */
static void OF(mean_of_rows)(const VALUE *rows, int64_t pitch, const int64_t *order, int64_t count, int64_t width,
                             double *mean) {
    for (int64_t j = 0; j < width; j++) mean[j] = 0;
    for (int64_t i = 0; i < count; i++) {
        const VALUE *row = rows + (order ? order[i] : i) * pitch;
        for (int64_t j = 0; j < width; j++) mean[j] += row[j];
    }
    for (int64_t j = 0; count && j < width; j++) mean[j] /= count;
}

/* Compute the distance of real [B, D] and synthetic [B', D], rows of `real_pitch` and `synthetic_pitch` values, and its
 * gradient [B', D] for the latter. Orders and offsets as in `ClassGroups`, NULL if all rows are one class. `partial` is
 * [classes, D / COLUMNS rounded up]. */
void OF(class_mean_distance)(const VALUE *real, int64_t real_pitch, const VALUE *synthetic, int64_t synthetic_pitch,
                             const int64_t *real_order, const int64_t *real_offsets, const int64_t *synthetic_order,
                             const int64_t *synthetic_offsets, VALUE *partial, VALUE *distance, VALUE *gradient,
                             int64_t real_count, int64_t synthetic_count, int64_t columns, int64_t classes,
                             int64_t threads) {
    int64_t blocks = (columns + COLUMNS - 1) / COLUMNS;
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t portion = 0; portion < classes * blocks; portion++) {
        int64_t class = portion / blocks, column = portion % blocks * COLUMNS, width = at_most(columns - column, COLUMNS);
        int64_t first_real = real_offsets ? real_offsets[class] : 0, first = synthetic_offsets ? synthetic_offsets[class] : 0;
        int64_t reals = real_offsets ? real_offsets[class + 1] - first_real : real_count;
        int64_t count = synthetic_offsets ? synthetic_offsets[class + 1] - first : synthetic_count;
        double difference[COLUMNS], mean[COLUMNS], sum = 0;
        VALUE slope[COLUMNS];
        OF(mean_of_rows)(real + column, real_pitch, real_order ? real_order + first_real : NULL, reals, width, difference);
        OF(mean_of_rows)(synthetic + column, synthetic_pitch, synthetic_order ? synthetic_order + first : NULL, count,
                         width, mean);
        for (int64_t j = 0; j < width; j++) {
            difference[j] -= mean[j];
            sum += difference[j] * difference[j];
            slope[j] = count ? -2 * difference[j] / count : 0;
        }
        partial[portion] = sum;
        for (int64_t i = 0; i < count; i++)
            memcpy(gradient + (synthetic_order ? synthetic_order[first + i] : i) * columns + column, slope,
                   width * sizeof(VALUE));
    }
    double total = 0;
    for (int64_t portion = 0; portion < classes * blocks; portion++) total += partial[portion];
    *distance = total;
}
