"""A norm, ReLU, both attention maps and 2x2 average pooling of a convolution's output, without its feature map.

A plane is one channel of one sample. `norm_block_forward_kernel` and `norm_block_backward_kernel` hold the planes of
BLOCK_C channels in registers: one read of the convolution's output, one write of a quarter of it, and backward one read
and one write. A program loops over the channels of one sample, so that it completes and normalises both maps itself.
For planes too large for registers, the `tiled_` kernels process BLOCK_C channels of a sample per program, in tiles and
twice, the second time from the L2 cache.

For BatchNorm, kernels with USE_STATISTICS read the statistics of the batch, stored for every plane. A first launch of a
backward kernel writes the two sums over each plane that the gradient needs; a second reads their means over samples.

A tile is a tuple of four arrays [BLOCK_P, BLOCK_C], named quad: positions (2i + a, 2j + b) for a, b in {0, 1} over the
same (i, j), so that pooling is their sum. In the comments below a place is one (i, j). The grid of (i, j) is rounded up
for odd sizes and masked.

With u = f / m, where m is the sample's largest feature, no power overflows and the factor m^p cancels in the
normalised maps. m is known only after the last channel, so sums are relative to a running maximum and
rescaled when it grows.

A power of 0 leaves a map out. Sums have a fixed order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from .powers import power, slope

# Bytes that a program reads per position in channels_last: a cache line. With a quarter of it, [1280, 128, 32, 32]
# takes six times as long on an H100.
LINE = 128


def norm_block_launch(channels: int, height: int, width: int, element_size: int, channels_last: bool) -> dict | None:
    """Return the launch table of `norm_block_forward_kernel`, measured on an H100; None if planes exceed registers.

    A program of 8 warps holds at most 128 values per thread. Narrow types use that; float32 is faster with 64.
    """
    block_p = _places(height, width)
    if not channels_last:
        return _plane_launch(channels, height, width)
    block_c = min(triton.next_power_of_2(channels), LINE // element_size, 32768 // (4 * block_p))
    if block_c < min(LINE // 4, triton.next_power_of_2(channels)):
        return None
    num_warps = 4 * block_p * block_c // (8192 // element_size)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": min(max(num_warps, 1), 8)}


def norm_block_backward_launch(
    channels: int, height: int, width: int, element_size: int, channels_last: bool
) -> dict | None:
    """Return the launch table of `norm_block_backward_kernel`, which also holds a gradient per value, or None."""
    block_p = _places(height, width)
    if not channels_last:
        return _plane_launch(channels, height, width)
    block_c = min(triton.next_power_of_2(channels), 64, 8192 // (4 * block_p))
    if block_c < min(LINE // 4, triton.next_power_of_2(channels)):
        return None
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": max(4 * block_p * block_c // 2048, 1)}


def _places(height: int, width: int) -> int:
    """Return the quads of a plane, rounded up to a power of two."""
    return triton.next_power_of_2(triton.cdiv(height, 2) * triton.cdiv(width, 2))


def _plane_launch(channels: int, height: int, width: int) -> dict[str, int] | None:
    """Return the launch table for planes of adjacent positions: 2048 values per warp, whose sums need no other warp.

    With masked places, whose masks need registers, half as many.
    """
    block_p = _places(height, width)
    warp = 2048 if height * width == 4 * block_p and width % 2 == 0 else 1024
    block_c = min(triton.next_power_of_2(channels), max(warp // (4 * block_p), 1))
    num_warps = max(4 * block_p * block_c // warp, 1)
    return {"BLOCK_P": block_p, "BLOCK_C": block_c, "num_warps": num_warps} if num_warps <= 8 else None


def tiled_launch(channels: int, height: int, width: int, element_size: int, channels_last: bool) -> dict[str, int]:
    """Return the launch table of the kernels that process planes in tiles of BLOCK_P quads."""
    block_c = min(triton.next_power_of_2(channels), LINE // element_size if channels_last else 4)
    return {"BLOCK_P": min(_places(height, width), 4096 // block_c), "BLOCK_C": block_c, "num_warps": 8}


def is_exact(channels: int, height: int, width: int, launch: dict[str, int], tiles: int = 1) -> bool:
    """Return True if the tiles cover the planes without a masked place."""
    even = height % 2 == 0 and width % 2 == 0
    return even and height * width == 4 * launch["BLOCK_P"] * tiles and channels % launch["BLOCK_C"] == 0


def channel_group(block_c: int, channels_last: bool) -> int:
    """Return GROUP of `norm_block_forward_kernel`: the channels of a position that one thread holds."""
    return min(4, block_c) if channels_last else block_c


@triton.jit
def valid_quad(start, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return which positions of the places from ``start`` lie in the plane: four masks [BLOCK_P, 1]."""
    o_p = start + tl.arange(0, BLOCK_P)
    o_h = 2 * (o_p // ((W + 1) // 2))[:, None]
    o_w = 2 * (o_p % ((W + 1) // 2))[:, None]
    top, bottom, right = o_h < H, o_h + 1 < H, o_w + 1 < W
    return top, top & right, bottom, bottom & right


@triton.jit
def _quad_offsets(start, stride_h, stride_w, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return offsets [BLOCK_P] of the positions (2i, 2j)."""
    o_p = start + tl.arange(0, BLOCK_P)
    return 2 * (o_p // ((W + 1) // 2)) * stride_h + 2 * (o_p % ((W + 1) // 2)) * stride_w


@triton.jit
def _row_offsets(start, stride_h, stride_w, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return offsets [2 BLOCK_P] of the even rows' positions in order, and masks for them and for the row below."""
    o_q = 2 * start + tl.arange(0, 2 * BLOCK_P)
    breadth: tl.constexpr = 2 * ((W + 1) // 2)
    o_h = 2 * (o_q // breadth)
    o_w = o_q % breadth
    return o_h * stride_h + o_w * stride_w, (o_h < H) & (o_w < W), (o_h + 1 < H) & (o_w < W)


@triton.jit
def load_tile(pointers, mask, dtype: tl.constexpr, EXACT: tl.constexpr):
    """Load values at ``pointers``, zero where masked; EXACT if nothing is masked."""
    if EXACT:
        values = tl.load(pointers)
    else:
        values = tl.load(pointers, mask=mask, other=0.0)
    return values.to(dtype)


@triton.jit
def store_tile(pointers, values, mask, EXACT: tl.constexpr):
    """Write values in the dtype of the memory."""
    if EXACT:
        tl.store(pointers, values.to(pointers.dtype.element_ty))
    else:
        tl.store(pointers, values.to(pointers.dtype.element_ty), mask=mask)


@triton.jit
def _split_rows(b_rows, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Split a row's positions [BLOCK_C, 2 BLOCK_P] into even and odd ones, [BLOCK_P, BLOCK_C] each."""
    even, odd = tl.split(tl.reshape(b_rows, [BLOCK_C, BLOCK_P, 2]))
    return tl.trans(even), tl.trans(odd)


@triton.jit
def _join_rows(even, odd, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    """Invert `_split_rows`."""
    return tl.reshape(tl.join(tl.trans(even), tl.trans(odd)), [BLOCK_C, 2 * BLOCK_P])


@triton.jit
def _load_quad(
    p_sample,
    start,
    o_c,
    stride_c,
    stride_h,
    stride_w,
    dtype: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Load the places from ``start`` of channels ``o_c``: four tiles [BLOCK_P, BLOCK_C], zero outside the plane."""
    m_c = o_c < C
    if CHANNELS_LAST:
        valid = valid_quad(start, H, W, BLOCK_P)
        offsets = _quad_offsets(start, stride_h, stride_w, W, BLOCK_P)
        p_00 = p_sample + offsets[:, None] + (o_c * stride_c)[None, :]
        b_00 = load_tile(p_00, valid[0] & m_c[None, :], dtype, EXACT)
        b_01 = load_tile(p_00 + stride_w, valid[1] & m_c[None, :], dtype, EXACT)
        b_10 = load_tile(p_00 + stride_h, valid[2] & m_c[None, :], dtype, EXACT)
        b_11 = load_tile(p_00 + (stride_h + stride_w), valid[3] & m_c[None, :], dtype, EXACT)
    else:
        offsets, even, odd = _row_offsets(start, stride_h, stride_w, H, W, BLOCK_P)
        p_0 = p_sample + (o_c * stride_c)[:, None] + offsets[None, :]
        b_0 = load_tile(p_0, m_c[:, None] & even[None, :], dtype, EXACT)
        b_1 = load_tile(p_0 + stride_h, m_c[:, None] & odd[None, :], dtype, EXACT)
        b_00, b_01 = _split_rows(b_0, BLOCK_P, BLOCK_C)
        b_10, b_11 = _split_rows(b_1, BLOCK_P, BLOCK_C)
    return b_00, b_01, b_10, b_11


@triton.jit
def _store_quad(
    p_sample,
    start,
    o_c,
    stride_c,
    stride_h,
    stride_w,
    quad,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Write four tiles in the layout that `_load_quad` reads."""
    m_c = o_c < C
    if CHANNELS_LAST:
        valid = valid_quad(start, H, W, BLOCK_P)
        offsets = _quad_offsets(start, stride_h, stride_w, W, BLOCK_P)
        p_00 = p_sample + offsets[:, None] + (o_c * stride_c)[None, :]
        store_tile(p_00, quad[0], valid[0] & m_c[None, :], EXACT)
        store_tile(p_00 + stride_w, quad[1], valid[1] & m_c[None, :], EXACT)
        store_tile(p_00 + stride_h, quad[2], valid[2] & m_c[None, :], EXACT)
        store_tile(p_00 + (stride_h + stride_w), quad[3], valid[3] & m_c[None, :], EXACT)
    else:
        offsets, even, odd = _row_offsets(start, stride_h, stride_w, H, W, BLOCK_P)
        p_0 = p_sample + (o_c * stride_c)[:, None] + offsets[None, :]
        store_tile(p_0, _join_rows(quad[0], quad[1], BLOCK_P, BLOCK_C), m_c[:, None] & even[None, :], EXACT)
        store_tile(p_0 + stride_h, _join_rows(quad[2], quad[3], BLOCK_P, BLOCK_C), m_c[:, None] & odd[None, :], EXACT)


@triton.jit
def pooled_pointers(
    p_sample,
    start,
    o_c,
    stride_c,
    stride_h,
    stride_w,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Return pointers [BLOCK_P, BLOCK_C] into pooled planes and their mask; an odd last row or column is dropped."""
    o_p = start + tl.arange(0, BLOCK_P)
    o_h = o_p // ((W + 1) // 2)
    o_w = o_p % ((W + 1) // 2)
    mask = ((o_h < H // 2) & (o_w < W // 2))[:, None] & (o_c < C)[None, :]
    return p_sample + (o_h * stride_h + o_w * stride_w)[:, None] + (o_c * stride_c)[None, :], mask


@triton.jit
def _store_map(p_map, start, quad, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Write four blocks [BLOCK_P] into a spatial map [H W]."""
    valid = valid_quad(start, H, W, BLOCK_P)
    p_00 = p_map + _quad_offsets(start, W, 1, W, BLOCK_P)
    tl.store(p_00, quad[0], mask=tl.reshape(valid[0], [BLOCK_P]))
    tl.store(p_00 + 1, quad[1], mask=tl.reshape(valid[1], [BLOCK_P]))
    tl.store(p_00 + W, quad[2], mask=tl.reshape(valid[2], [BLOCK_P]))
    tl.store(p_00 + (W + 1), quad[3], mask=tl.reshape(valid[3], [BLOCK_P]))


@triton.jit
def load_map(p_map, start, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Load the places from ``start`` of a spatial map [H W]: four blocks [BLOCK_P]."""
    valid = valid_quad(start, H, W, BLOCK_P)
    p_00 = p_map + _quad_offsets(start, W, 1, W, BLOCK_P)
    b_00 = tl.load(p_00, mask=tl.reshape(valid[0], [BLOCK_P]), other=0.0)
    b_01 = tl.load(p_00 + 1, mask=tl.reshape(valid[1], [BLOCK_P]), other=0.0)
    b_10 = tl.load(p_00 + W, mask=tl.reshape(valid[2], [BLOCK_P]), other=0.0)
    b_11 = tl.load(p_00 + (W + 1), mask=tl.reshape(valid[3], [BLOCK_P]), other=0.0)
    return b_00, b_01, b_10, b_11


@triton.jit
def load_affine(
    p_weight, p_bias, o_c, dtype: tl.constexpr, C: tl.constexpr, AFFINE: tl.constexpr, BLOCK_C: tl.constexpr
):
    """Load scale and shift of channels ``o_c``; zero past the last channel, so that its features are zero."""
    if AFFINE:
        b_weight = tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(dtype)
        b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(dtype)
    else:
        b_weight = tl.full([BLOCK_C], 1.0, dtype)
        b_bias = tl.zeros([BLOCK_C], dtype)
    return b_weight, b_bias


@triton.jit
def sum_quad(quad):
    """Return the sum of the four tiles."""
    return (quad[0] + quad[1]) + (quad[2] + quad[3])


@triton.jit
def dot_quad(a, b):
    """Return the sum of the four tiles' products."""
    return (a[0] * b[0] + a[1] * b[1]) + (a[2] * b[2] + a[3] * b[3])


@triton.jit
def scale_quad(quad, factor):
    """Multiply the four tiles by a factor."""
    return quad[0] * factor, quad[1] * factor, quad[2] * factor, quad[3] * factor


@triton.jit
def mask_quad(quad, valid, EXACT: tl.constexpr):
    """Set tiles to zero outside the plane."""
    if EXACT:
        masked = quad
    else:
        b_00, b_01 = tl.where(valid[0], quad[0], 0.0), tl.where(valid[1], quad[1], 0.0)
        b_10, b_11 = tl.where(valid[2], quad[2], 0.0), tl.where(valid[3], quad[3], 0.0)
        masked = (b_00, b_01, b_10, b_11)
    return masked


@triton.jit
def centre_quad(quad, b_mean, valid, EXACT: tl.constexpr):
    """Return x - mean, zero outside the plane."""
    row = b_mean[None, :]
    return mask_quad((quad[0] - row, quad[1] - row, quad[2] - row, quad[3] - row), valid, EXACT)


@triton.jit
def _relu(b_d, b_scale, b_shift):
    """Return ReLU(d scale + shift); NaN stays NaN."""
    return tl.maximum(b_d * b_scale[None, :] + b_shift[None, :], 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def relu_quad(quad, b_scale, b_shift, valid, EXACT: tl.constexpr):
    """Return the features of centred tiles, zero outside the plane."""
    b_00, b_01 = _relu(quad[0], b_scale, b_shift), _relu(quad[1], b_scale, b_shift)
    b_10, b_11 = _relu(quad[2], b_scale, b_shift), _relu(quad[3], b_scale, b_shift)
    return mask_quad((b_00, b_01, b_10, b_11), valid, EXACT)


@triton.jit
def centre_planes(quad, valid, H: tl.constexpr, W: tl.constexpr, EXACT: tl.constexpr):
    """Return centred planes, and their mean and population variance [BLOCK_C], computed from centred values."""
    b_mean = tl.sum(sum_quad(quad), axis=0) / (H * W)
    quad = centre_quad(quad, b_mean, valid, EXACT)
    return quad, b_mean, tl.sum(dot_quad(quad, quad), axis=0) / (H * W)


@triton.jit
def load_statistics(p_mean, p_rstd, i_b, o_c, C: tl.constexpr):
    """Load mean and 1 / sqrt(variance + eps) of channels ``o_c`` of sample ``i_b``; zero past the last channel."""
    b_mean = tl.load(p_mean + i_b * C + o_c, mask=o_c < C, other=0.0)
    return b_mean, tl.load(p_rstd + i_b * C + o_c, mask=o_c < C, other=0.0)


@triton.jit
def normalize_planes(
    quad,
    valid,
    p_mean,
    p_rstd,
    i_b,
    o_c,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    EXACT: tl.constexpr,
    USE_STATISTICS: tl.constexpr,
):
    """Centre planes; return them and 1 / sqrt(variance + eps) [BLOCK_C], read (USE_STATISTICS) or written."""
    if USE_STATISTICS:
        b_mean, b_rstd = load_statistics(p_mean, p_rstd, i_b, o_c, C)
        quad = centre_quad(quad, b_mean, valid, EXACT)
    else:
        quad, b_mean, b_variance = centre_planes(quad, valid, H, W, EXACT)
        b_rstd = 1.0 / tl.sqrt(b_variance + eps)
        tl.store(p_mean + i_b * C + o_c, b_mean, mask=o_c < C)
        tl.store(p_rstd + i_b * C + o_c, b_rstd, mask=o_c < C)
    return quad, b_rstd


@triton.jit
def relative_to(peak):
    """Return 1 / peak, or 1 if all features so far are zero."""
    return 1.0 / tl.where(peak > 0, peak, 1.0)


@triton.jit
def _inverse_norm(square):
    """Return 1 / sqrt(square), or 1 for a zero map."""
    return 1.0 / tl.sqrt(tl.where(square > 0, square, 1.0))


@triton.jit
def empty_maps(
    dtype: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr, CHUNKS: tl.constexpr
):
    """Return a zero peak, spatial map (four tiles [BLOCK_P, BLOCK_C / GROUP]) and channel map [CHUNKS, BLOCK_C]."""
    zero = tl.zeros([BLOCK_P, BLOCK_C // GROUP], dtype)
    return tl.full([], 0.0, dtype), (zero, zero, zero, zero), tl.zeros([CHUNKS, BLOCK_C], dtype)


@triton.jit
def _add_power(b_map, ratio, b_u, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, GROUP: tl.constexpr):
    """Return map * ratio + sums of u^P over GROUP channels, all in one thread: no exchange between threads."""
    return b_map * ratio + tl.sum(tl.reshape(power(b_u, P), [BLOCK_P, BLOCK_C // GROUP, GROUP]), axis=2)


@triton.jit
def add_maps(
    quad,
    i_c,
    peak,
    spatial,
    b_channel,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    GROUP: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Add the features of chunk ``i_c`` to the maps, and make them relative to the larger peak."""
    new_peak, new_spatial, new_channel = peak, spatial, b_channel
    if SPATIAL > 0 or CHANNEL > 0:
        b_max = tl.maximum(tl.maximum(quad[0], quad[1]), tl.maximum(quad[2], quad[3]))
        new_peak = tl.maximum(peak, tl.max(tl.max(b_max, axis=0), axis=0))
        inverse = relative_to(new_peak)
        # Exactly 1 if the peak is unchanged, because the sums are multiplied once per chunk.
        ratio = tl.where(new_peak > peak, peak * inverse, 1.0)
        quad = scale_quad(quad, inverse)
        if SPATIAL > 0:
            ratio_s = power(ratio, SPATIAL)
            b_00 = _add_power(spatial[0], ratio_s, quad[0], SPATIAL, BLOCK_P, BLOCK_C, GROUP)
            b_01 = _add_power(spatial[1], ratio_s, quad[1], SPATIAL, BLOCK_P, BLOCK_C, GROUP)
            b_10 = _add_power(spatial[2], ratio_s, quad[2], SPATIAL, BLOCK_P, BLOCK_C, GROUP)
            b_11 = _add_power(spatial[3], ratio_s, quad[3], SPATIAL, BLOCK_P, BLOCK_C, GROUP)
            new_spatial = (b_00, b_01, b_10, b_11)
        if CHANNEL > 0:
            b_total = tl.sum(sum_powers(quad, CHANNEL), axis=0)
            earlier = b_channel * power(ratio, CHANNEL)
            new_channel = tl.where(tl.arange(0, CHUNKS)[:, None] == i_c, b_total[None, :], earlier)
    return new_peak, new_spatial, new_channel


@triton.jit
def sum_powers(quad, P: tl.constexpr):
    """Return the sum of the four tiles' powers."""
    return (power(quad[0], P) + power(quad[1], P)) + (power(quad[2], P) + power(quad[3], P))


@triton.jit
def map_length(C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr):
    """Return the number of values of one sample's maps."""
    return (H * W if SPATIAL > 0 else 0) + (C if CHANNEL > 0 else 0)


@triton.jit
def store_maps(
    p_maps,
    p_statistics,
    peak,
    spatial,
    b_channel,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Write a sample's maps with L2 norm 1, its peak and both factors (1 for a map that is zero or left out)."""
    spatial_factor = peak * 0 + 1.0
    channel_factor = peak * 0 + 1.0
    if SPATIAL > 0:
        b_00, b_01 = tl.sum(spatial[0], axis=1), tl.sum(spatial[1], axis=1)
        b_10, b_11 = tl.sum(spatial[2], axis=1), tl.sum(spatial[3], axis=1)
        sums = (b_00, b_01, b_10, b_11)
        spatial_factor = _inverse_norm(tl.sum(dot_quad(sums, sums), axis=0))
        _store_map(p_maps, 0, scale_quad(sums, spatial_factor), H, W, BLOCK_P)
        p_maps += H * W
    if CHANNEL > 0:
        channel_factor = _inverse_norm(tl.sum(tl.sum(b_channel * b_channel, axis=1), axis=0))
        o_all = tl.arange(0, CHUNKS)[:, None] * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
        tl.store(p_maps + o_all, b_channel * channel_factor, mask=o_all < C)
    tl.store(p_statistics, tl.where(peak > 0, peak, 1.0))
    tl.store(p_statistics + 1, spatial_factor)
    tl.store(p_statistics + 2, channel_factor)


@triton.jit
def norm_block_forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_pooled,
    p_maps,
    p_mean,
    p_rstd,
    p_statistics,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    USE_STATISTICS: tl.constexpr,
    EXACT: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute one sample's pooled features, normalised maps and values saved for backward. Grid: (samples,).

    Args:
        p_x: [B, C, H, W] output of the convolution, any strides; H, W >= 2, at most BLOCK_P quads per plane.
        p_weight, p_bias: [C] scale and shift of the norm; not read without AFFINE.
        p_pooled: [B, C, H // 2, W // 2], any strides.
        p_maps: [B, M] the spatial map (H W values), then the channel map (C), each of L2 norm 1 or zero.
        p_mean, p_rstd: [B, C] mean and 1 / sqrt(variance + eps) of each plane; read (USE_STATISTICS) or written.
        p_statistics: [B, 3] the largest feature and 1 / norm of each map relative to it; 1 if zero or left out.
        CHUNKS: number of blocks of BLOCK_C channels, rounded up to a power of two.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_x += i_b * stride_b
    p_pooled += i_b * pooled_stride_b
    valid = valid_quad(0, H, W, BLOCK_P)
    peak, spatial, b_channel = empty_maps(dtype, BLOCK_P, BLOCK_C, GROUP, CHUNKS)
    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        quad = _load_quad(
            p_x, 0, o_c, stride_c, stride_h, stride_w, dtype, C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, EXACT
        )
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
def _feature_gradient(
    b_d, b_scale, b_shift, b_pooled, b_spatial, b_channel, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr
):
    """Return the gradient of the norm's output, from the pooled features' gradient and the maps' weights."""
    b_y = b_d * b_scale[None, :] + b_shift[None, :]
    b_u = tl.maximum(b_y, 0.0)
    b_g = b_pooled
    if SPATIAL > 0:
        b_g = b_g + b_spatial[:, None] * slope(b_u, SPATIAL)
    if CHANNEL > 0:
        b_g = b_g + b_channel[None, :] * slope(b_u, CHANNEL)
    return tl.where(b_y > 0, b_g, 0.0)


@triton.jit
def gradient_quad(
    quad,
    b_scale,
    b_bias,
    inverse_peak,
    b_pooled,
    spatial,
    b_channel,
    valid,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Return the gradient of the norm's output from centred tiles, zero outside the plane.

    Args:
        b_pooled: gradient of the pooled features, divided by 4.
        spatial, b_channel: four blocks [BLOCK_P] and [BLOCK_C], factors of (f / peak)^(p - 1).
    """
    b_scale = b_scale * inverse_peak
    b_shift = b_bias * inverse_peak
    g_00 = _feature_gradient(quad[0], b_scale, b_shift, b_pooled, spatial[0], b_channel, SPATIAL, CHANNEL)
    g_01 = _feature_gradient(quad[1], b_scale, b_shift, b_pooled, spatial[1], b_channel, SPATIAL, CHANNEL)
    g_10 = _feature_gradient(quad[2], b_scale, b_shift, b_pooled, spatial[2], b_channel, SPATIAL, CHANNEL)
    g_11 = _feature_gradient(quad[3], b_scale, b_shift, b_pooled, spatial[3], b_channel, SPATIAL, CHANNEL)
    return mask_quad((g_00, g_01, g_10, g_11), valid, EXACT)


@triton.jit
def through_norm(gradient, quad, b_sum, b_dot, b_rstd, b_scale, H: tl.constexpr, W: tl.constexpr):
    """Return the gradient of the norm's input: remove the parts that change a plane's mean or variance.

    Args:
        gradient, quad: gradient of the norm's output and centred input, four tiles [BLOCK_P, BLOCK_C] each.
        b_sum, b_dot: [BLOCK_C] sums over the plane of the gradient, and of its product with the centred input; for
            BatchNorm, the means of these sums over samples.
    """
    b_offset = (b_sum * b_scale / (H * W))[None, :]
    b_slope = (b_dot * b_rstd * b_rstd * b_scale / (H * W))[None, :]
    b_scale = b_scale[None, :]
    b_00 = gradient[0] * b_scale - b_offset - quad[0] * b_slope
    b_01 = gradient[1] * b_scale - b_offset - quad[1] * b_slope
    b_10 = gradient[2] * b_scale - b_offset - quad[2] * b_slope
    b_11 = gradient[3] * b_scale - b_offset - quad[3] * b_slope
    return b_00, b_01, b_10, b_11


@triton.jit
def spatial_weights(p_gradient, p_map, factor, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return (gradient - <gradient, map> map) factor of a spatial map, as four blocks [BLOCK_P]."""
    gradient = load_map(p_gradient, 0, H, W, BLOCK_P)
    normalized = load_map(p_map, 0, H, W, BLOCK_P)
    dot = tl.sum(dot_quad(gradient, normalized), axis=0)
    b_00, b_01 = gradient[0] - normalized[0] * dot, gradient[1] - normalized[1] * dot
    b_10, b_11 = gradient[2] - normalized[2] * dot, gradient[3] - normalized[3] * dot
    return scale_quad((b_00, b_01, b_10, b_11), factor)


@triton.jit
def channel_weights(p_gradient, p_map, factor, dot, o_c, C: tl.constexpr):
    """Return (gradient - dot map) factor of channels ``o_c`` of a channel map."""
    b_g = tl.load(p_gradient + o_c, mask=o_c < C, other=0.0)
    return (b_g - tl.load(p_map + o_c, mask=o_c < C, other=0.0) * dot) * factor


@triton.jit
def channel_dot(p_gradient, p_map, C: tl.constexpr, BLOCK: tl.constexpr):
    """Return <gradient, map> of a channel map of at most BLOCK channels."""
    o_c = tl.arange(0, BLOCK)
    b_g = tl.load(p_gradient + o_c, mask=o_c < C, other=0.0)
    return tl.sum(b_g * tl.load(p_map + o_c, mask=o_c < C, other=0.0), axis=0)


@triton.jit
def load_sums(p_sums, o_c, C: tl.constexpr):
    """Load both sums of `through_norm` for channels ``o_c``."""
    return tl.load(p_sums + o_c, mask=o_c < C, other=0.0), tl.load(p_sums + C + o_c, mask=o_c < C, other=0.0)


@triton.jit
def store_sums(p_sums, b_sum, b_dot, o_c, C: tl.constexpr):
    """Write both sums in the layout that `load_sums` reads."""
    tl.store(p_sums + o_c, b_sum, mask=o_c < C)
    tl.store(p_sums + C + o_c, b_dot, mask=o_c < C)


@triton.jit
def norm_block_backward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_grad_pooled,
    p_grad_maps,
    p_maps,
    p_mean,
    p_rstd,
    p_statistics,
    p_sums,
    p_grad_x,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    grad_stride_b,
    grad_stride_c: tl.constexpr,
    grad_stride_h: tl.constexpr,
    grad_stride_w: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SUMS: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Compute the gradient of the convolution's output for one sample. Grid: (samples,).

    The L2 normalisation subtracts <gradient, map> map from a map's gradient; the rest, times p / (norm peak), is the
    factor of (f / peak)^(p - 1).

    Args:
        p_grad_pooled: [B, C, H // 2, W // 2], any strides.
        p_grad_maps: [B, M], in the order of p_maps.
        p_sums: [B, 2, C] both sums of `through_norm` (written), or [2, C] their means over samples (read).
        p_grad_x: [B, C, H, W], any strides.
        SUMS: "own" uses each plane's sums, "write" writes them and no gradient, "read" uses the batch's.
        The others as in `norm_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_x += i_b * stride_b
    if SUMS == "write":
        p_sums += i_b * (2 * C)
    else:
        p_grad_x += i_b * grad_stride_b
    p_grad_pooled += i_b * pooled_stride_b
    valid = valid_quad(0, H, W, BLOCK_P)
    inverse_peak = 1.0 / tl.load(p_statistics + i_b * 3)
    unread = tl.zeros([1], dtype)
    spatial = (unread, unread, unread, unread)
    p_grad_maps += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    p_maps += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    if SPATIAL > 0:
        factor = tl.load(p_statistics + i_b * 3 + 1) * inverse_peak * SPATIAL
        spatial = spatial_weights(p_grad_maps, p_maps, factor, H, W, BLOCK_P)
        p_grad_maps += H * W
        p_maps += H * W
    if CHANNEL > 0:
        channel_factor = tl.load(p_statistics + i_b * 3 + 2) * inverse_peak * CHANNEL
        dot = channel_dot(p_grad_maps, p_maps, C, CHUNKS * BLOCK_C)

    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        quad = _load_quad(
            p_x, 0, o_c, stride_c, stride_h, stride_w, dtype, C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, EXACT
        )
        pointers, mask = pooled_pointers(
            p_grad_pooled, 0, o_c, pooled_stride_c, pooled_stride_h, pooled_stride_w, C, H, W, BLOCK_P
        )
        b_pooled = load_tile(pointers, mask, dtype, EXACT) * 0.25
        b_mean, b_rstd = load_statistics(p_mean, p_rstd, i_b, o_c, C)
        b_channel = b_mean
        if CHANNEL > 0:
            b_channel = channel_weights(p_grad_maps, p_maps, channel_factor, dot, o_c, C)
        b_weight, b_bias = load_affine(p_weight, p_bias, o_c, dtype, C, AFFINE, BLOCK_C)
        b_scale = b_rstd * b_weight
        quad = centre_quad(quad, b_mean, valid, EXACT)
        gradient = gradient_quad(
            quad, b_scale, b_bias, inverse_peak, b_pooled, spatial, b_channel, valid, SPATIAL, CHANNEL, EXACT
        )
        if SUMS == "read":
            b_sum, b_dot = load_sums(p_sums, o_c, C)
        else:
            b_sum = tl.sum(sum_quad(gradient), axis=0)
            b_dot = tl.sum(dot_quad(gradient, quad), axis=0)
        if SUMS == "write":
            store_sums(p_sums, b_sum, b_dot, o_c, C)
        else:
            _store_quad(
                p_grad_x, 0, o_c, grad_stride_c, grad_stride_h, grad_stride_w,
                through_norm(gradient, quad, b_sum, b_dot, b_rstd, b_scale, H, W),
                C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, EXACT,
            )  # fmt: skip


@triton.jit
def extend_statistics(quad, valid, b_count, b_mean, b_m2, b_low, b_high):
    """Merge each place's four values into its running statistics (Chan et al.), without exchange between threads.

    Args:
        b_count: [BLOCK_P, 1] values so far; b_mean, b_m2, b_low, b_high: [BLOCK_P, BLOCK_C] their mean, sum of squared
            deviations, smallest and largest.
    """
    dtype: tl.constexpr = b_mean.dtype
    b_new = (valid[0].to(dtype) + valid[1].to(dtype)) + (valid[2].to(dtype) + valid[3].to(dtype))
    quad_mean = sum_quad(mask_quad(quad, valid, False)) / tl.maximum(b_new, 1.0)
    # A masked value counts as the mean of its place: it changes neither deviations nor extremes.
    d_00, d_01 = tl.where(valid[0], quad[0] - quad_mean, 0.0), tl.where(valid[1], quad[1] - quad_mean, 0.0)
    d_10, d_11 = tl.where(valid[2], quad[2] - quad_mean, 0.0), tl.where(valid[3], quad[3] - quad_mean, 0.0)
    deviation = (d_00, d_01, d_10, d_11)
    low = quad_mean + tl.minimum(tl.minimum(d_00, d_01), tl.minimum(d_10, d_11))
    high = quad_mean + tl.maximum(tl.maximum(d_00, d_01), tl.maximum(d_10, d_11))
    b_total = b_count + b_new
    b_share = b_new / tl.maximum(b_total, 1.0)
    b_delta = quad_mean - b_mean
    b_m2 += dot_quad(deviation, deviation) + b_delta * b_delta * (b_count * b_share)
    b_low = tl.where(b_new > 0, tl.minimum(b_low, low), b_low)
    b_high = tl.where(b_new > 0, tl.maximum(b_high, high), b_high)
    return b_total, b_mean + b_delta * b_share, b_m2, b_low, b_high


@triton.jit
def join_statistics(b_count, b_mean, b_m2, N: tl.constexpr):
    """Return mean and variance [BLOCK_C] of planes of N values from the statistics of their places."""
    mean = tl.sum(b_count * b_mean, axis=0) / N
    b_delta = b_mean - mean[None, :]
    return mean, tl.sum(b_m2 + b_count * b_delta * b_delta, axis=0) / N


@triton.jit
def largest_feature(b_low, b_high, b_mean, b_scale, b_bias):
    """Return the largest feature, at least 0, of channels whose values are from ``b_low`` to ``b_high``."""
    b_extreme = tl.maximum((b_low - b_mean) * b_scale, (b_high - b_mean) * b_scale) + b_bias
    return tl.maximum(tl.max(b_extreme, axis=0), 0.0)


@triton.jit
def add_tile(
    quad, start, o_c, b_channel, p_pooled, p_spatial, b_mean, b_scale, b_bias, peak,
    pooled_stride_c: tl.constexpr, pooled_stride_h: tl.constexpr, pooled_stride_w: tl.constexpr,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """Normalise a tile; write its pooled features and its positions of the spatial map.

    Returns:
        ``b_channel`` [BLOCK_P, BLOCK_C] with the tile's (f / peak)^p added.
    """
    valid = valid_quad(start, H, W, BLOCK_P)
    quad = relu_quad(centre_quad(quad, b_mean, valid, False), b_scale, b_bias, valid, False)
    pointers, mask = pooled_pointers(
        p_pooled, start, o_c, pooled_stride_c, pooled_stride_h, pooled_stride_w, C, H, W, BLOCK_P
    )
    store_tile(pointers, sum_quad(quad) * 0.25, mask, False)
    quad = scale_quad(quad, relative_to(peak))
    if SPATIAL > 0:
        b_00, b_01 = tl.sum(power(quad[0], SPATIAL), axis=1), tl.sum(power(quad[1], SPATIAL), axis=1)
        b_10, b_11 = tl.sum(power(quad[2], SPATIAL), axis=1), tl.sum(power(quad[3], SPATIAL), axis=1)
        _store_map(p_spatial, start, (b_00, b_01, b_10, b_11), H, W, BLOCK_P)
    if CHANNEL > 0:
        b_channel += sum_powers(quad, CHANNEL)
    return b_channel


@triton.jit
def tiled_forward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_pooled,
    p_spatial,
    p_channel,
    p_peak,
    p_mean,
    p_rstd,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    eps,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    USE_STATISTICS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute `norm_block_forward_kernel` for BLOCK_C planes too large for registers. Grid: (samples, chunks).

    Args:
        p_spatial: [B, chunks, H W] sums over the chunk's channels of (f / peak)^p, with the chunk's peak.
        p_channel: [B, C] sums over positions of (f / peak)^p, with the peak of the channel's chunk.
        p_peak: [B, chunks] the largest feature of the chunk.
        The others as in `norm_block_forward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_c = tl.program_id(1)
    i_row = i_b * tl.num_programs(1) + i_c
    dtype: tl.constexpr = p_mean.dtype.element_ty
    PLACES: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    p_x += i_b * stride_b
    p_pooled += i_b * pooled_stride_b
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_count = tl.zeros([BLOCK_P, 1], dtype)
    b_mean = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_m2 = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_low = tl.full([BLOCK_P, BLOCK_C], float("inf"), dtype)
    b_high = tl.full([BLOCK_P, BLOCK_C], float("-inf"), dtype)
    for start in range(0, PLACES, BLOCK_P):
        quad = _load_quad(
            p_x, start, o_c, stride_c, stride_h, stride_w, dtype, C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, False
        )
        b_count, b_mean, b_m2, b_low, b_high = extend_statistics(
            quad, valid_quad(start, H, W, BLOCK_P), b_count, b_mean, b_m2, b_low, b_high
        )
    b_mean, b_variance = join_statistics(b_count, b_mean, b_m2, H * W)
    b_low = tl.min(b_low, axis=0)
    b_high = tl.max(b_high, axis=0)
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
    for start in range(0, PLACES, BLOCK_P):
        quad = _load_quad(
            p_x, start, o_c, stride_c, stride_h, stride_w, dtype, C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, False
        )
        b_channel = add_tile(
            quad, start, o_c, b_channel, p_pooled, p_spatial + i_row * (H * W), b_mean, b_scale, b_bias, peak,
            pooled_stride_c, pooled_stride_h, pooled_stride_w, SPATIAL, CHANNEL, C, H, W, BLOCK_P,
        )  # fmt: skip
    if CHANNEL > 0:
        tl.store(p_channel + i_b * C + o_c, tl.sum(b_channel, axis=0), mask=o_c < C)


@triton.jit
def _project(p_gradient, p_map, p_weight, factor, N: tl.constexpr, BLOCK: tl.constexpr):
    """Write weight = (gradient - <gradient, map> map) factor for one map of N values."""
    dtype: tl.constexpr = p_map.dtype.element_ty
    b_dot = tl.zeros([BLOCK], dtype)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_g = tl.load(p_gradient + o_n, mask=o_n < N, other=0.0)
        b_dot += b_g * tl.load(p_map + o_n, mask=o_n < N, other=0.0)
    dot = tl.sum(b_dot, axis=0)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_g = tl.load(p_gradient + o_n, mask=o_n < N, other=0.0)
        b_g -= tl.load(p_map + o_n, mask=o_n < N, other=0.0) * dot
        tl.store(p_weight + o_n, b_g * factor, mask=o_n < N)


@triton.jit
def map_weights_kernel(
    p_gradient,
    p_maps,
    p_statistics,
    p_weights,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the factors of (f / peak)^(p - 1) in the gradient of each feature. Grid: (samples,).

    Args:
        p_gradient, p_maps: [B, M] gradient of the maps and the maps.
        p_statistics: [B, 3] as `norm_block_forward_kernel` writes it.
        p_weights: [B, M] (gradient - <gradient, map> map) p / (norm peak), for each of the maps.
    """
    i_b = tl.program_id(0).to(tl.int64)
    row = i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    inverse_peak = 1.0 / tl.load(p_statistics + i_b * 3)
    if SPATIAL > 0:
        factor = tl.load(p_statistics + i_b * 3 + 1) * inverse_peak * SPATIAL
        _project(p_gradient + row, p_maps + row, p_weights + row, factor, H * W, BLOCK)
        row += H * W
    if CHANNEL > 0:
        factor = tl.load(p_statistics + i_b * 3 + 2) * inverse_peak * CHANNEL
        _project(p_gradient + row, p_maps + row, p_weights + row, factor, C, BLOCK)


@triton.jit
def _tiled_gradient(
    p_x, p_grad_pooled, p_weights, start, o_c, b_mean, b_scale, b_bias, b_channel, inverse_peak,
    stride_c: tl.constexpr, stride_h: tl.constexpr, stride_w: tl.constexpr,
    pooled_stride_c: tl.constexpr, pooled_stride_h: tl.constexpr, pooled_stride_w: tl.constexpr,
    dtype: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, CHANNELS_LAST: tl.constexpr,
):  # fmt: skip
    """Return the centred input and the gradient of the norm's output for one tile."""
    valid = valid_quad(start, H, W, BLOCK_P)
    quad = _load_quad(
        p_x, start, o_c, stride_c, stride_h, stride_w, dtype, C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, False
    )
    pointers, mask = pooled_pointers(
        p_grad_pooled, start, o_c, pooled_stride_c, pooled_stride_h, pooled_stride_w, C, H, W, BLOCK_P
    )
    b_pooled = load_tile(pointers, mask, dtype, False) * 0.25
    spatial = (b_channel, b_channel, b_channel, b_channel)  # not read without SPATIAL
    if SPATIAL > 0:
        spatial = load_map(p_weights, start, H, W, BLOCK_P)
    quad = centre_quad(quad, b_mean, valid, False)
    gradient = gradient_quad(
        quad, b_scale, b_bias, inverse_peak, b_pooled, spatial, b_channel, valid, SPATIAL, CHANNEL, False
    )
    return quad, gradient


@triton.jit
def tiled_backward_kernel(
    p_x,
    p_weight,
    p_bias,
    p_grad_pooled,
    p_weights,
    p_mean,
    p_rstd,
    p_statistics,
    p_sums,
    p_grad_x,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    pooled_stride_b,
    pooled_stride_c: tl.constexpr,
    pooled_stride_h: tl.constexpr,
    pooled_stride_w: tl.constexpr,
    grad_stride_b,
    grad_stride_c: tl.constexpr,
    grad_stride_h: tl.constexpr,
    grad_stride_w: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    AFFINE: tl.constexpr,
    CHANNELS_LAST: tl.constexpr,
    SUMS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
):
    """Compute `norm_block_backward_kernel` for BLOCK_C planes too large for registers. Grid: (samples, chunks).

    Args:
        p_weights: [B, M] from `map_weights_kernel`.
        The others as in `norm_block_backward_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    PLACES: tl.constexpr = ((H + 1) // 2) * ((W + 1) // 2)
    p_x += i_b * stride_b
    if SUMS == "write":
        p_sums += i_b * (2 * C)
    else:
        p_grad_x += i_b * grad_stride_b
    p_grad_pooled += i_b * pooled_stride_b
    p_weights += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_mean, b_rstd = load_statistics(p_mean, p_rstd, i_b, o_c, C)
    b_weight, b_bias = load_affine(p_weight, p_bias, o_c, dtype, C, AFFINE, BLOCK_C)
    b_scale = b_rstd * b_weight
    inverse_peak = 1.0 / tl.load(p_statistics + i_b * 3)
    b_channel = b_mean  # not read without CHANNEL
    if CHANNEL > 0:
        b_channel = tl.load(p_weights + map_length(0, H, W, SPATIAL, 0) + o_c, mask=o_c < C, other=0.0)
    if SUMS == "read":
        b_sum, b_dot = load_sums(p_sums, o_c, C)
    else:
        b_sum = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        b_dot = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        for start in range(0, PLACES, BLOCK_P):
            quad, gradient = _tiled_gradient(
                p_x, p_grad_pooled, p_weights, start, o_c, b_mean, b_scale, b_bias, b_channel, inverse_peak,
                stride_c, stride_h, stride_w, pooled_stride_c, pooled_stride_h, pooled_stride_w,
                dtype, C, H, W, SPATIAL, CHANNEL, BLOCK_P, BLOCK_C, CHANNELS_LAST,
            )  # fmt: skip
            b_sum += sum_quad(gradient)
            b_dot += dot_quad(gradient, quad)
        b_sum = tl.sum(b_sum, axis=0)
        b_dot = tl.sum(b_dot, axis=0)
    if SUMS == "write":
        store_sums(p_sums, b_sum, b_dot, o_c, C)
    else:
        for start in range(0, PLACES, BLOCK_P):
            quad, gradient = _tiled_gradient(
                p_x, p_grad_pooled, p_weights, start, o_c, b_mean, b_scale, b_bias, b_channel, inverse_peak,
                stride_c, stride_h, stride_w, pooled_stride_c, pooled_stride_h, pooled_stride_w,
                dtype, C, H, W, SPATIAL, CHANNEL, BLOCK_P, BLOCK_C, CHANNELS_LAST,
            )  # fmt: skip
            _store_quad(
                p_grad_x, start, o_c, grad_stride_c, grad_stride_h, grad_stride_w,
                through_norm(gradient, quad, b_sum, b_dot, b_rstd, b_scale, H, W),
                C, H, W, BLOCK_P, BLOCK_C, CHANNELS_LAST, False,
            )  # fmt: skip
