"""The block after a convolution as one operator: a norm, ReLU, both attention maps, 2x2 average pooling.

The feature map between ReLU and pooling, which the maps are taken of, is never written. The backward pass keeps the
convolution's output, the maps and a few numbers a plane, and recomputes the rest. Scale and shift of the norm are
constants, as they are while distilling. There is no formula for a second derivative: asking for one raises.

The norm is InstanceNorm, or BatchNorm with the statistics of the batch; the latter is not one operator in PyTorch's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native, reference
from .._backend import resolve_backend
from .attention import attention_maps, map_sizes
from .launching import accumulation_dtype, addressable, constant_power, device_of
from .norm_block_torch import backward_torch, forward_torch, is_channels_last, piece_bytes, unit_length

NORMS = ("instance", "batch")


class BlockOutput(NamedTuple):
    """What a block hands on."""

    pooled: Tensor  # [B, C, H // 2, W // 2], the input's dtype
    maps: Tensor  # [B, M]: spatial map (H W values), then channel map (C values), each of L2 norm 1; float32 or float64


def norm_block(
    convolved: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    norm: str = "instance",
) -> BlockOutput:
    """A norm, ReLU, attention maps (equations 1 to 3 of the ATOM paper) and 2x2 average pooling, fused.

    Args:
        convolved: [B, C, H, W] output of a convolution, H and W at least 2; float64, float32, float16 or bfloat16, any
            strides; channels_last in gives channels_last out.
        weight: [C] scale of the norm, a constant; None for 1. Given or left out together with ``bias``.
        bias: [C] shift of the norm, a constant; None for 0.
        eps: added to the variance.
        spatial_power: exponent p_s of the spatial map, in [1, 16]; None leaves that map out of ``maps``.
        channel_power: exponent p_c of the channel map, likewise.
        norm: ``"instance"`` takes mean and population variance over each plane, ``"batch"`` over a channel's planes of
            all samples, as BatchNorm does in training; running statistics are neither read nor written.

    Returns:
        The pooled features and the maps. Differentiable once, in ``convolved``. A sample of zero features has zero
        maps.

    Raises:
        TypeError: ``convolved`` is no floating-point tensor.
        ValueError: a shape, power or norm is not accepted, or the scale or shift requires a gradient.
    """
    check_powers(spatial_power, channel_power)
    check_norm(norm)
    check_constants(weight=weight, bias=bias)
    _check_input(convolved, weight, bias)
    backend = resolve_backend(convolved)
    if backend == "native" and _native.widens(convolved) and _has_channels_last(convolved):
        options = {"eps": eps, "spatial_power": spatial_power, "channel_power": channel_power, "norm": norm}
        pooled, maps = norm_block(convolved.float(), _native.widened(weight), _native.widened(bias), **options)
        return BlockOutput(pooled.to(convolved.dtype), maps)
    if backend == "native" and not _is_native(convolved, weight, bias):
        backend = "torch"
    if backend == "reference":
        return reference_block(convolved, weight, bias, eps, spatial_power, channel_power, norm)
    if norm == "batch" and backend == "torch":
        return _unfused_batch_block(convolved, weight, bias, eps, spatial_power, channel_power)
    pooled, maps, *_ = norm_block_op(convolved, weight, bias, eps, spatial_power, channel_power, backend, norm)
    return BlockOutput(pooled, maps)


def check_powers(spatial_power: float | None, channel_power: float | None) -> None:
    """Raise ValueError for an exponent outside [1, 16]."""
    for name, power in (("spatial_power", spatial_power), ("channel_power", channel_power)):
        if power is not None and not 1 <= power <= 16:
            raise ValueError(f"{name} must be in [1, 16] or None; got {power}")


def check_norm(norm: str) -> None:
    """Raise ValueError for a norm that the blocks do not compute."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")


def _check_is_native(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    """Raise ValueError for what the kernel in C would misread."""
    if not _is_native(x, weight, bias):
        raise ValueError(f"backend 'native' takes float32 in channels_last; got {x.dtype} of strides {x.stride()}")


def check_is_fused(norm: str, backend: str) -> None:
    """Raise ValueError for a norm that PyTorch's operators do not compute in pieces."""
    if norm == "batch" and backend == "torch":
        raise ValueError(f"norm 'batch' is computed by backends 'triton' and 'native'; got {backend!r}")


def check_constants(**parameters: Tensor | None) -> None:
    """Raise ValueError for a parameter that asks for a gradient, which the fused blocks do not compute."""
    for name, parameter in parameters.items():
        if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but the fused blocks compute only that of their input; "
                "freeze the network (requires_grad_(False)), or use it unfused"
            )


