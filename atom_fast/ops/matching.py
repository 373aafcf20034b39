"""The squared distance of class means (equation 3 of the ATOM paper) as an operator, and the grouping of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import native
from .dispatch import dispatch, register
from .launching import accumulation_dtype, device_of, triton_dtype
from .operators import differentiate, fake, operator


class ClassGroups(NamedTuple):
    """Rows of the real and the synthetic side by class. The offsets may end with classes that hold no row."""

    real_order: Tensor  # int64 [B]: the real rows sorted by class
    real_offsets: Tensor  # int64 [K + 1]: start of each class in `real_order`
    synthetic_order: Tensor  # int64 [B']
    synthetic_offsets: Tensor  # int64 [K + 1]

    def of_classes(self, count: int) -> ClassGroups:
        """Return these groups with the offsets of the first ``count`` classes; later classes must hold no rows."""
        return self._replace(
            real_offsets=self.real_offsets[: count + 1], synthetic_offsets=self.synthetic_offsets[: count + 1]
        )


@operator("class_groups")
def class_groups_op(real_labels: Tensor, synthetic_labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return orders and offsets of two sides; one offset per synthetic row, since shapes must not depend on data."""
    real_classes, real_inverse = real_labels.unique(return_inverse=True)
    classes, inverse = synthetic_labels.unique(return_inverse=True)
    if not torch.equal(real_classes, classes):
        raise ValueError(_class_mismatch(real_classes.tolist(), classes.tolist()))
    limit = synthetic_labels.shape[0]
    return *_order_and_offsets(real_inverse, limit), *_order_and_offsets(inverse, limit)


@fake(class_groups_op)
def _(real_labels, synthetic_labels):
    offsets = synthetic_labels.shape[0] + 1
    return (
        torch.empty_like(real_labels),
        real_labels.new_empty(offsets),
        torch.empty_like(synthetic_labels),
        synthetic_labels.new_empty(offsets),
    )


