"""A norm, ReLU, attention maps and 2x2 average pooling, forward and backward: the kernels of three operators.

The norm is InstanceNorm, whose statistics belong to a plane (one channel of one sample), or with BATCH BatchNorm, whose
statistics belong to a channel of the batch. The features, which are the input after norm and ReLU, are not written with
POOL: their maps are summed and their quads averaged as they are computed, and backward computes them again.

Tensors lie densely in channels_last. A quad is 2x2 positions; the last quads of odd sides have fewer. A tile
[4 BLOCK_Q, BLOCK_C] holds BLOCK_Q quads of BLOCK_C channels: first their upper left positions, then their upper right,
lower left and lower right ones. So all of a quad is in one thread, and pooling needs no exchange between threads.

A row is TILES tiles of one sample, and a program processes BLOCK_C channels of a row. For InstanceNorm a row is a whole
plane: the program computes its statistics, then its features from the same values, read again from the cache, or kept
in registers where one tile is the plane. For BatchNorm `statistics_kernel` and `batch_statistics_kernel` come first;
backward, `gradient_kernel` runs twice, and `sum_rows_kernel` in between.

Sums have a fixed order: the same input gives the same bits.
"""

import triton
import triton.language as tl

from .powers import power, slope

# If the norms of both maps are between these, no power of a feature and no sum of powers left the range of float32.
LEAST_NORM = tl.constexpr(1e-15)
MOST_NORM = tl.constexpr(1e15)


