/* `atom_fast.ops.instance_norm` for samples [B, C, H, W] in channels_last, one thread per sample. */
#include "norm_block.h"

/* `out` is [B, C, H, W], or pooled if `pool`. */
void instance_norm_forward(const float *x, const float *weight, const float *bias, float *out, float *mean, float *rstd,
                           int64_t samples, int64_t channels, int64_t height, int64_t width, double eps, int64_t relu,
                           int64_t pool, int64_t threads) {
    Shape s = channels_last(channels, height, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *own = x + i * height * s.row;
        float *to = out + i * output_values(s, pool);
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        normalizing_statistics(own, s, eps, mean + i * channels, rstd + i * channels);
        features_pass(own, s, &norm, relu, 1, pool ? to : NULL, pool ? NULL : to, maps_at(NULL, s, 0, 0));
    }
}

/* `grad_weight` and `grad_bias` are [B, C], one row per sample. */
void instance_norm_backward(const float *gradient, const float *x, const float *weight, const float *bias,
                            const float *mean, const float *rstd, float *grad_x, float *grad_weight, float *grad_bias,
                            int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t relu,
                            int64_t pool, int64_t threads) {
    Shape s = channels_last(channels, height, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *above = gradient + i * output_values(s, pool);
        float *product = grad_weight + i * channels;
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        gradient_of_sample(x + i * height * s.row, s, &norm, relu, 1, pool ? above : NULL, pool ? NULL : above,
                           maps_at(NULL, s, 0, 0), grad_x + i * height * s.row, s, grad_bias + i * channels, product);
        through_norm(x + i * height * s.row, s, &norm, grad_x + i * height * s.row, s, grad_bias + i * channels,
                     product);
        for (int64_t c = 0; c < channels; c++) product[c] *= norm.rstd[c];
    }
}

/* What the second derivative reads at a position: the normalised input, what the gradient is there of the norm's output,
 * and if ReLU lets it pass. */
typedef struct {
    vector z, g;
    mask off;
} Position;

INLINE Position position(const float *x, const float *above, float share, Affine a, int64_t relu, int64_t n) {
    vector centred = load(x, n) - a.mean;
    Position p = {centred * a.rstd};
    p.off = relu ? centred * a.scale + a.shift <= splat(0) : (mask)splat(0);
    p.g = choose(p.off, splat(0), load(above, n) * splat(share));
    return p;
}

/* The derivative of `instance_norm_backward`. `on_x` [B, C, H, W] weighs its `grad_x`, `on_weight` and `on_bias` [C] its
 * sums over samples of `grad_weight` and `grad_bias`. Written are the gradients of that weighted sum in `gradient`, in
 * `x`, and in the weight [B, C], one row per sample.
 *
 * With z the normalised x, g the gradient of the norm's output and P the projection off the constant and off z, that sum
 * is on_x . rstd P(weight g) + on_weight . g z + on_bias . g. */
void instance_norm_second(const float *on_x, const float *on_weight, const float *on_bias, const float *gradient,
                          const float *x, const float *weight, const float *bias, const float *mean, const float *rstd,
                          float *grad_gradient, float *grad_x, float *grad_weight, int64_t samples, int64_t channels,
                          int64_t height, int64_t width, int64_t relu, int64_t pool, int64_t threads) {
    Shape s = channels_last(channels, height, width);
    int side = pool ? 2 : 1;
    float share = pool ? 0.25f : 1;
    vector places = splat(height * width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *own_u = on_x + i * height * s.row, *own_x = x + i * height * s.row;
        const float *above = gradient + i * output_values(s, pool);
        float *to_x = grad_x + i * height * s.row, *to_above = grad_gradient + i * output_values(s, pool);
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t n = at_most(channels - c, LANES);
            Affine a = affine(&norm, c, n);
            vector u_mean = {0}, uz = {0}, g_mean = {0}, gz = {0}, ug = {0};
            for (int64_t y = 0; y < height; y++)
                for (int64_t column = 0; column < width; column++) {
                    int64_t at = y * s.row + column * s.pitch + c;
                    int64_t under = ((y / side) * (width / side) + column / side) * channels + c;
                    Position p = position(own_x + at, above + under, share, a, relu, n);
                    vector u = load(own_u + at, n);
                    u_mean += u, uz += u * p.z, g_mean += p.g, gz += p.g * p.z, ug += u * p.g;
                }
            u_mean /= places, uz /= places, g_mean /= places, gz /= places, ug /= places;
            vector covariance = ug - u_mean * g_mean - uz * gz; /* of u and g, without what z explains */
            vector alpha = load(on_weight + c, n), beta = load(on_bias + c, n);
            vector v_mean = alpha * g_mean - a.scale * (gz * u_mean + uz * g_mean);
            vector vz = alpha * gz - a.scale * splat(2) * uz * gz + a.scale * covariance;
            store(grad_weight + i * channels + c, a.rstd * places * covariance, n);
            for (int64_t y = 0; y < height; y += side)
                for (int64_t column = 0; column < width; column += side) {
                    int64_t under = ((y / side) * (width / side) + column / side) * channels + c;
                    vector total = {0};
                    for (int down = 0; down < side; down++)
                        for (int across = 0; across < side; across++) {
                            int64_t at = (y + down) * s.row + (column + across) * s.pitch + c;
                            Position p = position(own_x + at, above + under, share, a, relu, n);
                            vector u = load(own_u + at, n), v = alpha * p.g - a.scale * (gz * u + uz * p.g);
                            vector t = a.scale * (u - u_mean - p.z * uz) + alpha * p.z + beta;
                            store(to_x + at, a.rstd * (v - v_mean - p.z * vz), n);
                            total += choose(p.off, splat(0), t);
                        }
                    store(to_above + under, total * splat(share), n);
                }
        }
    }
}

