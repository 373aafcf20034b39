"""BatchNorm, ReLU and 2x2 average pooling as one operator, for training and for testing.

The statistics are a pass of their own, since they are of the whole batch; the input and two numbers a channel are kept
for the backward pass, and asking for a second derivative raises. That is on a GPU, and on a CPU for float32 in
channels_last; elsewhere PyTorch's own operators run.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native
from .._backend import resolve_backend
from .instance_norm import check_input, empty_gradient, empty_output, rectified_and_pooled
from .launching import accumulation_dtype, addressable, device_of, is_traced
from .norm_block import join_statistics, sums_passes


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    *,
    offset: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    rectify: bool = False,
    pool: bool = False,
) -> Tensor:
    """Normalise every channel, scale and shift it; then, as asked for, ReLU and 2x2 average pooling.

    What is normalised is ``x + offset``, as where a convolution's bias comes before the norm. Statistics of the batch
    take it away again, so that it costs no pass: the running mean alone depends on it, and its gradient is zero.

    Args:
        x: [B, C, H, W], floating point; fastest in channels_last. H and W even with ``pool``.
        weight, bias: [C] scale and shift, in the type of ``x`` or a wider one.
        running_mean, running_var: [C], both or neither. With ``training`` they are updated in place, as by
            ``nn.BatchNorm2d``: the variance is the unbiased one.
        offset: [C], added to every place of ``x``.
        training: normalise by mean and variance of the batch, over B, H and W; otherwise by the running ones.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        rectify: apply ReLU.
        pool: apply 2x2 average pooling, after ReLU.

    Returns:
        [B, C, H, W], with ``pool`` [B, C, H / 2, W / 2], in the type and memory format of ``x``. Differentiable once,
        in ``x``, ``weight``, ``bias`` and ``offset``.

    Raises:
        ValueError: a shape does not fit, running statistics are missing, or a channel has fewer than two values to
            train with.
    """
    _check(x, weight, bias, running_mean, running_var, offset, training, pool)
    if not is_fused(x, training, weight, bias, running_mean, running_var, offset):
        return reference_batch_norm(
            x, weight, bias, running_mean, running_var, offset, training, momentum, eps, rectify, pool
        )
    native = resolve_backend(x) == "native"
    if training:
        if running_mean is None:  # updated for nobody
            running_mean, running_var = torch.empty_like(weight), torch.empty_like(weight)
        statistics = _statistics_native if native else batch_statistics_op
        offset_alone = None if offset is None else offset.detach()
        mean, rstd = statistics(x.detach(), offset_alone, running_mean, running_var, momentum, eps)
    else:
        wide = accumulation_dtype(x.dtype)
        mean = (running_mean if offset is None else running_mean - offset).to(wide)
        rstd = (running_var + eps).rsqrt().to(wide)
    apply = _BatchNorm.apply if native else batch_norm_op
    return apply(x, weight, bias, offset, mean, rstd, rectify, pool)


def is_fused(x: Tensor, training: bool, *vectors: Tensor | None) -> bool:
    """Whether `batch_norm` of ``x``, with these vectors, is one operation and not PyTorch's own operators."""
    backend = resolve_backend(x)
    if not training and torch.is_grad_enabled():
        return False
    if backend == "native":
        dense = x.is_contiguous(memory_format=torch.channels_last)
        return dense and _native.takes(x, *vectors) and not is_traced() and not x.is_neg()
    return backend == "triton"


def _check(x, weight, bias, running_mean, running_var, offset, training, pool) -> None:
    vectors = {"running_mean": running_mean, "running_var": running_var, "offset": offset}
    check_input(x, pool, weight=weight, bias=bias, **vectors)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together; got one of them")
    if not training and running_mean is None:
        raise ValueError("without training, running_mean and running_var are what x is normalised by; got None")
    if training and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"training needs two values a channel or more; got x of shape {tuple(x.shape)}")