def norm_launch(
    channels: int, height: int, width: int, element_size: int, norm: str, backward: bool = False
) -> dict[str, int]:
    """Return the launch table of the kernels that walk the input; chosen by instruction counts, no GPU has run it.

    InstanceNorm keeps planes in registers if 8 warps, or 4 in 16 bits, hold them, with 256 bytes per thread, or 128
    backward: its sums over a plane cost each thread the same instructions, however many values it holds. Otherwise a
    thread holds one quad of 16 bytes per position, or two if that is the plane. Channels fill a cache line, or half of
    one where planes fit only then.
    """
    quads = triton.cdiv(height, 2) * triton.cdiv(width, 2)
    block_q = triton.next_power_of_2(quads)
    block_c = min(triton.next_power_of_2(channels), 128 // element_size)
    held = (128 if backward else 256) // element_size
    most_warps = 4 if element_size == 2 else 8
    if norm == "instance" and block_q * block_c == 16 * most_warps * held and block_c == 64:
        block_c = 32
    if norm == "batch" or block_q * block_c > 8 * most_warps * held:
        block_q = min(block_q, max(2048 // element_size // block_c, 1))
        held = (64 if block_q < quads else 128) // element_size
    tiles = triton.cdiv(quads, block_q)
    return {
        "TILES": tiles if norm == "instance" else min(tiles, 4),
        "BLOCK_Q": block_q,
        "BLOCK_C": block_c,
        "num_warps": max(block_q * block_c // (8 * held), 1),
    }


def rows_launch(rows: int) -> dict[str, int]:
    """Return the launch table of the kernels that combine rows: few channels a program, for more programs."""
    return {"BLOCK_R": min(triton.next_power_of_2(rows), 256), "BLOCK_C": 8, "num_warps": 4}


def maps_launch(channels: int, height: int, width: int, launch: dict[str, int]) -> dict[str, int]:
    """Return the launch table of `maps_kernel` for that of `apply_kernel`: its rows, with 32 values per thread.

    With 16 for planes above 64x64, where ptxas 12.9 spills for sm_90.
    """
    block_q = min(launch["BLOCK_Q"], 16)
    tiles = launch["TILES"] * launch["BLOCK_Q"] // block_q
    num_warps = max(block_q * launch["BLOCK_C"] // (256 if tiles <= 64 else 128), 1)
    block = weights_launch(channels, height, width)["BLOCK"]
    return {**launch, "TILES": tiles, "BLOCK_Q": block_q, "BLOCK": block, "num_warps": num_warps}


def weights_launch(channels: int, height: int, width: int) -> dict[str, int]:
    """Return the launch table of `map_weights_kernel`: 8 values per thread."""
    block = min(triton.next_power_of_2(max(channels, height * width)), 1024)
    return {"BLOCK": block, "num_warps": max(block // 256, 1)}


def is_exact(channels: int, height: int, width: int, launch: dict[str, int]) -> bool:
    """Return True if the rows' tiles cover the planes without a masked position."""
    quads = launch["TILES"] * launch["BLOCK_Q"]
    return height % 2 == width % 2 == height * width // 4 % quads == channels % launch["BLOCK_C"] == 0


@triton.jit
def _place(
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, REVERSED: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Return a program's row, its sample, the row's first quad, and the program's block of channels.

    REVERSED: from last to first, for a pass that follows another one: what that read last is still in the cache.
    """
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    parts: tl.constexpr = tl.cdiv(((H + 1) // 2) * ((W + 1) // 2), TILES * BLOCK_Q)
    i_program = tl.program_id(0)
    if REVERSED:
        i_program = tl.num_programs(0) - 1 - i_program
    i_row = (i_program // blocks).to(tl.int64)
    first = (i_row % parts).to(tl.int32) * (TILES * BLOCK_Q)
    return i_row, i_row // parts, first, i_program % blocks


@triton.jit
def _positions(start, H: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return the positions [4 BLOCK_Q] of a tile whose first quad is ``start``, and the mask of those in the plane."""
    o_p = tl.arange(0, 4 * BLOCK_Q)
    o_q = start + o_p % BLOCK_Q
    o_h = 2 * (o_q // ((W + 1) // 2)) + o_p // BLOCK_Q // 2
    o_w = 2 * (o_q % ((W + 1) // 2)) + o_p // BLOCK_Q % 2
    return o_h * W + o_w, (o_h < H) & (o_w < W)


@triton.jit
def _pooled_positions(start, H: tl.constexpr, W: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Return the pooled positions [BLOCK_Q] of a tile's quads, and the mask of those that are whole."""
    o_q = start + tl.arange(0, BLOCK_Q)
    o_h, o_w = o_q // ((W + 1) // 2), o_q % ((W + 1) // 2)
    return o_h * (W // 2) + o_w, (o_h < H // 2) & (o_w < W // 2)


@triton.jit
def _load(p_sample, o_p, m_p, o_c, dtype: tl.constexpr, C: tl.constexpr, EXACT: tl.constexpr):
    """Load channels ``o_c`` of positions ``o_p``, zero where masked; EXACT if nothing is masked."""
    pointers = p_sample + (o_p * C)[:, None] + o_c[None, :]
    if EXACT:
        b_x = tl.load(pointers)
    else:
        b_x = tl.load(pointers, mask=m_p[:, None] & (o_c < C)[None, :], other=0.0)
    return b_x.to(dtype)


@triton.jit
def _store(p_sample, values, o_p, m_p, o_c, C: tl.constexpr, EXACT: tl.constexpr):
    """Write channels ``o_c`` of positions ``o_p``."""
    pointers = p_sample + (o_p * C)[:, None] + o_c[None, :]
    if EXACT:
        tl.store(pointers, values.to(p_sample.dtype.element_ty))
    else:
        tl.store(pointers, values.to(p_sample.dtype.element_ty), mask=m_p[:, None] & (o_c < C)[None, :])


@triton.jit
def _load_vector(p, o_c, dtype: tl.constexpr, C: tl.constexpr):
    """Load a value per channel; zero past the last channel, so that its features are zero."""
    return tl.load(p + o_c, mask=o_c < C, other=0.0).to(dtype)


@triton.jit
def _affine(p_weight, p_bias, b_rstd, o_c, C: tl.constexpr):
    """Return what centred values are multiplied by, and what is added; without ``p_weight``, scale 1 and shift 0."""
    b_scale, b_shift = b_rstd, tl.zeros_like(b_rstd)
    if p_weight is not None:
        b_scale = b_rstd * _load_vector(p_weight, o_c, b_rstd.dtype, C)
        b_shift = _load_vector(p_bias, o_c, b_rstd.dtype, C)
    return b_scale, b_shift


@triton.jit
def _sum_quads(b_tile, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr):
    """Return the sums [BLOCK_Q, BLOCK_C] over the positions of each quad."""
    return tl.sum(tl.reshape(b_tile, [4, BLOCK_Q, BLOCK_C]), axis=0)


@triton.jit
def _count(m_p, dtype: tl.constexpr, BLOCK_Q: tl.constexpr, EXACT: tl.constexpr):
    """Return the number of a tile's positions in the plane."""
    if EXACT:
        count = tl.full([], 4.0 * BLOCK_Q, dtype)
    else:
        count = tl.sum(m_p.to(dtype), axis=0)
    return count


@triton.jit
def _row_statistics(
    p_sample, b_first, first, o_c,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return the number of positions of a row, and their mean and squared deviations [BLOCK_C].

    Sums are of differences from the mean of ``b_first``, the row's first tile. The squared deviations are at least a
    tile's share of the squared distance between that mean and the row's, so subtracting loses few digits.
    """
    dtype: tl.constexpr = b_first.dtype
    _, m_p = _positions(first, H, W, BLOCK_Q)
    count = _count(m_p, dtype, BLOCK_Q, EXACT)
    b_mean = tl.sum(b_first, axis=0) * (1.0 / count)
    b_d = tl.where(m_p[:, None] | EXACT, b_first - b_mean[None, :], 0.0)
    b_squares = b_d * b_d
    if TILES == 1:
        b_square = tl.sum(b_squares, axis=0)
    else:
        b_sums = b_d
        for start in range(first + BLOCK_Q, first + TILES * BLOCK_Q, BLOCK_Q):
            o_p, m_p = _positions(start, H, W, BLOCK_Q)
            b_d = _load(p_sample, o_p, m_p, o_c, dtype, C, EXACT) - b_mean[None, :]
            b_d = tl.where(m_p[:, None] | EXACT, b_d, 0.0)
            b_sums += b_d
            b_squares += b_d * b_d
            count += _count(m_p, dtype, BLOCK_Q, EXACT)
        b_sum = tl.sum(b_sums, axis=0)
        b_shift = b_sum * (1.0 / count)
        b_mean += b_shift
        b_square = tl.sum(b_squares, axis=0) - b_sum * b_shift
    return count, b_mean, tl.maximum(b_square, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def statistics_kernel(
    p_x, p_parts,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute each row's statistics. Grid: rows times blocks of channels.

    Args:
        p_x: [B, C, H, W].
        p_parts: [rows, 3, C] number of positions, their mean, and their squared deviations from it.
    """
    i_row, i_b, first, i_c = _place(C, H, W, False, TILES, BLOCK_Q, BLOCK_C)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    p_x += i_b * (C * H * W)
    o_p, m_p = _positions(first, H, W, BLOCK_Q)
    b_first = _load(p_x, o_p, m_p, o_c, p_parts.dtype.element_ty, C, EXACT)
    count, b_mean, b_square = _row_statistics(p_x, b_first, first, o_c, C, H, W, TILES, BLOCK_Q, BLOCK_C, EXACT)
    p_row = p_parts + i_row * (3 * C) + o_c
    tl.store(p_row, tl.zeros_like(b_mean) + count, mask=o_c < C)
    tl.store(p_row + C, b_mean, mask=o_c < C)
    tl.store(p_row + 2 * C, b_square, mask=o_c < C)


@triton.jit
def batch_statistics_kernel(
    p_parts, p_offset, p_running_mean, p_running_var, p_mean, p_rstd, rows, count, momentum, eps,
    C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Combine rows to statistics of the batch, and update running statistics. Grid: blocks of channels.

    Args:
        p_parts: [rows, 3, C] from `statistics_kernel`.
        p_offset: [C], added to the mean before it enters the running mean, or None.
        p_running_mean, p_running_var: [C], read and written, or None.
        p_mean, p_rstd: [C] mean and 1 / sqrt(variance + eps).
        count: values per channel; at least 2 with running statistics.
    """
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    b_pivot = _load_vector(p_parts + C, o_c, dtype, C)[None, :]
    b_sums = tl.zeros([BLOCK_R, BLOCK_C], dtype)
    b_squares = tl.zeros([BLOCK_R, BLOCK_C], dtype)
    for start in range(0, rows, BLOCK_R):
        o_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        m_r = o_r < rows
        b_n = _load(p_parts, 3 * o_r, m_r, o_c, dtype, C, False)
        b_d = _load(p_parts + C, 3 * o_r, m_r, o_c, dtype, C, False) - b_pivot
        b_sums += b_n * b_d
        b_squares += _load(p_parts + 2 * C, 3 * o_r, m_r, o_c, dtype, C, False) + b_n * b_d * b_d
    b_shift = tl.sum(b_sums, axis=0) / count
    b_mean = tl.sum(b_pivot, axis=0) + b_shift
    b_variance = tl.sum(b_squares, axis=0) / count - b_shift * b_shift
    b_variance = tl.maximum(b_variance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(p_mean + o_c, b_mean, mask=o_c < C)
    tl.store(p_rstd + o_c, 1.0 / tl.sqrt(b_variance + eps), mask=o_c < C)
    if p_running_mean is not None:
        if p_offset is not None:
            b_mean += _load_vector(p_offset, o_c, dtype, C)
        b_old = _load_vector(p_running_mean, o_c, dtype, C)
        b_new = (1 - momentum) * b_old + momentum * b_mean
        tl.store(p_running_mean + o_c, b_new.to(p_running_mean.dtype.element_ty), mask=o_c < C)
        b_old = _load_vector(p_running_var, o_c, dtype, C)
        b_new = (1 - momentum) * b_old + momentum * (b_variance * count / (count - 1))
        tl.store(p_running_var + o_c, b_new.to(p_running_var.dtype.element_ty), mask=o_c < C)


@triton.jit
def _features(b_x, m_p, b_mean, b_scale, b_shift, RECTIFY: tl.constexpr, EXACT: tl.constexpr):
    """Return a tile's features, zero outside the plane; NaN stays NaN."""
    b_f = (b_x - b_mean[None, :]) * b_scale[None, :] + b_shift[None, :]
    if RECTIFY:
        b_f = tl.maximum(b_f, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.where(m_p[:, None] | EXACT, b_f, 0.0)


@triton.jit
def _add_powers(
    b_f, b_channel, p_spatial, o_p, m_p,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Write the sums of a tile's f^SPATIAL over channels; return ``b_channel`` [BLOCK_Q, BLOCK_C] plus f^CHANNEL."""
    if SPATIAL > 0:
        tl.store(p_spatial + o_p, tl.sum(power(b_f, SPATIAL), axis=1), mask=m_p)
    if CHANNEL > 0:
        b_channel += _sum_quads(power(b_f, CHANNEL), BLOCK_Q, BLOCK_C)
    return b_channel


@triton.jit
def apply_kernel(
    p_x, p_weight, p_bias, p_mean, p_rstd, p_out, p_spatial, p_channel, eps,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    BATCH: tl.constexpr, RECTIFY: tl.constexpr, POOL: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Normalise, and with RECTIFY, POOL and powers above 0 do what they name. Grid: rows times blocks of channels.

    Args:
        p_x: [B, C, H, W].
        p_weight, p_bias: [C] scale and shift of the norm; None for 1 and 0.
        p_mean, p_rstd: [B, C] mean and 1 / sqrt(variance + eps) of each plane, written; with BATCH [C], read.
        p_out: [B, C, H, W], with POOL [B, C, H // 2, W // 2].
        p_spatial: [B, blocks of channels, H W] sums of f^SPATIAL over the channels of a block.
        p_channel: [rows, C] sums of f^CHANNEL over the positions of a row.
    """
    i_row, i_b, first, i_c = _place(C, H, W, BATCH, TILES, BLOCK_Q, BLOCK_C)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    p_x += i_b * (C * H * W)
    o_p, m_p = _positions(first, H, W, BLOCK_Q)
    b_x = _load(p_x, o_p, m_p, o_c, dtype, C, EXACT)
    if BATCH:
        b_mean = _load_vector(p_mean, o_c, dtype, C)
        b_rstd = _load_vector(p_rstd, o_c, dtype, C)
    else:
        count, b_mean, b_square = _row_statistics(p_x, b_x, first, o_c, C, H, W, TILES, BLOCK_Q, BLOCK_C, EXACT)
        b_rstd = tl.rsqrt(b_square * (1.0 / count) + eps)
        tl.store(p_mean + i_b * C + o_c, b_mean, mask=o_c < C)
        tl.store(p_rstd + i_b * C + o_c, b_rstd, mask=o_c < C)
    b_scale, b_shift = _affine(p_weight, p_bias, b_rstd, o_c, C)
    if SPATIAL > 0:
        p_spatial += (i_b * tl.cdiv(C, BLOCK_C) + i_c) * (H * W)
    p_out += i_b * (C * (H // 2) * (W // 2) if POOL else C * H * W)
    b_channel = tl.zeros([BLOCK_Q, BLOCK_C], dtype)
    for start in range(first, first + TILES * BLOCK_Q, BLOCK_Q):
        o_p, m_p = _positions(start, H, W, BLOCK_Q)
        if TILES > 1:
            b_x = _load(p_x, o_p, m_p, o_c, dtype, C, EXACT)
        b_f = _features(b_x, m_p, b_mean, b_scale, b_shift, RECTIFY, EXACT)
        b_channel = _add_powers(b_f, b_channel, p_spatial, o_p, m_p, SPATIAL, CHANNEL, BLOCK_Q, BLOCK_C)
        if POOL:
            o_q, m_q = _pooled_positions(start, H, W, BLOCK_Q)
            _store(p_out, _sum_quads(b_f, BLOCK_Q, BLOCK_C) * 0.25, o_q, m_q, o_c, C, EXACT)
        else:
            _store(p_out, b_f, o_p, m_p, o_c, C, EXACT)
    if CHANNEL > 0:
        tl.store(p_channel + i_row * C + o_c, tl.sum(b_channel, axis=0), mask=o_c < C)


@triton.jit
def _sum_parts(p_parts, o_n, N: tl.constexpr, PARTS: tl.constexpr):
    """Return the sum of PARTS parts [PARTS, N] of a map at ``o_n``."""
    b_sum = tl.load(p_parts + o_n, mask=o_n < N, other=0.0)
    for i in range(1, PARTS):
        b_sum += tl.load(p_parts + i * N + o_n, mask=o_n < N, other=0.0)
    return b_sum


@triton.jit
def _square_of_map(p_parts, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Return the squared L2 norm of a map, which is the sum of its parts."""
    square = tl.zeros([BLOCK], p_parts.dtype.element_ty)
    for start in range(0, N, BLOCK):
        b_sum = _sum_parts(p_parts, start + tl.arange(0, BLOCK), N, PARTS)
        square += b_sum * b_sum
    return tl.sum(square, axis=0)


@triton.jit
def _is_unsafe(square, N: tl.constexpr):
    """Return True if a map of N values and this squared norm needs features divided by their peak."""
    return (N > 0) & ~((square >= LEAST_NORM * LEAST_NORM) & (square <= MOST_NORM * MOST_NORM))


@triton.jit
def _write_map(p_parts, p_map, square, N: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Write a map with L2 norm 1; return 1 / norm, or 1 for a map that is zero."""
    factor = 1.0 / tl.sqrt(tl.where(square == 0, 1.0, square))
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        tl.store(p_map + o_n, _sum_parts(p_parts, o_n, N, PARTS) * factor, mask=o_n < N)
    return factor


@triton.jit
def maps_kernel(
    p_x, p_weight, p_bias, p_mean, p_rstd, p_spatial, p_channel, p_maps, p_statistics,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    BATCH: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Complete a sample's maps from the sums of `apply_kernel`. Grid: (samples,).

    Where a norm is not between LEAST_NORM and MOST_NORM, the sums are computed again, of features over their peak.

    Args:
        p_maps: [B, M] the spatial map (H W values), then the channel map (C), each of L2 norm 1 or zero.
        p_statistics: [B, 3] what features are divided by, and 1 / norm of each map; 1 if zero or left out.
        The others as in `apply_kernel`; the statistics of the norm are read.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    blocks: tl.constexpr = tl.cdiv(C, BLOCK_C)
    tiles: tl.constexpr = tl.cdiv(((H + 1) // 2) * ((W + 1) // 2), BLOCK_Q)
    parts: tl.constexpr = tl.cdiv(tiles, TILES)
    places: tl.constexpr = H * W if SPATIAL > 0 else 0
    channels: tl.constexpr = C if CHANNEL > 0 else 0
    p_x += i_b * (C * H * W)
    p_spatial += i_b * (blocks * places)
    p_channel += i_b * (parts * channels)
    p_maps += i_b * (places + channels)
    p_statistics += i_b * 3
    if not BATCH:
        p_mean += i_b * C
        p_rstd += i_b * C
    spatial = _square_of_map(p_spatial, places, blocks, BLOCK)
    channel = _square_of_map(p_channel, channels, parts, BLOCK)
    peak = tl.full([], 1.0, dtype)
    if _is_unsafe(spatial, places) | _is_unsafe(channel, channels):
        b_peaks = tl.zeros([4 * BLOCK_Q, BLOCK_C], dtype)
        for i_tile in range(blocks * tiles):
            o_c = i_tile // tiles * BLOCK_C + tl.arange(0, BLOCK_C)
            o_p, m_p = _positions(i_tile % tiles * BLOCK_Q, H, W, BLOCK_Q)
            b_x = _load(p_x, o_p, m_p, o_c, dtype, C, EXACT)
            b_mean = _load_vector(p_mean, o_c, dtype, C)
            b_scale, b_shift = _affine(p_weight, p_bias, _load_vector(p_rstd, o_c, dtype, C), o_c, C)
            b_peaks = tl.maximum(b_peaks, _features(b_x, m_p, b_mean, b_scale, b_shift, True, EXACT))
        peak = tl.max(tl.max(b_peaks, axis=1), axis=0)
        peak = tl.where(peak > 0, peak, 1.0)
        tl.debug_barrier()  # every thread has read the sums that are written now
        for i_row in range(blocks * parts):
            o_c = i_row // parts * BLOCK_C + tl.arange(0, BLOCK_C)
            first = i_row % parts * (TILES * BLOCK_Q)
            b_mean = _load_vector(p_mean, o_c, dtype, C)
            b_scale, b_shift = _affine(p_weight, p_bias, _load_vector(p_rstd, o_c, dtype, C), o_c, C)
            b_channel = tl.zeros([BLOCK_Q, BLOCK_C], dtype)
            for start in range(first, first + TILES * BLOCK_Q, BLOCK_Q):
                o_p, m_p = _positions(start, H, W, BLOCK_Q)
                b_x = _load(p_x, o_p, m_p, o_c, dtype, C, EXACT)
                b_f = _features(b_x, m_p, b_mean, b_scale, b_shift, True, EXACT) / peak
                p_block = p_spatial + i_row // parts * places
                b_channel = _add_powers(b_f, b_channel, p_block, o_p, m_p, SPATIAL, CHANNEL, BLOCK_Q, BLOCK_C)
            if CHANNEL > 0:
                tl.store(p_channel + i_row % parts * C + o_c, tl.sum(b_channel, axis=0), mask=o_c < C)
        tl.debug_barrier()
        spatial = _square_of_map(p_spatial, places, blocks, BLOCK)
        channel = _square_of_map(p_channel, channels, parts, BLOCK)
    tl.store(p_statistics, peak)
    tl.store(p_statistics + 1, _write_map(p_spatial, p_maps, spatial, places, blocks, BLOCK))
    tl.store(p_statistics + 2, _write_map(p_channel, p_maps + places, channel, channels, parts, BLOCK))


@triton.jit
def _project(p_gradient, p_map, p_weight, factor, N: tl.constexpr, BLOCK: tl.constexpr):
    """Write weight = (gradient - <gradient, map> map) factor for one map of N values."""
    b_dot = tl.zeros([BLOCK], p_map.dtype.element_ty)
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
    p_gradient, p_maps, p_statistics, p_weights,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Compute the factors of (f / peak)^(p - 1) in the gradient of each feature. Grid: (samples,).

    The maps have norm 1, so a gradient along a map is subtracted; the rest, times p / (norm peak), is the factor.

    Args:
        p_gradient, p_maps: [B, M] gradient of the maps, and the maps.
        p_statistics: [B, 3] from `maps_kernel`.
        p_weights: [B, M].
    """
    i_b = tl.program_id(0).to(tl.int64)
    places: tl.constexpr = H * W if SPATIAL > 0 else 0
    channels: tl.constexpr = C if CHANNEL > 0 else 0
    row = i_b * (places + channels)
    inverse_peak = 1.0 / tl.load(p_statistics + i_b * 3)
    factor = tl.load(p_statistics + i_b * 3 + 1) * inverse_peak * SPATIAL
    _project(p_gradient + row, p_maps + row, p_weights + row, factor, places, BLOCK)
    row += places
    factor = tl.load(p_statistics + i_b * 3 + 2) * inverse_peak * CHANNEL
    _project(p_gradient + row, p_maps + row, p_weights + row, factor, channels, BLOCK)


@triton.jit
def _gradient(
    p_x, p_grad, p_weights, start, o_c, b_mean, b_scale, b_shift, b_channel,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    RECTIFY: tl.constexpr, POOL: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Return a tile's centred input, and the gradient of its normalised values, zero outside the plane."""
    dtype: tl.constexpr = b_mean.dtype
    o_p, m_p = _positions(start, H, W, BLOCK_Q)
    b_d = _load(p_x, o_p, m_p, o_c, dtype, C, EXACT) - b_mean[None, :]
    b_y = b_d * b_scale[None, :] + b_shift[None, :]
    b_g = tl.zeros_like(b_d)
    if p_grad is not None:
        if POOL:
            o_q, m_q = _pooled_positions(start, H, W, BLOCK_Q)
            b_g = _load(p_grad, o_q, m_q, o_c, dtype, C, EXACT) * 0.25
            b_g = tl.reshape(tl.broadcast_to(b_g[None, :, :], [4, BLOCK_Q, BLOCK_C]), [4 * BLOCK_Q, BLOCK_C])
        else:
            b_g = _load(p_grad, o_p, m_p, o_c, dtype, C, EXACT)
    if SPATIAL > 0:
        b_g += tl.load(p_weights + o_p, mask=m_p, other=0.0)[:, None] * slope(b_y, SPATIAL)
    if CHANNEL > 0:
        b_g += b_channel[None, :] * slope(b_y, CHANNEL)
    if RECTIFY:
        b_g = tl.where(b_y > 0, b_g, 0.0)
    return b_d, tl.where(m_p[:, None] | EXACT, b_g, 0.0)


@triton.jit
def gradient_kernel(
    p_x, p_grad, p_weight, p_bias, p_mean, p_rstd, p_peak, p_weights, p_sums, p_grad_x, count,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    SUMS: tl.constexpr, RECTIFY: tl.constexpr, POOL: tl.constexpr, SPATIAL: tl.constexpr, CHANNEL: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_C: tl.constexpr, EXACT: tl.constexpr,
):  # fmt: skip
    """Compute the gradient of `apply_kernel`'s input. Grid: rows times blocks of channels.

    The norm's gradient needs two sums over the positions that share its statistics: those of the gradients of its shift
    and of its scale.

    Args:
        p_grad: gradient of p_out of `apply_kernel`; None for zero.
        p_mean, p_rstd: [B, C] with SUMS "own", else [C].
        p_peak: [B, 3] p_statistics of `maps_kernel`; read with powers above 0.
        p_weights: [B, M] from `map_weights_kernel`; read with powers above 0.
        p_sums: [rows, 2, C] a row's gradients of shift and scale, written, or [2, C] those of the batch, read.
        p_grad_x: [B, C, H, W].
        count: number of positions that share statistics.
        SUMS: "own" uses the sums of the row, a plane, and writes them unless p_sums is None; "write" only writes them;
            "read" reads those of the batch.
    """
    i_row, i_b, first, i_c = _place(C, H, W, SUMS == "read", TILES, BLOCK_Q, BLOCK_C)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    places: tl.constexpr = H * W if SPATIAL > 0 else 0
    channels: tl.constexpr = C if CHANNEL > 0 else 0
    p_x += i_b * (C * H * W)
    if p_grad is not None:
        p_grad += i_b * (C * (H // 2) * (W // 2) if POOL else C * H * W)
    if SUMS == "own":
        p_mean += i_b * C
        p_rstd += i_b * C
    b_mean = _load_vector(p_mean, o_c, dtype, C)
    b_rstd = _load_vector(p_rstd, o_c, dtype, C)
    b_scale, b_shift = _affine(p_weight, p_bias, b_rstd, o_c, C)
    b_inner, b_channel = b_scale, b_shift
    if places + channels > 0:
        inverse_peak = 1.0 / tl.load(p_peak + i_b * 3)
        b_inner, b_shift = b_scale * inverse_peak, b_shift * inverse_peak
        p_weights += i_b * (places + channels)
    if CHANNEL > 0:
        b_channel = _load_vector(p_weights + places, o_c, dtype, C)
    b_d, b_g = _gradient(
        p_x, p_grad, p_weights, first, o_c, b_mean, b_inner, b_shift, b_channel,
        C, H, W, RECTIFY, POOL, SPATIAL, CHANNEL, BLOCK_Q, BLOCK_C, EXACT,
    )  # fmt: skip
    if SUMS == "read":
        b_sum = _load_vector(p_sums, o_c, dtype, C)
        b_dot = _load_vector(p_sums + C, o_c, dtype, C)
    else:
        b_sums = _sum_quads(b_g, BLOCK_Q, BLOCK_C)
        b_dots = _sum_quads(b_g * b_d, BLOCK_Q, BLOCK_C)
        for start in range(first + BLOCK_Q, first + TILES * BLOCK_Q, BLOCK_Q):
            b_x, b_h = _gradient(
                p_x, p_grad, p_weights, start, o_c, b_mean, b_inner, b_shift, b_channel,
                C, H, W, RECTIFY, POOL, SPATIAL, CHANNEL, BLOCK_Q, BLOCK_C, EXACT,
            )  # fmt: skip
            b_sums += _sum_quads(b_h, BLOCK_Q, BLOCK_C)
            b_dots += _sum_quads(b_h * b_x, BLOCK_Q, BLOCK_C)
        b_sum = tl.sum(b_sums, axis=0)
        b_dot = tl.sum(b_dots, axis=0) * b_rstd
        if p_sums is not None:
            tl.store(p_sums + i_row * (2 * C) + o_c, b_sum, mask=o_c < C)
            tl.store(p_sums + i_row * (2 * C) + C + o_c, b_dot, mask=o_c < C)
    if SUMS != "write":
        p_grad_x += i_b * (C * H * W)
        share = 1.0 / (tl.zeros([1], dtype) + count)
        b_share = b_scale * share
        b_constant = b_sum * b_share
        b_slope = b_dot * (b_rstd * b_share)
        for start in range(first, first + TILES * BLOCK_Q, BLOCK_Q):
            if TILES > 1:
                b_d, b_g = _gradient(
                    p_x, p_grad, p_weights, start, o_c, b_mean, b_inner, b_shift, b_channel,
                    C, H, W, RECTIFY, POOL, SPATIAL, CHANNEL, BLOCK_Q, BLOCK_C, EXACT,
                )  # fmt: skip
            b_grad_x = b_g * b_scale[None, :] - b_constant[None, :] - b_d * b_slope[None, :]
            o_p, m_p = _positions(start, H, W, BLOCK_Q)
            _store(p_grad_x, b_grad_x, o_p, m_p, o_c, C, EXACT)


@triton.jit
def sum_rows_kernel(
    p_parts, p_shift, p_scale, rows, C: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr
):  # fmt: skip
    """Add the rows' gradients [rows, 2, C] of shift and scale, to [C] each. Grid: blocks of channels."""
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    dtype: tl.constexpr = p_parts.dtype.element_ty
    b_shift = tl.zeros([BLOCK_R, BLOCK_C], dtype)
    b_scale = tl.zeros([BLOCK_R, BLOCK_C], dtype)
    for start in range(0, rows, BLOCK_R):
        o_r = (start + tl.arange(0, BLOCK_R)).to(tl.int64)
        b_shift += _load(p_parts, 2 * o_r, o_r < rows, o_c, dtype, C, False)
        b_scale += _load(p_parts + C, 2 * o_r, o_r < rows, o_c, dtype, C, False)
    tl.store(p_shift + o_c, tl.sum(b_shift, axis=0).to(p_shift.dtype.element_ty), mask=o_c < C)
    tl.store(p_scale + o_c, tl.sum(b_scale, axis=0).to(p_scale.dtype.element_ty), mask=o_c < C)
