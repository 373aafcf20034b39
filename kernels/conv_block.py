"""The first block from the image: 3x3 convolution and all that `kernels/norm_block.py` computes, in one kernel.

An image has a few kilobytes and its convolution up to 128 times as many, so the convolution is never written to
memory: it is recomputed from the image when it is needed, as the product of the image's 3x3 neighbourhoods
[positions, 9 channels] with the filters. The convolution's bias is left out, because the norm subtracts the mean.

For BatchNorm, `conv_block_statistics_kernel` first computes the statistics of every plane; kernels with USE_STATISTICS
read them.

Backward: `conv_block_sums_kernel` computes the two sums over a plane that the norm's gradient needs,
`conv_block_columns_kernel` multiplies the gradient of the convolution's output by the filters, and `fold_kernel` adds
up the gradients of overlapping neighbourhoods.
"""

import triton
import triton.language as tl

from .norm_block import (
    add_maps,
    add_tile,
    centre_planes,
    centre_quad,
    dot_quad,
    empty_maps,
    extend_statistics,
    gradient_quad,
    join_statistics,
    largest_feature,
    load_affine,
    load_map,
    load_statistics,
    load_tile,
    map_length,
    normalize_planes,
    pooled_pointers,
    relu_quad,
    store_maps,
    store_tile,
    sum_quad,
    through_norm,
    valid_quad,
)

# Largest number of values of one sample's neighbourhoods, 128 KB in float32; larger images use PyTorch's convolution.
RESIDENT = 32768
IMAGE_CHANNELS = 4  # the most that the kernels accept


