/* Siamese augmentation of one image, or the transpose of its linear part.
 *
 * Crop, cutout and flip copy pixels. Scale and rotate gather each output pixel from four pixels; the transpose scatters
 * it to the same four with the same weights. One thread computes an image, so the order of its sums is fixed. */
#pragma once

#include "vectors.h"

/* Indices into atom_fast.names.OPERATIONS; any other leaves an image unchanged. */
enum { COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE };

#define CORNERS 4
#define QUAD 4

typedef float Quad __attribute__((vector_size(4 * QUAD)));
typedef float UnalignedQuad __attribute__((vector_size(4 * QUAD), aligned(4), may_alias));

/* A contiguous image: `planes` times height times width pixels of `step` channels each. */
typedef struct {
    int64_t channels, height, width, planes, step;
} Shape;

/* The source pixels of one output row and their weights, corner by corner. */
typedef struct {
    int32_t *place;
    float *weight;
} Taps;

INLINE int64_t pixels_of(Shape size) { return size.height * size.width; }

INLINE int64_t at_least(int64_t a, int64_t b) { return a > b ? a : b; }

/* Map a uniform number to one of `choices` consecutive integers from `first`, in float32 like the other backends. */
static int64_t drawn(float uniform, int64_t choices, int64_t first) {
    return (int64_t)fminf(fmaxf(floorf(uniform * choices), 0), choices) + first;
}

static void shift(const float *image, Shape size, int64_t down, int64_t across, float *output) {
    int64_t first = at_least(-across, 0), last = at_most(size.width - across, size.width);
    for (int64_t row = 0; row < size.planes * size.height; row++) {
        int64_t source = row % size.height + down;
        float *to = output + row * size.width * size.step;
        if (source < 0 || source >= size.height || first >= last) {
            memset(to, 0, 4 * size.width * size.step);
            continue;
        }
        const float *from = image + ((row + down) * size.width + first + across) * size.step;
        memset(to, 0, 4 * first * size.step);
        memcpy(to + first * size.step, from, 4 * (last - first) * size.step);
        memset(to + last * size.step, 0, 4 * (size.width - last) * size.step);
    }
}

static void clear(Shape size, int64_t top, int64_t left, int64_t high, int64_t wide, float *output) {
    int64_t first = at_least(left, 0), last = at_most(left + wide, size.width);
    if (first >= last) return;
    for (int64_t plane = 0; plane < size.planes; plane++)
        for (int64_t y = at_least(top, 0); y < at_most(top + high, size.height); y++) {
            float *row = output + (plane * size.height + y) * size.width * size.step;
            memset(row + first * size.step, 0, 4 * (last - first) * size.step);
        }
}

INLINE void mirror_rows(const float *image, int64_t rows, int64_t width, int64_t step, float *output) {
    for (int64_t row = 0; row < rows; row++, image += width * step, output += width * step)
        for (int64_t x = 0; x < width; x++)
            for (int64_t channel = 0; channel < step; channel++)
                output[x * step + channel] = image[(width - 1 - x) * step + channel];
}

static void mirror(const float *image, Shape size, float *output) {
    int64_t rows = size.planes * size.height;
    if (size.step == 1) return mirror_rows(image, rows, size.width, 1, output);
    if (size.step == 3) return mirror_rows(image, rows, size.width, 3, output);
    mirror_rows(image, rows, size.width, size.step, output);
}

static float mean_of(const float *values, int64_t count) {
    vector total = {0};
    for (int64_t at = 0; at < count; at += LANES) total += load(values + at, count - at);
    return sum_of(total) / count;
}

/* Write own * value + share * (sum over the pixel's channels) + constant. */
INLINE void add_sums(const float *image, int64_t pixels, int64_t channels, int64_t channel_step, int64_t pixel_step,
                     float own, float share, float constant, float *output) {
    for (int64_t pixel = 0; pixel < pixels; pixel++) {
        const float *from = image + pixel * pixel_step;
        float *to = output + pixel * pixel_step;
        float sum = 0;
        for (int64_t channel = 0; channel < channels; channel++) sum += from[channel * channel_step];
        float level = share * sum + constant;
        for (int64_t channel = 0; channel < channels; channel++)
            to[channel * channel_step] = own * from[channel * channel_step] + level;
    }
}

