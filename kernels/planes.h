/* InstanceNorm of one sample, and what follows it, with the channels of a place adjacent in memory: each pass walks the
 * sample in the second-level cache, so that passes cost little beside the convolutions around them. */
#pragma once

#include "vectors.h"

/* A sample: places are `pitch` floats apart, rows of places `row`. */
typedef struct {
    int64_t channels, height, width, pitch, row;
} Shape;

/* One of samples [B, C, H, W] in channels_last. */
INLINE Shape channels_last(int64_t channels, int64_t height, int64_t width) {
    return (Shape){channels, height, width, channels, channels * width};
}

/* Values of a sample's output, 2x2 places of which are pooled into one where `pool`. */
INLINE int64_t output_values(Shape s, int64_t pool) {
    return s.channels * (pool ? (s.height / 2) * (s.width / 2) : s.height * s.width);
}

/* Mean, or with `mean` given the mean square around it, of `n` channels over all places. */
INLINE vector mean_over_places(const float *x, Shape s, int64_t n, const vector *mean) {
    vector sums[4] = {{0}, {0}, {0}, {0}}; /* independent, so that one addition need not wait for the last */
    vector centre = mean ? *mean : load(x, n); /* a mean is summed from the first place's value: less is rounded */
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

/* Mean and variance of every channel of a sample. */
INLINE void plane_statistics(const float *x, Shape s, float *mean, float *variance) {
    for (int64_t c = 0; c < s.channels; c += LANES) {
        int64_t n = at_most(s.channels - c, LANES);
        vector own = mean_over_places(x + c, s, n, NULL);
        store(mean + c, own, n);
        store(variance + c, mean_over_places(x + c, s, n, &own), n);
    }
}

/* Mean and 1 / sqrt(variance + eps) of every channel of a sample. */
INLINE void normalizing_statistics(const float *x, Shape s, float eps, float *mean, float *rstd) {
    plane_statistics(x, s, mean, rstd);
    for (int64_t c = 0; c < s.channels; c++) rstd[c] = 1 / sqrtf(rstd[c] + eps);
}

/* Of one sample: mean and 1 / standard deviation of its channels, and the norm's scale and shift, NULL for none. */
typedef struct {
    const float *mean, *rstd, *weight, *bias;
} Norm;

/* The same of some channels; `scale` takes what is centred to the norm's output but for `shift`. */
typedef struct {
    vector mean, rstd, scale, shift;
} Affine;

/* Of sample `i`, of statistics [B, C]. */
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
    return relu ? rectified(value) : value;
}
