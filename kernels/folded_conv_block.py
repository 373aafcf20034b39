"""The first block from the image as a product with filters into which the norm is folded; see `kernels/conv_block.py`.

A norm is affine per plane, so that its output is the product of the image's 3x3 neighbourhoods [positions, 9 channels]
with the filters times scale / standard deviation, plus a shift. No kernel holds a plane: each walks tiles of quads, the
2x2 positions that are pooled. The planes' means and variances follow from the means and the covariance of the
neighbourhoods (`moments_kernel`, `fold_filters_kernel`), which cost less than a walk over the convolution's output.

Neighbourhoods are taken relative to one pixel, so that neither the rounding of the folded filters nor the difference of
squares in the covariance grows with the image's mean.

Maps are sums of powers of the features. Where a map's norm left the range in which no power overflows or vanishes,
`maps_kernel` walks the sample again, with features divided by the largest.

Backward, in one walk: with x the normalised values, the gradient of a norm's input is scale / deviation times
g - mean(g) - x mean(g x). Multiplied by the filters W, with W' the folded ones and P the neighbourhoods, it becomes

    D - mean(D) - M (P - mean(P)),    D = W' g,    M = W diag(mean(g x scale) / variance) W'

`gradients_kernel` computes D and the sums, `correction_kernel` M, and `image_gradient_kernel` adds up the gradients of
overlapping neighbourhoods; there, M becomes a 5x5 convolution of the image. For BatchNorm the means are the batch's.
"""

import triton
import triton.language as tl

from .norm_block import load_tile, map_length, store_tile
from .powers import power, slope

# If a map's norm is between these, no power or sum of it left the range of float32.
LEAST_NORM = tl.constexpr(1e-15)
MOST_NORM = tl.constexpr(1e15)


def launch_table(image_channels: int, channels: int, tensor_cores: bool) -> dict[str, int]:
    """Return the launch table of the kernels that walk TILES tiles of BLOCK_P quads and BLOCK_C channels.

    By instructions and registers: four warps of 128 channels share a tile's neighbourhoods. Without tensor cores a
    product keeps its operands in registers, and more would spill.
    """
    return {
        "BLOCK_P": 16,
        "BLOCK_C": max(16, min(triton.next_power_of_2(channels), 128 if tensor_cores else 32)),
        "BLOCK_K": columns_block(image_channels),
        "TILES": 4,
        "num_warps": 4 if tensor_cores else 8,
        "num_stages": 1,
    }


def forward_registers(capability: int) -> int | None:
    """Return the limit of registers of `features_kernel` with which three programs of four warps fit; None: none."""
    return 168 if capability == 90 else None


def columns_block(image_channels: int) -> int:
    """Return the values of a neighbourhood and two constants, rounded up to a power of two for matrix instructions."""
    return max(16, triton.next_power_of_2(9 * image_channels + 2))


@triton.jit
def _taps(BLOCK_K: tl.constexpr):
    """Return channel, and row and column from the centre, [BLOCK_K], of the values of a neighbourhood.

    By comparisons, because ptxas 12.8 and 12.9 lose constants of divisions that are packed in pairs of 16 bits.
    """
    o_k = tl.arange(0, BLOCK_K)
    channel = (o_k >= 9).to(tl.int32) + (o_k >= 18).to(tl.int32) + (o_k >= 27).to(tl.int32)
    o_k -= 9 * channel
    row = (o_k >= 3).to(tl.int32) + (o_k >= 6).to(tl.int32)
    return channel, row - 1, o_k - 3 * row - 1