def reference_batch_norm(
    x, weight, bias, running_mean, running_var, offset, training, momentum, eps, rectify, pool
) -> Tensor:
    """`batch_norm` in PyTorch's own operators."""
    x = x if offset is None else x + offset.to(x.dtype)[:, None, None]
    x = F.batch_norm(x, running_mean, running_var, weight, bias, training, momentum, eps)
    return rectified_and_pooled(x, rectify, pool)


@torch.library.custom_op("atom_fast::batch_statistics", mutates_args=("running_mean", "running_var"))
def batch_statistics_op(
    x: Tensor, offset: Tensor | None, running_mean: Tensor, running_var: Tensor, momentum: float, eps: float
) -> tuple[Tensor, Tensor]:
    """Mean and 1 / standard deviation [C] of ``x``; updates the running statistics of ``x + offset``."""
    from ..kernels.batch_norm import batch_norm_parts_kernel, batch_norm_statistics_kernel, statistics_launch

    x = addressable(x)
    mean, rstd = _empty_statistics(x)
    rows, grid, constants = _launch(x)
    means, squares = mean.new_empty((2, rows, x.shape[1])).unbind()
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    launch = statistics_launch(rows)
    with device_of(x):
        batch_norm_parts_kernel[grid](x, means, squares, *x.stride(), **constants)
        batch_norm_statistics_kernel[(-(-channels // launch["BLOCK_C"]),)](
            means, squares, offset, running_mean, running_var, mean, rstd, rows, x.shape[0] * positions,
            MOMENTUM=momentum, EPS=eps, C=channels, POSITIONS=positions, PLACES=constants["PLACES"], **launch,
        )  # fmt: skip
    return mean, rstd


def _empty_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    wide = {"dtype": accumulation_dtype(x.dtype), "device": x.device}
    return torch.empty(x.shape[1], **wide), torch.empty(x.shape[1], **wide)


@batch_statistics_op.register_fake
def _(x, offset, running_mean, running_var, momentum, eps):
    return _empty_statistics(x)


@torch.library.custom_op("atom_fast::batch_norm", mutates_args=())
def batch_norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    rectify: bool,
    pool: bool,
) -> Tensor:
    """``x`` normalised by ``mean`` and ``rstd`` [C], of which the gradient takes for granted that they are the batch's.

    ``offset`` is there for its gradient alone, zero.
    """
    from ..kernels.batch_norm import batch_norm_apply_kernel

    out = empty_output(x, pool)
    if x.numel() > 0:
        x = addressable(x)
        _, grid, constants = _launch(x)
        with device_of(x):
            batch_norm_apply_kernel[grid](
                x, weight, bias, mean, rstd, out, *x.stride(), *out.stride(), RECTIFY=rectify, POOL=pool, **constants
            )
    return out


@batch_norm_op.register_fake
def _(x, weight, bias, offset, mean, rstd, rectify, pool):
    return empty_output(x, pool)


@torch.library.custom_op("atom_fast::batch_norm_backward", mutates_args=())
def batch_norm_backward_op(
    gradient: Tensor, x: Tensor, weight: Tensor, bias: Tensor, mean: Tensor, rstd: Tensor, rectify: bool, pool: bool
) -> tuple[Tensor, Tensor]:
    """Gradients of ``x`` [B, C, H, W], and of shift and scale [2, C]."""
    from ..kernels.batch_norm import batch_norm_backward_kernel, batch_norm_sums_kernel

    rows, grid, constants = _launch(x)
    constants |= {"RECTIFY": rectify, "POOL": pool}
    # Each row's part, added afterwards in a fixed order.
    parts = mean.new_empty((2, rows, x.shape[1]))
    grad_x = empty_gradient(x)
    gradient, x = addressable(gradient), addressable(x)
    with device_of(x):
        batch_norm_sums_kernel[grid](
            gradient, x, weight, bias, mean, rstd, parts, *gradient.stride(), *x.stride(), **constants
        )
        sums = parts.sum(1)
        batch_norm_backward_kernel[grid](
            gradient, x, weight, bias, mean, rstd, sums, grad_x, x.numel() // x.shape[1],
            *gradient.stride(), *x.stride(), *grad_x.stride(), **constants,
        )  # fmt: skip
    return grad_x, sums


@batch_norm_backward_op.register_fake
def _(gradient, x, weight, bias, mean, rstd, rectify, pool):
    return empty_gradient(x), mean.new_empty((2, x.shape[1]))


def _setup_context(ctx, inputs, output):
    x, weight, bias, offset, mean, rstd, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, offset)