/* Apply brightness, saturation and contrast in that order, multiplied out; both means are of the input. */
static void color(const float *image, Shape size, const float *uniforms, int64_t offset, float *output) {
    float saturation = uniforms[1] * 2, contrast = uniforms[2] + 0.5f;
    float own = contrast * saturation, share = contrast * (1 - saturation) / size.channels;
    float constant = (1 - contrast) * mean_of(image, size.channels * pixels_of(size));
    if (offset) constant += uniforms[0] - 0.5f;
    int64_t pixels = pixels_of(size), channels = size.channels;
    if (channels == 1)
        add_sums(image, pixels, 1, 1, 1, own, share, constant, output);
    else if (channels == 3 && size.step == 3)
        add_sums(image, pixels, 3, 1, 3, own, share, constant, output);
    else if (channels == 3)
        add_sums(image, pixels, 3, pixels, 1, own, share, constant, output);
    else if (size.step > 1)
        add_sums(image, pixels, channels, 1, channels, own, share, constant, output);
    else
        add_sums(image, pixels, channels, pixels, 1, own, share, constant, output);
}

/* Compute the matrix from a pixel's offset from the centre to the displacement, down and across, of its source.
 *
 * Rotation applies to coordinates from -1 to 1 along both sides of the image. */
static void find_matrix(int64_t operation, const float *uniforms, Shape size, double max_scale, double max_angle,
                        float matrix[4]) {
    if (operation == SCALE) {
        double least = 1 / max_scale, range = max_scale - least;
        matrix[0] = least - 1 + uniforms[0] * range;
        matrix[1] = matrix[2] = 0;
        matrix[3] = least - 1 + uniforms[1] * range;
        return;
    }
    double angle = (uniforms[0] - 0.5) * 2 * max_angle, half = sin(angle / 2);
    matrix[0] = matrix[3] = -2 * half * half;
    matrix[1] = sin(angle) * size.height / size.width;
    matrix[2] = -sin(angle) * size.width / size.height;
}

INLINE int32_t inside(int32_t place, int64_t length) { return place >= 0 && place < length; }

/* A source with weight zero is redirected past the image, to a zero: it may be NaN or infinite. */
INLINE void set_tap(Taps taps, int64_t at, float weight, int32_t place, int32_t behind) {
    taps.weight[at] = weight;
    taps.place[at] = weight > 0 ? place : behind;
}

static void find_taps(const float matrix[4], Shape size, int32_t y, Taps taps) {
    int32_t height = size.height, width = size.width, behind = pixels_of(size);
    float middle_y = (height - 1) / 2.f, middle_x = (width - 1) / 2.f;
#pragma omp simd
    for (int32_t x = 0; x < width; x++) {
        /* A displacement is a few pixels where a position may be a hundred: its fraction has more correct digits. */
        float down = matrix[0] * (y - middle_y) + matrix[1] * (x - middle_x);
        float across = matrix[2] * (y - middle_y) + matrix[3] * (x - middle_x);
        int32_t top = y + (int32_t)floorf(down), left = x + (int32_t)floorf(across);
        float part_y = down - floorf(down), part_x = across - floorf(across);
        float upper = inside(top, height) ? 1 - part_y : 0, lower = inside(top + 1, height) ? part_y : 0;
        float near = inside(left, width) ? 1 - part_x : 0, far = inside(left + 1, width) ? part_x : 0;
        int32_t place = top * width + left;
        set_tap(taps, x, upper * near, place, behind);
        set_tap(taps, x + width, upper * far, place + 1, behind);
        set_tap(taps, x + 2 * width, lower * near, place + width, behind);
        set_tap(taps, x + 3 * width, lower * far, place + width + 1, behind);
    }
}

/* Load four channels of a pixel from `first`; lanes without a channel are undefined. */
INLINE Quad take(const float *image, Shape size, int64_t pixel, int64_t first) {
    int64_t pixels = pixels_of(size), at = pixel * size.channels + first;
    if (size.planes == 1 && at + QUAD <= pixels * size.channels) return *(const UnalignedQuad *)(image + at);
    Quad value = {0};
    for (int64_t lane = 0; lane < at_most(QUAD, size.channels - first); lane++)
        value[lane] = size.planes == 1 ? image[at + lane] : image[(first + lane) * pixels + pixel];
    return value;
}

/* Store four channels of a pixel. Pixels are stored in order, so the next store overwrites what lanes past the last
 * channel wrote, except if the next pixels already hold channels before `first`. */
INLINE void put(float *output, Shape size, int64_t pixel, int64_t first, Quad value) {
    int64_t pixels = pixels_of(size), at = pixel * size.channels + first;
    int64_t whole = first == 0 || first + QUAD <= size.channels;
    if (size.planes == 1 && whole && at + QUAD <= pixels * size.channels) {
        *(UnalignedQuad *)(output + at) = value;
        return;
    }
    for (int64_t lane = 0; lane < at_most(QUAD, size.channels - first); lane++)
        output[size.planes == 1 ? at + lane : (first + lane) * pixels + pixel] = value[lane];
}