def _check_input(convolved: Tensor, weight: Tensor | None, bias: Tensor | None) -> None:
    if not convolved.is_floating_point():
        raise TypeError(f"convolved must be a floating-point tensor; got {convolved.dtype}")
    if convolved.dim() != 4 or min(convolved.shape[2:]) < 2 or convolved.shape[1] < 1:
        raise ValueError(
            f"convolved must be [B, C, H, W] with C at least 1, H and W at least 2; got {tuple(convolved.shape)}"
        )
    check_affine(weight, bias, convolved.shape[1])


def check_affine(weight: Tensor | None, bias: Tensor | None, channels: int) -> None:
    """Raise ValueError unless scale and shift are both [channels], or both left out."""
    if (weight is None) != (bias is None):
        raise ValueError("weight and bias must be given together or left out together")
    for name, parameter in (("weight", weight), ("bias", bias)):
        if parameter is not None and parameter.shape != (channels,):
            raise ValueError(f"{name} must be [{channels}]; got {tuple(parameter.shape)}")


def reference_block(
    convolved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    norm: str = "instance",
) -> BlockOutput:
    """`norm_block` in plain PyTorch: what the fused block is compared with."""
    if norm == "batch":
        features = _batch_features(convolved, weight, bias, eps)
    else:
        features = F.relu(F.group_norm(convolved, convolved.shape[1], weight, bias, eps))
    wide = features.to(accumulation_dtype(features.dtype))
    maps = [wide.new_empty((wide.shape[0], 0))]
    if spatial_power is not None:
        maps.append(reference.spatial_attention(wide, spatial_power))
    if channel_power is not None:
        maps.append(reference.channel_attention(wide, channel_power))
    return BlockOutput(F.avg_pool2d(features, 2), torch.cat(maps, dim=1))