@triton.jit
def _origin(
    p_image, strides, dtype: tl.constexpr, CI: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr
):
    """Return what `_columns` subtracts [BLOCK_K]: the middle pixel of the tap's channel, then -1 twice, then 0."""
    o_k = tl.arange(0, BLOCK_K)
    channel, _, _ = _taps(BLOCK_K)
    pointers = p_image + channel * strides[0] + (H // 2) * strides[1] + (W // 2) * strides[2]
    b_pixel = tl.load(pointers, mask=o_k < 9 * CI, other=0.0).to(dtype)
    return tl.where((o_k == 9 * CI) | (o_k == 9 * CI + 1), -1.0, b_pixel)


@triton.jit
def _columns(image, o_h, o_w, CI: tl.constexpr, H: tl.constexpr, W: tl.constexpr, BLOCK_K: tl.constexpr):
    """Load the neighbourhoods [positions, BLOCK_K] of positions (o_h, o_w): (x - origin) scale, where x past 9 CI is 0.

    Args:
        image: the sample's pointer, origin [BLOCK_K], scale, and strides of channels, rows and columns.
    """
    p_image, b_origin, scale, strides = image
    channel, row, column = _taps(BLOCK_K)
    n_h = o_h[:, None] + row[None, :]
    n_w = o_w[:, None] + column[None, :]
    mask = (n_h >= 0) & (n_h < H) & (n_w >= 0) & (n_w < W) & (tl.arange(0, BLOCK_K) < 9 * CI)[None, :]
    b_x = tl.load(p_image + (channel * strides[0])[None, :] + n_h * strides[1] + n_w * strides[2], mask, other=0.0)
    return b_x.to(b_origin.dtype) * scale - (b_origin * scale)[None, :]


@triton.jit
def _load_filters(p_filter, o_k, o_c, CI: tl.constexpr, C: tl.constexpr):
    """Load filters [C, 9 CI] as [BLOCK_K, BLOCK_C]."""
    mask = (o_k < 9 * CI)[:, None] & (o_c < C)[None, :]
    return tl.load(p_filter + o_k[:, None] + (o_c * (9 * CI))[None, :], mask=mask, other=0.0)


@triton.jit
def moments_kernel(
    p_image,
    p_filter,
    p_moments,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BATCH: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Sum the products of all pairs of a neighbourhood's values over one sample's positions. Grid: (samples,).

    Args:
        p_image: [B, CI, H, W], any strides.
        p_filter: [C, CI, 3, 3]; neighbourhoods are rounded to its dtype.
        p_moments: [B, BLOCK_K, BLOCK_K]; row and column 9 CI are of the constant 1, so that they hold sums and count.
        BATCH: values are relative to the first sample's origin instead of their own sample's.
        PRECISION: "tf32" or "ieee", of the products of float32 operands.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_moments.dtype.element_ty
    strides = (stride_c, stride_h, stride_w)
    p_sample = p_image + i_b * stride_b
    b_origin = _origin(p_image if BATCH else p_sample, strides, dtype, CI, H, W, BLOCK_K)
    o_k = tl.arange(0, BLOCK_K)
    b_moments = tl.zeros([BLOCK_K, BLOCK_K], dtype)
    for start in range(0, H * W, BLOCK_N):
        o_n = start + tl.arange(0, BLOCK_N)
        b_columns = _columns((p_sample, b_origin, 1.0, strides), o_n // W, o_n % W, CI, H, W, BLOCK_K)
        b_columns = tl.where((o_n < H * W)[:, None], b_columns, 0.0).to(p_filter.dtype.element_ty)
        b_moments = tl.dot(tl.trans(b_columns), b_columns, b_moments, input_precision=PRECISION, out_dtype=dtype)
    tl.store(p_moments + i_b * (BLOCK_K * BLOCK_K) + o_k[:, None] * BLOCK_K + o_k[None, :], b_moments)


@triton.jit
def _round(b_x, operand: tl.constexpr, PRECISION: tl.constexpr):
    """Round to the operands of matrix instructions; float32 to the nearest TF32, because the instructions truncate."""
    if PRECISION == "tf32":
        b_x = ((b_x.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
    return b_x.to(operand)


@triton.jit
def fold_filters_kernel(
    p_image,
    p_filter,
    p_weight,
    p_bias,
    p_moments,
    p_mean,
    p_rstd,
    p_folded,
    folded_stride_c,
    folded_stride_k,
    eps,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    PRECISION: tl.constexpr,
    EXACT_PRECISION: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Fold the norm into the filters. Grid: (rows, blocks of BLOCK_C channels), one row per sample or for the batch.

    Args:
        p_image: as in `moments_kernel`; the origin is that of sample i for row i.
        p_filter: [C, CI, 3, 3] contiguous.
        p_weight, p_bias: [C] scale and shift of the norm; None for 1 and 0.
        p_moments: [rows, BLOCK_K, BLOCK_K] from `moments_kernel`, summed over samples for the batch; None to read mean
            and rstd instead of writing them.
        p_mean, p_rstd: [rows, C] mean and 1 / sqrt(variance + eps) of the convolution's output.
        p_folded: [rows, blocks BLOCK_C, BLOCK_K] filter scale / deviation in the dtype of the filters, zero past C; two
            strides are given. The values that multiply constants add up to the output where the neighbourhood is the
            origin.
        EXACT_PRECISION: "tf32x3" or "ieee", of products whose rounding the variance would magnify.
    """
    i_r = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    n_c = tl.num_programs(1) * BLOCK_C
    o_k = tl.arange(0, BLOCK_K)
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)
    b_filter = _load_filters(p_filter, o_k, o_c, CI, C).to(dtype)
    b_origin = _origin(p_image + i_r * stride_b, (stride_c, stride_h, stride_w), dtype, CI, H, W, BLOCK_K)
    b_constant = tl.sum(b_filter * b_origin[:, None], axis=0)
    if p_moments is None:
        b_mean = tl.load(p_mean + i_r * C + o_c, mask=o_c < C, other=0.0)
        b_rstd = tl.load(p_rstd + i_r * C + o_c, mask=o_c < C, other=0.0)
        b_shift = b_constant - b_mean
    else:
        p_moments += i_r * (BLOCK_K * BLOCK_K)
        count = tl.load(p_moments + (9 * CI) * (BLOCK_K + 1))
        b_rows = tl.load(p_moments + o_k * BLOCK_K + 9 * CI) / count
        b_columns = tl.load(p_moments + (9 * CI) * BLOCK_K + o_k) / count
        b_covariance = tl.load(p_moments + o_k[:, None] * BLOCK_K + o_k[None, :]) / count
        b_covariance -= b_rows[:, None] * b_columns[None, :]
        b_product = tl.dot(b_covariance, b_filter, input_precision=EXACT_PRECISION, out_dtype=dtype)
        b_variance = tl.maximum(tl.sum(b_filter * b_product, axis=0), 0.0, propagate_nan=tl.PropagateNan.ALL)
        b_shift = -tl.sum(b_filter * b_rows[:, None], axis=0)
        b_mean = b_constant - b_shift
        b_rstd = 1.0 / tl.sqrt(b_variance + eps)
        tl.store(p_mean + i_r * C + o_c, b_mean, mask=o_c < C)
        tl.store(p_rstd + i_r * C + o_c, b_rstd, mask=o_c < C)
    b_scale = b_rstd
    if p_weight is not None:
        b_scale *= tl.load(p_weight + o_c, mask=o_c < C, other=0.0).to(dtype)
    b_shift *= b_scale
    if p_bias is not None:
        b_shift += tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(dtype)
    operand: tl.constexpr = p_folded.dtype.element_ty
    b_folded = _round(b_filter * b_scale[None, :], operand, PRECISION)
    b_high = _round(b_shift, operand, PRECISION)
    b_low = _round(b_shift - b_high, operand, PRECISION)  # what rounding took away
    b_folded = tl.where((o_k == 9 * CI)[:, None], b_high[None, :], b_folded)
    b_folded = tl.where((o_k == 9 * CI + 1)[:, None], b_low[None, :], b_folded)
    b_folded = tl.where((o_c < C)[None, :], b_folded, 0.0)
    p_folded += i_r * (n_c * BLOCK_K)
    tl.store(p_folded + o_k[:, None] * folded_stride_k + o_c[None, :] * folded_stride_c, b_folded)


@triton.jit
def _places(i_t, W: tl.constexpr, BLOCK_P: tl.constexpr):
    """Return row and column [BLOCK_P] of the first positions of the quads of tile ``i_t``."""
    o_p = i_t * BLOCK_P + tl.arange(0, BLOCK_P)
    return 2 * (o_p // ((W + 1) // 2)), 2 * (o_p % ((W + 1) // 2))


@triton.jit
def _add_pairs(a_0, a_1, b_0, b_1):
    """Add two pairs."""
    return a_0 + b_0, a_1 + b_1


@triton.jit
def _walk(
    image, p_folded, p_pooled, p_spatial, p_channel, i_s, i_c, rows,
    CI: tl.constexpr, C: tl.constexpr, H: tl.constexpr, W: tl.constexpr,
    SPATIAL: tl.constexpr, CHANNEL: tl.constexpr, EXACT: tl.constexpr, PRECISION: tl.constexpr,
    CHUNKS: tl.constexpr, TILES: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Compute the features of split ``i_s`` of a sample's tiles and chunk ``i_c`` of its channels.

    Args:
        p_pooled: the sample's pooled features; None to leave them out.
        p_spatial, p_channel: the sample's rows of sums, see `features_kernel`; both None to return the largest feature.
    """
    dtype: tl.constexpr = image[1].dtype
    GROUP: tl.constexpr = min(BLOCK_C, 32)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_filter = tl.trans(tl.load(p_folded + o_c[:, None] * BLOCK_K + tl.arange(0, BLOCK_K)[None, :]))
    b_channel = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    for i_t in range(i_s * TILES, tl.minimum((i_s + 1) * TILES, tl.cdiv(((H + 1) // 2) * ((W + 1) // 2), BLOCK_P))):
        o_h, o_w = _places(i_t, W, BLOCK_P)
        b_pooled = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        for i_h in tl.static_range(2):
            if i_h < rows:
                spatial = ()
                for i_w in tl.static_range(2):
                    n_h, n_w = o_h + i_h, o_w + i_w
                    b_columns = _columns(image, n_h, n_w, CI, H, W, BLOCK_K).to(b_filter.dtype)
                    b_f = tl.dot(b_columns, b_filter, input_precision=PRECISION, out_dtype=dtype)
                    b_f = tl.maximum(b_f, 0.0, propagate_nan=tl.PropagateNan.ALL)
                    if not EXACT:
                        b_f = tl.where(((n_h < H) & (n_w < W))[:, None], b_f, 0.0)
                    b_pooled = b_f if i_h + i_w == 0 else b_pooled + b_f
                    if p_spatial is None:
                        b_channel = tl.maximum(b_channel, b_f)
                    else:
                        if SPATIAL > 0:  # first over the channels of one thread
                            b_groups = tl.reshape(power(b_f, SPATIAL), [BLOCK_P, BLOCK_C // GROUP, GROUP])
                            spatial = spatial + (tl.sum(b_groups, axis=1),)
                        if CHANNEL > 0:
                            b_channel += power(b_f, CHANNEL)
                if p_spatial is not None and SPATIAL > 0:
                    left, right = tl.reduce(spatial, 1, _add_pairs)
                    pointers = p_spatial + i_c * (H * W) + (o_h + i_h) * W + o_w
                    tl.store(pointers, left, mask=(o_h + i_h < H) & (o_w < W))
                    tl.store(pointers + 1, right, mask=(o_h + i_h < H) & (o_w + 1 < W))
        if p_pooled is not None:
            o_p = (o_h // 2) * (W // 2) + o_w // 2
            mask = ((o_h < H // 2 * 2) & (o_w < W // 2 * 2))[:, None] & (o_c < C)[None, :]
            store_tile(p_pooled + o_p[:, None] * C + o_c[None, :], b_pooled * 0.25, mask, EXACT)
    if p_spatial is not None and CHANNEL > 0:
        tl.store(p_channel + i_s * C + o_c, tl.sum(b_channel, axis=0), mask=o_c < C)
    return tl.max(tl.max(b_channel, axis=1), axis=0)


@triton.jit
def features_kernel(
    p_image,
    p_folded,
    p_pooled,
    p_spatial,
    p_channel,
    rows,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BATCH: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Compute the pooled features and both maps before normalisation. Grid: (samples, SPLITS, CHUNKS).

    Args:
        p_folded: from `fold_filters_kernel`; one row for the batch with BATCH.
        p_pooled: [B, C, H // 2, W // 2], channels_last.
        p_spatial: [B, CHUNKS, H W] sums over a chunk's channels of f^SPATIAL.
        p_channel: [B, SPLITS, C] sums over a split's positions of f^CHANNEL.
        rows: 2, of a quad. It is no constant, so that the compiler does not interleave the rows' arithmetic: that would
            spill registers.
        EXACT: tiles cover the planes and channels without a masked value.
        SPLITS, CHUNKS: parts of TILES tiles of a plane, and chunks of BLOCK_C channels.
        The others as in `moments_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_spatial.dtype.element_ty
    strides = (stride_c, stride_h, stride_w)
    p_sample = p_image + i_b * stride_b
    b_origin = _origin(p_image if BATCH else p_sample, strides, dtype, CI, H, W, BLOCK_K)
    i_r = i_b * (0 if BATCH else 1)
    _walk(
        (p_sample, b_origin, 1.0, strides),
        p_folded + i_r * (BLOCK_K * CHUNKS * BLOCK_C),
        p_pooled + i_b * (C * (H // 2) * (W // 2)), p_spatial + i_b * (CHUNKS * H * W), p_channel + i_b * (SPLITS * C),
        tl.program_id(1), tl.program_id(2), rows, CI, C, H, W, SPATIAL, CHANNEL, EXACT, PRECISION,
        CHUNKS, TILES, BLOCK_P, BLOCK_C, BLOCK_K,
    )  # fmt: skip


@triton.jit
def _add_rows(p_rows, rows, N: tl.constexpr, BLOCK: tl.constexpr):
    """Return the sum [BLOCK] of rows of N values, in their order."""
    o_n = tl.arange(0, BLOCK)
    b_sum = tl.load(p_rows + o_n, mask=o_n < N, other=0.0)
    for i in range(1, rows):
        b_sum += tl.load(p_rows + i * N + o_n, mask=o_n < N, other=0.0)
    return b_sum


@triton.jit
def _norm(b_map):
    """Return the L2 norm."""
    return tl.sqrt(tl.sum(b_map * b_map, axis=0))


@triton.jit
def maps_kernel(
    p_image,
    p_folded,
    p_spatial,
    p_channel,
    p_maps,
    p_statistics,
    rows,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BATCH: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_SPATIAL: tl.constexpr,
    BLOCK_CHANNEL: tl.constexpr,
):
    """Normalise a sample's maps; walk the sample again where their powers left the range. Grid: (samples,).

    Args:
        p_spatial, p_channel: from `features_kernel`; overwritten.
        p_maps: [B, M] the spatial map (H W values), then the channel map (C), each of L2 norm 1 or zero.
        p_statistics: [B, 3] what features are divided by, and 1 / norm of each map; 1 if zero or left out.
        BLOCK_SPATIAL, BLOCK_CHANNEL: H W and C rounded up to powers of two.
        The others as in `features_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    dtype: tl.constexpr = p_spatial.dtype.element_ty
    p_spatial += i_b * (CHUNKS * H * W)
    p_channel += i_b * (SPLITS * C)
    peak = tl.full([], 1.0, dtype)
    safe = tl.full([], True, tl.int1)
    if SPATIAL > 0:
        norm = _norm(_add_rows(p_spatial, CHUNKS, H * W, BLOCK_SPATIAL))
        safe = (norm >= LEAST_NORM) & (norm <= MOST_NORM)
    if CHANNEL > 0:
        norm = _norm(_add_rows(p_channel, SPLITS, C, BLOCK_CHANNEL))
        safe = safe & (norm >= LEAST_NORM) & (norm <= MOST_NORM)
    if not safe:
        strides = (stride_c, stride_h, stride_w)
        p_sample = p_image + i_b * stride_b
        b_origin = _origin(p_image if BATCH else p_sample, strides, dtype, CI, H, W, BLOCK_K)
        i_r = i_b * (0 if BATCH else 1)
        p_folded += i_r * (BLOCK_K * CHUNKS * BLOCK_C)
        largest = tl.full([], 0.0, dtype)
        for i in range(SPLITS * CHUNKS):
            found = _walk(
                (p_sample, b_origin, 1.0, strides), p_folded, None, None, None,
                i % SPLITS, i // SPLITS, rows, CI, C, H, W, 0, 0, EXACT, PRECISION,
                CHUNKS, TILES, BLOCK_P, BLOCK_C, BLOCK_K,
            )  # fmt: skip
            largest = tl.maximum(largest, found)
        peak = tl.where(largest > 0, largest, 1.0)
        for i in range(SPLITS * CHUNKS):
            _walk(
                (p_sample, b_origin, 1.0 / peak, strides), p_folded, None, p_spatial, p_channel,
                i % SPLITS, i // SPLITS, rows, CI, C, H, W, SPATIAL, CHANNEL, EXACT, PRECISION,
                CHUNKS, TILES, BLOCK_P, BLOCK_C, BLOCK_K,
            )  # fmt: skip
        tl.debug_barrier()  # the sums are read again by other threads
    p_maps += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    p_statistics += i_b * 3
    tl.store(p_statistics, peak)
    spatial_factor = tl.full([], 1.0, dtype)
    channel_factor = tl.full([], 1.0, dtype)
    if SPATIAL > 0:
        spatial_factor = _store_unit(p_maps, _add_rows(p_spatial, CHUNKS, H * W, BLOCK_SPATIAL), H * W)
        p_maps += H * W
    if CHANNEL > 0:
        channel_factor = _store_unit(p_maps, _add_rows(p_channel, SPLITS, C, BLOCK_CHANNEL), C)
    tl.store(p_statistics + 1, spatial_factor)
    tl.store(p_statistics + 2, channel_factor)


@triton.jit
def _store_unit(p_map, b_map, N: tl.constexpr):
    """Write a map of N values with L2 norm 1; return 1 / norm, or 1 for a zero map."""
    norm = _norm(b_map)
    factor = 1.0 / tl.where(norm == 0, 1.0, norm)
    o_n = tl.arange(0, b_map.shape[0])
    tl.store(p_map + o_n, b_map * factor, mask=o_n < N)
    return factor


@triton.jit
def gradients_kernel(
    p_image,
    p_folded,
    p_bias,
    p_grad_pooled,
    p_weights,
    p_statistics,
    p_columns,
    p_column_sums,
    p_products,
    positions,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    SPATIAL: tl.constexpr,
    CHANNEL: tl.constexpr,
    BATCH: tl.constexpr,
    EXACT: tl.constexpr,
    PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """Multiply the gradient of the norm's output by the folded filters, and sum it. Grid: (samples, SPLITS, CHUNKS).

    Args:
        p_folded: [rows, BLOCK_K, CHUNKS BLOCK_C] from `fold_filters_kernel`, without the norm's shift.
        p_bias: [C] that shift; None for 0.
        p_grad_pooled: [B, C, H // 2, W // 2], channels_last; None counts as zero.
        p_weights: [B, M] from `map_weights_kernel` of `kernels/norm_block.py`.
        p_statistics: [B, 3] from `maps_kernel`.
        p_columns: [B, CHUNKS, 9 CI, (H + 2) (W + 2)] the products of a chunk's channels; its frame is left unwritten.
        p_column_sums: [B, SPLITS, CHUNKS, BLOCK_K] their sums over positions.
        p_products: [B, SPLITS, C] sums of the gradient times the norm's output before its shift.
        positions: 4, of a quad; no constant, as `rows` of `features_kernel`.
        The others as in `features_kernel`.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_s, i_c = tl.program_id(1), tl.program_id(2)
    i_r = i_b * (0 if BATCH else 1)
    dtype: tl.constexpr = p_products.dtype.element_ty
    FRAME: tl.constexpr = (H + 2) * (W + 2)
    strides = (stride_c, stride_h, stride_w)
    peak = tl.load(p_statistics + i_b * 3)
    p_sample = p_image + i_b * stride_b
    b_origin = _origin(p_image if BATCH else p_sample, strides, dtype, CI, H, W, BLOCK_K)
    image = (p_sample, b_origin, 1.0 / peak, strides)
    p_weights += i_b * map_length(C, H, W, SPATIAL, CHANNEL)
    p_columns += (i_b * CHUNKS + i_c) * (9 * CI * FRAME)
    o_k = tl.arange(0, BLOCK_K)
    o_c = i_c * BLOCK_C + tl.arange(0, BLOCK_C)
    b_filter = tl.load(p_folded + (i_r * BLOCK_K + o_k)[:, None] * (CHUNKS * BLOCK_C) + o_c[None, :])
    if p_bias is not None:
        b_bias = tl.load(p_bias + o_c, mask=o_c < C, other=0.0).to(dtype) / peak
    if CHANNEL > 0:
        b_channel = tl.load(p_weights + map_length(0, H, W, SPATIAL, 0) + o_c, mask=o_c < C, other=0.0)
    b_products = tl.zeros([BLOCK_P, BLOCK_C], dtype)
    b_sums = tl.zeros([BLOCK_P, BLOCK_K], dtype)
    for i_t in range(i_s * TILES, tl.minimum((i_s + 1) * TILES, tl.cdiv(((H + 1) // 2) * ((W + 1) // 2), BLOCK_P))):
        o_h, o_w = _places(i_t, W, BLOCK_P)
        b_pooled = tl.zeros([BLOCK_P, BLOCK_C], dtype)
        if p_grad_pooled is not None:
            o_p = (o_h // 2) * (W // 2) + o_w // 2
            mask = ((o_h < H // 2 * 2) & (o_w < W // 2 * 2))[:, None] & (o_c < C)[None, :]
            p_pooled = p_grad_pooled + i_b * (C * (H // 2) * (W // 2)) + o_p[:, None] * C + o_c[None, :]
            b_pooled = load_tile(p_pooled, mask, dtype, EXACT) * 0.25
        for i_q in tl.static_range(4):
            if i_q < positions:
                n_h, n_w = o_h + i_q // 2, o_w + i_q % 2
                m_p = (n_h < H) & (n_w < W)
                b_patch = _columns(image, n_h, n_w, CI, H, W, BLOCK_K).to(b_filter.dtype)
                b_z = tl.dot(b_patch, b_filter, input_precision=PRECISION, out_dtype=dtype)
                b_y = b_z
                if p_bias is not None:
                    b_y += b_bias[None, :]
                b_g = b_pooled
                if SPATIAL > 0:
                    b_spatial = tl.load(p_weights + n_h * W + n_w, mask=m_p, other=0.0)
                    b_g += b_spatial[:, None] * slope(b_y, SPATIAL)
                if CHANNEL > 0:
                    b_g += b_channel[None, :] * slope(b_y, CHANNEL)
                b_g = tl.where(b_y > 0, b_g, 0.0)
                if not EXACT:
                    b_g = tl.where(m_p[:, None], b_g, 0.0)
                b_products += b_g * b_z
                b_columns = tl.dot(
                    b_g.to(b_filter.dtype), tl.trans(b_filter), input_precision=PRECISION, out_dtype=dtype
                )
                b_sums += b_columns
                pointers = p_columns + (o_k * FRAME)[None, :] + ((n_h + 1) * (W + 2) + n_w + 1)[:, None]
                tl.store(pointers, b_columns, mask=m_p[:, None] & (o_k < 9 * CI)[None, :])
    row = (i_b * SPLITS + i_s) * CHUNKS + i_c
    tl.store(p_column_sums + row * BLOCK_K + o_k, tl.sum(b_sums, axis=0))
    tl.store(p_products + (i_b * SPLITS + i_s) * C + o_c, tl.sum(b_products, axis=0) * peak, mask=o_c < C)


@triton.jit
def correction_kernel(
    p_image,
    p_filter,
    p_mean,
    p_rstd,
    p_column_sums,
    p_products,
    p_matrix,
    p_columns,
    p_taps,
    p_constant,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    C: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    BATCH: tl.constexpr,
    EXACT_PRECISION: tl.constexpr,
    SPLITS: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """Compute what the norm's gradient subtracts, as a 5x5 convolution of the image. Grid: (samples,).

    With M and the means as at the top of this file, position p of the neighbourhoods' gradient is reduced by
    M P(p) + c, where c = mean(D) - M mean(P). Summed over the nine neighbourhoods of a pixel, M becomes taps of a 5x5
    convolution. It includes positions outside the plane, which have no gradient: they are given M P(p) + c, so that
    nothing is left of them.

    Args:
        p_column_sums, p_products: [B, SPLITS, CHUNKS, BLOCK_K] and [B, SPLITS, C] from `gradients_kernel`; with BATCH
            their means over samples, [1, SPLITS, CHUNKS, BLOCK_K] and [1, SPLITS, C].
        p_matrix: [B, BLOCK_K, BLOCK_K] scratch memory for M.
        p_columns: from `gradients_kernel`; the frame is written.
        p_taps: [B, CI, CI, 25] by channel of the gradient, channel, row and column of the image.
        p_constant: [B, CI] sum of c over the nine neighbourhoods.
        BLOCK_N: positions of the frame per step.
        BLOCK_T: 25 CI CI rounded up to a power of two.
    """
    i_b = tl.program_id(0).to(tl.int64)
    i_r = i_b * (0 if BATCH else 1)
    dtype: tl.constexpr = p_mean.dtype.element_ty
    FRAME: tl.constexpr = (H + 2) * (W + 2)
    o_k = tl.arange(0, BLOCK_K)
    b_matrix = tl.zeros([BLOCK_K, BLOCK_K], dtype)
    b_constant = _add_rows(p_column_sums + i_r * (SPLITS * CHUNKS * BLOCK_K), SPLITS * CHUNKS, BLOCK_K, BLOCK_K)
    b_constant /= H * W
    for start in range(0, C, BLOCK_C):
        o_c = start + tl.arange(0, BLOCK_C)
        b_filter = _load_filters(p_filter, o_k, o_c, CI, C).to(dtype)
        b_mean = tl.load(p_mean + i_r * C + o_c, mask=o_c < C, other=0.0)
        b_factor = tl.load(p_rstd + i_r * C + o_c, mask=o_c < C, other=0.0)
        b_sum = tl.zeros([BLOCK_C], dtype)
        for i_s in range(SPLITS):
            b_sum += tl.load(p_products + (i_r * SPLITS + i_s) * C + o_c, mask=o_c < C, other=0.0)
        b_factor *= b_factor * b_sum / (H * W)
        b_scaled = b_filter * b_factor[None, :]
        b_matrix = tl.dot(b_scaled, tl.trans(b_filter), b_matrix, input_precision=EXACT_PRECISION, out_dtype=dtype)
        b_constant -= tl.sum(b_scaled * b_mean[None, :], axis=1)

    p_matrix += i_b * (BLOCK_K * BLOCK_K)
    tl.store(p_matrix + o_k[:, None] * BLOCK_K + o_k[None, :], b_matrix)
    tl.debug_barrier()  # it is read again by other threads
    o_t = tl.arange(0, BLOCK_T)
    i_out, i_in, i_tap = o_t // (CI * 25), o_t // 25 % CI, o_t % 25
    b_taps = tl.zeros([BLOCK_T], dtype)
    for i_k in tl.static_range(9):
        row, column = i_tap // 5 - 2 + i_k // 3, i_tap % 5 - 2 + i_k % 3
        m_t = (row >= 0) & (row < 3) & (column >= 0) & (column < 3) & (o_t < CI * CI * 25)
        b_taps += tl.load(p_matrix + (9 * i_out + i_k) * BLOCK_K + 9 * i_in + 3 * row + column, mask=m_t, other=0.0)
    tl.store(p_taps + i_b * (CI * CI * 25) + o_t, b_taps, mask=o_t < CI * CI * 25)
    for i_k in tl.static_range(CI):
        total = tl.sum(tl.where((o_k >= 9 * i_k) & (o_k < 9 * i_k + 9), b_constant, 0.0), axis=0)
        tl.store(p_constant + i_b * CI + i_k, total)

    p_columns += i_b * (CHUNKS * 9 * CI * FRAME)
    image = (p_image + i_b * stride_b, tl.zeros([BLOCK_K], dtype), 1.0, (stride_c, stride_h, stride_w))
    for start in range(0, 2 * (H + W) + 4, BLOCK_N):
        # Above, below, then left and right of the plane, alternately.
        o_n = start + tl.arange(0, BLOCK_N)
        o_side = o_n - 2 * (W + 2)
        o_h = tl.where(o_side >= 0, o_side // 2, tl.where(o_n < W + 2, -1, H))
        o_w = tl.where(o_side >= 0, o_side % 2 * (W + 1) - 1, o_n % (W + 2) - 1)
        b_columns = _columns(image, o_h, o_w, CI, H, W, BLOCK_K)
        b_ring = tl.dot(b_columns, b_matrix, input_precision=EXACT_PRECISION, out_dtype=dtype) + b_constant[None, :]
        pointers = p_columns + (o_k * FRAME)[None, :] + ((o_h + 1) * (W + 2) + o_w + 1)[:, None]
        m_n = (o_n < 2 * (H + W) + 4)[:, None] & (o_k < 9 * CI)[None, :]
        for i_o in tl.static_range(CHUNKS):
            tl.store(pointers + i_o * (9 * CI * FRAME), b_ring if i_o == 0 else b_ring * 0, mask=m_n)


@triton.jit
def image_gradient_kernel(
    p_image,
    p_columns,
    p_taps,
    p_constant,
    p_grad_image,
    stride_b,
    stride_c: tl.constexpr,
    stride_h: tl.constexpr,
    stride_w: tl.constexpr,
    CI: tl.constexpr,
    H: tl.constexpr,
    W: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_CI: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Sum each pixel's gradients over its nine neighbourhoods, less the correction. Grid: (samples, pixels / BLOCK).

    Args:
        p_columns, p_taps, p_constant: from `gradients_kernel` and `correction_kernel`.
        p_grad_image: [B, CI, H, W] contiguous.
        BLOCK_CI: CI rounded up to a power of two.
    """
    i_b = tl.program_id(0).to(tl.int64)
    FRAME: tl.constexpr = (H + 2) * (W + 2)
    o_p = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    o_h, o_w = o_p // W, o_p % W
    o_c = tl.arange(0, BLOCK_CI)[:, None]
    mask = (o_p < H * W)[None, :] & (o_c < CI)
    p_image += i_b * stride_b
    p_taps += i_b * (CI * CI * 25) + o_c * (CI * 25)
    p_columns += i_b * (CHUNKS * 9 * CI * FRAME) + o_c * (9 * FRAME) + ((o_h + 2) * (W + 2) + o_w + 2)[None, :]
    b_sum = -tl.load(p_constant + i_b * CI + o_c, mask=o_c < CI, other=0.0)
    for i_c in tl.static_range(CHUNKS):
        for i_k in tl.static_range(9):
            offset = (i_c * 9 * CI + i_k) * FRAME - (i_k // 3) * (W + 2) - i_k % 3
            b_sum += tl.load(p_columns + offset, mask=mask, other=0.0)
    for i_k in tl.static_range(25):
        n_h, n_w = o_h + (i_k // 5 - 2), o_w + (i_k % 5 - 2)
        m_p = (n_h >= 0) & (n_h < H) & (n_w >= 0) & (n_w < W) & (o_p < H * W)
        for i_c in tl.static_range(CI):
            b_x = tl.load(p_image + i_c * stride_c + n_h * stride_h + n_w * stride_w, mask=m_p, other=0.0)
            b_tap = tl.load(p_taps + (i_c * 25 + i_k), mask=o_c < CI, other=0.0)
            b_sum -= b_tap * b_x.to(b_sum.dtype)[None, :]
    tl.store(p_grad_image + (i_b * CI + o_c) * (H * W) + o_p[None, :], b_sum.to(p_grad_image.dtype.element_ty), mask)
