/* `atom_fast.ops.batch_norm` for samples [B, C, H, W] in channels_last, each worked on by one thread: what follows the
 * statistics, which are [C]. The output and its gradient are pooled where `pool`, or [B, C, H, W]. */
#include "block.h"

static Shape dense(int64_t channels, int64_t height, int64_t width) {
    return (Shape){channels, height, width, channels, channels * width};
}

static int64_t output_values(Shape s, int64_t pool) {
    return s.channels * (pool ? (s.height / 2) * (s.width / 2) : s.height * s.width);
}

void batch_norm_forward(const float *x, const float *weight, const float *bias, const float *mean, const float *rstd,
                        float *out, int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t rectify,
                        int64_t pool, int64_t threads) {
    Shape s = dense(channels, height, width);
    Norm norm = {mean, rstd, weight, bias};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < samples; i++) {
        float *to = out + i * output_values(s, pool);
        features_pass(x + i * height * s.row, s, &norm, rectify, 1, pool ? to : NULL, pool ? NULL : to,
                      maps_at(NULL, s, 0, 0));
    }
}

/* The gradient behind the norm of `down` x `across` places at `x`: added to `sum` and `product` where `out` is NULL, or
 * brought through the norm by them. */
INLINE void backward_of_square(const float *x, Shape s, int down, int across, const Norm *norm, int rectify, int pool,
                               const float *above, float *sum, float *product, float *out) {
    for (int64_t c = 0; c < s.channels; c += LANES) {
        int64_t n = at_most(s.channels - c, LANES);
        Affine a = affine(norm, c, n);
        vector pooled = pool ? load(above + c, n) * splat(0.25f) : splat(0);
        vector total = load(sum + c, n), with_centred = load(product + c, n);
        for (int i = 0; i < down; i++)
            for (int j = 0; j < across; j++) {
                int64_t at = i * s.row + j * s.pitch + c;
                vector centred = load(x + at, n) - a.mean, g = pool ? pooled : load(above + at, n);
                if (rectify) g = choose(centred * a.scale + a.shift <= splat(0), splat(0), g);
                if (out)
                    store(out + at, (g - total - with_centred * centred) * a.scale, n);
                else
                    total += g, with_centred += g * centred;
            }
        if (out) continue;
        store(sum + c, total, n);
        store(product + c, with_centred, n);
    }
}

INLINE void backward_of_squares(const float *x, Shape s, const Norm *norm, int rectify, int pool, const float *gradient,
                                float *sum, float *product, float *out) {
    for (int64_t y = 0; y < s.height; y += 2)
        for (int64_t column = 0; column < s.width; column += 2) {
            int64_t at = y * s.row + column * s.pitch;
            const float *above = pool ? pooled_at((float *)gradient, s, y, column) : gradient + at;
            int down = at_most(s.height - y, 2), across = at_most(s.width - column, 2);
            float *to = out ? out + at : NULL;
            if (down == 2 && across == 2)
                backward_of_square(x + at, s, 2, 2, norm, rectify, pool, above, sum, product, to);
            else
                backward_of_square(x + at, s, down, across, norm, rectify, pool, above, sum, product, to);
        }
}

INLINE void backward_of_sample(const float *x, Shape s, const Norm *norm, int rectify, int pool, const float *gradient,
                               float *sum, float *product, float *out) {
    if (rectify && pool) /* what a network trains with, as constants */
        backward_of_squares(x, s, norm, 1, 1, gradient, sum, product, out);
    else
        backward_of_squares(x, s, norm, rectify, pool, gradient, sum, product, out);
}

/* Without `grad_x`, writes each sample's sums [B, C] of the gradient behind the norm, alone and times the centred
 * input. With it, reads them as [C], meaned over all samples and places, the second over the variance. */
void batch_norm_backward(const float *gradient, const float *x, const float *weight, const float *bias,
                         const float *mean, const float *rstd, float *sum, float *product, float *grad_x,
                         int64_t samples, int64_t channels, int64_t height, int64_t width, int64_t rectify,
                         int64_t pool, int64_t threads) {
    Shape s = dense(channels, height, width);
    Norm norm = {mean, rstd, weight, bias};
#pragma omp parallel for num_threads(threads) schedule(static)
    for (int64_t i = 0; i < samples; i++) {
        const float *own = x + i * height * s.row, *above = gradient + i * output_values(s, pool);
        if (grad_x) {
            backward_of_sample(own, s, &norm, rectify, pool, above, sum, product, grad_x + i * height * s.row);
        } else {
            float *own_sum = sum + i * channels, *own_product = product + i * channels;
            memset(own_sum, 0, 4 * channels);
            memset(own_product, 0, 4 * channels);
            backward_of_sample(own, s, &norm, rectify, pool, above, own_sum, own_product, NULL);
        }
    }
}
