/* Decoding of small images and their siamese augmentation, or the transpose of both, in one pass.
 *
 * A sheet holds ratio x ratio small images. Decoding enlarges one to the sheet's size: a line of pixels reads the small
 * line it lies in and, with a share of at most a half, the next one on its side; at the border there is no next one.
 * A thread decodes into its scratch, which stays in the cache. The transpose runs over small images, each of which one
 * thread writes, so the order of its sums is fixed. */
#include "augmentation.h"

/* A row of `width` small pixels of `step` channels; `ratio` pixels of a decoded row lie in each. */
typedef struct {
    int64_t width, step, ratio;
} Row;

/* The lines of one phase, of `ratio`: `side` is where their other small line lies, -1, 0 (nowhere) or 1. Small lines
 * from `first` to before `last` have one there. */
typedef struct {
    int64_t side, first, last;
    float own, share;
} Phase;

INLINE Phase phase_of(int64_t phase, int64_t ratio, int64_t length) {
    int64_t twice = 2 * phase + 1 - ratio;
    if (twice == 0) return (Phase){0, length, length, 1, 0};
    float share = (twice < 0 ? -twice : twice) * (0.5f / ratio);
    return (Phase){twice < 0 ? -1 : 1, twice < 0, length - (twice > 0), 1 - share, share};
}

INLINE int has_other(Phase phase, int64_t line) { return line >= phase.first && line < phase.last; }

INLINE void copy_widened(const float *restrict from, Row row, int64_t first, int64_t last, float *restrict to) {
    for (int64_t x = first; x < last; x++)
        for (int64_t channel = 0; channel < row.step; channel++)
            to[x * row.ratio * row.step + channel] = from[x * row.step + channel];
}

INLINE void widen_row(const float *restrict from, Row row, float *restrict to) {
    for (int64_t at = 0; at < row.ratio; at++, to += row.step) {
        Phase phase = phase_of(at, row.ratio, row.width);
        const float *other = from + phase.side * row.step;
        int64_t start = at_most(phase.first, row.width);
        copy_widened(from, row, 0, start, to);
        for (int64_t x = start; x < phase.last; x++)
            for (int64_t channel = 0; channel < row.step; channel++)
                to[x * row.ratio * row.step + channel] =
                    phase.own * from[x * row.step + channel] + phase.share * other[x * row.step + channel];
        copy_widened(from, row, at_least(phase.last, start), row.width, to);
    }
}

INLINE void add_narrowed(const float *restrict from, Row row, int64_t first, int64_t last, float weight,
                         float *restrict to) {
    for (int64_t x = first; x < last; x++)
        for (int64_t channel = 0; channel < row.step; channel++)
            to[x * row.step + channel] += weight * from[x * row.ratio * row.step + channel];
}

INLINE void narrow_row(const float *restrict from, Row row, float *restrict to) {
    memset(to, 0, 4 * row.width * row.step);
    for (int64_t at = 0; at < row.ratio; at++, from += row.step) {
        Phase phase = phase_of(at, row.ratio, row.width);
        int64_t start = at_most(phase.first, row.width);
        add_narrowed(from, row, 0, start, 1, to);
        add_narrowed(from, row, start, phase.last, phase.own, to);
        add_narrowed(from, row, start, phase.last, phase.share, to + phase.side * row.step);
        add_narrowed(from, row, at_least(phase.last, start), row.width, 1, to);
    }
}

/* Widen or narrow a row; channels of one and three are constants for the compiler. */
static void resize_row(const float *from, Row row, int64_t transposed, float *to) {
    Row one = {row.width, 1, row.ratio}, three = {row.width, 3, row.ratio};
    if (row.ratio == 2) one.ratio = three.ratio = 2;
    if (transposed) {
        if (row.step == 1) return narrow_row(from, one, to);
        if (row.step == 3) return narrow_row(from, three, to);
        return narrow_row(from, row, to);
    }
    if (row.step == 1) return widen_row(from, one, to);
    if (row.step == 3) return widen_row(from, three, to);
    widen_row(from, row, to);
}

/* Add weight * from. */
INLINE void add_scaled(const float *restrict from, int64_t count, float weight, float *restrict to) {
    for (int64_t at = 0; at < count; at++) to[at] += weight * from[at];
}

/* Enlarge the small image at `part` of a sheet to [height, width]. rows: scratch, [height / ratio, width * step]. */
static void decode(const float *part, Shape size, int64_t ratio, float *restrict rows, float *restrict output) {
    int64_t line = size.width * size.step, small = size.height / ratio;
    Row row = {size.width / ratio, size.step, ratio};
    for (int64_t plane = 0; plane < size.planes; plane++, part += size.height * line) {
        for (int64_t y = 0; y < small; y++) resize_row(part + y * line, row, 0, rows + y * line);
        for (int64_t y = 0; y < size.height; y++, output += line) {
            Phase phase = phase_of(y % ratio, ratio, small);
            const float *from = rows + y / ratio * line, *other = from + phase.side * line;
            if (has_other(phase, y / ratio))
                for (int64_t at = 0; at < line; at++) output[at] = phase.own * from[at] + phase.share * other[at];
            else
                memcpy(output, from, 4 * line);
        }
    }
}