def _backward(ctx, gradient):
    return _gradients(batch_norm_backward_op, ctx, gradient)


def _gradients(backward: Callable, ctx, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * 8
    *saved, offset = ctx.saved_tensors
    grad_x, (grad_bias, grad_weight) = backward(gradient, *saved, *ctx.options)
    grad_offset = None if offset is None else torch.zeros_like(offset)
    return grad_x, grad_weight.to(saved[1].dtype), grad_bias.to(saved[2].dtype), grad_offset, None, None, None, None


batch_norm_op.register_autograd(_backward, setup_context=_setup_context)


# C: see kernels/batch_norm.c, for channels_last.


class _BatchNorm(torch.autograd.Function):
    """`batch_norm_op` in C, without the dispatch of an operator."""

    @staticmethod
    def forward(ctx, x, weight, bias, offset, mean, rstd, rectify, pool):
        out = empty_output(x, pool)
        vectors = (vector.contiguous() for vector in (weight, bias, mean, rstd))
        _native.run("batch_norm_forward", len(x), x, *vectors, out, *x.shape, rectify, pool)
        _setup_context(ctx, (x, weight, bias, offset, mean, rstd, rectify, pool), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        return _gradients(_backward_native, ctx, gradient)


def _statistics_native(x, offset, running_mean, running_var, momentum, eps) -> tuple[Tensor, Tensor]:
    """As `batch_statistics_op`."""
    means, variances = x.new_empty((2, *x.shape[:2]))
    _native.run("norm_block_statistics", len(x), x, means, variances, *x.shape)
    mean, variance = join_statistics(means, variances)
    count = x.numel() / x.shape[1]
    running_mean.lerp_(mean if offset is None else mean + offset, momentum)
    running_var.lerp_(variance * (count / (count - 1)), momentum)
    return mean, variance.add_(eps).rsqrt_()


def _backward_native(gradient, x, weight, bias, mean, rstd, rectify, pool) -> tuple[Tensor, Tensor]:
    """As `batch_norm_backward_op`."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    inputs = gradient, x, weight.contiguous(), bias.contiguous(), mean, rstd
    grad_x = empty_gradient(x)
    # Each sample's part, added afterwards in a fixed order.
    parts = x.new_empty((len(x), 2, x.shape[1]))
    for sums, mode in sums_passes("batch", parts):
        _native.run("batch_norm_backward", len(x), *inputs, sums, grad_x, *x.shape, rectify, pool, mode)
    grad_bias, product = parts.sum(0)
    return grad_x, torch.stack((grad_bias, product * rstd))


# Triton: see kernels/batch_norm.py.


def _launch(x: Tensor) -> tuple[int, tuple[int], dict]:
    """Rows of the kernels that walk ``x``, see kernels/batch_norm.py; their grid; and what they share."""
    from ..kernels.batch_norm import batch_norm_launch

    batch, channels, height, width = x.shape
    launch = batch_norm_launch(channels, height * width, x.element_size())
    rows = batch * -(-height * width // launch["PLACES"])
    grid = (rows * -(-channels // launch["BLOCK_C"]),)
    return rows, grid, {"C": channels, "H": height, "W": width, **launch}
