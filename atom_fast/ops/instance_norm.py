"""InstanceNorm, ReLU and 2x2 average pooling as one operator, for training: scale and shift get gradients too.

Where :mod:`atom_fast.ops.norm_block` takes attention maps for a network whose parameters are constants, this one trains
the parameters and takes no maps. Only the input and two numbers a plane are kept for the backward pass. There is no
formula for a second derivative: asking for one raises.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .. import _native
from .._backend import resolve_backend
from .launching import accumulation_dtype, addressable, device_of, is_traced


def instance_norm(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float = 1e-5, *, rectify: bool = False, pool: bool = False
) -> Tensor:
    """Normalise every plane, scale and shift it; then, as asked for, ReLU and 2x2 average pooling.

    Args:
        x: [B, C, H, W], floating point; fastest in channels_last. H and W even with ``pool``.
        weight, bias: [C] scale and shift, in the type of ``x`` or a wider one.
        eps: added to the variance.
        rectify: apply ReLU.
        pool: apply 2x2 average pooling, after ReLU.

    Returns:
        [B, C, H, W], with ``pool`` [B, C, H / 2, W / 2], in the type and memory format of ``x``. Differentiable once,
        in ``x``, ``weight`` and ``bias``.

    Raises:
        ValueError: a shape does not fit.
    """
    check_input(x, pool, weight=weight, bias=bias)
    backend = resolve_backend(x)
    if backend == "native" and not _native.takes(x, weight, bias):
        backend = "torch"
    # Planes whose values are adjacent are what PyTorch's own operators are fast at on a CPU.
    if backend == "reference" or (backend != "triton" and not _is_channels_last(x)):
        return reference_instance_norm(x, weight, bias, eps, rectify, pool)
    if backend != "triton" and not is_traced() and not x.is_neg():  # whose memory holds the opposite
        return _InstanceNorm.apply(x, weight, bias, eps, rectify, pool, backend)
    return instance_norm_op(x, weight, bias, eps, rectify, pool, backend)[0]


def check_input(x: Tensor, pool: bool, **vectors: Tensor | None) -> None:
    """Raise ValueError unless ``x`` is [B, C, H, W], even with ``pool``, and the vectors that are given are [C]."""
    if x.dim() != 4 or not x.is_floating_point():
        raise ValueError(f"x must be floating point [B, C, H, W]; got {x.dtype} of shape {tuple(x.shape)}")
    for name, vector in vectors.items():
        if vector is not None and vector.shape != x.shape[1:2]:
            raise ValueError(f"{name} must be [{x.shape[1]}]; got {tuple(vector.shape)}")
    if pool and (x.shape[2] % 2 or x.shape[3] % 2):
        raise ValueError(f"pooling needs an even height and width; got {tuple(x.shape)}")


def reference_instance_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float, rectify: bool, pool: bool) -> Tensor:
    """`instance_norm` in PyTorch's own operators."""
    x = F.group_norm(x, x.shape[1], weight.to(x.dtype), bias.to(x.dtype), eps)
    return rectified_and_pooled(x, rectify, pool)


def rectified_and_pooled(x: Tensor, rectify: bool, pool: bool) -> Tensor:
    """What follows a norm, as asked for: ReLU, 2x2 average pooling."""
    x = F.relu(x) if rectify else x
    return F.avg_pool2d(x, 2) if pool else x


def _is_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last)


@torch.library.custom_op("atom_fast::instance_norm", mutates_args=())
def instance_norm_op(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, rectify: bool, pool: bool, backend: str
) -> tuple[Tensor, Tensor, Tensor]:
    """The result, and mean and 1 / standard deviation [B, C] of each plane."""
    outputs = _empty_outputs(x, pool)
    if x.numel() > 0:
        forward, _ = _implementation(backend)
        forward(x, weight, bias, eps, rectify, pool, *outputs)
    return outputs


def _implementation(backend: str) -> tuple[Callable, Callable]:
    """Forward and backward of a backend."""
    return {
        "triton": (_forward_triton, _backward_triton),
        "native": (_forward_native, _backward_native),
        "torch": (_forward_torch, _backward_torch),
    }[backend]