/* Directional derivatives of the norm, ReLU and 2x2 average pooling and of their gradient: `t` is the tangent of `x`,
 * `weight_t` and `bias_t` those of scale and shift. Positions beyond the last whole square are pooled away. */

/* What the passes over a vector of a sample's channels have in common. */
typedef struct {
    Affine norm;
    vector weight, weight_t, mean_t, slope; /* slope: mean of the normalised values times `t` */
} Tangent;

INLINE Tangent tangent_of(const Norm *norm, const float *weight_t, const float *mean_t, const float *slope, int64_t c,
                          int64_t n) {
    return (Tangent){affine(norm, c, n), load(norm->weight + c, n), load(weight_t + c, n), load(mean_t + c, n),
                     load(slope + c, n)};
}

/* `mean`, `rstd`, `mean_t` and `slope` are [B, C]; `out` and `out_t` are pooled. */
void instance_norm_tangent_forward(const float *x, const float *t, const float *weight, const float *bias,
                                   const float *weight_t, const float *bias_t, float *out, float *out_t, float *mean,
                                   float *rstd, float *mean_t, float *slope, int64_t samples, int64_t channels,
                                   int64_t height, int64_t width, double eps, int64_t threads) {
    Shape s = channels_last(channels, height, width);
    vector places = splat(height * width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *own = x + i * height * s.row, *own_t = t + i * height * s.row;
        float *to = out + i * output_values(s, 1), *to_t = out_t + i * output_values(s, 1);
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        normalizing_statistics(own, s, eps, mean + i * channels, rstd + i * channels);
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t n = at_most(channels - c, LANES);
            vector middle = mean_over_places(own_t + c, s, n, NULL), sums[2] = {{0}, {0}};
            vector centre = load(mean + i * channels + c, n), inverse = load(rstd + i * channels + c, n);
            for (int64_t y = 0; y < height; y++)
                for (int64_t column = 0; column < width; column++) {
                    int64_t at = y * s.row + column * s.pitch + c;
                    sums[column % 2] += (load(own + at, n) - centre) * (load(own_t + at, n) - middle);
                }
            store(mean_t + i * channels + c, middle, n);
            store(slope + i * channels + c, (sums[0] + sums[1]) / places * inverse, n);
            Tangent d = tangent_of(&norm, weight_t, mean_t + i * channels, slope + i * channels, c, n);
            /* scale' (x - mean) + scale (t - mean_t) + bias_t */
            vector of_x = (d.weight_t - d.norm.scale * d.slope) * inverse, constant = load(bias_t + c, n);
            for (int64_t y = 0; y + 1 < height; y += 2)
                for (int64_t column = 0; column + 1 < width; column += 2) {
                    vector total = {0}, total_t = {0};
                    for (int j = 0; j < 4; j++) {
                        int64_t at = (y + j / 2) * s.row + (column + j % 2) * s.pitch + c;
                        vector centred = load(own + at, n) - centre;
                        vector value = centred * d.norm.scale + d.norm.shift;
                        vector value_t = centred * of_x + (load(own_t + at, n) - middle) * d.norm.scale + constant;
                        total += vector_relu(value);
                        total_t += choose(value > splat(0), value_t, splat(0));
                    }
                    int64_t at = ((y / 2) * (width / 2) + column / 2) * channels + c;
                    store(to + at, total * splat(0.25f), n);
                    store(to_t + at, total_t * splat(0.25f), n);
                }
        }
    }
}

