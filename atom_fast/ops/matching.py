"""The squared distance of class means (equation 3 of the ATOM paper) as an operator, and the grouping of samples."""

from __future__ import annotations

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
    return dispatch("matching", real, synthetic, *(groups or (None,) * 4))


def _run_triton(*arguments):
    return class_mean_distance_op(*arguments, "triton")[0]


def _run_c(real, synthetic, *groups):
    if not native.takes(real, synthetic):
        return NotImplemented
    return class_mean_distance_op(real, synthetic, *groups, "c")[0]


def _run_eager(real, synthetic, real_order, real_offsets, synthetic_order, synthetic_offsets):
    dtype = accumulation_dtype(synthetic.dtype)
    real, synthetic = real.to(dtype), synthetic.to(dtype)
    if synthetic_order is None:
        return reference.class_mean_distance(real, synthetic) if len(synthetic) else synthetic.sum()
    labels = _labels(real_order, real_offsets), _labels(synthetic_order, synthetic_offsets)
    return reference.class_mean_distance(real, synthetic, *labels)


def _labels(order: Tensor, offsets: Tensor) -> Tensor:
    """Return the label of each row, from the rows sorted by class."""
    positions = torch.arange(order.shape[0], device=order.device)
    labels = torch.empty_like(order)
    labels[order] = torch.searchsorted(offsets, positions, right=True) - 1
    return labels


register("matching", triton=_run_triton, c=_run_c, eager=_run_eager)


@operator("class_mean_distance", differentiable=True)
def class_mean_distance_op(
    real: Tensor,
    synthetic: Tensor,
    real_order: Tensor | None,
    real_offsets: Tensor | None,
    synthetic_order: Tensor | None,
    synthetic_offsets: Tensor | None,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return the distance (scalar) of real [B, D] and synthetic [B', D], and its gradient [B', D] for the latter.

    Without orders and offsets all rows are one class. The implementation is "triton", or "c" on a CPU.
    """
    dtype = accumulation_dtype(synthetic.dtype)
    if real.numel() == 0 or synthetic.numel() == 0:
        return synthetic.new_zeros((), dtype=dtype), synthetic.new_zeros(synthetic.shape, dtype=dtype)
    distance = _distance_triton if implementation == "triton" else _distance_c
    return distance(real, synthetic, real_order, real_offsets, synthetic_order, synthetic_offsets, dtype)


@fake(class_mean_distance_op)
def _(real, synthetic, real_order, real_offsets, synthetic_order, synthetic_offsets, implementation):
    dtype = accumulation_dtype(synthetic.dtype)
    return synthetic.new_empty((), dtype=dtype), synthetic.new_empty(synthetic.shape, dtype=dtype)


@operator("scaled_gradient")
def scaled_gradient(gradient: Tensor, scale: Tensor, like: Tensor) -> Tensor:
    """Return gradient * scale in the dtype of ``like``; not differentiable, so that a second derivative raises."""
    return (gradient * scale).to(like.dtype)


@fake(scaled_gradient)
def _(gradient, scale, like):
    return torch.empty_like(gradient, dtype=like.dtype)


def _setup_context(ctx, inputs, output):
    _, gradient = output
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.like = inputs[1].new_empty(0)


def _backward(ctx, scale, _):
    (gradient,) = ctx.saved_tensors
    return None, scaled_gradient(gradient, scale, ctx.like), None, None, None, None, None


differentiate(class_mean_distance_op, _backward, _setup_context)


def _distance_triton(real, synthetic, real_order, real_offsets, synthetic_order, synthetic_offsets, dtype):
    import triton

    from ..kernels import matching as kernels

    columns = synthetic.shape[1]
    grouped = synthetic_offsets is not None
    classes = synthetic_offsets.shape[0] - 1 if grouped else 1
    launch = kernels.matching_launch(columns)
    blocks = triton.cdiv(columns, launch["BLOCK_D"])
    partial = synthetic.new_empty((classes, blocks), dtype=dtype)
    gradient = synthetic.new_empty(synthetic.shape, dtype=dtype)
    real, synthetic = (side if side.stride(1) == 1 else side.contiguous() for side in (real, synthetic))
    with device_of(synthetic):
        kernels.class_mean_distance_kernel[(classes, blocks)](
            real, synthetic, real_order, real_offsets, synthetic_order, synthetic_offsets, partial, gradient,
            real.shape[0], synthetic.shape[0], columns, real.stride(0), synthetic.stride(0),
            GROUPED=grouped, ACCUMULATE=triton_dtype(dtype), **launch,
        )  # fmt: skip
    return partial.sum(), gradient


_COLUMNS = 256  # as in kernels/matching.c


def _distance_c(real, synthetic, real_order, real_offsets, synthetic_order, synthetic_offsets, dtype):
    real, synthetic = (
        side if side.stride(1) == 1 else side.contiguous() for side in (real.to(dtype), synthetic.to(dtype))
    )
    columns = synthetic.shape[1]
    classes = 1 if synthetic_offsets is None else synthetic_offsets.shape[0] - 1
    portions = classes * -(-columns // _COLUMNS)
    partial = synthetic.new_empty(portions)
    distance, gradient = synthetic.new_empty(()), synthetic.new_empty(synthetic.shape)
    native.run(
        f"class_mean_distance_{native.suffix(dtype)}", portions, real, real.stride(0), synthetic,
        synthetic.stride(0), real_order, real_offsets, synthetic_order, synthetic_offsets, partial, distance, gradient,
        len(real), len(synthetic), columns, classes,
    )  # fmt: skip
    return distance, gradient