/* Write the transpose of `decode` to the small image at `part` of a sheet. */
static void decode_transposed(const float *restrict image, Shape size, int64_t ratio, float *restrict rows,
                              float *part) {
    int64_t line = size.width * size.step, small = size.height / ratio;
    Row row = {size.width / ratio, size.step, ratio};
    for (int64_t plane = 0; plane < size.planes; plane++, part += size.height * line) {
        memset(rows, 0, 4 * small * line);
        for (int64_t y = 0; y < size.height; y++, image += line) {
            Phase phase = phase_of(y % ratio, ratio, small);
            float *to = rows + y / ratio * line;
            int with_other = has_other(phase, y / ratio);
            add_scaled(image, line, with_other ? phase.own : 1, to);
            if (with_other) add_scaled(image, line, phase.share, to + phase.side * line);
        }
        for (int64_t y = 0; y < small; y++) resize_row(rows + y * line, row, 1, part + y * line);
    }
}

/* Return the place, among the values of all sheets, of the first value of a small image. */
INLINE int64_t place_of(Shape size, int64_t ratio, int64_t number) {
    int64_t sheet = number / (ratio * ratio), down = number / ratio % ratio, across = number % ratio;
    int64_t pixel = down * (size.height / ratio) * size.width + across * (size.width / ratio);
    return sheet * size.channels * pixels_of(size) + pixel * size.step;
}

/* A thread's scratch. */
typedef struct {
    float *image, *other, *rows, *augmentation;
} Scratch;

/* Return the scratch of this thread, of 2 images, the rows of a small one and what `augment_image` needs, each padded
 * to whole vectors. */
INLINE Scratch scratch_of_thread(float *scratch, Shape size, int64_t ratio) {
    int64_t values = padded(size.channels * pixels_of(size));
    int64_t rows = padded(size.height / ratio * size.width * size.step);
    scratch += omp_get_thread_num() * (2 * values + rows + padded(scratch_of(size)));
    return (Scratch){scratch, scratch + values, scratch + 2 * values, scratch + 2 * values + rows};
}

INLINE Shape shape_of(int64_t channels, int64_t height, int64_t width, int64_t channels_last) {
    return (Shape){channels, height, width, channels_last ? 1 : channels, channels_last ? channels : 1};
}

/* Decode and augment `batch` small images.
 *
 * sheets: [sheets, channels, height, width], contiguous in NCHW or channels_last; output: [batch, ...] likewise.
 * chosen: [batch], numbers of small images; NULL for all in order.
 * operations: [batch]; uniforms: [batch, 3] in [0, 1).
 * scratch: see `scratch_of_thread`; pad, cut, max_scale, max_angle: see `Limits`.
 * offset: add the brightness, the part that does not depend on the image. */
void partition_forward(const float *sheets, const int64_t *chosen, const int64_t *operations, const float *uniforms,
                       float *output, float *scratch, int64_t batch, int64_t channels, int64_t height, int64_t width,
                       int64_t channels_last, int64_t ratio, int64_t pad_y, int64_t pad_x, int64_t cut_y,
                       int64_t cut_x, double max_scale, double max_angle, int64_t offset, int64_t threads) {
    Shape size = shape_of(channels, height, width, channels_last);
    Limits limits = {pad_y, pad_x, cut_y, cut_x, max_scale, max_angle};
    int64_t values = channels * pixels_of(size);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < batch; i++) {
        Scratch own = scratch_of_thread(scratch, size, ratio);
        const float *image = sheets + place_of(size, ratio, chosen ? chosen[i] : i);
        int64_t augmented = operations[i] >= COLOR && operations[i] <= ROTATE;
        if (ratio > 1) {
            float *decoded = augmented ? own.image : output + i * values;
            decode(image, size, ratio, own.rows, decoded);
            image = decoded;
        }
        if (augmented || ratio == 1)
            augment_image(image, size, operations[i], uniforms + 3 * i, limits, 0, offset, own.augmentation,
                          output + i * values);
    }
}

/* Apply the transpose: from a gradient [batch, ...] of the images to one of the sheets.
 *
 * order: [batch], the rows of `gradient` ordered by their small image; starts: [parts + 1], where each small image's
 * rows start in `order`; both NULL if each small image is the row of its number.
 * parts: number of small images of all sheets. The other arguments are as above. */
void partition_transposed(const float *gradient, const int64_t *order, const int64_t *starts,
                          const int64_t *operations, const float *uniforms, float *output, float *scratch,
                          int64_t parts, int64_t channels, int64_t height, int64_t width, int64_t channels_last,
                          int64_t ratio, int64_t pad_y, int64_t pad_x, int64_t cut_y, int64_t cut_x, double max_scale,
                          double max_angle, int64_t threads) {
    Shape size = shape_of(channels, height, width, channels_last);
    Limits limits = {pad_y, pad_x, cut_y, cut_x, max_scale, max_angle};
    int64_t values = channels * pixels_of(size);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t part = 0; part < parts; part++) {
        Scratch own = scratch_of_thread(scratch, size, ratio);
        int64_t first = order ? starts[part] : part, last = order ? starts[part + 1] : part + 1;
        if (first == last) memset(own.image, 0, 4 * values);
        for (int64_t at = first; at < last; at++) {
            int64_t row = order ? order[at] : at;
            augment_image(gradient + row * values, size, operations[row], uniforms + 3 * row, limits, 1, 0,
                          own.augmentation, at == first ? own.image : own.other);
            if (at > first) add_scaled(own.other, values, 1, own.image);
        }
        decode_transposed(own.image, size, ratio, own.rows, output + place_of(size, ratio, part));
    }
}