/* `gradient` and `gradient_t` are of the pooled output; `grad_weight_t` and `grad_bias_t` are [B, C]. */
void instance_norm_tangent_backward(const float *gradient, const float *gradient_t, const float *x, const float *t,
                                    const float *weight, const float *bias, const float *weight_t, const float *mean,
                                    const float *rstd, const float *mean_t, const float *slope, float *grad_x,
                                    float *grad_x_t, float *grad_weight_t, float *grad_bias_t, int64_t samples,
                                    int64_t channels, int64_t height, int64_t width, int64_t threads) {
    Shape s = channels_last(channels, height, width);
    vector places = splat(height * width), quarter = splat(0.25f), zero = splat(0);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        int64_t first = i * height * s.row, row = i * channels;
        const float *above = gradient + i * output_values(s, 1), *above_t = gradient_t + i * output_values(s, 1);
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        for (int64_t c = 0; c < channels; c += LANES) {
            int64_t n = at_most(channels - c, LANES);
            Tangent d = tangent_of(&norm, weight_t, mean_t + row, slope + row, c, n);
            vector r = d.norm.rstd;
            vector sum = {0}, by_x = {0}, by_t = {0}, sum_t = {0}, by_x_t = {0}; /* of the gradients after ReLU */
            for (int64_t y = 0; y + 1 < height; y += 2)
                for (int64_t column = 0; column + 1 < width; column += 2) {
                    int64_t from = ((y / 2) * (width / 2) + column / 2) * channels + c;
                    vector g = load(above + from, n) * quarter, g_t = load(above_t + from, n) * quarter;
                    for (int j = 0; j < 4; j++) {
                        int64_t at = first + (y + j / 2) * s.row + (column + j % 2) * s.pitch + c;
                        vector centred = load(x + at, n) - d.norm.mean;
                        mask on = centred * d.norm.scale + d.norm.shift > zero;
                        vector own = choose(on, g, zero), own_t = choose(on, g_t, zero);
                        sum += own;
                        by_x += own * centred;
                        by_t += own * (load(t + at, n) - d.mean_t);
                        sum_t += own_t;
                        by_x_t += own_t * centred;
                    }
                }
            by_x *= r; /* with the normalised values and their tangents */
            by_t = r * (by_t - d.slope * by_x);
            by_x_t *= r;
            store(grad_weight_t + row + c, by_x_t + by_t, n);
            store(grad_bias_t + row + c, sum_t, n);
            vector mean_g = sum / places, along = by_x / places;
            vector mean_g_t = (d.weight_t * sum + d.weight * sum_t) / places;
            vector along_t = (d.weight_t * by_x + d.weight * (by_x_t + by_t)) / places;
            for (int64_t y = 0; y < height; y++)
                for (int64_t column = 0; column < width; column++) {
                    int64_t at = first + y * s.row + column * s.pitch + c;
                    int64_t from = ((y / 2) * (width / 2) + column / 2) * channels + c;
                    vector centred = load(x + at, n) - d.norm.mean, g = zero, g_t = zero;
                    if (y / 2 < height / 2 && column / 2 < width / 2) {
                        mask on = centred * d.norm.scale + d.norm.shift > zero;
                        g = choose(on, load(above + from, n) * quarter, zero);
                        g_t = choose(on, load(above_t + from, n) * quarter, zero);
                    }
                    vector normalised = centred * r;
                    vector normalised_t = r * (load(t + at, n) - d.mean_t - d.slope * normalised);
                    vector of_x = d.norm.scale * (g - mean_g - normalised * along);
                    vector of_t = d.weight_t * g + d.weight * g_t - mean_g_t - normalised_t * d.weight * along -
                                  normalised * along_t;
                    store(grad_x + at, of_x, n);
                    store(grad_x_t + at, r * (of_t - d.slope * of_x), n);
                }
        }
    }
}
