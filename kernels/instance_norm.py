"""InstanceNorm, ReLU and 2x2 average pooling, one kernel forward and one backward, with gradients of scale and shift.

A program processes BLOCK_C planes of one sample in tiles [BLOCK_P, BLOCK_C] twice: first for the sums over a plane,
then for the result; the second pass reads from the cache. With POOL positions are ordered quad by quad, so that the
four values of a pooled value are neighbours in a tile. Fastest in channels_last, where the channels of a position are
adjacent in memory; other strides give the same numbers more slowly.

Sums have a fixed order: the same input gives the same bits.
"""

import triton
import triton.language as tl


def instance_norm_launch(channels: int, positions: int, element_size: int) -> dict[str, int]:
    """Return the launch table: a cache line of channels, and positions for 2,048 values per program of 128 threads."""
    block_c = min(triton.next_power_of_2(channels), 128 // element_size)
    block_p = max(4, min(triton.next_power_of_2(positions), 2048 // block_c))
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": 4 if block_p * block_c >= 1024 else 1}


@triton.jit
def place_offsets(
    start, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr, QUADS: tl.constexpr, BLOCK_P: tl.constexpr
):
    """Return offsets of positions from ``start``, row by row or quad by quad, and the mask of those in the plane."""
    o_p = start + tl.arange(0, BLOCK_P)
    if QUADS:
        o_h = 2 * (o_p // 4 // (W // 2)) + o_p // 2 % 2
        o_w = 2 * (o_p // 4 % (W // 2)) + o_p % 2
    else:
        o_h = o_p // W
        o_w = o_p % W
    return o_h * stride_h + o_w * stride_w, o_p < H * W


@triton.jit
def load_tile(
    p_plane, start, stride_c, stride_h, stride_w, o_c, dtype: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, QUADS: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Load a tile [BLOCK_P, BLOCK_C] of planes; also return the mask [BLOCK_P, 1] of its positions."""
    offsets, m_p = place_offsets(start, stride_h, stride_w, H, W, QUADS, BLOCK_P)
    mask = m_p[:, None] & (o_c < C)[None, :]
    b_x = tl.load(p_plane + offsets[:, None] + (o_c * stride_c)[None, :], mask=mask, other=0.0).to(dtype)
    return b_x, m_p[:, None]


@triton.jit
def pooled_offsets(start, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return offsets of the pooled positions of the quads from ``start``, and the mask of those that exist."""
    o_q = start // 4 + tl.arange(0, BLOCK_Q)
    return o_q // (W // 2) * stride_h + o_q % (W // 2) * stride_w, o_q < (H // 2) * (W // 2)


@triton.jit
def load_gradient(
    p_grad, start, stride_c, stride_h, stride_w, o_c, dtype: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, POOL: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Load the gradient of a tile's features: with POOL, a quarter of the gradient of their pooled value."""
    if POOL:
        o_q = (start + tl.arange(0, BLOCK_P)) // 4
        offsets = o_q // (W // 2) * stride_h + o_q % (W // 2) * stride_w
        mask = (o_q < (H // 2) * (W // 2))[:, None] & (o_c < C)[None, :]
        b_g = tl.load(p_grad + offsets[:, None] + (o_c * stride_c)[None, :], mask=mask, other=0.0).to(dtype) * 0.25
    else:
        b_g, _ = load_tile(p_grad, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, False, BLOCK_P)
    return b_g


@triton.jit
def instance_norm_forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_out,
    p_mean,
    p_rstd,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    out_stride_b,
    out_stride_c,
    out_stride_h,
    out_stride_w,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    RELU: tl.constexpr,
    POOL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Normalise planes, and apply ReLU with RELU and pooling with POOL. Grid: (samples, blocks of channels).

    Sums are of differences from the first tile's mean. The variance is at least a tile's share of the squared distance
    between that mean and the plane's, so the difference of squares loses few digits.

    Args:
        p_x: [B, C, H, W], any strides; H and W even with POOL.
        p_weight, p_bias: [C] scale and shift.
        p_out: [B, C, H, W], with POOL [B, C, H / 2, W / 2], any strides.
        p_mean, p_rstd: [B, C] mean and 1 / sqrt(variance + eps) of each plane.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_x += i_b * stride_b
    p_out += i_b * out_stride_b
    b_x, _ = load_tile(p_x, 0, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P)
    b_pivot = tl.sum(b_x, axis=0) / min(BLOCK_P, H * W)
    b_sums = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_squares = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    for start in range(0, H * W, BLOCK_P):
        b_x, m_p = load_tile(p_x, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P)
        b_d = tl.where(m_p, b_x - b_pivot[None, :], 0.0)
        b_sums += b_d
        b_squares += b_d * b_d
    b_shift = tl.sum(b_sums, axis=0) / (H * W)
    b_mean = b_pivot + b_shift
    b_variance = tl.sum(b_squares, axis=0) / (H * W) - b_shift * b_shift
    b_rstd = 1.0 / tl.sqrt(tl.maximum(b_variance, 0.0, propagate_nan=tl.PropagateNan.ALL) + eps)
    tl.store(p_mean + i_b * C + o_c, b_mean, mask=o_c < C)
    tl.store(p_rstd + i_b * C + o_c, b_rstd, mask=o_c < C)

    b_scale = b_rstd * tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(dtype)
    b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(dtype)
    for start in range(0, H * W, BLOCK_P):
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
def instance_norm_backward_kernel(
    p_grad,
    p_x,
    p_weight,
    p_bias,
    p_mean,
    p_rstd,
    p_grad_x,
    p_grad_weight,
    p_grad_bias,
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
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute gradients of the planes, and per sample of scale and shift. Grid: (samples, blocks of channels).

    Args:
        p_grad: gradient of the forward kernel's p_out, any strides.
        p_grad_x: [B, C, H, W], any strides.
        p_grad_weight, p_grad_bias: [B, C] in the dtype of p_mean, to be summed over samples.
        The others as in `instance_norm_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_grad += i_b * grad_stride_b
    p_x += i_b * stride_b
    p_grad_x += i_b * out_stride_b
    b_mean = tl.load(p_mean + i_b * C + o_c, mask=o_c < C, other=0.0)
    b_rstd = tl.load(p_rstd + i_b * C + o_c, mask=o_c < C, other=0.0)
    b_scale = b_rstd * tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(dtype)
    b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(dtype)
    b_sums = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_dots = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    for start in range(0, H * W, BLOCK_P):
        b_x, m_p = load_tile(p_x, start, stride_c, stride_h, stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P)
        b_d = tl.where(m_p, b_x - b_mean[None, :], 0.0)
        b_g = load_gradient(
            p_grad, start, grad_stride_c, grad_stride_h, grad_stride_w, o_c, dtype, C, H, W, POOL, BLOCK_P
        )
        if RELU:
            b_g = tl.where(b_d * b_scale[None, :] + b_bias[None, :] > 0, b_g, 0.0)
        b_sums += b_g
        b_dots += b_g * b_d
    b_sum = tl.sum(b_sums, axis=0)
    b_dot = tl.sum(b_dots, axis=0) * b_rstd
    tl.store(p_grad_bias + i_b * C + o_c, b_sum, mask=o_c < C)
    tl.store(p_grad_weight + i_b * C + o_c, b_dot, mask=o_c < C)

    b_mean_grad = (b_sum / (H * W))[None, :]
    b_slope = (b_dot * b_rstd / (H * W))[None, :]
    for start in range(0, H * W, BLOCK_P):
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
