"""InstanceNorm, ReLU and 2x2 average pooling as one operator, for training: scale and shift get gradients too.

`atom_fast.ops.norm_block` computes attention maps for a network whose parameters are constants; this operator trains
the parameters and computes no maps. The backward pass keeps the input and two numbers per plane. In C it can be
differentiated again; in Triton a second derivative is not implemented and raises. Input that neither Triton nor C
computes runs `atom_fast.reference.instance_norm`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import reference
from . import native, norm_block
from .dispatch import dispatch, register
from .launching import KERNELS, accumulation_dtype, contiguous, device_of, int32_indexable, is_traced
from .operators import differentiate, fake, operator


def instance_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, relu: bool = False, pool: bool = False
) -> Tensor:
    """Normalise every plane, scale and shift it; then, if asked for, apply ReLU and 2x2 average pooling.

    Args:
        x: [B, C, H, W], floating point; fastest in channels_last. H and W even with ``pool``.
        weight, bias: [C] scale and shift, in the dtype of ``x`` or a wider one.
        eps: added to the variance.
        relu: apply ReLU.
        pool: apply 2x2 average pooling, after ReLU.

    Returns:
        [B, C, H, W], with ``pool`` [B, C, H / 2, W / 2], in the dtype and memory format of ``x``. Differentiable in
        ``x``, ``weight`` and ``bias``: twice in C, once in Triton.

    Raises:
        ValueError: a shape does not fit.
    """
    check_input(x, pool, weight=weight, bias=bias)
    return dispatch("instance_norm", x, weight, bias, float(eps), relu, pool)


def _run_triton(x, *arguments):
    if KERNELS["instance_norm"] == "measured":
        return instance_norm_op(x, *arguments, "triton")[0]
    output = instance_norm_op(x.contiguous(memory_format=torch.channels_last), *arguments, "successor")[0]
    return output.contiguous(memory_format=layout_of(x))


def _run_c(x, weight, bias, eps, relu, pool):
    if not _is_channels_last(x):  # on contiguous planes PyTorch's norm is fast
        return NotImplemented
    if native.upcasts(x):
        return _run_c(x.float(), native.upcast(weight), native.upcast(bias), eps, relu, pool).to(x.dtype)
    if not native.supports(x, weight, bias):
        return NotImplemented
    if is_traced():
        return instance_norm_op(x, weight, bias, eps, relu, pool, "c")[0]
    return _InstanceNorm.apply(x.resolve_neg(), weight, bias, eps, relu, pool)


register("instance_norm", triton=_run_triton, c=_run_c, eager=reference.instance_norm)


def check_input(x: Tensor, pool: bool, **vectors: Tensor | None) -> None:
    """Raise ValueError unless ``x`` is [B, C, H, W], even with ``pool``, and the vectors that are given are [C]."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, C, H, W]; got {x.dtype} of shape {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}]; got {tuple(vector.shape)}")
    if pool and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"pooling needs an even height and width; got {tuple(x.shape)}")


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@operator("instance_norm", differentiable=True)
def instance_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, relu: bool, pool: bool, implementation: str
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the result, and mean and 1 / standard deviation [B, C] of each plane.

    The implementation is "triton", its "successor" or "c"; the latter two take channels_last.
    """
    return _outputs(x, weight, bias, eps, relu, pool, implementation)


def _outputs(x, weight, bias, eps, relu, pool, implementation) -> tuple[Tensor, Tensor, Tensor]:
    outputs = _empty_outputs(x, pool)
    if x.numel() > 0:
        forward = {"triton": _forward_triton, "successor": _forward_successor, "c": _forward_c}[implementation]
        forward(x, weight, bias, eps, relu, pool, *outputs)
    return outputs


def _empty_outputs(x: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = {"dtype": accumulation_dtype(x.dtype), "device": x.device}
    return empty_output(x, pool), torch.empty(x.shape[:2], **wide), torch.empty(x.shape[:2], **wide)


def empty_output(x: Tensor, pool: bool) -> Tensor:
    """Allocate the normalised and perhaps pooled planes, in the layout of ``x``."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // 2, width // 2) if pool else x.shape
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout_of(x))


def layout_of(x: Tensor) -> torch.memory_format:
    """Return the layout of the operators' outputs for an input."""
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


@fake(instance_norm_op)
def _(x, weight, bias, eps, relu, pool, implementation):
    return _empty_outputs(x, pool)


