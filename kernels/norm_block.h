/* The block after a convolution, of one sample: InstanceNorm, ReLU, both attention maps, 2x2 average pooling. */
#pragma once

#include <math.h>
#include <stdint.h>

/* Of single values, before `planes.h` forbids to reorder sums. */
#define SCALAR static __attribute__((noinline, unused))

SCALAR double norm_of(const float *values, int64_t count) {
    double sum = 0;
    for (int64_t i = 0; i < count; i++) sum += (double)values[i] * values[i];
    return sqrt(sum);
}

/* Compute the factors of (f / peak)^(p - 1) in the gradient of each feature: `factor` times the map's gradient without
 * its component along the map, which the normalisation removes. */
SCALAR void project(const float *gradient, const float *map, int64_t count, float factor, float *out) {
    double along = 0;
    for (int64_t i = 0; i < count; i++) along += (double)gradient[i] * map[i];
    for (int64_t i = 0; i < count; i++) out[i] = factor * (gradient[i] - (float)along * map[i]);
}

#include "planes.h"

/* If a map's norm is between these, no power or sum of it left the range of float32. */
#define LEAST_NORM 1e-15
#define MOST_NORM 1e15

/* The maps of a sample: powers (0 for a map that is left out), a value per position, a value per channel. */
typedef struct {
    float spatial_power, channel_power;
    float *spatial, *channel;
} Maps;

INLINE Maps maps_at(float *memory, Shape s, float spatial_power, float channel_power) {
    return (Maps){spatial_power, channel_power, memory, memory + (spatial_power ? s.height * s.width : 0)};
}

INLINE int64_t map_values(Shape s, float spatial_power, float channel_power) {
    return (spatial_power ? s.height * s.width : 0) + (channel_power ? s.channels : 0);
}

INLINE float *pooled_at(float *pooled, Shape s, int64_t y, int64_t column) {
    return pooled ? pooled + ((y / 2) * (s.width / 2) + column / 2) * s.channels : NULL;
}

/* `features_pass` for `down` x `across` positions, the first at `x` and at `index` of a map. */
INLINE void features_of_square(const float *x, Shape s, int down, int across, int64_t index, const Norm *norm,
                               int relu, float peak, float *pooled, float *whole, Maps maps) {
    vector spatial[2][2][PARTS];
    for (int part = 0; part < PARTS; part++) {
        vector sums[2][2] = {{{0}, {0}}, {{0}, {0}}};
        for (int64_t c = part * LANES; c < s.channels; c += GROUP) {
            int64_t n = at_most(s.channels - c, LANES);
            Affine a = affine(norm, c, n);
            vector total = {0}, channel = {0};
            for (int i = 0; i < down; i++)
                for (int j = 0; j < across; j++) {
                    vector f = normalized(a, load(x + i * s.row + j * s.pitch + c, n), relu);
                    total += f;
                    if (whole) store(whole + (index + i * s.width + j) * s.channels + c, f, n);
                    if (peak != 1) f /= splat(peak);
                    vector power = {0};
                    if (maps.spatial_power) sums[i][j] += power = raised(f, maps.spatial_power);
                    if (maps.channel_power)
                        channel += maps.channel_power == maps.spatial_power ? power : raised(f, maps.channel_power);
                }
            if (pooled) store(pooled + c, total * splat(0.25f), n);
            if (maps.channel_power) store(maps.channel + c, load(maps.channel + c, n) + channel, n);
        }
        for (int i = 0; i < down; i++)
            for (int j = 0; j < across; j++) spatial[i][j][part] = sums[i][j];
    }
    if (maps.spatial_power)
        for (int i = 0; i < down; i++)
            for (int j = 0; j < across; j++) maps.spatial[index + i * s.width + j] = sum_of_group(spatial[i][j]);
}

INLINE void features_of_squares(const float *x, Shape s, const Norm *norm, int relu, float peak, float *pooled,
                                float *whole, Maps maps) {
    if (maps.channel_power) memset(maps.channel, 0, 4 * s.channels);
    for (int64_t y = 0; y < s.height; y += 2)
        for (int64_t column = 0; column < s.width; column += 2) {
            const float *first = x + y * s.row + column * s.pitch;
            int64_t index = y * s.width + column;
            int down = at_most(s.height - y, 2), across = at_most(s.width - column, 2);
            if (down == 2 && across == 2)
                features_of_square(first, s, 2, 2, index, norm, relu, peak, pooled_at(pooled, s, y, column), whole,
                                   maps);
            else
                features_of_square(first, s, down, across, index, norm, relu, peak, NULL, whole, maps);
        }
}

