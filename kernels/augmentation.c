/* Differentiable siamese augmentation: one operation per image, or the transpose of its linear part. */
#include "augmentation.h"

/* images, output: [batch, channels, height, width], contiguous in NCHW or channels_last.
 * operations: [batch]; uniforms: [batch, 3] in [0, 1).
 * scratch: [threads, 4 (pixels + 1) + 8 width].
 * pad, cut, max_scale, max_angle: see `Limits`.
 * offset: add the brightness, the part that does not depend on the image. */
void augment(const float *images, const int64_t *operations, const float *uniforms, float *output, float *scratch,
             int64_t batch, int64_t channels, int64_t height, int64_t width, int64_t channels_last, int64_t pad_y,
             int64_t pad_x, int64_t cut_y, int64_t cut_x, double max_scale, double max_angle, int64_t transposed,
             int64_t offset, int64_t threads) {
    Shape size = {channels, height, width, channels_last ? 1 : channels, channels_last ? channels : 1};
    Limits limits = {pad_y, pad_x, cut_y, cut_x, max_scale, max_angle};
    int64_t values = channels * pixels_of(size);
#pragma omp parallel for num_threads(threads) schedule(dynamic)
    for (int64_t i = 0; i < batch; i++)
        augment_image(images + i * values, size, operations[i], uniforms + 3 * i, limits, transposed, offset,
                      scratch + omp_get_thread_num() * scratch_of(size), output + i * values);
}
