"""Spatial and channel attention of a feature map in one read; their gradient in one read and one write.

With u = |f| / m, where m is the largest |f| of the sample, equations 1 and 2 of the paper become
s[hw] = sum_c u^ps and c[ch] = sum_hw u^pc, up to a factor that the L2 normalisation removes. No value exceeds 1, so
no power overflows. m is not known before the read: a program keeps a running maximum and rescales its sums when the
maximum grows, as online softmax does, and `attention_normalize_kernel` rescales the tiles to the sample's m.

Grid of the streaming kernels: (samples, tiles of BLOCK_P positions). A tile holds complete sums of
the spatial map, and one partial sum per channel of the channel map. Partial sums are added in tile order, so the same
input gives the same bits. A power of 0 leaves a map out.
"""

import triton
import triton.language as tl

from .powers import power, slope


def forward_launch(channels: int, positions: int, bytes_per_value: int) -> dict[str, int]:
    """Return the launch table of `attention_forward_kernel`: 32 KB per tile and 64 values per thread were fastest."""
    return _tile(channels, positions, 32768 // max(bytes_per_value, 2), 64)


def backward_launch(channels: int, positions: int, channels_last: bool) -> dict[str, int]:
    """Return the launch table of `attention_backward_kernel`: longer tiles if positions are adjacent in memory."""
    return _tile(channels, positions, 4096 if channels_last else 8192, 32 if channels_last else 64)


def _tile(channels: int, positions: int, values: int, values_per_thread: int) -> dict[str, int]:
    block_c = min(triton.next_power_of_2(channels), 128)
    block_p = min(triton.next_power_of_2(positions), values // block_c)
    return {"BLOCK_C": block_c, "BLOCK_P": block_p, "num_warps": max(block_c * block_p // (32 * values_per_thread), 1)}


def normalize_launch(channels: int, positions: int, tiles: int) -> dict[str, int]:
    """Return the launch table of the per-sample kernels over maps of ``positions`` + ``channels`` values."""
    return {
        "BLOCK_C": min(triton.next_power_of_2(channels), 128),
        "BLOCK_P": min(triton.next_power_of_2(positions), 1024),
        "BLOCK_T": min(triton.next_power_of_2(tiles), 16),
        "num_warps": 4,
    }


@triton.jit
def _position_offsets(o_p, W, stride_h, stride_w, FLAT: tl.constexpr):
    """Return offsets of flattened positions; FLAT if rows follow each other without a gap (stride_h = W stride_w)."""
    if FLAT:
        offsets = o_p.to(tl.int64) * stride_w
    else:
        offsets = (o_p // W).to(tl.int64) * stride_h + (o_p % W).to(tl.int64) * stride_w
    return offsets


@triton.jit
def attention_forward_kernel(
    p_features,
    p_spatial,
    p_channel,
    p_peak,
    C,
    P,
    W,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    FLAT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the unnormalised maps of one tile, relative to the running maximum at the time of the read.

    Args:
        p_features: [B, C, H, W], any strides, any floating dtype.
        p_spatial: [B, P] sums over channels, P = H W; relative to the tile's final peak.
        p_channel: [B, T, C] sums over the tile's positions; chunk i of BLOCK_C channels is relative to peak i.
        p_peak: [B, T, ceil(C / BLOCK_C)] the running maximum of |f| after each chunk of channels.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1).to(tl.int64)
    n_t = tl.num_programs(1)
    n_c = tl.cdiv(C, BLOCK_C)
    o_p = i_t.to(tl.int32) * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    offsets_p = _position_offsets(o_p, W, stride_h, stride_w, FLAT)
    p_row = p_features + i_b * stride_b

    peak = tl.zeros([], dtype=ACCUMULATE)
    b_spatial = tl.zeros([BLOCK_P], dtype=ACCUMULATE)
    for i_c in range(n_c):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        pointers = p_row + o_c.to(tl.int64)[:, None] * stride_c + offsets_p[None, :]
        b_u = tl.abs(tl.load(pointers, mask=m_c[:, None] & m_p[None, :], other=0.0).to(ACCUMULATE))
        new_peak = tl.maximum(peak, tl.max(tl.max(b_u, axis=1), axis=0))
        inverse = 1.0 / _divisor(new_peak)
        b_u = b_u * inverse
        if SPATIAL > 0:
            b_spatial = b_spatial * power(peak * inverse, SPATIAL) + tl.sum(power(b_u, SPATIAL), axis=0)
        if CHANNEL > 0:
            b_channel = tl.sum(power(b_u, CHANNEL), axis=1)
            tl.store(p_channel + (i_b * n_t + i_t) * C + o_c, b_channel, mask=m_c)
        peak = new_peak
        tl.store(p_peak + (i_b * n_t + i_t) * n_c + i_c, peak)
    if SPATIAL > 0:
        tl.store(p_spatial + i_b * P + o_p, b_spatial, mask=m_p)


@triton.jit
def _divisor(peak):
    """Return the peak, or 1 if it is zero or so small that its reciprocal overflows."""
    smallest: tl.constexpr = 2.2250738585072014e-308 if peak.dtype == tl.float64 else 1.1754943508222875e-38
    return tl.where(peak >= smallest, peak, 1.0)


@triton.jit
def _tile_ratio(p_peak, row, o_t, m_t, i_c, n_c, inverse_peak):
    """Return the peaks of tiles ``o_t`` after chunk ``i_c``, divided by the sample's peak: at most 1."""
    return tl.load(p_peak + (row + o_t) * n_c + i_c, mask=m_t, other=0.0) * inverse_peak


@triton.jit
def _spatial_block(p_spatial, p_peak, i_b, o_p, P, n_t, n_c, inverse_peak, SPATIAL: tl.constexpr, TILE_P: tl.constexpr):
    """Load one block of the spatial map, relative to the sample's peak."""
    m_p = o_p < P
    ratio = _tile_ratio(p_peak, i_b * n_t, (o_p // TILE_P).to(tl.int64), m_p, n_c - 1, n_c, inverse_peak)
    return tl.load(p_spatial + i_b * P + o_p, mask=m_p, other=0.0) * power(ratio, SPATIAL)


@triton.jit
def _channel_block(
    p_channel,
    p_peak,
    i_b,
    i_c,
    C,
    n_t,
    n_c,
    inverse_peak,
    CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Sum one block of the channel map over the tiles, in tile order, relative to the sample's peak."""
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    total = tl.zeros([BLOCK_C], dtype=p_channel.dtype.element_ty)
    for start in range(0, n_t, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        m_t = o_t < n_t
        weight = power(_tile_ratio(p_peak, i_b * n_t, o_t, m_t, i_c, n_c, inverse_peak), CHANNEL)
        pointers = p_channel + (i_b * n_t + o_t)[:, None] * C + o_c[None, :]
        total += tl.sum(tl.load(pointers, mask=m_t[:, None] & (o_c < C)[None, :], other=0.0) * weight[:, None], axis=0)
    return total


@triton.jit
def attention_normalize_kernel(
    p_spatial,
    p_channel,
    p_peak,
    p_maps,
    p_statistics,
    C,
    P,
    n_t,
    n_c,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    TILE_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Rescale a sample's tiles to one peak and divide each map by its L2 norm (equation 3). Grid: (samples,).

    Args:
        p_spatial, p_channel, p_peak: outputs of `attention_forward_kernel` with tiles of TILE_P positions and chunks
            of BLOCK_C channels.
        p_maps: [B, M] the spatial map (P values) followed by the channel map (C values), without those left out.
        p_statistics: [3, B] the sample's peak (1 for a sample of zeros or subnormal numbers) and, for each map, the
            factor that multiplies the map relative to the peak: 1 / norm, or peak^p without NORMALIZE.
    """
    i_b = tl.program_id(0).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    dtype = p_maps.dtype.element_ty
    n_spatial = P if SPATIAL > 0 else 0
    n_channel = C if CHANNEL > 0 else 0
    p_row = p_maps + i_b * (n_spatial + n_channel)

    running = tl.zeros([BLOCK_T], dtype=dtype)
    for start in range(0, n_t, BLOCK_T):
        o_t = start + tl.arange(0, BLOCK_T).to(tl.int64)
        running = tl.maximum(running, tl.load(p_peak + (i_b * n_t + o_t) * n_c + n_c - 1, mask=o_t < n_t, other=0.0))
    peak = tl.max(running, axis=0)
    peak = _divisor(peak)
    inverse_peak = 1.0 / peak
    tl.store(p_statistics + i_b, peak)

    if SPATIAL > 0:
        if NORMALIZE:
            squares = tl.zeros([BLOCK_P], dtype=dtype)
            for start in range(0, P, BLOCK_P):
                o_p = start + tl.arange(0, BLOCK_P)
                b_s = _spatial_block(p_spatial, p_peak, i_b, o_p, P, n_t, n_c, inverse_peak, SPATIAL, TILE_P)
                squares += b_s * b_s
            norm = tl.sqrt(tl.sum(squares, axis=0))
            factor = 1.0 / tl.where(norm > 0, norm, 1.0)
        else:
            factor = power(peak, SPATIAL)
        tl.store(p_statistics + n_b + i_b, factor)
        for start in range(0, P, BLOCK_P):
            o_p = start + tl.arange(0, BLOCK_P)
            b_s = _spatial_block(p_spatial, p_peak, i_b, o_p, P, n_t, n_c, inverse_peak, SPATIAL, TILE_P)
            tl.store(p_row + o_p, b_s * factor, mask=o_p < P)

    if CHANNEL > 0:
        if NORMALIZE:
            squares = tl.zeros([BLOCK_C], dtype=dtype)
            for i_c in range(n_c):
                b_c = _channel_block(p_channel, p_peak, i_b, i_c, C, n_t, n_c, inverse_peak, CHANNEL, BLOCK_C, BLOCK_T)
                squares += b_c * b_c
            norm = tl.sqrt(tl.sum(squares, axis=0))
            factor = 1.0 / tl.where(norm > 0, norm, 1.0)
        else:
            factor = power(peak, CHANNEL)
        tl.store(p_statistics + 2 * n_b + i_b, factor)
        for i_c in range(n_c):
            o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
            b_c = _channel_block(p_channel, p_peak, i_b, i_c, C, n_t, n_c, inverse_peak, CHANNEL, BLOCK_C, BLOCK_T)
            tl.store(p_row + n_spatial + o_c, b_c * factor, mask=o_c < C)


@triton.jit
def _row_dot(p_a, p_b, N, dtype: tl.constexpr, BLOCK: tl.constexpr):
    """Return the inner product of two rows of N values."""
    total = tl.zeros([BLOCK], dtype=dtype)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < N
        total += tl.load(p_a + o_n, mask=m_n, other=0.0) * tl.load(p_b + o_n, mask=m_n, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def attention_projection_kernel(
    p_gradient,
    p_maps,
    p_projection,
    C,
    P,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute <gradient, map> of each normalised map, as the gradient of the L2 norm needs it. Grid: (samples,).

    Args:
        p_gradient, p_maps: [B, M] gradient of the maps and the normalised maps.
        p_projection: [2, B] the inner products for the spatial and the channel map.
    """
    i_b = tl.program_id(0).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    dtype = p_maps.dtype.element_ty
    n_spatial = P if SPATIAL > 0 else 0
    n_channel = C if CHANNEL > 0 else 0
    row = i_b * (n_spatial + n_channel)
    if SPATIAL > 0:
        tl.store(p_projection + i_b, _row_dot(p_gradient + row, p_maps + row, P, dtype, BLOCK_P))
    if CHANNEL > 0:
        row += n_spatial
        tl.store(p_projection + n_b + i_b, _row_dot(p_gradient + row, p_maps + row, C, dtype, BLOCK_C))


@triton.jit
def attention_backward_kernel(
    p_features,
    p_gradient,
    p_maps,
    p_statistics,
    p_projection,
    p_output,
    C,
    P,
    W,
    stride_b,
    stride_c,
    stride_h,
    stride_w,
    output_stride_b,
    output_stride_c,
    output_stride_h,
    output_stride_w,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    FLAT: tl.constexpr,
    OUTPUT_FLAT: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Compute the gradient of the features in one read and one write. Grid: (samples, tiles of BLOCK_P positions).

    Args:
        p_features: [B, C, H, W], any strides.
        p_gradient, p_maps: [B, M] gradient of the maps, and the maps.
        p_statistics: [3, B] peak and the two factors from `attention_normalize_kernel`.
        p_projection: [2, B] from `attention_projection_kernel`; not read without NORMALIZE.
        p_output: [B, C, H, W], any strides, in the dtype of the features.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_t = tl.program_id(1)
    n_b = tl.num_programs(0).to(tl.int64)
    n_spatial = P if SPATIAL > 0 else 0
    n_channel = C if CHANNEL > 0 else 0
    row = i_b * (n_spatial + n_channel)
    o_p = i_t * BLOCK_P + tl.arange(0, BLOCK_P)
    m_p = o_p < P
    offsets_p = _position_offsets(o_p, W, stride_h, stride_w, FLAT)
    output_offsets_p = _position_offsets(o_p, W, output_stride_h, output_stride_w, OUTPUT_FLAT)
    inverse_peak = 1.0 / tl.load(p_statistics + i_b)

    if SPATIAL > 0:
        b_spatial = tl.load(p_gradient + row + o_p, mask=m_p, other=0.0)
        if NORMALIZE:
            b_spatial -= tl.load(p_maps + row + o_p, mask=m_p, other=0.0) * tl.load(p_projection + i_b)
        b_spatial *= SPATIAL * tl.load(p_statistics + n_b + i_b) * inverse_peak
    for i_c in range(tl.cdiv(C, BLOCK_C)):
        o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
        m_c = o_c < C
        mask = m_c[:, None] & m_p[None, :]
        pointers = p_features + i_b * stride_b + o_c.to(tl.int64)[:, None] * stride_c + offsets_p[None, :]
        b_f = tl.load(pointers, mask=mask, other=0.0).to(ACCUMULATE)
        b_u = tl.abs(b_f) * inverse_peak
        b_g = tl.zeros([BLOCK_C, BLOCK_P], dtype=ACCUMULATE)
        if SPATIAL > 0:
            b_g += slope(b_u, SPATIAL) * b_spatial[None, :]
        if CHANNEL > 0:
            b_channel = tl.load(p_gradient + row + n_spatial + o_c, mask=m_c, other=0.0)
            if NORMALIZE:
                b_map = tl.load(p_maps + row + n_spatial + o_c, mask=m_c, other=0.0)
                b_channel -= b_map * tl.load(p_projection + n_b + i_b)
            b_channel *= CHANNEL * tl.load(p_statistics + 2 * n_b + i_b) * inverse_peak
            b_g += slope(b_u, CHANNEL) * b_channel[:, None]
        b_g = tl.where(b_f == 0, 0.0, tl.where(b_f < 0, -b_g, b_g))
        output = p_output + i_b * output_stride_b + o_c.to(tl.int64)[:, None] * output_stride_c
        tl.store(output + output_offsets_p[None, :], b_g.to(p_output.dtype.element_ty), mask=mask)