def conv_block_launch(
    image_channels: int, channels: int, height: int, width: int, element_size: int, shared: int
) -> dict[str, int] | None:
    """Return the launch table of `conv_block_forward_kernel`; None if a plane needs more than ``shared`` bytes.

    Args:
        element_size: bytes per operand of the products.
        shared: bytes of shared memory that one program may use.
    """
    block_k = _columns_block(image_channels)
    block_p = _places(height, width)
    block_c = max(16, min(triton.next_power_of_2(channels), 16384 // (4 * block_p), 128))
    # The compiler keeps neighbourhoods and filters in shared memory, and rearranges a tile through it.
    needed = (4 * block_p + block_c) * block_k * element_size + 4 * block_p * block_c + 4096
    if needed > shared:
        return None
    num_warps = 8 if block_p >= 64 else 4
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "BLOCK_K": block_k, "GROUP": 2, "num_warps": num_warps}


def tiled_conv_block_launch(image_channels: int) -> dict[str, int]:
    """Return the launch table of the forward kernels that process planes in tiles of BLOCK_P quads."""
    return {"BLOCK_P": 16, "BLOCK_C": 64, "BLOCK_K": _columns_block(image_channels), "num_warps": 8, "num_stages": 1}


def conv_block_backward_launch(image_channels: int, capability: int) -> dict[str, int]:
    """Return the launch table of the backward kernels, which loop over the channels for a tile of BLOCK_P quads.

    The tile was measured on an H100. The two conditions avoid register spills for 8x8 images of one channel: on other
    GPUs with 32 channels per block, on an H100 with three stages under Triton 3.6.
    """
    block_k = _columns_block(image_channels)
    block_c = 32 if capability in (80, 90) else 16
    num_stages = 3 if block_k > 16 else 2
    return {"BLOCK_P": 16, "BLOCK_C": block_c, "BLOCK_K": block_k, "num_warps": 2, "num_stages": num_stages}


def is_resident(image_channels: int, height: int, width: int) -> bool:
    """Return True if the first block of images of this size is fused with its convolution."""
    fits = 4 * _places(height, width) * _columns_block(image_channels) <= RESIDENT
    return image_channels <= IMAGE_CHANNELS and fits


def _columns_block(image_channels: int) -> int:
    return max(16, triton.next_power_of_2(9 * image_channels))


def _places(height: int, width: int) -> int:
    """Return the quads of a plane, rounded up to a power of two that matrix instructions accept."""
    return max(16, triton.next_power_of_2(triton.cdiv(height, 2) * triton.cdiv(width, 2)))


# `_entries` uses comparisons, or divisions if this is True (in a test of the miscompilation). A compiler may pack the
# divisions in pairs of 16 bits, and ptxas 12.8 and 12.9 lose the constant of a packed addition of which one half is
# used: tiles of 16 quads per warp then read wrong pixels.
DIVIDED = tl.constexpr(False)


@triton.jit
def _entries(BLOCK_K: tl.constexpr):
    """Return channel, row and column [BLOCK_K] of the values of a 3x3 neighbourhood of at most 4 channels."""
    o_k = tl.arange(0, BLOCK_K)
    if DIVIDED:
        channel = o_k // 9
        row = (o_k % 9) // 3
        column = o_k % 3
    else:
        channel = (o_k >= 9).to(tl.int32) + (o_k >= 18).to(tl.int32) + (o_k >= 27).to(tl.int32)
        row = (o_k - 9 * channel >= 3).to(tl.int32) + (o_k - 9 * channel >= 6).to(tl.int32)
        column = o_k - 9 * channel - 3 * row
    return channel, row, column


@triton.jit
def _columns(
    p_image,
    start,
    stride_c,
    stride_h,
    stride_w,
    ROW: tl.constexpr,
    COLUMN: tl.constexpr,
    operand: tl.constexpr,
    CI: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load 3x3 neighbourhoods [BLOCK_P, BLOCK_K] of positions (2i + ROW, 2j + COLUMN), by channel, row, column."""
    o_p = start + tl.arange(0, BLOCK_P)
    o_h = 2 * (o_p // ((W + 1) // 2)) + ROW
    o_w = 2 * (o_p % ((W + 1) // 2)) + COLUMN
    o_k = tl.arange(0, BLOCK_K)
    channel, row, column = _entries(BLOCK_K)
    n_h = o_h[:, None] + (row - 1)[None, :]
    n_w = o_w[:, None] + (column - 1)[None, :]
    mask = (n_h >= 0) & (n_h < H) & (n_w >= 0) & (n_w < W) & (o_k < 9 * CI)[None, :]
    mask = mask & ((o_h < H) & (o_w < W))[:, None]
    pointers = p_image + (channel * stride_c)[None, :] + n_h * stride_h + n_w * stride_w
    return tl.load(pointers, mask=mask, other=0.0).to(operand)


@triton.jit
def _columns_quad(
    p_image,
    start,
    stride_c,
    stride_h,
    stride_w,
    operand: tl.constexpr,
    CI: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Load the neighbourhoods of the four positions of each quad."""
    b_00 = _columns(p_image, start, stride_c, stride_h, stride_w, 0, 0, operand, CI, H, W, BLOCK_P, BLOCK_K)
    b_01 = _columns(p_image, start, stride_c, stride_h, stride_w, 0, 1, operand, CI, H, W, BLOCK_P, BLOCK_K)
    b_10 = _columns(p_image, start, stride_c, stride_h, stride_w, 1, 0, operand, CI, H, W, BLOCK_P, BLOCK_K)
    b_11 = _columns(p_image, start, stride_c, stride_h, stride_w, 1, 1, operand, CI, H, W, BLOCK_P, BLOCK_K)
    return b_00, b_01, b_10, b_11


@triton.jit
def _filters(p_filter, o_k, o_c, operand: tl.constexpr, CI: tl.constexpr, C: tl.constexpr):
    """Load filters [C, 9 CI] as [BLOCK_K, BLOCK_C]."""
    mask = (o_k < 9 * CI)[:, None] & (o_c < C)[None, :]
    return tl.load(p_filter + o_k[:, None] + (o_c * (9 * CI))[None, :], mask=mask, other=0.0).to(operand)


@triton.jit
def _convolve(columns, b_filter, dtype: tl.constexpr, PRECISION: tl.constexpr, APART: tl.constexpr = False):
    """Return the convolution's output: four tiles [BLOCK_P, BLOCK_C].

    Without tensor cores the compiler interleaves the products, which spills registers; APART computes them in sequence.
    """
    b_00 = tl.dot(columns[0], b_filter, input_precision=PRECISION, out_dtype=dtype)
    if APART:
        tl.debug_barrier()
    b_01 = tl.dot(columns[1], b_filter, input_precision=PRECISION, out_dtype=dtype)
    if APART:
        tl.debug_barrier()
    b_10 = tl.dot(columns[2], b_filter, input_precision=PRECISION, out_dtype=dtype)
    if APART:
        tl.debug_barrier()
    b_11 = tl.dot(columns[3], b_filter, input_precision=PRECISION, out_dtype=dtype)
    return b_00, b_01, b_10, b_11


@triton.jit
def conv_block_statistics_kernel(
    p_image,
    p_filter,
    p_mean,
    p_variance,
    image_stride_b,
    image_stride_c: tl.constexpr,
    image_stride_h: tl.constexpr,
    image_stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute mean and population variance [B, C] of every plane of the convolution's output. Grid: (samples,).

    Args:
        As in `conv_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    operand: tl.constexpr = p_filter.dtype.element_ty
    APART: tl.constexpr = PRECISION == "ieee" and operand == tl.float32
    o_k = tl.arange(0, BLOCK_K)
    valid = valid_quad(0, H, W, BLOCK_P)
    columns = _columns_quad(
        p_image + i_b * image_stride_b, 0, image_stride_c, image_stride_h, image_stride_w,
        operand, CI, H, W, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        quad = _convolve(columns, _filters(p_filter, o_k, o_c, operand, CI, C), dtype, PRECISION, APART)
        quad, b_mean, b_variance = centre_planes(quad, valid, H, W, EXACT)
        tl.store(p_mean + i_b * C + o_c, b_mean, mask=o_c < C)
        tl.store(p_variance + i_b * C + o_c, b_variance, mask=o_c < C)


@triton.jit
def conv_block_forward_kernel(
    p_image,
    p_filter,
    p_weight,
    p_bias,
    p_pooled,
    p_maps,
    p_mean,
    p_rstd,
    p_statistics,
    image_stride_b,
    image_stride_c: tl.constexpr,
    image_stride_h: tl.constexpr,
    image_stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    eps,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    USE_STATISTICS: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute one sample's pooled features, normalised maps and values saved for backward. Grid: (samples,).

    Args:
        p_image: [B, CI, H, W], any strides.
        p_filter: [C, CI, 3, 3] contiguous; the image is rounded to its dtype.
        PRECISION: "tf32" or "ieee", of the products of float32 operands.
        The others as in `norm_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    operand: tl.constexpr = p_filter.dtype.element_ty
    APART: tl.constexpr = USE_STATISTICS and PRECISION == "ieee" and operand == tl.float32
    p_pooled += i_b * pooled_stride_b
    o_k = tl.arange(0, BLOCK_K)
    valid = valid_quad(0, H, W, BLOCK_P)
    columns = _columns_quad(
        p_image + i_b * image_stride_b, 0, image_stride_c, image_stride_h, image_stride_w,
        operand, CI, H, W, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    peak, spatial, b_channel = empty_maps(dtype, BLOCK_P, BLOCK_C, GROUP, CHUNKS)
    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        quad = _convolve(columns, _filters(p_filter, o_k, o_c, operand, CI, C), dtype, PRECISION, APART)
        quad, b_rstd = normalize_planes(quad, valid, p_mean, p_rstd, i_b, o_c, eps, C, H, W, EXACT, USE_STATISTICS)
        b_weight, b_bias = load_affine(p_weight, p_bias, o_c, dtype, C, AFFINE, BLOCK_C)
        quad = relu_quad(quad, b_rstd * b_weight, b_bias, valid, EXACT)
        pointers, mask = pooled_pointers(
            p_pooled, 0, o_c, pooled_stride_c, pooled_stride_h, pooled_stride_w, C, H, W, BLOCK_P
        )
        store_tile(pointers, sum_quad(quad) * 0.25, mask, EXACT)
        peak, spatial, b_channel = add_maps(
            quad, i_c, peak, spatial, b_channel, SPATIAL, CHANNEL, BLOCK_P, BLOCK_C, GROUP, CHUNKS
        )
    store_maps(
        p_maps + i_b * map_length(C, H, W, SPATIAL, CHANNEL), p_statistics + i_b * 3, peak, spatial, b_channel,
        SPATIAL, CHANNEL, C, H, W, BLOCK_P, BLOCK_C, CHUNKS,
    )  # fmt: skip


@triton.jit
def _walk_statistics(
    p_image, b_filter, image_stride_c, image_stride_h, image_stride_w,
    dtype: tl.constexpr, operand: tl.constexpr, CI: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    PRECISION: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Return mean, variance, smallest and largest value [BLOCK_C] of planes of the convolution, tile by tile."""
    b_count = tl.zeros([BLOCK_P, 1], dtype)
    b_mean = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_m2 = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_low = tl.full([BLOCK_P, BLOCK_C], float("inf"), dtype)
    b_high = tl.full([BLOCK_P, BLOCK_C], float("-inf"), dtype)
    for start in range(0, ((H + 1) // 2) * ((W + 1) // 2), BLOCK_P):
        columns = _columns_quad(
            p_image, start, image_stride_c, image_stride_h, image_stride_w, operand, CI, H, W, BLOCK_P, BLOCK_K
        )
        quad = _convolve(columns, b_filter, dtype, PRECISION)
        b_count, b_mean, b_m2, b_low, b_high = extend_statistics(
            quad, valid_quad(start, H, W, BLOCK_P), b_count, b_mean, b_m2, b_low, b_high
        )
    b_mean, b_variance = join_statistics(b_count, b_mean, b_m2, H * W)
    return b_mean, b_variance, tl.min(b_low, axis=0), tl.max(b_high, axis=0)


@triton.jit
def tiled_conv_block_statistics_kernel(
    p_image,
    p_filter,
    p_mean,
    p_variance,
    image_stride_b,
    image_stride_c: tl.constexpr,
    image_stride_h: tl.constexpr,
    image_stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Run `conv_block_statistics_kernel` in tiles of BLOCK_P quads. Grid: (samples, blocks of BLOCK_C channels).

    Args:
        As in `conv_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    operand: tl.constexpr = p_filter.dtype.element_ty
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_mean, b_variance, _, _ = _walk_statistics(
        p_image + i_b * image_stride_b, _filters(p_filter, tl.arange(0, BLOCK_K), o_c, operand, CI, C),
        image_stride_c, image_stride_h, image_stride_w,
        p_mean.dtype.element_ty, operand, CI, H, W, PRECISION, BLOCK_P, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    tl.store(p_mean + i_b * C + o_c, b_mean, mask=o_c < C)
    tl.store(p_variance + i_b * C + o_c, b_variance, mask=o_c < C)


@triton.jit
def tiled_conv_block_forward_kernel(
    p_image,
    p_filter,
    p_weight,
    p_bias,
    p_pooled,
    p_spatial,
    p_channel,
    p_peak,
    p_mean,
    p_rstd,
    image_stride_b,
    image_stride_c: tl.constexpr,
    image_stride_h: tl.constexpr,
    image_stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    eps,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    USE_STATISTICS: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute `conv_block_forward_kernel` for BLOCK_C planes in tiles of BLOCK_P quads: statistics, then the outputs.

    For GPUs whose shared memory does not hold the neighbourhoods of a whole image. The convolution is computed twice.
    Grid: (samples, blocks of BLOCK_C channels).

    Args:
        p_spatial, p_channel, p_peak: as `tiled_forward_kernel` of `kernels/norm_block.py` writes them.
        The others as in `conv_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1)
    i_row = i_b * tl.num_programs(1) + i_c
    dtype: tl.constexpr = p_mean.dtype.element_ty
    operand: tl.constexpr = p_filter.dtype.element_ty
    p_image += i_b * image_stride_b
    p_pooled += i_b * pooled_stride_b
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_filter = _filters(p_filter, tl.arange(0, BLOCK_K), o_c, operand, CI, C)
    b_mean, b_variance, b_low, b_high = _walk_statistics(
        p_image, b_filter, image_stride_c, image_stride_h, image_stride_w,
        dtype, operand, CI, H, W, PRECISION, BLOCK_P, BLOCK_C, BLOCK_K,
    )  # fmt: skip
    if USE_STATISTICS:
        b_mean, b_rstd = load_statistics(p_mean, p_rstd, i_b, o_c, C)
    else:
        b_rstd = 1.0 / tl.sqrt(b_variance + eps)
        tl.store(p_mean + i_b * C + o_c, b_mean, mask=o_c < C)
        tl.store(p_rstd + i_b * C + o_c, b_rstd, mask=o_c < C)

    b_weight, b_bias = load_affine(p_weight, p_bias, o_c, dtype, C, AFFINE, BLOCK_C)
    b_scale = b_rstd * b_weight
    peak = largest_feature(b_low, b_high, b_mean, b_scale, b_bias)
    tl.store(p_peak + i_row, peak)
    b_channel = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    for start in range(0, ((H + 1) // 2) * ((W + 1) // 2), BLOCK_P):
        columns = _columns_quad(
            p_image, start, image_stride_c, image_stride_h, image_stride_w, operand, CI, H, W, BLOCK_P, BLOCK_K
        )
        b_channel = add_tile(
            _convolve(columns, b_filter, dtype, PRECISION), start, o_c, b_channel, p_pooled,
            p_spatial + i_row * (H * W), b_mean, b_scale, b_bias, peak,
            pooled_stride_c, pooled_stride_h, pooled_stride_w, SPATIAL, CHANNEL, C, H, W, BLOCK_P,
        )  # fmt: skip
    if CHANNEL > 0:
        tl.store(p_channel + i_b * C + o_c, tl.sum(b_channel, axis=0), mask=o_c < C)


@triton.jit
def _tile_gradient(
    columns, b_filter, p_grad_pooled, start, o_c, b_mean, b_scale, b_bias, b_channel, inverse_peak, spatial,
    pooled_stride_c: tl.constexpr, pooled_stride_h: tl.constexpr, pooled_stride_w: tl.constexpr,
    dtype: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr, BLOCK_P: tl.constexpr,
    EXACT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the convolution's centred output and the gradient of the norm's output for one tile of quads."""
    valid = valid_quad(start, H, W, BLOCK_P)
    quad = centre_quad(_convolve(columns, b_filter, dtype, PRECISION), b_mean, valid, EXACT)
    pointers, mask = pooled_pointers(
        p_grad_pooled, start, o_c, pooled_stride_c, pooled_stride_h, pooled_stride_w, C, H, W, BLOCK_P
    )
    b_pooled = load_tile(pointers, mask, dtype, EXACT) * 0.25
    gradient = gradient_quad(
        quad, b_scale, b_bias, inverse_peak, b_pooled, spatial, b_channel, valid, SPATIAL, CHANNEL, EXACT
    )
    return quad, gradient


@triton.jit
def conv_block_sums_kernel(
    p_image,
    p_filter,
    p_weight,
    p_bias,
    p_grad_pooled,
    p_weights,
    p_mean,
    p_rstd,
    p_statistics,
    p_sums,
    image_stride_b,
    image_stride_c: tl.constexpr,
    image_stride_h: tl.constexpr,
    image_stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the two sums over a tile that the norm's gradient needs. Grid: (samples, tiles of BLOCK_P quads).

    Args:
        p_weights: [B, M] from `map_weights_kernel`.
        p_sums: [B, tiles, 2, C] sums of the gradient of the norm's output, and of its product with the centred input.
        The others as in `conv_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    operand: tl.constexpr = p_filter.dtype.element_ty
    start = i_t * BLOCK_P
    p_grad_pooled += i_b * pooled_stride_b
    p_sums += (i_b * tl.num_programs(1) + i_t) * (2 * C)
    o_k = tl.arange(0, BLOCK_K)
    columns = _columns_quad(
        p_image + i_b * image_stride_b, start, image_stride_c, image_stride_h, image_stride_w,
        operand, CI, H, W, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    inverse_peak = 1.0 / tl.load(p_statistics + i_b * 3)
    unread = tl.zeros([1], dtype)
    spatial = (unread, unread, unread, unread)
    p_weights += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    if SPATIAL > 0:
        spatial = load_map(p_weights, start, H, W, BLOCK_P)
    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        b_mean, b_rstd = load_statistics(p_mean, p_rstd, i_b, o_c, C)
        b_channel = b_mean
        if CHANNEL > 0:
            b_channel = tl.load(p_weights + map_length(0, H, W, SPATIAL, 0) + o_c, mask=o_c < C, other=0.0)
        b_weight, b_bias = load_affine(p_weight, p_bias, o_c, dtype, C, AFFINE, BLOCK_C)
        quad, gradient = _tile_gradient(
            columns, _filters(p_filter, o_k, o_c, operand, CI, C), p_grad_pooled, start, o_c,
            b_mean, b_rstd * b_weight, b_bias, b_channel, inverse_peak, spatial,
            pooled_stride_c, pooled_stride_h, pooled_stride_w,
            dtype, C, H, W, SPATIAL, CHANNEL, BLOCK_P, EXACT, PRECISION,
        )  # fmt: skip
        tl.store(p_sums + o_c, tl.sum(sum_quad(gradient), axis=0), mask=o_c < C)
        tl.store(p_sums + C + o_c, tl.sum(dot_quad(gradient, quad), axis=0), mask=o_c < C)


@triton.jit
def _total(p_sums, i_b, tiles, row: tl.constexpr, o_c, dtype: tl.constexpr, C: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return one of a plane's sums [BLOCK_C], added in the order of its tiles."""
    b_total = tl.zeros([BLOCK_C], dtype)
    for i_t in range(tiles):
        b_total += tl.load(p_sums + (i_b * tiles + i_t) * (2 * C) + row * C + o_c, mask=o_c < C, other=0.0)
    return b_total


@triton.jit
def conv_block_columns_kernel(
    p_image,
    p_filter,
    p_weight,
    p_bias,
    p_grad_pooled,
    p_weights,
    p_mean,
    p_rstd,
    p_statistics,
    p_sums,
    p_columns,
    image_stride_b,
    image_stride_c: tl.constexpr,
    image_stride_h: tl.constexpr,
    image_stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    TILES: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the gradient of each position's neighbourhood. Grid: (samples, tiles of BLOCK_P quads).

    Args:
        p_sums: [B, TILES, 2, C] from `conv_block_sums_kernel`; for BatchNorm [B, 1, 2, C], in every row the mean over
            samples of the totals over tiles.
        p_columns: [B, 9 CI, H W] the gradient, by channel, row and column of the neighbourhood.
        The others as in `conv_block_sums_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    operand: tl.constexpr = p_filter.dtype.element_ty
    start = tl.program_id(1) * BLOCK_P
    p_grad_pooled += i_b * pooled_stride_b
    o_k = tl.arange(0, BLOCK_K)
    columns = _columns_quad(
        p_image + i_b * image_stride_b, start, image_stride_c, image_stride_h, image_stride_w,
        operand, CI, H, W, BLOCK_P, BLOCK_K,
    )  # fmt: skip
    inverse_peak = 1.0 / tl.load(p_statistics + i_b * 3)
    unread = tl.zeros([1], dtype)
    spatial = (unread, unread, unread, unread)
    p_weights += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    if SPATIAL > 0:
        spatial = load_map(p_weights, start, H, W, BLOCK_P)
    zero = tl.zeros([BLOCK_P, BLOCK_K], dtype)
    g_00, g_01, g_10, g_11 = zero, zero, zero, zero
    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        b_mean, b_rstd = load_statistics(p_mean, p_rstd, i_b, o_c, C)
        b_channel = b_mean
        if CHANNEL > 0:
            b_channel = tl.load(p_weights + map_length(0, H, W, SPATIAL, 0) + o_c, mask=o_c < C, other=0.0)
        b_weight, b_bias = load_affine(p_weight, p_bias, o_c, dtype, C, AFFINE, BLOCK_C)
        b_scale = b_rstd * b_weight
        b_filter = _filters(p_filter, o_k, o_c, operand, CI, C)
        quad, gradient = _tile_gradient(
            columns, b_filter, p_grad_pooled, start, o_c,
            b_mean, b_scale, b_bias, b_channel, inverse_peak, spatial,
            pooled_stride_c, pooled_stride_h, pooled_stride_w,
            dtype, C, H, W, SPATIAL, CHANNEL, BLOCK_P, EXACT, PRECISION,
        )  # fmt: skip
        b_sum = _total(p_sums, i_b, TILES, 0, o_c, dtype, C, BLOCK_C)
        b_dot = _total(p_sums, i_b, TILES, 1, o_c, dtype, C, BLOCK_C)
        gradient = through_norm(gradient, quad, b_sum, b_dot, b_rstd, b_scale, H, W)
        b_transposed = tl.trans(b_filter)
        g_00 = tl.dot(gradient[0].to(operand), b_transposed, g_00, input_precision=PRECISION, out_dtype=dtype)
        g_01 = tl.dot(gradient[1].to(operand), b_transposed, g_01, input_precision=PRECISION, out_dtype=dtype)
        g_10 = tl.dot(gradient[2].to(operand), b_transposed, g_10, input_precision=PRECISION, out_dtype=dtype)
        g_11 = tl.dot(gradient[3].to(operand), b_transposed, g_11, input_precision=PRECISION, out_dtype=dtype)

    o_p = start + tl.arange(0, BLOCK_P)
    o_position = 2 * (o_p // ((W + 1) // 2)) * W + 2 * (o_p % ((W + 1) // 2))
    pointers = p_columns + i_b * (9 * CI * H * W) + (o_k * (H * W))[None, :] + o_position[:, None]
    valid = valid_quad(start, H, W, BLOCK_P)
    m_k = (o_k < 9 * CI)[None, :]
    tl.store(pointers, g_00, mask=valid[0] & m_k)
    tl.store(pointers + 1, g_01, mask=valid[1] & m_k)
    tl.store(pointers + W, g_10, mask=valid[2] & m_k)
    tl.store(pointers + (W + 1), g_11, mask=valid[3] & m_k)


@triton.jit
def fold_kernel(
    p_columns,
    p_grad_image,
    CI: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum each pixel's gradients over its nine neighbourhoods. Grid: (samples CI, pixels / BLOCK).

    Args:
        p_columns: [B, 9 CI, H W] from `conv_block_columns_kernel`.
        p_grad_image: [B, CI, H, W] contiguous.
    """
    i_plane = tl.program_id(0).to(tl.int64)
    o_p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_h, o_w = o_p // W, o_p % W
    p_columns += i_plane * (9 * H * W)
    b_sum = tl.zeros([BLOCK], p_columns.dtype.element_ty)
    for i_k in tl.static_range(9):
        n_h, n_w = o_h + (1 - i_k // 3), o_w + (1 - i_k % 3)
        mask = (o_p < H * W) & (n_h >= 0) & (n_h < H) & (n_w >= 0) & (n_w < W)
        b_sum += tl.load(p_columns + i_k * (H * W) + n_h * W + n_w, mask=mask, other=0.0)
    tl.store(p_grad_image + i_plane * (H * W) + o_p, b_sum.to(p_grad_image.dtype.element_ty), mask=o_p < H * W)