/* Compute the features, into `pooled` or `whole` (either may be NULL), and the maps' sums of (feature / peak)^power. */
INLINE void features_pass(const float *x, Shape s, const Norm *norm, int relu, float peak, float *pooled,
                          float *whole, Maps maps) {
    /* The paper's powers, as constants. */
    if (maps.spatial_power == 4 && maps.channel_power == 4 && peak == 1) {
        maps.spatial_power = maps.channel_power = 4;
        features_of_squares(x, s, norm, relu, 1, pooled, whole, maps);
    } else
        features_of_squares(x, s, norm, relu, peak, pooled, whole, maps);
}

INLINE float largest_feature(const float *x, Shape s, const Norm *norm) {
    vector largest = {0};
    for (int64_t y = 0; y < s.height; y++)
        for (int64_t column = 0; column < s.width; column++)
            for (int64_t c = 0; c < s.channels; c += LANES) {
                int64_t n = at_most(s.channels - c, LANES);
                vector f = normalized(affine(norm, c, n), load(x + y * s.row + column * s.pitch + c, n), 1);
                largest = choose(f > largest, f, largest);
            }
    float peak = 0;
    for (int lane = 0; lane < LANES; lane++) peak = fmaxf(peak, largest[lane]);
    return peak > 0 ? peak : 1;
}

INLINE int is_safe(double norm) { return norm >= LEAST_NORM && norm <= MOST_NORM; }

INLINE float to_unit_length(float *values, int64_t count, double norm) {
    float factor = norm == 0 ? 1 : 1 / norm;
    for (int64_t i = 0; i < count; i++) values[i] *= factor;
    return factor;
}

/* Compute one sample's pooled features, maps of unit length, and statistics {peak, 1 / norm of each map}. */
INLINE void block_of_sample(const float *x, Shape s, const Norm *norm, float *pooled, Maps maps, float *statistics) {
    int64_t places = maps.spatial_power ? s.height * s.width : 0, channels = maps.channel_power ? s.channels : 0;
    float peak = 1;
    features_pass(x, s, norm, 1, peak, pooled, NULL, maps);
    double spatial = norm_of(maps.spatial, places), channel = norm_of(maps.channel, channels);
    if ((places && !is_safe(spatial)) || (channels && !is_safe(channel))) {
        peak = largest_feature(x, s, norm);
        features_pass(x, s, norm, 1, peak, NULL, NULL, maps);
        spatial = norm_of(maps.spatial, places), channel = norm_of(maps.channel, channels);
    }
    statistics[0] = peak;
    statistics[1] = to_unit_length(maps.spatial, places, spatial);
    statistics[2] = to_unit_length(maps.channel, channels, channel);
}

/* Write the factors of sample `i` to `out`; NULL for `grad_maps` counts as zero. */
INLINE Maps factors_of_sample(const float *grad_maps, const float *maps, const float *statistics, int64_t i, Shape s,
                              float spatial_power, float channel_power, float *out) {
    if (!grad_maps) return maps_at(out, s, 0, 0);
    Maps factors = maps_at(out, s, spatial_power, channel_power);
    int64_t values = map_values(s, spatial_power, channel_power), places = values - (channel_power ? s.channels : 0);
    const float *gradient = grad_maps + i * values, *map = maps + i * values, *own = statistics + 3 * i;
    project(gradient, map, places, spatial_power * own[1] / own[0], factors.spatial);
    project(gradient + places, map + places, values - places, channel_power * own[2] / own[0], factors.channel);
    return factors;
}

