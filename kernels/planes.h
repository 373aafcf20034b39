/* InstanceNorm of one sample, and the operations after it, with the channels of a position adjacent in memory. A sample
 * stays in the second-level cache, so that a pass over it costs little compared with a convolution. */
#pragma once

#include "registers.h"

#define LANES (REGISTER / 4)

/* Sums are taken as written: GCC would reorder those that it keeps in registers, and so take back the centring of
 * `mean_over_places`. With sixteen lanes it was never seen to. */
#if defined __GNUC__ && !defined __clang__ && LANES < 16
#pragma GCC optimize("no-associative-math")
#endif
#include "vectors.h"

/* A sample: neighbouring positions are `pitch` floats apart, rows of positions `row` floats. */
typedef struct {
    int64_t channels, height, width, pitch, row;
} Shape;

/* Return the shape of one of samples [B, C, H, W] in channels_last. */
INLINE Shape channels_last(int64_t channels, int64_t height, int64_t width) {
    return (Shape){channels, height, width, channels, channels * width};
}

/* Return the number of values of a sample's output, pooled 2x2 if `pool`. */
INLINE int64_t output_values(Shape s, int64_t pool) {
    return s.channels * (pool ? (s.height / 2) * (s.width / 2) : s.height * s.width);
}

/* Return the mean of `n` channels over all positions; if `mean` is given, the mean square deviation from it. */
INLINE vector mean_over_places(const float *x, Shape s, int64_t n, const vector *mean) {
    vector sums[4] = {{0}, {0}, {0}, {0}}; /* independent, so that additions overlap */
    vector centre = mean ? *mean : load(x, n); /* differences from the first value: smaller rounding errors */
    for (int64_t y = 0; y < s.height; y++) {
        const float *row = x + y * s.row;
        int64_t column = 0;
        for (; column + 4 <= s.width; column += 4)
            for (int i = 0; i < 4; i++) {
                vector value = load(row + (column + i) * s.pitch, n) - centre;
                sums[i] += mean ? value * value : value;
            }
        for (; column < s.width; column++) {
            vector value = load(row + column * s.pitch, n) - centre;
            sums[0] += mean ? value * value : value;
        }
    }
    vector result = ((sums[0] + sums[1]) + (sums[2] + sums[3])) / splat(s.height * s.width);
    return mean ? result : result + centre;
}

/* Compute mean and variance of every channel of a sample. */
INLINE void plane_statistics(const float *x, Shape s, float *mean, float *variance) {
    for (int64_t c = 0; c < s.channels; c += LANES) {
        int64_t n = at_most(s.channels - c, LANES);
        vector own = mean_over_places(x + c, s, n, NULL);
        store(mean + c, own, n);
        store(variance + c, mean_over_places(x + c, s, n, &own), n);
    }
}

/* Compute mean and 1 / sqrt(variance + eps) of every channel of a sample. */
INLINE void normalizing_statistics(const float *x, Shape s, float eps, float *mean, float *rstd) {
    plane_statistics(x, s, mean, rstd);
    for (int64_t c = 0; c < s.channels; c++) rstd[c] = 1 / sqrtf(rstd[c] + eps);
}

/* Mean and 1 / standard deviation of a sample's channels; scale and shift of the norm, NULL for none. */
typedef struct {
    const float *mean, *rstd, *weight, *bias;
} Norm;

/* The same for a vector of channels: the norm's output is (x - mean) * scale + shift. */
typedef struct {
    vector mean, rstd, scale, shift;
} Affine;

/* Return the norm of sample `i` from statistics [B, C]. */
INLINE Norm norm_of_sample(const float *mean, const float *rstd, const float *weight, const float *bias, int64_t i,
                           int64_t channels) {
    return (Norm){mean + i * channels, rstd + i * channels, weight, bias};
}

INLINE Affine affine(const Norm *norm, int64_t c, int64_t n) {
    Affine a = {load(norm->mean + c, n), load(norm->rstd + c, n)};
    a.scale = norm->weight ? a.rstd * load(norm->weight + c, n) : a.rstd;
    a.shift = norm->bias ? load(norm->bias + c, n) : splat(0);
    return a;
}

INLINE vector normalized(Affine a, vector x, int relu) {
    vector value = (x - a.mean) * a.scale + a.shift;
    return relu ? vector_relu(value) : value;
}
