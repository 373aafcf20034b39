"""BatchNorm, ReLU and 2x2 average pooling as one operator, for training and for testing.

The statistics take a pass over the whole batch before the operator. The backward pass keeps the input and two numbers
per channel; a second derivative is not implemented and raises. Triton computes this on a GPU, C on a CPU in
channels_last; other input, and evaluation mode with gradients, runs `atom_fast.reference.batch_norm`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import native
from .dispatch import dispatch, register
from .instance_norm import check_input, empty_gradient, empty_output, layout_of, options_without_maps
from .joint_batch import join_statistics
from .launching import KERNELS, accumulation_dtype, device_of, int32_indexable, is_traced
from .norm_block import sums_passes, walk_of, write_gradient, write_statistics
from .operators import differentiate, fake, operator


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
    relu: bool = False,
    pool: bool = False,
) -> Tensor:
    """Normalise every channel, scale and shift it; then, if asked for, apply ReLU and 2x2 average pooling.

    The input of the norm is ``x + offset``; ``offset`` stands for the bias of a convolution before the norm. The
    statistics of the batch cancel it without a pass over memory: only the running mean depends on it, and its gradient
    is zero.

    Args:
        x: [B, C, H, W], floating point; fastest in channels_last. H and W even with ``pool``.
        weight, bias: [C] scale and shift, in the dtype of ``x`` or a wider one.
        running_mean, running_var: [C], both or neither. With ``training`` they are updated in place, as by
            ``nn.BatchNorm2d``, with the unbiased variance.
        offset: [C], added to every position of ``x``.
        training: normalise by mean and variance of the batch, over B, H and W; otherwise by the running statistics.
        momentum: weight of this batch in the running statistics.
        eps: added to the variance.
        relu: apply ReLU.
        pool: apply 2x2 average pooling, after ReLU.

    Returns:
        [B, C, H, W], with ``pool`` [B, C, H / 2, W / 2], in the dtype and memory format of ``x``. Differentiable once,
        in ``x``, ``weight``, ``bias`` and ``offset``.

    Raises:
        ValueError: a shape does not fit, running statistics are missing, or a channel has fewer than two values to
            train on.
    """
    _check(x, weight, bias, running_mean, running_var, offset, training, pool)
    return dispatch(
        "batch_norm", x, weight, bias, running_mean, running_var, offset, training, momentum, eps, relu, pool
    )


def _run_triton(x, weight, bias, running_mean, running_var, offset, training, momentum, eps, relu, pool):
    if _is_evaluated_with_gradients(training):
        return NotImplemented
    implementation = "triton" if KERNELS["batch_norm"] == "measured" else "successor"
    layout = layout_of(x)
    if implementation == "successor":
        x = x.contiguous(memory_format=torch.channels_last)
    statistics = running_mean, running_var, offset, training, momentum, eps
    mean, rstd = _mean_and_rstd(batch_statistics_op, x, weight, *statistics, implementation)
    output = batch_norm_op(x, weight, bias, offset, mean, rstd, relu, pool, implementation)
    return output.contiguous(memory_format=layout)


def _run_c(x, weight, bias, running_mean, running_var, offset, training, momentum, eps, relu, pool):
    contiguous = x.is_contiguous(memory_format=torch.channels_last)
    if not contiguous or _is_evaluated_with_gradients(training) or is_traced():
        return NotImplemented
    statistics = running_mean, running_var, offset, training, momentum, eps
    if native.upcasts(x) and native.supports(running_mean, running_var, offset):
        parameters = native.upcast(weight), native.upcast(bias)
        return _run_c(x.float(), *parameters, *statistics, relu, pool).to(x.dtype)
    if not native.supports(x, weight, bias, running_mean, running_var, offset):
        return NotImplemented
    x = x.resolve_neg()
    mean, rstd = _mean_and_rstd(_statistics_c, x, weight, *statistics)
    return _BatchNorm.apply(x, weight, bias, offset, mean, rstd, relu, pool)


register("batch_norm", triton=_run_triton, c=_run_c, eager=reference.batch_norm)


def _is_evaluated_with_gradients(training: bool) -> bool:
    """Return True for evaluation mode with gradients, whose backward pass the kernels do not compute."""
    return not training and torch.is_grad_enabled()


def _mean_and_rstd(compute, x, weight, running_mean, running_var, offset, training, momentum, eps, *implementation):
    """Return mean and 1 / standard deviation [C] that ``x`` is normalised with; update the running statistics."""
    if not training:
        wide = accumulation_dtype(x.dtype)
        mean = running_mean if offset is None else running_mean - offset
        return mean.to(wide), (running_var + eps).rsqrt().to(wide)
    if running_mean is None:  # updated and dropped
        running_mean, running_var = torch.empty_like(weight), torch.empty_like(weight)
    offset = None if offset is None else offset.detach()
    return compute(x.detach(), offset, running_mean, running_var, momentum, eps, *implementation)


def _check(x, weight, bias, running_mean, running_var, offset, training, pool) -> None:
    vectors = {"running_mean": running_mean, "running_var": running_var, "offset": offset}
    check_input(x, pool, weight=weight, bias=bias, **vectors)
    if (running_mean is None) != (running_var is None):
        raise ValueError("running_mean and running_var go together; got one of them")
    if not training and running_mean is None:
        raise ValueError("without training, x is normalised by running_mean and running_var; got None")
    if training and x.shape[0] * x.shape[2] * x.shape[3] < 2:
        raise ValueError(f"training needs at least two values per channel; got x of shape {tuple(x.shape)}")


@operator("batch_statistics", mutates=("running_mean", "running_var"))
def batch_statistics_op(
    x: Tensor,
    offset: Tensor | None,
    running_mean: Tensor,
    running_var: Tensor,
    momentum: float,
    eps: float,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return mean and 1 / standard deviation [C] of ``x``; update the running statistics of ``x + offset``.

    The implementation is "triton" or, for channels_last, its "successor".
    """
    from ..kernels.batch_norm import batch_norm_parts_kernel, batch_norm_statistics_kernel, statistics_launch

    torch.autograd.graph.increment_version([t for t in (running_mean, running_var) if not t.is_inference()])
    mean, rstd = _empty_statistics(x)
    if implementation == "successor":
        write_statistics(x, mean, rstd, eps, (offset, running_mean, running_var), momentum)
        return mean, rstd
    x = int32_indexable(x)
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