def _batch_features(convolved: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return F.relu(F.batch_norm(convolved, None, None, weight, bias, training=True, eps=eps))


def _unfused_batch_block(
    convolved: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
) -> BlockOutput:
    """`norm_block` with BatchNorm where it is not fused: the operators of PyTorch, and that of the maps."""
    features = _batch_features(convolved, weight, bias, eps)
    if spatial_power is None and channel_power is None:
        maps = features.new_empty((features.shape[0], 0), dtype=accumulation_dtype(features.dtype))
    else:
        maps, _ = attention_maps(features, spatial_power, channel_power, True, "torch")
    return BlockOutput(F.avg_pool2d(features, 2), maps)


@torch.library.custom_op("atom_fast::block", mutates_args=())
def norm_block_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    backend: str,
    norm: str = "instance",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Pooled features; maps [B, M]; mean and 1 / standard deviation [B, C] that each plane is normalised with; and
    [B, 3]: what features were divided by, and 1 / norm of each map of the features over it (1 if not taken).

    Norm "batch" is not computed with backend "torch".
    """
    check_is_fused(norm, backend)
    outputs = empty_outputs(x.shape, x, is_channels_last(x), spatial_power, channel_power)
    if x.numel() > 0:
        if backend == "triton":
            _forward_triton(x, weight, bias, eps, spatial_power, channel_power, norm, *outputs)
        elif backend == "native":
            _check_is_native(x, weight, bias)
            _forward_native(x, weight, bias, eps, spatial_power, channel_power, norm, *outputs)
        else:
            pieces = [(rows, x[rows]) for rows in _sample_pieces(x)]
            forward_torch(lambda: pieces, weight, bias, eps, spatial_power, channel_power, outputs)
    return outputs


def empty_outputs(
    shape: tuple[int, ...], like: Tensor, channels_last: bool, spatial_power: float | None, channel_power: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Memory for what a block returns for a convolution's output of this shape; dtype and device as ``like``."""
    batch, channels, height, width = shape
    wide = {"dtype": accumulation_dtype(like.dtype), "device": like.device}
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return (
        torch.empty(
            (batch, channels, height // 2, width // 2), dtype=like.dtype, device=like.device, memory_format=layout
        ),
        torch.empty((batch, sum(map_sizes(shape, spatial_power, channel_power))), **wide),
        torch.empty((batch, channels), **wide),
        torch.empty((batch, channels), **wide),
        torch.empty((batch, 3), **wide),
    )


@norm_block_op.register_fake
def _(x, weight, bias, eps, spatial_power, channel_power, backend, norm="instance"):
    return empty_outputs(x.shape, x, is_channels_last(x), spatial_power, channel_power)


@torch.library.custom_op("atom_fast::norm_block_backward", mutates_args=())
def norm_block_backward_op(
    grad_pooled: Tensor | None,
    grad_maps: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    maps: Tensor,
    mean: Tensor,
    rstd: Tensor,
    statistics: Tensor,
    spatial_power: float | None,
    channel_power: float | None,
    backend: str,
    norm: str = "instance",
) -> Tensor:
    """Gradient [B, C, H, W] of the convolution's output; a gradient that is None is zero."""
    grad_x = _empty_gradient(x)
    if x.numel() > 0:
        saved = weight, bias, maps, mean, rstd, statistics
        if backend == "native":
            _backward_native(grad_pooled, grad_maps, x, *saved, spatial_power, channel_power, norm, grad_x)
            return grad_x
        batch, channels, height, width = x.shape
        if grad_pooled is None:
            grad_pooled = x.new_zeros(()).expand(batch, channels, height // 2, width // 2)
        powers = (None, None) if grad_maps is None else (spatial_power, channel_power)
        if backend == "triton":
            _backward_triton(grad_pooled, grad_maps, x, *saved, *powers, norm, grad_x)
        else:
            pieces = ((rows, x[rows], grad_x[rows]) for rows in _sample_pieces(x))
            for _ in backward_torch(pieces, grad_pooled, grad_maps, *saved, *powers):
                pass  # each writes its rows
    return grad_x


def _sample_pieces(x: Tensor) -> list[slice]:
    """Runs of samples that PyTorch operators work on at once."""
    rows = max(1, piece_bytes(x.device) * x.shape[0] // (x.numel() * x.element_size()))
    return [slice(start, start + rows) for start in range(0, x.shape[0], rows)]


def _empty_gradient(x: Tensor) -> Tensor:
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


@norm_block_backward_op.register_fake
def _(grad_pooled, grad_maps, x, *_):
    return _empty_gradient(x)


def _setup_context(ctx, inputs, output):
    x, weight, bias, _, *ctx.options = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x, weight, bias, *saved)


def _backward(ctx, grad_pooled, grad_maps, *_):
    grad_x = None
    if grad_pooled is not None or grad_maps is not None:
        grad_x = norm_block_backward_op(grad_pooled, grad_maps, *ctx.saved_tensors, *ctx.options)
    return grad_x, None, None, None, None, None, None, None


norm_block_op.register_autograd(_backward, setup_context=_setup_context)


# C: see kernels/norm_block.c.


def _is_native(x: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel in C takes this input."""
    return _native.takes(x, weight, bias) and _has_channels_last(x)


def _has_channels_last(x: Tensor) -> bool:
    # As seen through a permutation: torch.func.vmap knows no memory format but the default.
    return x.permute(0, 2, 3, 1).is_contiguous()


def _forward_native(x, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics):
    if norm == "batch":
        means, variances = torch.empty_like(mean), torch.empty_like(mean)
        _native.run("norm_block_statistics", len(x), x, means, variances, *x.shape)
        write_batch_statistics(means, variances, eps, mean, rstd)
    _native.run(
        "norm_block_forward", len(x), x, dense(weight), dense(bias), pooled, maps, mean, rstd, statistics,
        *x.shape, eps, *native_powers(spatial_power, channel_power), norm == "batch",
    )  # fmt: skip


def join_statistics(means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance [C] of channels over a batch, of those of its planes [B, C], which are used up."""
    # Planes are of one size: the variance is the mean of theirs and the variance of their means.
    mean = means.mean(0)
    return mean, variances.add_(means.sub_(mean).square_()).mean(0)


def write_batch_statistics(means: Tensor, variances: Tensor, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """Write mean and 1 / sqrt(variance + eps) of the batch into every row of [B, C]; see `join_statistics`."""
    total, variance = join_statistics(means, variances)
    mean.copy_(total)
    rstd.copy_(torch.rsqrt(variance + eps))


def _backward_native(
    grad_pooled, grad_maps, x, weight, bias, maps, mean, rstd, statistics, spatial_power, channel_power, norm, grad_x
):
    inputs = *native_gradients(grad_pooled, grad_maps), x, dense(weight), dense(bias), maps, mean, rstd, statistics
    scratch = x.new_empty((_native.threads_for(len(x)), maps.shape[1]))
    sizes = *x.shape, *native_powers(spatial_power, channel_power)
    for sums, mode in sums_passes(norm, mean.new_empty((len(mean), 2, mean.shape[1]))):
        _native.run("norm_block_backward", len(x), *inputs, sums, grad_x, scratch, *sizes, mode)


OWN_SUMS, WRITE_SUMS, READ_SUMS = range(3)  # as in kernels/norm_block.h


def sums_passes(norm: str, sums: Tensor) -> Iterator[tuple[Tensor, int]]:
    """The calls that a backward kernel in C takes: the sums [B, 2, C] that it writes, or what it reads, and which."""
    if norm == "instance":
        yield sums, OWN_SUMS
    else:
        yield sums, WRITE_SUMS
        yield sums.mean(0), READ_SUMS


def native_powers(*powers: float | None) -> tuple[float, ...]:
    """Powers as the kernels in C take them."""
    return tuple(0.0 if power is None else float(power) for power in powers)


def native_gradients(grad_pooled: Tensor | None, grad_maps: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The gradients of a block's outputs as the kernels in C index them."""
    layout = torch.channels_last
    return None if grad_pooled is None else grad_pooled.contiguous(memory_format=layout), dense(grad_maps)


# Triton: see kernels/norm_block.py.


def _forward_triton(x, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics):
    import triton

    from ..kernels import norm_block as kernels

    batch, channels, height, width = x.shape
    x, weight, bias = addressable(x), dense(weight), dense(bias)
    constants = _constants(x, weight, spatial_power, channel_power) | {"GIVEN": norm == "batch"}
    size = channels, height, width, x.element_size(), constants["CHANNELS_LAST"]
    launch = kernels.norm_block_launch(*size)
    with device_of(x):
        if norm == "batch":
            _batch_statistics(x, eps, mean, rstd)
        if launch is not None:
            kernels.norm_block_forward_kernel[(batch,)](
                x, weight, bias, pooled, maps, mean, rstd, statistics, *x.stride(), *pooled.stride(), eps,
                **constants, EXACT=kernels.is_exact(channels, height, width, launch),
                GROUP=kernels.channel_group(launch["BLOCK_C"], constants["CHANNELS_LAST"]),
                CHUNKS=triton.next_power_of_2(triton.cdiv(channels, launch["BLOCK_C"])), **launch,
            )  # fmt: skip
            return
        launch = kernels.tiled_launch(*size)
        chunks = triton.cdiv(channels, launch["BLOCK_C"])
        sums = chunk_sums(maps, chunks, x.shape, spatial_power, channel_power)
        kernels.tiled_forward_kernel[(batch, chunks)](
            x, weight, bias, pooled, *sums, mean, rstd, *x.stride(), *pooled.stride(), eps, **constants, **launch
        )
    join_chunks(*sums, launch["BLOCK_C"], spatial_power, channel_power, maps, statistics)


def chunk_sums(
    maps: Tensor, chunks: int, shape: tuple[int, ...], spatial_power: float | None, channel_power: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Memory for what `join_chunks` joins: spatial sums, channel sums and peaks, in the dtype of ``maps``."""
    n_spatial, n_channel = map_sizes(shape, spatial_power, channel_power)
    spatial, channel = maps.new_empty((shape[0], chunks, n_spatial)), maps.new_empty((shape[0], n_channel))
    return spatial, channel, maps.new_empty((shape[0], chunks))


def _batch_statistics(x: Tensor, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """Write each channel's mean and 1 / sqrt(variance + eps) over the batch into every row of [B, C]."""
    if x.is_cuda:
        own_mean, own_rstd = torch.batch_norm_stats(x, eps)
    else:
        variance, own_mean = torch.var_mean(x.to(mean.dtype), (0, 2, 3), correction=0)
        own_rstd = torch.rsqrt(variance + eps)
    mean.copy_(own_mean)
    rstd.copy_(own_rstd)


def join_chunks(
    spatial: Tensor,
    channel: Tensor,
    peaks: Tensor,
    block_c: int,
    spatial_power: float | None,
    channel_power: float | None,
    maps: Tensor,
    statistics: Tensor,
) -> None:
    """Bring the chunks of a sample to its largest feature, and its maps to unit length.

    Args:
        spatial: [B, chunks, H W or 0] sums over a chunk's channels, relative to the chunk's peak.
        channel: [B, C or 0] sums over positions, relative to the peak of the channel's chunk of ``block_c``.
        peaks: [B, chunks], 0 where a chunk's features are all zero.
        maps, statistics: [B, M] and [B, 3], written.
    """
    peak = peaks.amax(1, keepdim=True)
    peak = torch.where(peak == 0, 1.0, peak)
    statistics.fill_(1.0)[:, :1] = peak
    ratio = peaks / peak
    n_spatial = spatial.shape[2]
    if spatial_power is not None:
        total = spatial[:, 0] if ratio.shape[1] == 1 else (spatial * ratio.pow(spatial_power)[:, :, None]).sum(1)
        unit_length(total, statistics[:, 1], maps[:, :n_spatial])
    if channel_power is not None:
        total = channel * ratio.pow(channel_power).repeat_interleave(block_c, 1)[:, : channel.shape[1]]
        unit_length(total, statistics[:, 2], maps[:, n_spatial:])


def _backward_triton(
    grad_pooled, grad_maps, x, weight, bias, maps, mean, rstd, statistics, spatial_power, channel_power, norm, grad_x
):
    import triton

    from ..kernels import norm_block as kernels

    batch, channels, height, width = x.shape
    x, grad_pooled, weight, bias = addressable(x), addressable(grad_pooled), dense(weight), dense(bias)
    constants = _constants(x, weight, spatial_power, channel_power)
    strides = *x.stride(), *grad_pooled.stride(), *grad_x.stride()
    size = channels, height, width, x.element_size(), constants["CHANNELS_LAST"]
    launch = kernels.norm_block_backward_launch(*size)
    with device_of(x):
        if launch is not None:
            kernel = kernels.norm_block_backward_kernel[(batch,)]
            of_maps = maps if grad_maps is None else grad_maps.contiguous(), maps  # not read without powers
            constants["EXACT"] = kernels.is_exact(channels, height, width, launch)
            constants["CHUNKS"] = triton.next_power_of_2(triton.cdiv(channels, launch["BLOCK_C"]))
        else:
            launch = kernels.tiled_launch(*size)
            kernel = kernels.tiled_backward_kernel[(batch, triton.cdiv(channels, launch["BLOCK_C"]))]
            of_maps = (map_weights(grad_maps, maps, statistics, x.shape, spatial_power, channel_power),)
        inputs = x, weight, bias, grad_pooled, *of_maps, mean, rstd, statistics
        if norm == "instance":
            kernel(*inputs, None, grad_x, *strides, **constants, SUMS="own", **launch)
        else:
            sums = mean.new_empty((batch, 2, channels))
            kernel(*inputs, sums, None, *strides, **constants, SUMS="write", **launch)
            kernel(*inputs, sums.mean(0), grad_x, *strides, **constants, SUMS="read", **launch)


def map_weights(
    grad_maps: Tensor | None,
    maps: Tensor,
    statistics: Tensor,
    shape: tuple[int, ...],
    spatial_power: float | None,
    channel_power: float | None,
) -> Tensor:
    """What multiplies (f / peak)^(p - 1) in the gradient of each feature: [B, M], laid out as the maps."""
    from ..kernels import norm_block as kernels

    if grad_maps is None:
        return maps  # not read: without a gradient there are no powers
    weights = torch.empty_like(maps)
    batch, channels, height, width = shape
    kernels.map_weights_kernel[(batch,)](
        grad_maps.contiguous(), maps, statistics, weights, C=channels, H=height, W=width,
        SPATIAL=constant_power(spatial_power), CHANNEL=constant_power(channel_power), BLOCK=1024, num_warps=4,
    )  # fmt: skip
    return weights


def _constants(x: Tensor, weight: Tensor | None, spatial_power: float | None, channel_power: float | None) -> dict:
    _, channels, height, width = x.shape
    return {
        "C": channels,
        "H": height,
        "W": width,
        "SPATIAL": constant_power(spatial_power),
        "CHANNEL": constant_power(channel_power),
        "AFFINE": weight is not None,
        "CHANNELS_LAST": is_channels_last(x),
    }


def dense(parameter: Tensor | None) -> Tensor | None:
    """A parameter as the kernels index it."""
    return None if parameter is None else parameter.contiguous()
