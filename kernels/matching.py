"""Squared distance between the class means of real and synthetic samples, and its gradient (equation 3)."""

import triton
import triton.language as tl


def matching_launch(columns: int) -> dict[str, int]:
    """Return the launch table: block sizes in columns and rows for maps or embeddings of ``columns`` values."""
    block_d = min(triton.next_power_of_2(columns), 128)
    return {"BLOCK_D": block_d, "BLOCK_N": 32, "num_warps": 4}


@triton.jit
def _rows(p_order, o_n, m_n, GROUPED: tl.constexpr):
    """Return the row numbers of the samples at positions ``o_n`` of the order by class."""
    if GROUPED:
        rows = tl.load(p_order + o_n, mask=m_n, other=0)
    else:
        rows = o_n.to(tl.int64)
    return rows


@triton.jit
def _class_mean(
    p_values,
    p_order,
    start,
    end,
    o_d,
    D,
    stride,
    GROUPED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Return the mean of the rows at positions [start, end) of the order by class."""
    total = tl.zeros([BLOCK_D], dtype=ACCUMULATE)
    for first in range(start, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        rows = _rows(p_order, o_n, m_n, GROUPED)
        pointers = p_values + rows[:, None] * stride + o_d[None, :]
        total += tl.sum(tl.load(pointers, mask=m_n[:, None] & (o_d < D)[None, :], other=0.0).to(ACCUMULATE), axis=0)
    return total / tl.maximum(end - start, 1).to(ACCUMULATE)


@triton.jit
def class_mean_distance_kernel(
    p_real,
    p_synthetic,
    p_real_order,
    p_real_offsets,
    p_synthetic_order,
    p_synthetic_offsets,
    p_partial,
    p_gradient,
    n_real,
    n_synthetic,
    D,
    real_stride,
    synthetic_stride,
    GROUPED: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Compute |mean real - mean synthetic|^2 and its gradient per class and block of columns. Grid: (classes, blocks).

    Args:
        p_real, p_synthetic: [n_real, D], [n_synthetic, D], rows ``*_stride`` apart.
        p_real_order, p_synthetic_order: int64, row numbers sorted by class; not read without GROUPED (one class).
        p_real_offsets, p_synthetic_offsets: int64 [classes + 1], start of each class in its order.
        p_partial: [classes, blocks] squared distances, to be added in this order.
        p_gradient: [n_synthetic, D] gradient of the summed distance with respect to the synthetic rows.
    """
    i_k = tl.program_id(0)
    i_d = tl.program_id(1)
    o_d = i_d * BLOCK_D + tl.arange(0, BLOCK_D)
    if GROUPED:
        real_start = tl.load(p_real_offsets + i_k)
        real_end = tl.load(p_real_offsets + i_k + 1)
        start = tl.load(p_synthetic_offsets + i_k)
        end = tl.load(p_synthetic_offsets + i_k + 1)
    else:
        start = i_k.to(tl.int64) * 0
        real_start = start
        real_end = real_start + n_real
        end = start + n_synthetic
    difference = _class_mean(
        p_real, p_real_order, real_start, real_end, o_d, D, real_stride, GROUPED, ACCUMULATE, BLOCK_N, BLOCK_D
    ) - _class_mean(
        p_synthetic, p_synthetic_order, start, end, o_d, D, synthetic_stride, GROUPED, ACCUMULATE, BLOCK_N, BLOCK_D
    )
    difference = tl.where(o_d < D, difference, 0.0)
    tl.store(p_partial + i_k * tl.num_programs(1) + i_d, tl.sum(difference * difference, axis=0))
    row = difference * (-2.0 / tl.maximum(end - start, 1).to(ACCUMULATE))
    for first in range(start, end, BLOCK_N):
        o_n = first + tl.arange(0, BLOCK_N)
        m_n = o_n < end
        rows = _rows(p_synthetic_order, o_n, m_n, GROUPED)
        values = tl.broadcast_to(row[None, :], [BLOCK_N, BLOCK_D]).to(p_gradient.dtype.element_ty)
        tl.store(p_gradient + rows[:, None] * D + o_d[None, :], values, mask=m_n[:, None] & (o_d < D)[None, :])