@operator("instance_norm_backward", differentiable=True)
def instance_norm_backward_op(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    relu: bool,
    pool: bool,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of ``x`` [B, C, H, W], and of scale and shift [C]."""
    return _gradients(gradient, x, weight, bias, mean, rstd, relu, pool, implementation)


def _gradients(gradient, x, weight, bias, mean, rstd, relu, pool, implementation) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_gradient(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    if implementation == "successor":
        affine = torch.empty_like(bias), torch.empty_like(weight)
        inputs = gradient, x, weight, bias, mean, rstd
        norm_block.write_gradient(*inputs, "instance", grad_x, affine=affine, **options_without_maps(relu, pool))
        return grad_x, affine[1], affine[0]
    # One part per sample, added afterwards in a fixed order.
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    backward = _backward_triton if implementation == "triton" else _backward_c
    backward(gradient, x, weight, bias, mean, rstd, relu, pool, grad_x, grad_weight, grad_bias)
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def empty_gradient(x: Tensor) -> Tensor:
    """Allocate the gradient of ``x``, in its layout."""
    return torch.empty_like(x, memory_format=layout_of(x))


@fake(instance_norm_backward_op)
def _(gradient, x, weight, bias, mean, rstd, relu, pool, implementation):
    return empty_gradient(x), torch.empty_like(weight), torch.empty_like(bias)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, *ctx.options = inputs
    _, mean, rstd = output
    ctx.mark_non_differentiable(mean, rstd)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, mean, rstd)


def _backward(ctx, gradient, *_):
    gradients = (None, None, None)
    if gradient is not None:
        gradients = instance_norm_backward_op(gradient, *ctx.saved_tensors, *ctx.options)
    return *gradients, None, None, None, None


differentiate(instance_norm_op, _backward, _setup_context)


def _setup_second(ctx, inputs, output):
    *tensors, relu, pool, ctx.implementation = inputs
    ctx.options = relu, pool
    ctx.save_for_backward(*tensors)


def _second(ctx, *weighing):
    if ctx.implementation != "c":
        raise RuntimeError("atom_fast::instance_norm is differentiable twice in C alone, not in Triton")
    return *_second_gradients(*weighing, *ctx.saved_tensors, *ctx.options), *[None] * 6


differentiate(instance_norm_backward_op, _second, _setup_second)


class _InstanceNorm(torch.autograd.Function):
    """`instance_norm_op` in C, without the dispatch of an operator: 5 % of a step of 100 digits on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, relu, pool):
        out, mean, rstd = _outputs(x, weight, bias, eps, relu, pool, "c")
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = relu, pool, "c"
        return out

    @staticmethod
    def backward(ctx, gradient):  # pyrefly: ignore[bad-override]
        if torch.is_grad_enabled():  # create_graph: to be differentiated again
            return *_InstanceNormBackward.apply(gradient, *ctx.saved_tensors, *ctx.options[:2]), None, None, None
        return *_gradients(gradient, *ctx.saved_tensors, *ctx.options), None, None, None


