/* `atom_fast.ops.norm_block` for samples [B, C, H, W] in channels_last, one thread per sample. */
#include "norm_block.h"

/* Compute mean and variance [B, C] of each plane. */
void norm_block_statistics(const float *x, float *mean, float *variance, int64_t samples, int64_t channels, int64_t height,
                      int64_t width, int64_t threads) {
    Shape s = channels_last(channels, height, width);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++)
        plane_statistics(x + i * height * s.row, s, mean + i * channels, variance + i * channels);
}

/* `given`: read mean and rstd instead of writing them. */
void norm_block_forward(const float *x, const float *weight, const float *bias, float *pooled, float *maps, float *mean,
                   float *rstd, float *statistics, int64_t samples, int64_t channels, int64_t height, int64_t width,
                   double eps, double spatial_power, double channel_power, int64_t given, int64_t threads) {
    Shape s = channels_last(channels, height, width);
    int64_t values = map_values(s, spatial_power, channel_power);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *own = x + i * height * s.row;
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        if (!given) normalizing_statistics(own, s, eps, mean + i * channels, rstd + i * channels);
        block_of_sample(own, s, &norm, pooled + i * output_values(s, 1),
                        maps_at(maps + i * values, s, spatial_power, channel_power), statistics + 3 * i);
    }
}

/* A gradient that is NULL counts as zero. `sums` is [B, 2, C], with READ_SUMS [2, C]: then `grad_x` holds the result of
 * the call with WRITE_SUMS. `scratch` is [threads, M]. */
void norm_block_backward(const float *grad_pooled, const float *grad_maps, const float *x, const float *weight,
                    const float *bias, const float *maps, const float *mean, const float *rstd, const float *statistics,
                    float *sums, float *grad_x, float *scratch, int64_t samples, int64_t channels, int64_t height,
                    int64_t width, double spatial_power, double channel_power, int64_t mode, int64_t threads) {
    Shape s = channels_last(channels, height, width);
    int64_t values = map_values(s, spatial_power, channel_power);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < samples; i++) {
        const float *own = x + i * height * s.row;
        float *sum = mode == READ_SUMS ? sums : sums + i * 2 * channels, *to = grad_x + i * height * s.row;
        Norm norm = norm_of_sample(mean, rstd, weight, bias, i, channels);
        if (mode != READ_SUMS) {
            Maps factors = factors_of_sample(grad_maps, maps, statistics, i, s, spatial_power, channel_power,
                                             scratch + omp_get_thread_num() * values);
            gradient_of_sample(own, s, &norm, 1, statistics[3 * i],
                               grad_pooled ? grad_pooled + i * output_values(s, 1) : NULL, NULL,
                               factors, to, s, sum, sum + channels);
        }
        if (mode != WRITE_SUMS) through_norm(own, s, &norm, to, s, sum, sum + channels);
    }
}
