/* `atom_fast.ops.conv_block`: a 3x3 convolution, then the norm block, one thread per sample. A sample's convolution
 * stays in the thread's cache. Filters are [3, 3, C_in, padded(C)], zero beyond C. */
#include "norm_block.h"

#define RUN 8 /* positions convolved at once: the sums fit the registers and hide the latency of additions */

/* Copy an image [C_in, H, W] of any strides to [H + 2, W + 2, C_in], framed by zeros. */
INLINE void pad_image(const float *image, const int64_t *strides, int64_t image_channels, Shape s,
                      float *padded_image) {
    int64_t row = (s.width + 2) * image_channels;
    memset(padded_image, 0, 4 * (s.height + 2) * row);
    for (int64_t y = 0; y < s.height; y++)
        for (int64_t x = 0; x < s.width; x++)
            for (int64_t ci = 0; ci < image_channels; ci++)
                padded_image[(y + 1) * row + (x + 1) * image_channels + ci] =
                    image[ci * strides[1] + y * strides[2] + x * strides[3]];
}

/* Convolve `count` neighbouring positions for LANES channels; `image` is the first position's window. */
INLINE void convolve_run(const float *image, int64_t image_row, int64_t image_channels, const float *filters,
                         int64_t pitch, float *out, int count) {
    vector sums[RUN];
    for (int i = 0; i < count; i++) sums[i] = splat(0);
    for (int64_t ky = 0; ky < 3; ky++)
        for (int64_t k = 0; k < 3 * image_channels; k++) {
            vector filter = load(filters + (ky * 3 * image_channels + k) * pitch, LANES);
            for (int i = 0; i < count; i++)
                sums[i] = multiply_add(filter, splat(image[ky * image_row + i * image_channels + k]), sums[i]);
        }
    for (int i = 0; i < count; i++) store(out + i * pitch, sums[i], LANES);
}

INLINE void convolve(const float *padded_image, int64_t image_channels, const float *filters, Shape s, float *out) {
    int64_t row = (s.width + 2) * image_channels;
    for (int64_t y = 0; y < s.height; y++)
        for (int64_t c = 0; c < s.pitch; c += LANES) {
            int64_t x = 0;
            for (; x + RUN <= s.width; x += RUN)
                convolve_run(padded_image + y * row + x * image_channels, row, image_channels, filters + c, s.pitch,
                             out + y * s.row + x * s.pitch + c, RUN);
            for (; x < s.width; x++)
                convolve_run(padded_image + y * row + x * image_channels, row, image_channels, filters + c, s.pitch,
                             out + y * s.row + x * s.pitch + c, 1);
        }
}

/* Compute the transposed convolution at `count` neighbouring pixels; `gradient` is the first pixel's window. */
INLINE void fold_run(const float *gradient, int64_t row, int64_t pitch, const float *filters, int64_t image_channels,
                     float *out, int64_t channel_stride, int count) {
    vector sums[4][4][PARTS];
    for (int part = 0; part < PARTS; part++) {
        vector own_sums[4][4];
        for (int i = 0; i < count; i++)
            for (int64_t ci = 0; ci < image_channels; ci++) own_sums[i][ci] = splat(0);
        for (int64_t ky = 0; ky < 3; ky++)
            for (int64_t kx = 0; kx < 3; kx++)
                for (int64_t c = part * LANES; c < pitch; c += GROUP) {
                    vector own[4];
                    for (int64_t ci = 0; ci < image_channels; ci++)
                        own[ci] = load(filters + ((ky * 3 + kx) * image_channels + ci) * pitch + c, LANES);
                    for (int i = 0; i < count; i++) {
                        vector g = load(gradient + (2 - ky) * row + (i + 2 - kx) * pitch + c, LANES);
                        for (int64_t ci = 0; ci < image_channels; ci++)
                            own_sums[i][ci] = multiply_add(g, own[ci], own_sums[i][ci]);
                    }
                }
        for (int i = 0; i < count; i++)
            for (int64_t ci = 0; ci < image_channels; ci++) sums[i][ci][part] = own_sums[i][ci];
    }
    for (int i = 0; i < count; i++)
        for (int64_t ci = 0; ci < image_channels; ci++) out[ci * channel_stride + i] = sum_of_group(sums[i][ci]);
}

INLINE void fold(const float *gradient, Shape s, const float *filters, int64_t image_channels, float *out) {
    for (int64_t y = 0; y < s.height; y++) {
        int64_t x = 0;
        for (; x + 4 <= s.width; x += 4)
            fold_run(gradient + y * s.row + x * s.pitch, s.row, s.pitch, filters, image_channels,
                     out + y * s.width + x, s.height * s.width, 4);
        for (; x < s.width; x++)
            fold_run(gradient + y * s.row + x * s.pitch, s.row, s.pitch, filters, image_channels,
                     out + y * s.width + x, s.height * s.width, 1);
    }
}

/* Call with the number of image channels, 1 to 4, as a constant IC. */
#define FOR_IMAGE_CHANNELS(call)          \
    switch (image_channels) {             \
        case 1: { enum { IC = 1 }; call; break; } \
        case 2: { enum { IC = 2 }; call; break; } \
        case 3: { enum { IC = 3 }; call; break; } \
        default: { enum { IC = 4 }; call; }  \
    }