@fake(batch_statistics_op)
def _(x, offset, running_mean, running_var, momentum, eps, implementation):
    return _empty_statistics(x)


@operator("batch_norm", differentiable=True)
def batch_norm_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    offset: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    pool: bool,
    implementation: str,
) -> Tensor:
    """Normalise ``x`` with ``mean`` and ``rstd`` [C]. The backward pass assumes that they are this batch's statistics.

    ``offset`` is an argument only to receive its gradient, zero.
    """
    from ..kernels.batch_norm import batch_norm_apply_kernel

    out = empty_output(x, pool)
    if implementation == "successor":
        _apply_successor(x, weight, bias, mean, rstd, out, relu, pool)
    elif x.numel() > 0:
        x = int32_indexable(x)
        _, grid, constants = _launch(x)
        with device_of(x):
            batch_norm_apply_kernel[grid](
                x, weight, bias, mean, rstd, out, *x.stride(), *out.stride(), RELU=relu, POOL=pool, **constants
            )
    return out


@fake(batch_norm_op)
def _(x, weight, bias, offset, mean, rstd, relu, pool, implementation):
    return empty_output(x, pool)


@operator("batch_norm_backward")
def batch_norm_backward_op(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    pool: bool,
    implementation: str,
) -> tuple[Tensor, Tensor]:
    """Return the gradients of ``x`` [B, C, H, W], and of shift and scale [2, C]."""
    from ..kernels.batch_norm import batch_norm_backward_kernel, batch_norm_sums_kernel

    if implementation == "successor":
        grad_x, sums = empty_gradient(x), mean.new_empty((2, x.shape[1]))
        inputs = gradient, x, weight, bias, mean, rstd
        write_gradient(*inputs, "batch", grad_x, affine=sums, **options_without_maps(relu, pool))
        return grad_x, sums
    rows, grid, constants = _launch(x)
    constants |= {"RELU": relu, "POOL": pool}
    # One part per row, added afterwards in a fixed order.
    parts = mean.new_empty((2, rows, x.shape[1]))
    grad_x = empty_gradient(x)
    gradient, x = int32_indexable(gradient), int32_indexable(x)
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