def _order_and_offsets(classes: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    order = classes.argsort(stable=True)
    edges = torch.arange(limit + 1, device=classes.device)
    return order, torch.searchsorted(classes[order].contiguous(), edges)


def _class_mismatch(real: list[int], synthetic: list[int]) -> str:
    only_real = sorted(set(real) - set(synthetic))
    only_synthetic = sorted(set(synthetic) - set(real))
    return (
        "real and synthetic labels must hold the same classes; "
        f"only on the real side: {only_real[:10]}, only on the synthetic side: {only_synthetic[:10]}"
    )


def class_mean_distance(real: Tensor, synthetic: Tensor, groups: ClassGroups | None) -> Tensor:
    """Return the squared distance between the class means of real [B, D] and synthetic [B', D], summed over classes.

    Args:
        real: a constant, floating point.
        synthetic: floating point; the result is differentiable once with respect to it.
        groups: the rows of each class; None if all rows are one class.

    Returns:
        A scalar, float64 for float64 input, otherwise float32.
    """
    return class_mean_distances([real], [synthetic], groups).view(())


def class_mean_distances(real: Sequence[Tensor], synthetic: Sequence[Tensor], groups: ClassGroups | None) -> Tensor:
    """Return the `class_mean_distance` of each of n pairs, [n], which share their rows' classes.

    Args:
        real: n constants [B, D_i], floating point.
        synthetic: n tensors [B', D_i]; the result is differentiable once with respect to them.
        groups: as in `class_mean_distance`.
    """
    return dispatch("matching", list(synthetic), list(real), *(groups or (None,) * 4))


def _run_triton(*arguments):
    return class_mean_distances_op(*arguments, "triton")[0]


def _run_c(synthetic, real, *groups):
    if not native.takes(*real, *synthetic):
        return NotImplemented
    return class_mean_distances_op(synthetic, real, *groups, "c")[0]


def _run_eager(synthetic, real, real_order, real_offsets, synthetic_order, synthetic_offsets):
    dtype = _result_dtype(synthetic)
    pairs = [(r.to(dtype), s.to(dtype)) for r, s in zip(real, synthetic, strict=True)]
    if synthetic_order is None:
        return torch.stack([reference.class_mean_distance(r, s) if len(s) else s.sum() for r, s in pairs])
    labels = _labels(real_order, real_offsets), _labels(synthetic_order, synthetic_offsets)
    return torch.stack([reference.class_mean_distance(*pair, *labels) for pair in pairs])


def _labels(order: Tensor, offsets: Tensor) -> Tensor:
    """Return the label of each row, from the rows sorted by class."""
    positions = torch.arange(order.shape[0], device=order.device)
    labels = torch.empty_like(order)
    labels[order] = torch.searchsorted(offsets, positions, right=True) - 1
    return labels


register("matching", triton=_run_triton, c=_run_c, eager=_run_eager)


def _result_dtype(synthetic: Sequence[Tensor]) -> torch.dtype:
    """Return float64 if a tensor has it, otherwise float32."""
    return max((accumulation_dtype(s.dtype) for s in synthetic), key=lambda dtype: dtype.itemsize)


@operator("class_mean_distances", differentiable=True)
def class_mean_distances_op(
    synthetic: Sequence[Tensor],
    real: Sequence[Tensor],
    real_order: Tensor | None,
    real_offsets: Tensor | None,
    synthetic_order: Tensor | None,
    synthetic_offsets: Tensor | None,
    implementation: str,
) -> tuple[Tensor, list[Tensor]]:
    """Return the distances [n] of real [B, D_i] and synthetic [B', D_i], and each one's gradient [B', D_i].

    Without orders and offsets all rows are one class. The implementation is "triton", or "c" on a CPU.
    """
    dtype, pairs = _result_dtype(synthetic), list(zip(real, synthetic, strict=True))
    orders = real_order, real_offsets, synthetic_order, synthetic_offsets
    compute = _distances_triton if implementation == "triton" else _distances_c
    kept = [i for i, pair in enumerate(pairs) if all(side.numel() for side in pair)]
    if len(kept) == len(pairs):
        gradients = [s.new_empty(s.shape, dtype=dtype) for s in synthetic]
        return compute(pairs, orders, gradients), gradients
    gradients = [s.new_zeros(s.shape, dtype=dtype) for s in synthetic]
    distances = synthetic[0].new_zeros(len(pairs), dtype=dtype)
    if kept:
        distances[kept] = compute([pairs[i] for i in kept], orders, [gradients[i] for i in kept])
    return distances, gradients


@fake(class_mean_distances_op)
def _(synthetic, real, real_order, real_offsets, synthetic_order, synthetic_offsets, implementation):
    dtype = _result_dtype(synthetic)
    return synthetic[0].new_empty(len(synthetic), dtype=dtype), [s.new_empty(s.shape, dtype=dtype) for s in synthetic]


@operator("scaled_gradient")
def scaled_gradient(gradient: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Return gradient * scale in the dtype of ``like``; not differentiable, so that a second derivative raises."""
    return (gradient * scale).to(like.dtype)


@fake(scaled_gradient)
def _(gradient, scale, like):
    return torch.empty_like(gradient, dtype=like.dtype)


def _setup_context(ctx, inputs, output):
    _, gradients = output
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*gradients)
    ctx.like = [s.new_empty(0) for s in inputs[0]]


def _backward(ctx, scales, _):
    scaled = [None] * len(ctx.like)
    if scales is not None:
        parts = zip(ctx.saved_tensors, scales.unbind(), ctx.like, strict=True)
        scaled = [scaled_gradient(*part) for part in parts]
    return scaled, [None] * len(ctx.like), None, None, None, None, None


differentiate(class_mean_distances_op, _backward, _setup_context)


def _distances_triton(pairs, orders, gradients):
    import triton

    from ..kernels import matching as kernels

    offsets = orders[-1]
    classes = 1 if offsets is None else offsets.shape[0] - 1
    launches = [kernels.matching_launch(gradient.shape[1]) for gradient in gradients]
    # A pair of fewer columns has blocks without any, which write zeros: one sum serves all pairs.
    blocks = max(
        triton.cdiv(gradient.shape[1], launch["BLOCK_D"]) for gradient, launch in zip(gradients, launches, strict=True)
    )
    partial = gradients[0].new_empty((len(pairs), classes, blocks))
    for own, pair, gradient, launch in zip(partial, pairs, gradients, launches, strict=True):
        real, synthetic = map(_with_dense_rows, pair)
        with device_of(gradient):
            kernels.class_mean_distance_kernel[(classes, blocks)](
                real, synthetic, *orders, own, gradient,
                real.shape[0], synthetic.shape[0], gradient.shape[1], real.stride(0), synthetic.stride(0),
                GROUPED=offsets is not None, ACCUMULATE=triton_dtype(gradient.dtype), **launch,
            )  # fmt: skip
    return partial.sum((1, 2))


_COLUMNS = 256  # as in kernels/matching.c


def _distances_c(pairs, orders, gradients):
    offsets = orders[-1]
    classes = 1 if offsets is None else offsets.shape[0] - 1
    distances = gradients[0].new_empty(len(pairs))
    for distance, pair, gradient in zip(distances, pairs, gradients, strict=True):
        real, synthetic = (_with_dense_rows(side.to(gradient.dtype)) for side in pair)
        rows, columns = gradient.shape
        portions = classes * -(-columns // _COLUMNS)
        native.run(
            f"class_mean_distance_{native.suffix(gradient.dtype)}", portions, real, real.stride(0), synthetic,
            synthetic.stride(0), *orders, gradient.new_empty(portions), distance, gradient,
            len(real), rows, columns, classes,
        )  # fmt: skip
    return distances


def _with_dense_rows(rows: Tensor) -> Tensor:
    return rows if rows.stride(1) == 1 else rows.contiguous()