class _InstanceNormBackward(torch.autograd.Function):
    """The backward pass of `_InstanceNorm`, differentiable once."""

    @staticmethod
    def forward(ctx, gradient, x, weight, bias, mean, rstd, relu, pool):
        ctx.save_for_backward(gradient, x, weight, bias, mean, rstd)
        ctx.options = relu, pool
        return _gradients(gradient, x, weight, bias, mean, rstd, relu, pool, "c")

    @staticmethod
    @once_differentiable
    def backward(ctx, on_x, on_weight, on_bias):  # pyrefly: ignore[bad-override]
        gradients = _second_gradients(on_x, on_weight, on_bias, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None, None, None


def _second_gradients(on_x, on_weight, on_bias, gradient, x, weight, bias, mean, rstd, relu, pool):
    """Return what ``gradient``, ``x`` and ``weight`` get, the backward pass's results weighed by ``on_...``."""
    grad_gradient, grad_x = torch.empty_like(gradient, memory_format=torch.channels_last), empty_gradient(x)
    if x.numel() == 0:
        return grad_gradient, grad_x, torch.zeros_like(weight)
    grad_weight = torch.empty_like(mean)
    weighed = on_x.contiguous(memory_format=torch.channels_last), on_weight.contiguous(), on_bias.contiguous()
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    inputs = gradient, x, weight.contiguous(), bias.contiguous(), mean, rstd
    outputs = grad_gradient, grad_x, grad_weight
    native.run("instance_norm_second", len(x), *weighed, *inputs, *outputs, *x.shape, relu, pool)
    return grad_gradient, grad_x, grad_weight.sum(0)


# C: see kernels/instance_norm.c, for channels_last.


def _forward_c(x, weight, bias, eps, relu, pool, out, mean, rstd):
    arguments = x, weight.contiguous(), bias.contiguous(), out, mean, rstd
    native.run("instance_norm_forward", len(x), *arguments, *x.shape, eps, relu, pool)


def _backward_c(gradient, x, weight, bias, mean, rstd, relu, pool, grad_x, grad_weight, grad_bias):
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    arguments = gradient, x, weight.contiguous(), bias.contiguous(), mean, rstd, grad_x, grad_weight, grad_bias
    native.run("instance_norm_backward", len(x), *arguments, *x.shape, relu, pool)


class TangentStatistics(NamedTuple):
    """Statistics of each plane [B, C]: mean, 1 / standard deviation; mean of the tangent, and its mean product with the
    normalised plane."""

    mean: Tensor
    rstd: Tensor
    mean_tangent: Tensor
    slope: Tensor


def instance_norm_tangent(
    x: Tensor,
    tangent: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_tangent: Tensor,
    bias_tangent: Tensor,
    eps: float,
) -> tuple[Tensor, TangentStatistics]:
    """Apply InstanceNorm, ReLU and 2x2 average pooling, and take their derivative along a direction, in C.

    Args:
        x, tangent: float32 [B, C, H, W] in channels_last on a CPU: planes and their tangents.
        weight, bias, weight_tangent, bias_tangent: [C] scale and shift, and their tangents.
        eps: added to the variance.

    Returns:
        [2B, C, H // 2, W // 2], results and then their tangents; and what `instance_norm_tangent_backward` needs.
    """
    count, channels, height, width = x.shape
    pooled = torch.empty((2 * count, channels, height // 2, width // 2), memory_format=torch.channels_last)
    statistics = TangentStatistics(*torch.empty((4, count, channels)))
    affine = weight, bias, weight_tangent, bias_tangent
    native.run(
        "instance_norm_tangent_forward", count, x, tangent, *map(contiguous, affine), pooled[:count], pooled[count:],
        *statistics, *x.shape, eps,
    )  # fmt: skip
    return pooled, statistics


def instance_norm_tangent_backward(
    gradient: Tensor,
    x: Tensor,
    tangent: Tensor,
    weight: Tensor,
    bias: Tensor,
    weight_tangent: Tensor,
    statistics: TangentStatistics,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients that belong to `instance_norm_tangent`, and their derivatives along the direction.

    Args:
        gradient: [2B, C, H // 2, W // 2] in channels_last: tangents of the results' gradients, then the gradients.
        x, tangent, weight, bias, weight_tangent, statistics: as given and returned there.

    Returns:
        [2B, C, H, W], tangents of the planes' gradients, then the gradients; and the tangents of the gradients of scale
        and shift [C].
    """
    count, channels, height, width = x.shape
    of_x = torch.empty((2 * count, channels, height, width), memory_format=torch.channels_last)
    of_affine = torch.empty((2, count, channels))
    native.run(
        "instance_norm_tangent_backward", count, gradient[count:], gradient[:count], x, tangent,
        *map(contiguous, (weight, bias, weight_tangent)), *statistics, of_x[count:], of_x[:count], *of_affine, *x.shape,
    )  # fmt: skip
    weight_part, bias_part = of_affine.sum(1)
    return of_x, weight_part, bias_part


# Triton: see kernels/instance_norm.py.


def _forward_triton(x, weight, bias, eps, relu, pool, out, mean, rstd):
    from ..kernels.instance_norm import instance_norm_forward_kernel

    x = int32_indexable(x)
    grid, constants = _launch(x, relu, pool)
    with device_of(x):
        instance_norm_forward_kernel[grid](
            x, weight, bias, out, mean, rstd, *x.stride(), *out.stride(), eps, **constants
        )


def _backward_triton(gradient, x, weight, bias, mean, rstd, relu, pool, grad_x, grad_weight, grad_bias):
    from ..kernels.instance_norm import instance_norm_backward_kernel

    gradient, x = int32_indexable(gradient), int32_indexable(x)
    grid, constants = _launch(x, relu, pool)
    with device_of(x):
        instance_norm_backward_kernel[grid](
            gradient, x, weight, bias, mean, rstd, grad_x, grad_weight, grad_bias,
            *gradient.stride(), *x.stride(), *grad_x.stride(), **constants,
        )  # fmt: skip


def _launch(x: Tensor, relu: bool, pool: bool) -> tuple[tuple[int, int], dict]:
    import triton

    from ..kernels.instance_norm import instance_norm_launch

    batch, channels, height, width = x.shape
    launch = instance_norm_launch(channels, height * width, x.element_size())
    grid = (batch, triton.cdiv(channels, launch["BLOCK_C"]))
    return grid, {"C": channels, "H": height, "W": width, "RELU": relu, "POOL": pool, **launch}


# Triton, successor: see kernels/norm.py.


def _forward_successor(x, weight, bias, eps, relu, pool, out, mean, rstd):
    from ..kernels.norm import apply_kernel

    _, grid, constants = norm_block.walk_of(x, "instance")
    inputs = x, weight.contiguous(), bias.contiguous(), mean, rstd
    with device_of(x):
        apply_kernel[grid](*inputs, out, None, None, eps, BATCH=False, **constants, **options_without_maps(relu, pool))


def options_without_maps(relu: bool, pool: bool) -> dict[str, bool | int]:
    """Return the constants of `kernels/norm.py` for a norm without attention maps."""
    return {"RECTIFY": relu, "POOL": pool, "SPATIAL": 0, "CHANNEL": 0}