/* `gradient_of_sample` for `down` x `across` positions. */
INLINE void gradient_of_square(const float *x, Shape s, int down, int across, int64_t index, const Norm *norm,
                               int relu, float peak, const float *pooled, const float *whole, Maps maps, float *out,
                               Shape of_out, float *sum, float *product) {
    for (int64_t c = 0; c < s.channels; c += LANES) {
        int64_t n = at_most(s.channels - c, LANES);
        Affine a = affine(norm, c, n);
        vector above = pooled ? load(pooled + c, n) * splat(0.25f) : splat(0);
        vector channel = maps.channel_power ? load(maps.channel + c, n) : splat(0);
        vector total = {0}, with_centred = {0};
        for (int i = 0; i < down; i++)
            for (int j = 0; j < across; j++) {
                vector centred = load(x + i * s.row + j * s.pitch + c, n) - a.mean, f = centred * a.scale + a.shift;
                mask off = relu ? f <= splat(0) : (mask)splat(0);
                vector g = whole ? load(whole + (index + i * s.width + j) * s.channels + c, n) : above;
                if (maps.spatial_power || maps.channel_power) {
                    vector power = {0}, relative = choose(off, splat(0), f);
                    if (peak != 1) relative /= splat(peak);
                    if (maps.spatial_power) {
                        power = raised(relative, maps.spatial_power - 1);
                        g += power * splat(maps.spatial[index + i * s.width + j]);
                    }
                    if (maps.channel_power) {
                        if (maps.channel_power != maps.spatial_power) power = raised(relative, maps.channel_power - 1);
                        g += power * channel;
                    }
                }
                g = choose(off, splat(0), g);
                store(out + i * of_out.row + j * of_out.pitch + c, g, n);
                total += g;
                with_centred += g * centred;
            }
        store(sum + c, load(sum + c, n) + total, n);
        store(product + c, load(product + c, n) + with_centred, n);
    }
}

INLINE void gradient_of_squares(const float *x, Shape s, const Norm *norm, int relu, float peak,
                                const float *pooled, const float *whole, Maps maps, float *out, Shape of_out,
                                float *sum, float *product) {
    memset(sum, 0, 4 * s.channels);
    memset(product, 0, 4 * s.channels);
    for (int64_t y = 0; y < s.height; y += 2)
        for (int64_t column = 0; column < s.width; column += 2) {
            const float *first = x + y * s.row + column * s.pitch;
            float *to = out + y * of_out.row + column * of_out.pitch;
            int64_t index = y * s.width + column;
            int down = at_most(s.height - y, 2), across = at_most(s.width - column, 2);
            if (down == 2 && across == 2)
                gradient_of_square(first, s, 2, 2, index, norm, relu, peak,
                                   pooled_at((float *)pooled, s, y, column), whole, maps, to, of_out, sum, product);
            else
                gradient_of_square(first, s, down, across, index, norm, relu, peak, NULL, whole, maps, to, of_out,
                                   sum, product);
        }
}

/* Turn the gradient of the norm's output, in place, into the gradient of its input: subtract its components along a
 * constant and along the input, using the sums of `gradient_of_sample`. */
INLINE void through_norm(const float *x, Shape s, const Norm *norm, float *out, Shape of_out, const float *sum,
                         const float *product) {
    vector places = splat(s.height * s.width);
    for (int64_t c = 0; c < s.channels; c += LANES) {
        int64_t n = at_most(s.channels - c, LANES);
        Affine a = affine(norm, c, n);
        vector constant = load(sum + c, n) / places, slope = load(product + c, n) / places * a.rstd * a.rstd;
        for (int64_t y = 0; y < s.height; y++)
            for (int64_t column = 0; column < s.width; column++) {
                float *g = out + y * of_out.row + column * of_out.pitch + c;
                vector centred = load(x + y * s.row + column * s.pitch + c, n) - a.mean;
                store(g, (load(g, n) - constant - slope * centred) * a.scale, n);
            }
    }
}

/* Write the gradient of a sample's normalised values to `out` of shape `of_out`; to `sum` and `product` [channels] its
 * sums over positions, alone and times the centred input. `pooled` or `whole` is the gradient of the output, NULL for
 * zero; `maps` holds the result of `factors_of_sample`. */
INLINE void gradient_of_sample(const float *x, Shape s, const Norm *norm, int relu, float peak, const float *pooled,
                               const float *whole, Maps maps, float *out, Shape of_out, float *sum, float *product) {
    if (maps.spatial_power == 4 && maps.channel_power == 4 && peak == 1) {
        maps.spatial_power = maps.channel_power = 4;
        gradient_of_squares(x, s, norm, relu, 1, pooled, whole, maps, out, of_out, sum, product);
    } else
        gradient_of_squares(x, s, norm, relu, peak, pooled, whole, maps, out, of_out, sum, product);
}

/* Scope of a gradient's sums: the sample's own positions, or for BatchNorm all samples, in two calls: the first writes
 * each sample's sums, the second reads their mean. */
enum { OWN_SUMS, WRITE_SUMS, READ_SUMS };