def _empty_outputs(x: Tensor, pool: bool) -> tuple[Tensor, Tensor, Tensor]:
    wide = {"dtype": accumulation_dtype(x.dtype), "device": x.device}
    return empty_output(x, pool), torch.empty(x.shape[:2], **wide), torch.empty(x.shape[:2], **wide)


def empty_output(x: Tensor, pool: bool) -> Tensor:
    """Memory for the normalised and perhaps pooled planes, in the layout of ``x``."""
    batch, channels, height, width = x.shape
    shape = (batch, channels, height // 2, width // 2) if pool else x.shape
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=_layout(x))


def _layout(x: Tensor) -> torch.memory_format:
    return torch.channels_last if _is_channels_last(x) else torch.contiguous_format


@instance_norm_op.register_fake
def _(x, weight, bias, eps, rectify, pool, backend):
    return _empty_outputs(x, pool)


@torch.library.custom_op("atom_fast::instance_norm_backward", mutates_args=())
def instance_norm_backward_op(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    rstd: Tensor,
    rectify: bool,
    pool: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``x`` [B, C, H, W], and of scale and shift [C]."""
    return _gradients(gradient, x, weight, bias, mean, rstd, rectify, pool, backend)


def _gradients(gradient, x, weight, bias, mean, rstd, rectify, pool, backend) -> tuple[Tensor, Tensor, Tensor]:
    grad_x = empty_gradient(x)
    if x.numel() == 0:
        return grad_x, torch.zeros_like(weight), torch.zeros_like(bias)
    # Each sample's part, added afterwards in a fixed order.
    grad_weight, grad_bias = torch.empty_like(mean), torch.empty_like(mean)
    _, backward = _implementation(backend)
    backward(gradient, x, weight, bias, mean, rstd, rectify, pool, grad_x, grad_weight, grad_bias)
    return grad_x, grad_weight.sum(0).to(weight.dtype), grad_bias.sum(0).to(bias.dtype)


def empty_gradient(x: Tensor) -> Tensor:
    """Memory for the gradient of ``x``, in its layout."""
    return torch.empty_like(x, memory_format=_layout(x))


@instance_norm_backward_op.register_fake
def _(gradient, x, weight, bias, mean, rstd, rectify, pool, backend):
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


instance_norm_op.register_autograd(_backward, setup_context=_setup_context)


class _InstanceNorm(torch.autograd.Function):
    """The operator without its dispatch, which takes a twentieth of a step of a hundred digits on a CPU."""

    @staticmethod
    def forward(ctx, x, weight, bias, eps, rectify, pool, backend):
        out, mean, rstd = _empty_outputs(x, pool)
        if x.numel() > 0:
            forward, _ = _implementation(backend)
            forward(x, weight, bias, eps, rectify, pool, out, mean, rstd)
        ctx.save_for_backward(x, weight, bias, mean, rstd)
        ctx.options = rectify, pool, backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        gradients = _gradients(gradient, *ctx.saved_tensors, *ctx.options)
        return *gradients, None, None, None, None


# C: see kernels/instance_norm.c, for channels_last.


def _forward_native(x, weight, bias, eps, rectify, pool, out, mean, rstd):
    arguments = x, weight.contiguous(), bias.contiguous(), out, mean, rstd
    _native.run("instance_norm_forward", len(x), *arguments, *x.shape, float(eps), rectify, pool)


def _backward_native(gradient, x, weight, bias, mean, rstd, rectify, pool, grad_x, grad_weight, grad_bias):
    gradient = gradient.contiguous(memory_format=torch.channels_last)
    arguments = gradient, x, weight.contiguous(), bias.contiguous(), mean, rstd, grad_x, grad_weight, grad_bias
    _native.run("instance_norm_backward", len(x), *arguments, *x.shape, rectify, pool)


# Triton: see kernels/instance_norm.py.


def _forward_triton(x, weight, bias, eps, rectify, pool, out, mean, rstd):
    from ..kernels.instance_norm import instance_norm_forward_kernel

    x = addressable(x)
    grid, constants = _launch(x, rectify, pool)
    with device_of(x):
        instance_norm_forward_kernel[grid](
            x, weight, bias, out, mean, rstd, *x.stride(), *out.stride(), eps, **constants
        )


def _backward_triton(gradient, x, weight, bias, mean, rstd, rectify, pool, grad_x, grad_weight, grad_bias):
    from ..kernels.instance_norm import instance_norm_backward_kernel

    gradient, x = addressable(gradient), addressable(x)
    grid, constants = _launch(x, rectify, pool)
    with device_of(x):
        instance_norm_backward_kernel[grid](
            gradient, x, weight, bias, mean, rstd, grad_x, grad_weight, grad_bias,
            *gradient.stride(), *x.stride(), *grad_x.stride(), **constants,
        )  # fmt: skip


def _launch(x: Tensor, rectify: bool, pool: bool) -> tuple[tuple[int, int], dict]:
    import triton

    from ..kernels.instance_norm import instance_norm_launch

    batch, channels, height, width = x.shape
    launch = instance_norm_launch(channels, height * width, x.element_size())
    grid = (batch, triton.cdiv(channels, launch["BLOCK_C"]))
    return grid, {"C": channels, "H": height, "W": width, "RECTIFY": rectify, "POOL": pool, **launch}


# Lean PyTorch for channels_last: passes over [rows, H W, C] with the channels innermost, in pieces of samples that stay
# in the cache.

PIECE_BYTES = 1 << 20  # of a piece's input; smaller ones cost more in calls than the cache gives back


def _planes(x: Tensor) -> Tensor:
    """channels_last [B, C, H, W] as [B, H W, C]."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def _pieces(x: Tensor) -> list[slice]:
    """Runs of samples that are worked on at once."""
    limit = PIECE_BYTES if x.device.type == "cpu" else 128 * PIECE_BYTES
    rows = max(1, limit * x.shape[0] // (x.numel() * x.element_size()))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def _forward_torch(x, weight, bias, eps, rectify, pool, out, mean, rstd):
    _, channels, height, width = x.shape
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    for rows in _pieces(x):
        planes = _planes(x[rows]).to(mean.dtype)
        torch.mean(planes, 1, out=mean[rows])
        centred = planes - mean[rows, None]
        torch.mean(centred.square(), 1, out=rstd[rows])
        rstd[rows].add_(eps).rsqrt_()
        result = torch.addcmul(bias, centred, (rstd[rows] * weight)[:, None], out=centred)
        if rectify:
            result.relu_()
        result = result.view(-1, height, width, channels).permute(0, 3, 1, 2)
        out[rows] = F.avg_pool2d(result, 2) if pool else result


def _backward_torch(gradient, x, weight, bias, mean, rstd, rectify, pool, grad_x, grad_weight, grad_bias):
    height, width = x.shape[2:]
    weight, bias = weight.to(mean.dtype), bias.to(mean.dtype)
    scale = rstd * weight
    for rows in _pieces(x):
        centred = _planes(x[rows]).to(mean.dtype) - mean[rows, None]
        passed = gradient[rows].to(mean.dtype)
        if pool:
            passed = F.interpolate(passed.mul(0.25).contiguous(memory_format=torch.channels_last), scale_factor=2)
        passed = _planes(passed.contiguous(memory_format=torch.channels_last))
        if rectify:
            passed = torch.ops.aten.threshold_backward(passed, torch.addcmul(bias, centred, scale[rows, None]), 0.0)
        target = _planes(grad_x[rows])
        result = target if target.dtype == mean.dtype else torch.empty_like(centred)
        torch.mul(passed, centred, out=result)
        torch.sum(passed, 1, out=grad_bias[rows])
        torch.sum(result, 1, out=grad_weight[rows]).mul_(rstd[rows])
        factor = scale[rows] / -(height * width)
        torch.addcmul((grad_bias[rows] * factor)[:, None], passed, scale[rows, None], out=result)
        result.addcmul_(centred, (grad_weight[rows] * rstd[rows] * factor)[:, None])
        if result is not target:
            target.copy_(result)
