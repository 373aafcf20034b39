"""Spatial and channel attention of a feature map in one read; their gradient in one read and one write.

These kernels are to replace `attention.py` once a GPU has measured both: see ``KERNELS`` in ``ops/launching.py``.

A sample is a matrix [rows, columns] whose columns are adjacent in memory: positions x channels in channels_last,
otherwise channels x positions. One map is then the sums of |f|^p along the rows, the other the sums along the columns
(equations 1 and 2 of the paper), each divided by its L2 norm (equation 3). A power of 0 leaves a map out.

`attention_sums_kernel` sums tiles, and `attention_maps_kernel` adds their sums in a fixed order, so that the same input
gives the same bits. |f|^p may leave the range of the dtype, and then so does the norm of a map. Only in that case
`attention_maps_kernel` reads its sample again and divides it by its largest |f|, a factor that the norm removes.
"""

import triton
import triton.language as tl


def tile_launch(rows: int, columns: int, bytes_per_value: int) -> dict[str, int]:
    """Return the launch table of the kernels that walk over tiles.

    Chosen by instruction counts, no GPU has run it: a thread computes up to 128 values, 16 at a time, with registers
    for 36 to 48 warps on a multiprocessor of an H100. PART columns are a line of the cache.
    """
    block_columns = min(triton.next_power_of_2(columns), max(4096 // triton.next_power_of_2(rows), 128))
    tile_rows = min(triton.next_power_of_2(rows), 16384 // block_columns)
    block_rows = min(tile_rows, max(2048 // block_columns, 1))
    return {
        "TILE_ROWS": tile_rows,
        "BLOCK_ROWS": block_rows,
        "BLOCK_COLUMNS": block_columns,
        "PART": min(block_columns, 128 // bytes_per_value),
        "num_warps": max(block_rows * block_columns // 512, 1),
    }


def map_launch(rows: int, columns: int) -> dict[str, int]:
    """Return the launch table of the kernels that walk over maps, likewise.

    Without a maximum, the compiler of NVIDIA keeps `attention_maps_kernel` to 48 registers on some chips and spills.
    """
    return {"BLOCK": min(triton.next_power_of_2(max(rows, columns)), 512), "num_warps": 4, "maxnreg": 128}


@triton.jit
def _product(f, P: tl.constexpr):
    """Return f^P for a whole P >= 1."""
    if P == 1:
        result = f
    elif P % 2 == 0:
        result = _product(f * f, P // 2)
    else:
        result = f * _product(f * f, P // 2)
    return result


@triton.jit
def _real_power(f, P: tl.constexpr):
    """Return |f|^P for f other than 0."""
    return tl.exp2(P * tl.log2(tl.where(f == 0, 1.0, tl.abs(f))))


@triton.jit
def _power(f, P: tl.constexpr):
    """Return |f|^P."""
    if P % 2 == 0:
        result = _product(f, P)
    elif P % 1 == 0:
        result = _product(tl.abs(f), P)
    else:
        result = tl.where(f == 0, 0.0, _real_power(f, P))
    return result


@triton.jit
def _slope(f, P: tl.constexpr):
    """Return sign(f) |f|^(P - 1): the derivative of |f|^P without its factor P."""
    if P % 2 == 0:
        result = _product(f, P - 1)
    elif P == 1:
        result = tl.where(f > 0, 1.0, tl.where(f < 0, -1.0, f))
    elif P % 1 == 0:
        result = f * _product(tl.abs(f), P - 2)
    else:
        size = _real_power(f, P - 1)
        result = tl.where(f > 0, size, tl.where(f < 0, -size, f))
    return result


@triton.jit
def _load(pointers, mask, EVEN: tl.constexpr):
    """Load a block, filled up with zeros; EVEN if it is full."""
    if EVEN:
        block = tl.load(pointers)
    else:
        block = tl.load(pointers, mask=mask, other=0.0)
    return block


@triton.jit
def _rows(first_row, BLOCK_ROWS: tl.constexpr):
    """Return the rows of a block, [1, BLOCK_ROWS, 1], in 64 bits: they may be far apart in memory."""
    return (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)[None, :, None]


@triton.jit
def _columns(first_column, BLOCK_COLUMNS: tl.constexpr, PART: tl.constexpr):
    """Return the columns of a block, [BLOCK_COLUMNS / PART, 1, PART]."""
    o_part = tl.arange(0, BLOCK_COLUMNS // PART)[:, None, None]
    return first_column + o_part * PART + tl.arange(0, PART)[None, None, :]


@triton.jit
def _sum_tile(
    p_sample, p_row_sums, p_column_sums, first_row, first_column, rows, columns, stride_row, scale,
    ROW_POWER: tl.constexpr, COLUMN_POWER: tl.constexpr, EVEN: tl.constexpr, TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, PART: tl.constexpr,
):  # fmt: skip
    """Write the sums of |scale f|^p along the rows and along the columns of one tile."""
    dtype = p_row_sums.dtype.element_ty
    o_c = _columns(first_column, BLOCK_COLUMNS, PART)
    b_column = tl.zeros([BLOCK_COLUMNS // PART, BLOCK_ROWS, PART], dtype=dtype)
    for start in range(first_row, tl.minimum(first_row + TILE_ROWS, rows), BLOCK_ROWS):
        o_r = _rows(start, BLOCK_ROWS)
        m_r = o_r < rows
        b_f = _load(p_sample + o_r * stride_row + o_c, m_r & (o_c < columns), EVEN).to(dtype) * scale
        if ROW_POWER > 0:
            b_row = tl.sum(tl.sum(_power(b_f, ROW_POWER), axis=0, keep_dims=True), axis=2, keep_dims=True)
            tl.store(p_row_sums + o_r, b_row, mask=None if EVEN else m_r)
        if COLUMN_POWER > 0:
            b_column += _power(b_f, COLUMN_POWER)
    if COLUMN_POWER > 0:
        b_sum = tl.sum(b_column, axis=1, keep_dims=True)
        tl.store(p_column_sums + o_c, b_sum, mask=None if EVEN else o_c < columns)


@triton.jit
def _sums_of_sample(
    p_sums, i_b, rows, columns, n_r, n_c, ROW_POWER: tl.constexpr, COLUMN_POWER: tl.constexpr
):  # fmt: skip
    """Return where the sums of a sample's n_r x n_c tiles begin: along rows, and along columns."""
    n_row_sums = n_c * rows if ROW_POWER > 0 else 0
    n_column_sums = n_r * columns if COLUMN_POWER > 0 else 0
    p_row_sums = p_sums + i_b * (n_row_sums + n_column_sums)
    return p_row_sums, p_row_sums + n_row_sums


@triton.jit
def attention_sums_kernel(
    p_features,
    p_sums,
    rows,
    columns,
    stride_b,
    stride_row,
    ROW_POWER: tl.constexpr,
    COLUMN_POWER: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Sum |f|^p along the rows and along the columns of one tile.

    Grid: (samples, tiles of TILE_ROWS rows, tiles of BLOCK_COLUMNS columns).

    Args:
        p_features: [B, rows, columns], columns adjacent, any floating dtype.
        p_sums: [B, S] sums along the rows [column tiles, rows], then sums along the columns [row tiles, columns].
        EVEN: no block of BLOCK_ROWS rows and BLOCK_COLUMNS columns is cut off.
        BLOCK_ROWS: number of rows at a time.
        PART: number of adjacent columns that are spread over threads; a thread holds the same ones of each part.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_r = tl.program_id(1)
    i_c = tl.program_id(2)
    p_row_sums, p_column_sums = _sums_of_sample(
        p_sums, i_b, rows, columns, tl.num_programs(1), tl.num_programs(2), ROW_POWER, COLUMN_POWER
    )
    _sum_tile(
        p_features + i_b * stride_b, p_row_sums + i_c * rows, p_column_sums + i_r * columns,
        i_r * TILE_ROWS, i_c * BLOCK_COLUMNS, rows, columns, stride_row, 1.0,
        ROW_POWER, COLUMN_POWER, EVEN, TILE_ROWS, BLOCK_ROWS, BLOCK_COLUMNS, PART,
    )  # fmt: skip


@triton.jit
def _write_sum(p_map, p_parts, n_parts, N, BLOCK: tl.constexpr):
    """Write the sum of n_parts rows of N values, added in order; return its L2 norm."""
    dtype = p_map.dtype.element_ty
    squares = tl.zeros([BLOCK], dtype=dtype)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < N
        b_map = tl.zeros([BLOCK], dtype=dtype)
        for part in tl.range(n_parts, loop_unroll_factor=4):
            b_map += tl.load(p_parts + part * N + o_n, mask=m_n, other=0.0)
        tl.store(p_map + o_n, b_map, mask=m_n)
        squares += b_map * b_map
    return tl.sqrt(tl.sum(squares, axis=0))


@triton.jit
def _to_unit_length(p_map, N, norm, BLOCK: tl.constexpr):
    """Divide a map by its norm; return the factor, 1 for a map of zeros."""
    factor = 1.0 / tl.where(norm == 0, 1.0, norm)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        m_n = o_n < N
        tl.store(p_map + o_n, tl.load(p_map + o_n, mask=m_n, other=0.0) * factor, mask=m_n)
    return factor


@triton.jit
def _is_unsafe(norm):
    """Return True if powers or their sums may have left the dtype's range; False for NaN, which remains NaN."""
    least: tl.constexpr = 1e-150 if norm.dtype == tl.float64 else 1e-15
    most: tl.constexpr = 1e150 if norm.dtype == tl.float64 else 1e15
    return (norm < least) | (norm > most)


@triton.jit
def _largest(
    p_sample, rows, columns, stride_row, dtype: tl.constexpr, EVEN: tl.constexpr, BLOCK_ROWS: tl.constexpr,
    PART: tl.constexpr,
):  # fmt: skip
    """Return a sample's largest |f|."""
    largest = tl.zeros([1, BLOCK_ROWS, PART], dtype=dtype)
    n_c = tl.cdiv(columns, PART)
    for block in range(tl.cdiv(rows, BLOCK_ROWS) * n_c):
        o_r = _rows(block // n_c * BLOCK_ROWS, BLOCK_ROWS)
        o_c = _columns(block % n_c * PART, PART, PART)
        b_f = _load(p_sample + o_r * stride_row + o_c, (o_r < rows) & (o_c < columns), EVEN)
        largest = tl.maximum(largest, tl.abs(b_f.to(dtype)))
    return tl.max(tl.max(tl.max(largest, axis=2), axis=1), axis=0)


@triton.jit
def _maps_of_sample(
    p_maps, i_b, rows, columns, ROW_POWER: tl.constexpr, COLUMN_POWER: tl.constexpr, ROWS_ARE_POSITIONS: tl.constexpr
):  # fmt: skip
    """Return where a sample's map of sums along rows and that of sums along columns begin; the spatial map is first."""
    n_rows = rows if ROW_POWER > 0 else 0
    n_columns = columns if COLUMN_POWER > 0 else 0
    p_sample = p_maps + i_b * (n_rows + n_columns)
    if ROWS_ARE_POSITIONS:
        p_row_map = p_sample
        p_column_map = p_sample + n_rows
    else:
        p_row_map = p_sample + n_columns
        p_column_map = p_sample
    return p_row_map, p_column_map


@triton.jit
def attention_maps_kernel(
    p_features,
    p_sums,
    p_maps,
    p_statistics,
    rows,
    columns,
    stride_b,
    stride_row,
    ROW_POWER: tl.constexpr,
    COLUMN_POWER: tl.constexpr,
    ROWS_ARE_POSITIONS: tl.constexpr,
    NORMALIZE: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PART: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Add a sample's sums and divide each map by its L2 norm. Grid: (samples,).

    Args:
        p_features, p_sums: of `attention_sums_kernel`; the sums are computed again if one left the dtype's range.
        p_maps: [B, M] the spatial map followed by the channel map, without those left out.
        p_statistics: [3, B] the number that features were divided by, mostly 1, and the factors 1 / norm of the spatial
            and the channel map (1 without NORMALIZE, for a map of zeros and for one left out).
        BLOCK: number of a map's values at a time.
    """
    i_b = tl.program_id(0).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    dtype = p_maps.dtype.element_ty
    n_r = tl.cdiv(rows, TILE_ROWS)
    n_c = tl.cdiv(columns, BLOCK_COLUMNS)
    p_row_sums, p_column_sums = _sums_of_sample(p_sums, i_b, rows, columns, n_r, n_c, ROW_POWER, COLUMN_POWER)
    p_row_map, p_column_map = _maps_of_sample(p_maps, i_b, rows, columns, ROW_POWER, COLUMN_POWER, ROWS_ARE_POSITIONS)
    tl.store(p_statistics + i_b, 1.0)
    row_norm = tl.full([], 1.0, dtype)
    column_norm = tl.full([], 1.0, dtype)
    if ROW_POWER > 0:
        row_norm = _write_sum(p_row_map, p_row_sums, n_c, rows, BLOCK)
    if COLUMN_POWER > 0:
        column_norm = _write_sum(p_column_map, p_column_sums, n_r, columns, BLOCK)
    row_factor = tl.full([], 1.0, dtype)
    column_factor = tl.full([], 1.0, dtype)
    if NORMALIZE:
        if _is_unsafe(row_norm) | _is_unsafe(column_norm):
            p_sample = p_features + i_b * stride_b
            largest = _largest(p_sample, rows, columns, stride_row, dtype, EVEN, BLOCK_ROWS, PART)
            # The maps of numbers so small that their reciprocal overflows are zeros, as those of zeros.
            smallest: tl.constexpr = 2.2250738585072014e-308 if dtype == tl.float64 else 1.1754943508222875e-38
            peak = tl.where(largest >= smallest, largest, 1.0)
            tl.store(p_statistics + i_b, peak)
            scale = tl.where(largest >= smallest, 1.0 / peak, 0.0)
            for tile in range(n_r * n_c):
                i_r = tile // n_c
                i_c = tile % n_c
                _sum_tile(
                    p_sample, p_row_sums + i_c * rows, p_column_sums + i_r * columns,
                    i_r * TILE_ROWS, i_c * BLOCK_COLUMNS, rows, columns, stride_row, scale,
                    ROW_POWER, COLUMN_POWER, EVEN, TILE_ROWS, BLOCK_ROWS, BLOCK_COLUMNS, PART,
                )  # fmt: skip
            tl.debug_barrier()  # other threads read the sums
            if ROW_POWER > 0:
                row_norm = _write_sum(p_row_map, p_row_sums, n_c, rows, BLOCK)
            if COLUMN_POWER > 0:
                column_norm = _write_sum(p_column_map, p_column_sums, n_r, columns, BLOCK)
        tl.debug_barrier()  # other threads read the maps
        if ROW_POWER > 0:
            row_factor = _to_unit_length(p_row_map, rows, row_norm, BLOCK)
        if COLUMN_POWER > 0:
            column_factor = _to_unit_length(p_column_map, columns, column_norm, BLOCK)
    tl.store(p_statistics + (1 if ROWS_ARE_POSITIONS else 2) * n_b + i_b, row_factor)
    tl.store(p_statistics + (2 if ROWS_ARE_POSITIONS else 1) * n_b + i_b, column_factor)


@triton.jit
def _write_weights(p_weights, p_gradient, p_map, N, scale, NORMALIZE: tl.constexpr, BLOCK: tl.constexpr):
    """Write scale (g - <g, map> map), g the gradient of one map; scale g without NORMALIZE."""
    dtype = p_map.dtype.element_ty
    along = tl.zeros([], dtype=dtype)
    if NORMALIZE:
        products = tl.zeros([BLOCK], dtype=dtype)
        for start in range(0, N, BLOCK):
            o_n = start + tl.arange(0, BLOCK)
            b_g = tl.load(p_gradient + o_n, mask=o_n < N, other=0.0)
            products += b_g * tl.load(p_map + o_n, mask=o_n < N, other=0.0)
        along = tl.sum(products, axis=0)
    for start in range(0, N, BLOCK):
        o_n = start + tl.arange(0, BLOCK)
        b_g = tl.load(p_gradient + o_n, mask=o_n < N, other=0.0)
        if NORMALIZE:
            b_g -= along * tl.load(p_map + o_n, mask=o_n < N, other=0.0)
        tl.store(p_weights + o_n, scale * b_g, mask=o_n < N)


@triton.jit
def attention_weights_kernel(
    p_gradient,
    p_maps,
    p_statistics,
    p_weights,
    positions,
    channels,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Compute the weights of sign(u) |u|^(p - 1), u = f / peak, in the gradient of the features. Grid: (samples,).

    Args:
        p_gradient, p_maps: [B, M] gradient of the maps, and the maps.
        p_statistics: [3, B] from `attention_maps_kernel`.
        p_weights: [B, M] power * factor / peak times the gradient without its component along a normalised map.
        SPATIAL, CHANNEL: the powers.
    """
    i_b = tl.program_id(0).to(tl.int64)
    n_b = tl.num_programs(0).to(tl.int64)
    n_spatial = positions if SPATIAL > 0 else 0
    row = i_b * (n_spatial + (channels if CHANNEL > 0 else 0))
    peak = tl.load(p_statistics + i_b)
    if SPATIAL > 0:
        scale = SPATIAL * tl.load(p_statistics + n_b + i_b) / peak
        _write_weights(p_weights + row, p_gradient + row, p_maps + row, positions, scale, NORMALIZE, BLOCK)
    if CHANNEL > 0:
        row += n_spatial
        scale = CHANNEL * tl.load(p_statistics + 2 * n_b + i_b) / peak
        _write_weights(p_weights + row, p_gradient + row, p_maps + row, channels, scale, NORMALIZE, BLOCK)


@triton.jit
def attention_gradient_kernel(
    p_features,
    p_weights,
    p_statistics,
    p_output,
    rows,
    columns,
    stride_b,
    stride_row,
    output_stride_b,
    output_stride_row,
    ROW_POWER: tl.constexpr,
    COLUMN_POWER: tl.constexpr,
    ROWS_ARE_POSITIONS: tl.constexpr,
    EVEN: tl.constexpr,
    TILE_ROWS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLUMNS: tl.constexpr,
    PART: tl.constexpr,
):
    """Compute the gradient of one tile of the features.

    Grid: (samples, tiles of TILE_ROWS rows, tiles of BLOCK_COLUMNS columns).

    Args:
        p_features: [B, rows, columns], columns adjacent.
        p_weights: [B, M] from `attention_weights_kernel`.
        p_statistics: [3, B] from `attention_maps_kernel`.
        p_output: [B, rows, columns], columns adjacent, in the dtype of the features.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype = p_weights.dtype.element_ty
    p_row, p_column = _maps_of_sample(p_weights, i_b, rows, columns, ROW_POWER, COLUMN_POWER, ROWS_ARE_POSITIONS)
    scale = 1.0 / tl.load(p_statistics + i_b)

    o_c = _columns(tl.program_id(2) * BLOCK_COLUMNS, BLOCK_COLUMNS, PART)
    m_c = o_c < columns
    if COLUMN_POWER > 0:
        b_column = _load(p_column + o_c, m_c, EVEN)
    first_row = tl.program_id(1) * TILE_ROWS
    for start in range(first_row, tl.minimum(first_row + TILE_ROWS, rows), BLOCK_ROWS):
        o_r = _rows(start, BLOCK_ROWS)
        m_r = o_r < rows
        b_u = _load(p_features + i_b * stride_b + o_r * stride_row + o_c, m_r & m_c, EVEN).to(dtype) * scale
        if ROW_POWER > 0:
            b_row = _load(p_row + o_r, m_r, EVEN)
        if ROW_POWER == COLUMN_POWER:
            b_g = _slope(b_u, ROW_POWER) * (b_row + b_column)
        elif COLUMN_POWER == 0:
            b_g = _slope(b_u, ROW_POWER) * b_row
        elif ROW_POWER == 0:
            b_g = _slope(b_u, COLUMN_POWER) * b_column
        else:
            b_g = _slope(b_u, ROW_POWER) * b_row + _slope(b_u, COLUMN_POWER) * b_column
        pointers = p_output + i_b * output_stride_b + o_r * output_stride_row + o_c
        tl.store(pointers, b_g.to(p_output.dtype.element_ty), mask=None if EVEN else m_r & m_c)
