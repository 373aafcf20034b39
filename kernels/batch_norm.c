/* `atom_fast.ops.batch_norm` for samples [B, C, H, W] in channels_last, one thread per sample, given statistics [C].
 * The output and its gradient are [B, C, H, W], or pooled if `pool`. */
#include "norm_block.h"

void batch_norm_forward(const float *x, const float *weight, const float *bias, const float *mean, const float *rstd,
                        float *out, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t relu,
                        int64_t pool, int64_t threads) {
    Shape s = channels_last(channels, height, width);
    Norm norm = {mean, rstd, weight, bias};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        float *to = out + i * output_values(s, pool);
        features_pass(x + i * height * s.row, s, &norm, relu, 1, pool ? to : NULL, pool ? NULL : to,
                      maps_at(NULL, s, 0, 0));
    }
}

/* Call twice. WRITE_SUMS writes the gradient of the norm's output to `grad_x`, and to `sums` [B, 2, C] each sample's
 * sums of it and of its product with the centred input. READ_SUMS reads the means of `sums` over samples, [2, C]. */
void batch_norm_backward(const float *gradient, const float *x, const float *weight, const float *bias,
                         const float *mean, const float *rstd, float *sums, float *grad_x, int64_t samples,
                         int64_t channels, int64_t height, int64_t width, int64_t relu, int64_t pool, int64_t mode,
                         int64_t threads) {
    Shape s = channels_last(channels, height, width);
    Norm norm = {mean, rstd, weight, bias};
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *own = x + i * height * s.row, *above = gradient + i * output_values(s, pool);
        float *to = grad_x + i * height * s.row, *sum = mode == READ_SUMS ? sums : sums + i * 2 * channels;
        if (mode == READ_SUMS)
            through_norm(own, s, &norm, to, s, sum, sum + channels);
        else
            gradient_of_sample(own, s, &norm, relu, 1, pool ? above : NULL, pool ? NULL : above,
                               maps_at(NULL, s, 0, 0), to, s, sum, sum + channels);
    }
}
