"""BatchNorm over the batch in training, ReLU and 2x2 average pooling: two reads of the input forward, two backward.

A row is up to PLACES positions of one sample. A program processes BLOCK_C channels of a row in tiles
[BLOCK_P, BLOCK_C]. `batch_norm_parts_kernel` computes each row's mean and squares, `batch_norm_statistics_kernel`
combines the rows, `batch_norm_apply_kernel` normalises; backward, `batch_norm_sums_kernel` computes each row's sums and
`batch_norm_backward_kernel` the gradient. Tiles are as in `instance_norm`: fastest in channels_last, and ordered quad
by quad with POOL.

A pass that follows sums walks the samples from last to first, because the values read last are still in the cache.

Sums have a fixed order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from .instance_norm import instance_norm_launch, load_gradient, load_tile, place_offsets, pooled_offsets


def batch_norm_launch(channels: int, positions: int, element_size: int) -> dict[str, int]:
    """Return the launch table of all kernels except `batch_norm_statistics_kernel`: up to four tiles per program."""
    launch = instance_norm_launch(channels, positions, element_size)
    places = max(launch["BLOCK_P"], min(4 * launch["BLOCK_P"], triton.next_power_of_2(positions)))
    return {"PLACES": places, **launch}


def statistics_launch(rows: int) -> dict[str, int]:
    """Return the launch table of `batch_norm_statistics_kernel`: one sector of channels, for more programs."""
    return {"BLOCK_R": min(triton.next_power_of_2(rows), 256), "BLOCK_C": 8, "num_warps": 4}


@triton.jit
def _row(
    i_row, i_block, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, PLACES: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Return the sample of a row, its first position, and the channels of a block."""
    chunks: tl.constexpr = tl.cdiv(H * W, PLACES)
    return (i_row // chunks).to(tl.int64), i_row % chunks * PLACES, i_block * BLOCK_C + tl.arange(0, BLOCK_C)


@triton.jit
def batch_norm_parts_kernel(
    p_x,
    p_means,
    p_squares,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute each row's mean and sum of squared deviations from it. Grid: rows times blocks of channels.

    Sums are of differences from the first tile's mean: see `instance_norm_forward_kernel`.

    Args:
        p_x: [B, C, H, W], any strides.
        p_means, p_squares: [rows, C].
    """
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    i_row = tl.program_id(0) // blocks
    i_b, first, o_c = _row(i_row, tl.program_id(0) % blocks, C, H, W, PLACES, BLOCK_C)
    dtype: tl.constexpr = p_means.dtype.element_ty
    p_x += i_b * stride_b
    b_x, m_p = load_tile(p_x, first, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, False, BLOCK_P)
    b_pivot = tl.sum(b_x, axis=0) / tl.minimum(BLOCK_P, H * W - first)
    b_sums = tl.where(m_p, b_x - b_pivot[None, :], 0.0)
    b_squares = b_sums * b_sums
    for start in range(first + BLOCK_P, tl.minimum(first + PLACES, H * W), BLOCK_P):
        b_x, m_p = load_tile(p_x, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, False, BLOCK_P)
        b_d = tl.where(m_p, b_x - b_pivot[None, :], 0.0)
        b_sums += b_d
        b_squares += b_d * b_d
    b_sum = tl.sum(b_sums, axis=0)
    b_shift = b_sum / tl.minimum(PLACES, H * W - first)
    offsets = i_row.to(tl.int64) * C + o_c
    tl.store(p_means + offsets, b_pivot + b_shift, mask=o_c < C)
    tl.store(p_squares + offsets, tl.sum(b_squares, axis=0) - b_sum * b_shift, mask=o_c < C)


@triton.jit
def batch_norm_statistics_kernel(
    p_means,
    p_squares,
    p_offset,
    p_running_mean,
    p_running_var,
    p_mean,
    p_rstd,
    rows,
    count,
    MOMENTUM: tl.constexpr,
    EPS: tl.constexpr,
    C: tl.constexpr,
    POSITIONS: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute mean and 1 / sqrt(variance + EPS) per channel, and update running statistics. Grid: blocks of channels.

    Args:
        p_means, p_squares: [rows, C] from `batch_norm_parts_kernel`.
        p_offset: [C], or None; added to the mean before it enters the running mean.
        p_running_mean, p_running_var: [C], read and written.
        p_mean, p_rstd: [C].
        rows: number of rows; cdiv(POSITIONS, PLACES) per sample.
        count: values per channel, at least 2.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < C
    chunks: tl.constexpr = tl.cdiv(POSITIONS, PLACES)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    b_pivot = tl.load(p_means + o_c, mask=m_c, other=0.0)
    b_sums = tl.zeros([BLOCK_R, BLOCK_C], dtype)
    for start in range(0, rows, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        mask = (o_r < rows)[:, None] & m_c[None, :]
        b_n = tl.minimum(PLACES, POSITIONS - o_r % chunks * PLACES)[:, None]
        b_m = tl.load(p_means + o_r.to(tl.int64)[:, None] * C + o_c[None, :], mask=mask, other=0.0)
        b_sums += tl.where(mask, b_m - b_pivot[None, :], 0.0) * b_n
    b_mean = b_pivot + tl.sum(b_sums, axis=0) / count

    b_squares = tl.zeros([BLOCK_R, BLOCK_C], dtype)
    for start in range(0, rows, BLOCK_R):
        o_r = start + tl.arange(0, BLOCK_R)
        mask = (o_r < rows)[:, None] & m_c[None, :]
        b_n = tl.minimum(PLACES, POSITIONS - o_r % chunks * PLACES)[:, None]
        offsets = o_r.to(tl.int64)[:, None] * C + o_c[None, :]
        b_d = tl.where(mask, tl.load(p_means + offsets, mask=mask, other=0.0) - b_mean[None, :], 0.0)
        b_squares += tl.load(p_squares + offsets, mask=mask, other=0.0) + b_d * b_d * b_n
    b_square = tl.maximum(tl.sum(b_squares, axis=0), 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_mean + o_c, b_mean, mask=m_c)
    tl.store(p_rstd + o_c, 1.0 / tl.sqrt(b_square / count + EPS), mask=m_c)

    if p_offset is not None:
        b_mean += tl.load(p_offset + o_c, mask=m_c, other=0.0).to(dtype)
    b_old = tl.load(p_running_mean + o_c, mask=m_c, other=0.0).to(dtype)
    b_new = (1 - MOMENTUM) * b_old + MOMENTUM * b_mean
    tl.store(p_running_mean + o_c, b_new.to(p_running_mean.dtype.element_ty), mask=m_c)
    b_old = tl.load(p_running_var + o_c, mask=m_c, other=0.0).to(dtype)
    b_new = (1 - MOMENTUM) * b_old + MOMENTUM * (b_square / (count - 1))
    tl.store(p_running_var + o_c, b_new.to(p_running_var.dtype.element_ty), mask=m_c)


@triton.jit
def batch_norm_apply_kernel(
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_out,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    out_stride_b,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise, and apply ReLU with RELU and 2x2 average pooling with POOL. Grid: rows times blocks of channels.

    Args:
        p_x: [B, C, H, W], any strides; H and W even with POOL.
        p_weight, p_bias, p_mean, p_rstd: [C].
        p_out: [B, C, H, W], with POOL [B, C, H / 2, W / 2], any strides.
    """
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, first, o_c = _row(i_program // blocks, i_program % blocks, C, H, W, PLACES, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_x += i_b * stride_b
    p_out += i_b * out_stride_b
    b_mean, b_rstd, b_scale, b_bias = _load_channels(p_weight, p_bias, p_mean, p_rstd, o_c, dtype, C)
    for start in range(first, tl.minimum(first + PLACES, H * W), BLOCK_P):
        b_x, _ = load_tile(p_x, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P)
        b_y = (b_x - b_mean[None, :]) * b_scale[None, :] + b_bias[None, :]
        if RELU:
            b_y = tl.maximum(b_y, 0.0, propagate_nan=tl.PropagateNan.ALL)
        if POOL:
            b_y = tl.sum(tl.reshape(b_y, [BLOCK_P // 4, 4, BLOCK_C]), axis=1) * 0.25
            offsets, m_p = pooled_offsets(start, out_stride_h, out_stride_w, H, W, BLOCK_P // 4)
        else:
            offsets, m_p = place_offsets(start, out_stride_h, out_stride_w, H, W, False, BLOCK_P)
        p_tile = p_out + offsets[:, None] + (o_c * out_stride_c)[None, :]
        tl.store(p_tile, b_y.to(p_out.dtype.element_ty), mask=m_p[:, None] & (o_c < C)[None, :])


@triton.jit
def _load_channels(p_weight, p_bias, p_mean, p_rstd, o_c, dtype: tl.constexpr, C: tl.constexpr):
    """Load mean, 1 / standard deviation, scale / standard deviation, and shift of channels ``o_c``."""
    b_mean = tl.load(p_mean + o_c, mask=o_c < C, other=0.0)
    b_rstd = tl.load(p_rstd + o_c, mask=o_c < C, other=0.0)
    b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(dtype)
    b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(dtype)
    return b_mean, b_rstd, b_rstd * b_weight, b_bias


@triton.jit
def batch_norm_sums_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_sums,
    grad_stride_b,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute each row's part of the gradients of shift and scale. Grid: rows times blocks of channels.

    Args:
        p_grad: gradient of the apply kernel's p_out, any strides.
        p_sums: [2, rows, C] in the dtype of p_mean, to be summed over rows: shift, scale.
        The others as in `batch_norm_apply_kernel`.
    """
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    i_row = tl.program_id(0) // blocks
    i_b, first, o_c = _row(i_row, tl.program_id(0) % blocks, C, H, W, PLACES, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_grad += i_b * grad_stride_b
    p_x += i_b * stride_b
    b_mean, b_rstd, b_scale, b_bias = _load_channels(p_weight, p_bias, p_mean, p_rstd, o_c, dtype, C)
    b_sums = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_dots = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    for start in range(first, tl.minimum(first + PLACES, H * W), BLOCK_P):
        b_x, m_p = load_tile(p_x, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P)
        b_d = tl.where(m_p, b_x - b_mean[None, :], 0.0)
        b_g = load_gradient(
            p_grad, start, grad_stride_c, grad_stride_h, grad_stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P
        )
        if RELU:
            b_g = tl.where(b_d * b_scale[None, :] + b_bias[None, :] > 0, b_g, 0.0)
        b_sums += b_g
        b_dots += b_g * b_d
    rows = tl.num_programs(0) // blocks
    p_row = p_sums + i_row.to(tl.int64) * C + o_c
    tl.store(p_row, tl.sum(b_sums, axis=0), mask=o_c < C)
    tl.store(p_row + rows.to(tl.int64) * C, tl.sum(b_dots, axis=0) * b_rstd, mask=o_c < C)


@triton.jit
def batch_norm_backward_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_sums,
    p_grad_x,
    count,
    grad_stride_b,
    grad_stride_c,
    grad_stride_h,
    grad_stride_w,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    out_stride_b,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    PLACES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute the gradient of the input through the statistics of the batch. Grid: rows times blocks of channels.

    Args:
        p_sums: [2, C] gradients of shift and scale, in the dtype of p_mean.
        p_grad_x: [B, C, H, W], any strides.
        count: values per channel.
        The others as in `batch_norm_sums_kernel`.
    """
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    i_program = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, first, o_c = _row(i_program // blocks, i_program % blocks, C, H, W, PLACES, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_grad += i_b * grad_stride_b
    p_x += i_b * stride_b
    p_grad_x += i_b * out_stride_b
    b_mean, b_rstd, b_scale, b_bias = _load_channels(p_weight, p_bias, p_mean, p_rstd, o_c, dtype, C)
    b_mean_grad = (tl.load(p_sums + o_c, mask=o_c < C, other=0.0) / count)[None, :]
    b_slope = (tl.load(p_sums + C + o_c, mask=o_c < C, other=0.0) * b_rstd / count)[None, :]
    for start in range(first, tl.minimum(first + PLACES, H * W), BLOCK_P):
        b_x, m_p = load_tile(p_x, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P)
        b_d = b_x - b_mean[None, :]
        b_g = load_gradient(
            p_grad, start, grad_stride_c, grad_stride_h, grad_stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P
        )
        if RELU:
            b_g = tl.where(b_d * b_scale[None, :] + b_bias[None, :] > 0, b_g, 0.0)
        b_dx = (b_g - b_mean_grad - b_d * b_slope) * b_scale[None, :]
        offsets, _ = place_offsets(start, out_stride_h, out_stride_w, H, W, POOL, BLOCK_P)
        p_tile = p_grad_x + offsets[:, None] + (o_c * out_stride_c)[None, :]
        tl.store(p_tile, b_dx.to(p_grad_x.dtype.element_ty), mask=m_p & (o_c < C)[None, :])
