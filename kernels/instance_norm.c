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