static void convolve_image(const float *image, const int64_t *strides, int64_t image_channels, const float *filters,
                           Shape s, float *padded_image, float *out) {
    FOR_IMAGE_CHANNELS(pad_image(image, strides, IC, s, padded_image); convolve(padded_image, IC, filters, s, out))
}

static void fold_image(const float *gradient, Shape s, const float *filters, int64_t image_channels, float *out) {
    FOR_IMAGE_CHANNELS(fold(gradient, s, filters, IC, out))
}

/* Whole vectors, so that the memory after an image is aligned. */
static int64_t image_values(int64_t image_channels, int64_t height, int64_t width) {
    return padded((height + 2) * (width + 2) * image_channels);
}

/* Below, `strides` belong to the images [B, C_in, H, W], and `scratch` is [threads, padded((H + 2) (W + 2) C_in) +
 * H W padded(C)], with additions as noted. */

/* Compute mean and variance [B, C] of each plane of the convolution. */
void conv_block_statistics(const float *images, const int64_t *strides, const float *filters, float *mean,
                            float *variance, float *scratch, int64_t samples, int64_t image_channels, int64_t height,
                            int64_t width, int64_t channels, int64_t threads) {
    Shape s = {channels, height, width, padded(channels), padded(channels) * width};
    int64_t own_image = image_values(image_channels, height, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        float *padded_image = scratch + omp_get_thread_num() * (own_image + height * s.row);
        float *convolved = padded_image + own_image;
        convolve_image(images + i * strides[0], strides, image_channels, filters, s, padded_image, convolved);
        plane_statistics(convolved, s, mean + i * channels, variance + i * channels);
    }
}

/* `given`: read mean and rstd instead of writing them. */
void conv_block_forward(const float *images, const int64_t *strides, const float *filters, const float *weight,
                         const float *bias, float *pooled, float *maps, float *mean, float *rstd, float *statistics,
                         float *scratch, int64_t samples, int64_t image_channels, int64_t height, int64_t width,
                         int64_t channels, double eps, double spatial_power, double channel_power, int64_t given,
                         int64_t threads) {
    Shape s = {channels, height, width, padded(channels), padded(channels) * width};
    int64_t values = map_values(s, spatial_power, channel_power);
    int64_t own_image = image_values(image_channels, height, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        float *padded_image = scratch + omp_get_thread_num() * (own_image + height * s.row);
        float *convolved = padded_image + own_image;
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        convolve_image(images + i * strides[0], strides, image_channels, filters, s, padded_image, convolved);
        if (!given) normalizing_statistics(convolved, s, eps, mean + i * channels, rstd + i * channels);
        block_of_sample(convolved, s, &norm, pooled + i * output_values(s, 1),
                        maps_at(maps + i * values, s, spatial_power, channel_power), statistics + 3 * i);
    }
}

/* Compute the gradient [B, C_in, H, W] of the images; with WRITE_SUMS only the sums. A gradient that is NULL counts as
 * zero. `sums` is [B, 2, C], with READ_SUMS [2, C]. Each thread has (H + 2) (W + 2) padded(C) + padded(M + 2 C) more
 * values of `scratch`. */
void conv_block_backward(const float *grad_pooled, const float *grad_maps, const float *images, const int64_t *strides,
                          const float *filters, const float *weight, const float *bias, const float *maps,
                          const float *mean, const float *rstd, const float *statistics, float *sums,
                          float *grad_images, float *scratch, int64_t samples, int64_t image_channels, int64_t height,
                          int64_t width, int64_t channels, double spatial_power, double channel_power, int64_t mode,
                          int64_t threads) {
    Shape s = {channels, height, width, padded(channels), padded(channels) * width};
    Shape framed = {channels, height, width, s.pitch, s.pitch * (width + 2)};
    int64_t values = map_values(s, spatial_power, channel_power);
    int64_t own_image = image_values(image_channels, height, width), frame = (height + 2) * framed.row;
    int64_t of_thread = own_image + frame + height * s.row + padded(values + 2 * channels);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        float *padded_image = scratch + omp_get_thread_num() * of_thread, *framed_gradient = padded_image + own_image;
        float *gradient = framed_gradient + framed.row + framed.pitch, *convolved = framed_gradient + frame;
        float *own_sums = mode == WRITE_SUMS ? sums + i * 2 * channels : convolved + height * s.row;
        float *used_sums = mode == READ_SUMS ? sums : own_sums;
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        Maps factors = factors_of_sample(grad_maps, maps, statistics, i, s, spatial_power, channel_power,
                                         convolved + height * s.row + 2 * channels);
        convolve_image(images + i * strides[0], strides, image_channels, filters, s, padded_image, convolved);
        memset(framed_gradient, 0, 4 * frame); /* around the plane and past its channels */
        gradient_of_sample(convolved, s, &norm, 1, statistics[3 * i],
                           grad_pooled ? grad_pooled + i * output_values(s, 1) : NULL, NULL, factors,
                           gradient, framed, own_sums, own_sums + channels);
        if (mode == WRITE_SUMS) continue;
        through_norm(convolved, s, &norm, gradient, framed, used_sums, used_sums + channels);
        fold_image(framed_gradient, framed, filters, image_channels, grad_images + i * image_channels * height * width);
    }
}