INLINE void gather(const float *image, Shape size, const float matrix[4], Quad *values, Taps taps, float *output) {
    int64_t pixels = pixels_of(size), width = size.width;
    for (int64_t first = 0; first < size.channels; first += QUAD) {
        for (int64_t pixel = 0; pixel < pixels; pixel++) values[pixel] = take(image, size, pixel, first);
        values[pixels] = (Quad){0};
        for (int64_t y = 0; y < size.height; y++) {
            find_taps(matrix, size, y, taps);
            for (int64_t x = 0; x < width; x++) {
                Quad value = {0};
                for (int corner = 0; corner < CORNERS; corner++)
                    value += taps.weight[corner * width + x] * values[taps.place[corner * width + x]];
                put(output, size, y * width + x, first, value);
            }
        }
    }
}

INLINE void scatter(const float *image, Shape size, const float matrix[4], Quad *values, Taps taps, float *output) {
    int64_t pixels = pixels_of(size), width = size.width;
    for (int64_t first = 0; first < size.channels; first += QUAD) {
        memset(values, 0, (pixels + 1) * sizeof(Quad));
        for (int64_t y = 0; y < size.height; y++) {
            find_taps(matrix, size, y, taps);
            for (int64_t x = 0; x < width; x++) {
                Quad value = take(image, size, y * width + x, first);
                for (int corner = 0; corner < CORNERS; corner++)
                    values[taps.place[corner * width + x]] += taps.weight[corner * width + x] * value;
            }
        }
        for (int64_t pixel = 0; pixel < pixels; pixel++) put(output, size, pixel, first, values[pixel]);
    }
}

INLINE void move(const float *image, Shape size, const float matrix[4], int64_t transposed, float *scratch,
                 float *output) {
    Quad *values = (Quad *)scratch;
    float *weight = (float *)(values + pixels_of(size) + 1);
    Taps taps = {(int32_t *)(weight + CORNERS * size.width), weight};
    if (transposed)
        scatter(image, size, matrix, values, taps, output);
    else
        gather(image, size, matrix, values, taps, output);
}

static void interpolate(const float *image, Shape size, const float matrix[4], int64_t transposed, float *scratch,
                        float *output) {
    /* Numbers of channels that are constants for the compiler. */
    Shape one = {1, size.height, size.width, 1, 1};
    Shape three = {3, size.height, size.width, 1, 3}, three_planes = {3, size.height, size.width, 3, 1};
    if (size.channels == 1)
        move(image, one, matrix, transposed, scratch, output);
    else if (size.channels == 3 && size.planes == 1)
        move(image, three, matrix, transposed, scratch, output);
    else if (size.channels == 3)
        move(image, three_planes, matrix, transposed, scratch, output);
    else
        move(image, size, matrix, transposed, scratch, output);
}

/* Apply the operations that copy, move or clear whole pixels. */
static void copy(const float *image, Shape size, int64_t operation, const float *uniforms, int64_t pad_y, int64_t pad_x,
                 int64_t cut_y, int64_t cut_x, int64_t transposed, float *output) {
    if (operation == CROP) {
        int64_t down = drawn(uniforms[0], 2 * pad_y + 1, -pad_y), across = drawn(uniforms[1], 2 * pad_x + 1, -pad_x);
        return shift(image, size, transposed ? -down : down, transposed ? -across : across, output);
    }
    if (operation == FLIP && uniforms[0] < 0.5f) return mirror(image, size, output);
    memcpy(output, image, 4 * size.channels * pixels_of(size));
    if (operation != CUTOUT) return;
    int64_t top = drawn(uniforms[0], size.height + 1 - cut_y % 2, -(cut_y / 2));
    int64_t left = drawn(uniforms[1], size.width + 1 - cut_x % 2, -(cut_x / 2));
    clear(size, top, left, cut_y, cut_x, output);
}

/* pad: largest shift of a crop, pixels; cut: sides of a cutout, pixels.
 * max_scale: largest ratio; the smallest is its inverse; max_angle: radians. */
typedef struct {
    int64_t pad_y, pad_x, cut_y, cut_x;
    float max_scale, max_angle;
} Limits;

/* Return the number of floats that `augment_image` uses as scratch, a multiple of four. */
INLINE int64_t scratch_of(Shape size) { return QUAD * (pixels_of(size) + 1) + 2 * CORNERS * size.width; }

/* Write one image's augmentation; see `augment` for the arguments. */
static void augment_image(const float *image, Shape size, int64_t operation, const float *uniforms, Limits limits,
                          int64_t transposed, int64_t offset, float *scratch, float *output) {
    if (operation == COLOR) {
        color(image, size, uniforms, offset, output);
    } else if (operation == SCALE || operation == ROTATE) {
        float matrix[4];
        find_matrix(operation, uniforms, size, limits.max_scale, limits.max_angle, matrix);
        interpolate(image, size, matrix, transposed, scratch, output);
    } else {
        copy(image, size, operation, uniforms, limits.pad_y, limits.pad_x, limits.cut_y, limits.cut_x, transposed,
             output);
    }
}