@fake(batch_norm_backward_op)
def _(gradient, x, weight, bias, mean, rstd, relu, pool, implementation):
    return empty_gradient(x), mean.new_empty((2, x.shape[1]))


def _setup_context(ctx, inputs, output):
    x, weight, bias, offset, mean, rstd, *ctx.options = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd, offset)


def _backward(ctx, gradient):
    return _gradients(batch_norm_backward_op, ctx, gradient)


def _gradients(backward: Callable, ctx, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
    if gradient is None:
        return (None,) * len(ctx.needs_input_grad)
    *saved, offset = ctx.saved_tensors
    grad_x, (grad_bias, grad_weight) = backward(gradient, *saved, *ctx.options)
    grad_offset = None if offset is None else torch.zeros_like(offset)
    gradients = grad_x, grad_weight.to(saved[1].dtype), grad_bias.to(saved[2].dtype), grad_offset
    return *gradients, *(None,) * (len(ctx.needs_input_grad) - len(gradients))


differentiate(batch_norm_op, _backward, _setup_context)


# C: see kernels/batch_norm.c, for channels_last.


class _BatchNorm(torch.autograd.Function):
    """`batch_norm_op` in C, without the dispatch of an operator."""

    @staticmethod
    def forward(ctx, x, weight, bias, offset, mean, rstd, relu, pool):
        out = empty_output(x, pool)
        vectors = (vector.contiguous() for vector in (weight, bias, mean, rstd))
        native.run("batch_norm_forward", len(x), x, *vectors, out, *x.shape, relu, pool)
        _setup_context(ctx, (x, weight, bias, offset, mean, rstd, relu, pool), out)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):  # pyrefly: ignore[bad-override]
        return _gradients(_backward_c, ctx, gradient)


def _statistics_c(x, offset, running_mean, running_var, momentum, eps) -> tuple[Tensor, Tensor]:
    """Compute `batch_statistics_op` in C."""
    means, variances = x.new_empty((2, *x.shape[:2]))
    native.run("norm_block_statistics", len(x), x, means, variances, *x.shape)
    mean, variance = join_statistics(means, variances)
    count = x.numel() / x.shape[1]
    running_mean.lerp_(mean if offset is None else mean + offset, momentum)
    running_var.lerp_(variance * (count / (count - 1)), momentum)
    return mean, variance.add_(eps).rsqrt_()


def _backward_c(gradient, x, weight, bias, mean, rstd, relu, pool) -> tuple[Tensor, Tensor]:
    """Compute `batch_norm_backward_op` in C."""
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    inputs = gradient, x, weight.contiguous(), bias.contiguous(), mean, rstd
    grad_x = empty_gradient(x)
    # One part per sample, added afterwards in a fixed order.
    parts = x.new_empty((len(x), 2, x.shape[1]))
    for sums, mode in sums_passes("batch", parts):
        native.run("batch_norm_backward", len(x), *inputs, sums, grad_x, *x.shape, relu, pool, mode)
    grad_bias, product = parts.sum(0)
    return grad_x, torch.stack((grad_bias, product * rstd))


# Triton: see kernels/batch_norm.py.


def _launch(x: Tensor) -> tuple[int, tuple[int], dict]:
    """Return the rows of the kernels that walk ``x`` (see kernels/batch_norm.py), their grid and their constants."""
    from ..kernels.batch_norm import batch_norm_launch

    batch, channels, height, width = x.shape
    launch = batch_norm_launch(channels, height * width, x.element_size())
    rows = batch * -(-height * width // launch["PLACES"])
    grid = (rows * -(-channels // launch["BLOCK_C"]),)
    return rows, grid, {"C": channels, "H": height, "W": width, **launch}


# Triton, successor: see kernels/norm.py.


def _apply_successor(x, weight, bias, mean, rstd, out, relu, pool) -> None:
    from ..kernels.norm import apply_kernel

    if x.numel() > 0:
        _, grid, constants = walk_of(x, "batch")
        inputs = x, weight.contiguous(), bias.contiguous(), mean.contiguous(), rstd.contiguous()
        constants |= options_without_maps(relu, pool)
        with device_of(x):
            apply_kernel[grid](*inputs, out, None, None, 0.0, BATCH=True, **constants)
