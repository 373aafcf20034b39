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
