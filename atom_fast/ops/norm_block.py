"""The block after a convolution as one operator: a norm, ReLU, both attention maps, 2x2 average pooling.

The feature map between ReLU and pooling, from which the maps are computed, is never written to memory. The backward
pass keeps the convolution's output, the maps and a few numbers per plane, and recomputes the rest. Scale and shift of
the norm are constants, as they are during distillation. A second derivative is not implemented and raises.

The norm is InstanceNorm, or BatchNorm with the statistics of the batch. Input that neither Triton nor C computes
(float64 on a CPU, other layouts) runs `atom_fast.reference.norm_block`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import reference
from . import native
from .attention import map_sizes
from .dispatch import dispatch, register
from .joint_batch import JointBatchNorm, is_joint, join_statistics, join_sums
from .launching import KERNELS, accumulation_dtype, constant_power, contiguous, device_of, int32_indexable
from .operators import differentiate, fake, operator

NORMS = ("instance", "batch")


class BlockOutput(NamedTuple):
    """Outputs of a block."""

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
    """Apply a norm, ReLU and 2x2 average pooling, and take attention maps (equations 1 to 3 of the ATOM paper).

    Args:
        convolved: [B, C, H, W] output of a convolution, H and W at least 2; float64, float32, float16 or bfloat16, any
            strides; channels_last in gives channels_last out.
        weight: [C] scale of the norm, a constant; None for 1. Given or left out together with ``bias``.
        bias: [C] shift of the norm, a constant; None for 0.
        eps: added to the variance.
        spatial_power: exponent p_s of the spatial map, in [1, 16]; None leaves that map out of ``maps``.
        channel_power: exponent p_c of the channel map, likewise.
        norm: ``"instance"`` normalises by mean and population variance per plane, ``"batch"`` per channel over all
            samples, as BatchNorm does in training; running statistics are neither read nor written.

    Returns:
        The pooled features and the maps. Differentiable once, in ``convolved``. A sample of zero features has zero
        maps.

    Raises:
        TypeError: ``convolved`` is not a floating-point tensor.
        ValueError: a shape, power or norm is not accepted, or the scale or shift requires a gradient.
    """
    check_powers(spatial_power, channel_power)
    check_norm(norm)
    check_constants(weight=weight, bias=bias)
    _check_input(convolved, weight, bias)
    arguments = convolved, weight, bias, eps, spatial_power, channel_power, norm
    return BlockOutput(*dispatch("norm_block", *arguments))


def _run_triton(convolved, *arguments):
    if KERNELS["norm_block"] == "measured" or is_joint():  # the successors have no statistics of single classes
        return norm_block_op(convolved, *arguments, "triton")[:2]
    layout = torch.channels_last if is_channels_last(convolved) else torch.contiguous_format
    pooled, maps, *_ = norm_block_op(convolved.contiguous(memory_format=torch.channels_last), *arguments, "successor")
    return pooled.contiguous(memory_format=layout), maps


def _run_c(convolved, weight, bias, eps, spatial_power, channel_power, norm):
    if not _is_channels_last_view(convolved):
        return NotImplemented
    options = eps, spatial_power, channel_power, norm, "c"
    if native.upcasts(convolved):
        affine = native.upcast(weight), native.upcast(bias)
        pooled, maps, *_ = norm_block_op(convolved.float(), *affine, *options)
        return pooled.to(convolved.dtype), maps
    if not native.supports(convolved, weight, bias):
        return NotImplemented
    return norm_block_op(convolved, weight, bias, *options)[:2]


def run_eager(convolved, weight, bias, eps, spatial_power, channel_power, norm):
    """Run the equations as written; a joint batch has no operator of PyTorch's."""
    if norm != "batch" or not is_joint():
        return reference.norm_block(convolved, weight, bias, eps, spatial_power, channel_power, norm)
    normalised = JointBatchNorm.apply(convolved, eps)
    if weight is not None:
        normalised = normalised * weight[:, None, None] + bias[:, None, None]
    return reference.rectified_block(normalised, spatial_power, channel_power)


register("norm_block", triton=_run_triton, c=_run_c, eager=run_eager)


def check_powers(spatial_power: float | None, channel_power: float | None) -> None:
    """Raise ValueError for an exponent outside [1, 16]."""
    for name, power in (("spatial_power", spatial_power), ("channel_power", channel_power)):
        if power is not None and not 1 <= power <= 16:
            raise ValueError(f"{name} must be in [1, 16] or None; got {power}")


def check_norm(norm: str) -> None:
    """Raise ValueError for a norm that the blocks do not compute."""
    if norm not in NORMS:
        raise ValueError(f"norm must be one of {', '.join(NORMS)}; got {norm!r}")


def check_constants(**parameters: Tensor | None) -> None:
    """Raise ValueError for a parameter that asks for a gradient, which the fused blocks do not compute."""
    for name, parameter in parameters.items():
        if parameter is not None and parameter.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"{name} requires a gradient, but the fused blocks compute only the input's gradient; "
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


@operator("norm_block", differentiable=True)
def norm_block_op(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    norm: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Compute a block and what its backward pass needs.

    Args:
        implementation: "triton"; "successor" for channels_last on a GPU; or "c" for float32 in channels_last on a CPU.

    Returns:
        Pooled features [B, C, H // 2, W // 2]; maps [B, M]; mean and 1 / standard deviation [B, C] of planes (or of the
        batch: [B, C], and [1, C] of the successor); statistics [B, 3]: the peak that features are divided by, and
        1 / norm of each map of the features over the peak (1 for a map that is left out).
    """
    outputs = _empty_outputs(x, spatial_power, channel_power, norm, implementation)
    if implementation != "triton":
        _check_layout(x, implementation)
    if x.numel() > 0:
        forward = {"triton": _forward_triton, "successor": _forward_successor, "c": _forward_c}[implementation]
        forward(x, weight, bias, eps, spatial_power, channel_power, norm, *outputs)
    return outputs


def empty_outputs(
    shape: tuple[int, ...], like: Tensor, channels_last: bool, spatial_power: float | None, channel_power: float | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Allocate the outputs of `norm_block_op` for a convolution's output of this shape; dtype, device as ``like``."""
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


def _empty_outputs(x, spatial_power, channel_power, norm, implementation):
    channels_last = implementation == "successor" or is_channels_last(x)
    pooled, maps, mean, rstd, statistics = empty_outputs(x.shape, x, channels_last, spatial_power, channel_power)
    if implementation == "successor" and norm == "batch":
        mean, rstd = mean.new_empty((1, x.shape[1])), mean.new_empty((1, x.shape[1]))
    return pooled, maps, mean, rstd, statistics


@fake(norm_block_op)
def _(x, weight, bias, eps, spatial_power, channel_power, norm, implementation):
    return _empty_outputs(x, spatial_power, channel_power, norm, implementation)


@operator("norm_block_backward")
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
    norm: str,
    implementation: str,
) -> Tensor:
    """Return the gradient [B, C, H, W] of the convolution's output; a gradient that is None counts as zero."""
    grad_x = _empty_gradient(x)
    if x.numel() > 0:
        backward = {"triton": _backward_triton, "successor": _backward_successor, "c": _backward_c}[implementation]
        saved = weight, bias, maps, mean, rstd, statistics
        backward(grad_pooled, grad_maps, x, *saved, spatial_power, channel_power, norm, grad_x)
    return grad_x


def _empty_gradient(x: Tensor) -> Tensor:
    layout = torch.channels_last if is_channels_last(x) else torch.contiguous_format
    return torch.empty_like(x, memory_format=layout)


@fake(norm_block_backward_op)
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


differentiate(norm_block_op, _backward, _setup_context)


# C: see kernels/norm_block.c.


def _is_channels_last_view(x: Tensor) -> bool:
    # Through a permutation, because torch.func.vmap supports no memory format but the default.
    return x.permute(0, 2, 3, 1).is_contiguous()


def _check_layout(x: Tensor, implementation: str) -> None:
    """Raise ValueError for input that the kernels in C, or the successors of those in Triton, would misread."""
    if implementation == "c" and (x.dtype != torch.float32 or not _is_channels_last_view(x)):
        raise ValueError(f"the kernel in C takes float32 in channels_last; got {x.dtype} of strides {x.stride()}")
    if not _is_channels_last_view(x):
        raise ValueError(f"the kernels take channels_last; got strides {x.stride()}")


def _forward_c(x, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics):
    if norm == "batch":
        means, variances = torch.empty_like(mean), torch.empty_like(mean)
        native.run("norm_block_statistics", len(x), x, means, variances, *x.shape)
        write_batch_statistics(means, variances, eps, mean, rstd)
    native.run(
        "norm_block_forward", len(x), x, contiguous(weight), contiguous(bias), pooled, maps, mean, rstd, statistics,
        *x.shape, eps, *native.powers(spatial_power, channel_power), norm == "batch",
    )  # fmt: skip


def write_batch_statistics(means: Tensor, variances: Tensor, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """Write mean and 1 / sqrt(variance + eps) of the batch into every row of [B, C].

    See `atom_fast.ops.joint_batch.join_statistics`, which may overwrite ``means`` and ``variances``.
    """
    total, variance = join_statistics(means, variances)
    mean.copy_(total)
    rstd.copy_(torch.rsqrt(variance + eps))


def _backward_c(
    grad_pooled, grad_maps, x, weight, bias, maps, mean, rstd, statistics, spatial_power, channel_power, norm, grad_x
):
    inputs = *c_gradients(grad_pooled, grad_maps), x, contiguous(weight), contiguous(bias), maps, mean, rstd, statistics
    scratch = x.new_empty((native.threads_for(len(x)), maps.shape[1]))
    sizes = *x.shape, *native.powers(spatial_power, channel_power)
    for sums, mode in sums_passes(norm, mean.new_empty((len(mean), 2, mean.shape[1]))):
        native.run("norm_block_backward", len(x), *inputs, sums, grad_x, scratch, *sizes, mode)


OWN_SUMS, WRITE_SUMS, READ_SUMS = range(3)  # as in kernels/norm_block.h


def sums_passes(norm: str, sums: Tensor) -> Iterator[tuple[Tensor, int]]:
    """Yield, for each call of a backward kernel in C, the sums [B, 2, C] that it writes or reads, and the mode."""
    if norm == "instance":
        yield sums, OWN_SUMS
    else:
        yield sums, WRITE_SUMS
        yield join_sums(sums), READ_SUMS


def c_gradients(grad_pooled: Tensor | None, grad_maps: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """Lay out the gradients of a block's outputs as the kernels in C index them."""
    layout = torch.channels_last
    return None if grad_pooled is None else grad_pooled.contiguous(memory_format=layout), contiguous(grad_maps)


# Triton: see kernels/norm_block.py.


def _forward_triton(x, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics):
    import triton

    from ..kernels import norm_block as kernels

    batch, channels, height, width = x.shape
    x, weight, bias = int32_indexable(x), contiguous(weight), contiguous(bias)
    constants = _constants(x, weight, spatial_power, channel_power) | {"USE_STATISTICS": norm == "batch"}
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


def is_channels_last(x: Tensor) -> bool:
    """Return True if a position's channels are adjacent in memory, and its neighbours in the plane are not."""
    return x.stride(1) == 1 and x.stride(3) != 1


def chunk_sums(
    maps: Tensor, chunks: int, shape: tuple[int, ...], spatial_power: float | None, channel_power: float | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Allocate the inputs of `join_chunks`: spatial sums, channel sums and peaks, in the dtype of ``maps``."""
    n_spatial, n_channel = map_sizes(shape, spatial_power, channel_power)
    spatial, channel = maps.new_empty((shape[0], chunks, n_spatial)), maps.new_empty((shape[0], n_channel))
    return spatial, channel, maps.new_empty((shape[0], chunks))


def is_tiled(shape: tuple[int, ...], dtype: torch.dtype) -> bool:
    """Return True if Triton's kernels walk planes of [C, H, W] in tiles: registers do not hold them."""
    from ..kernels import norm_block as kernels

    return kernels.norm_block_launch(*shape, dtype.itemsize, True) is None


def spatial_sums(shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the most values that tiled kernels and `join_chunks` sum at once for the spatial map of [C, H, W]."""
    from ..kernels import norm_block as kernels

    channels, height, width = shape
    chunks = -(-channels // kernels.tiled_launch(*shape, dtype.itemsize, True)["BLOCK_C"])
    return height * width * (1 if chunks == 1 else 2 * chunks + 1)


def _batch_statistics(x: Tensor, eps: float, mean: Tensor, rstd: Tensor) -> None:
    """Write each channel's mean and 1 / sqrt(variance + eps) over the batch into every row of [B, C]."""
    if is_joint():
        variances, means = torch.var_mean(x.to(mean.dtype), (2, 3), correction=0)
        write_batch_statistics(means, variances, eps, mean, rstd)
        return
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
    """Combine the chunks of a sample relative to its largest feature, and scale its maps to unit length.

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


def unit_length(attention: Tensor, factor: Tensor, out: Tensor) -> None:
    """Write the maps [B, M] with L2 norm 1 to ``out``, and 1 / norm (1 for a zero map) to ``factor`` [B]."""
    norm = torch.linalg.vector_norm(attention, dim=1)
    factor.copy_(norm.masked_fill(norm == 0, 1.0).reciprocal_())
    torch.mul(attention, factor[:, None], out=out)


def _backward_triton(
    grad_pooled, grad_maps, x, weight, bias, maps, mean, rstd, statistics, spatial_power, channel_power, norm, grad_x
):
    import triton

    from ..kernels import norm_block as kernels

    batch, channels, height, width = x.shape
    if grad_pooled is None:
        grad_pooled = x.new_zeros(()).expand(batch, channels, height // 2, width // 2)
    if grad_maps is None:
        spatial_power = channel_power = None
    x, grad_pooled = int32_indexable(x), int32_indexable(grad_pooled)
    weight, bias = contiguous(weight), contiguous(bias)
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
            kernel(*inputs, join_sums(sums), grad_x, *strides, **constants, SUMS="read", **launch)


def map_weights(
    grad_maps: Tensor | None,
    maps: Tensor,
    statistics: Tensor,
    shape: tuple[int, ...],
    spatial_power: float | None,
    channel_power: float | None,
) -> Tensor:
    """Return the factors [B, M] of (f / peak)^(p - 1) in the gradient of each feature, laid out as the maps."""
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


# Triton, successor: see kernels/norm.py.


def _forward_successor(x, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics):
    from ..kernels import norm as kernels

    rows, grid, constants = walk_of(x, norm)
    constants |= {"BATCH": norm == "batch", **_powers(spatial_power, channel_power)}
    n_spatial, n_channel = map_sizes(x.shape, spatial_power, channel_power)
    spatial = maps.new_empty((len(x), grid[0] // rows, n_spatial))
    channel = maps.new_empty((rows, n_channel))
    inputs = x, contiguous(weight), contiguous(bias), mean, rstd
    if norm == "batch":
        write_statistics(x, mean, rstd, eps)
    with device_of(x):
        kernels.apply_kernel[grid](*inputs, pooled, spatial, channel, eps, **constants, RECTIFY=True, POOL=True)
        kernels.maps_kernel[(len(x),)](
            *inputs, spatial, channel, maps, statistics, **kernels.maps_launch(*x.shape[1:], constants)
        )


def _backward_successor(
    grad_pooled, grad_maps, x, weight, bias, maps, mean, rstd, statistics, spatial_power, channel_power, norm, grad_x
):
    from ..kernels import norm as kernels

    powers, weights = _powers(None, None), None
    if grad_maps is not None:
        powers, weights = _powers(spatial_power, channel_power), torch.empty_like(maps)
        sizes = dict(zip("CHW", x.shape[1:], strict=True)) | kernels.weights_launch(*x.shape[1:])
        with device_of(x):
            kernels.map_weights_kernel[(len(x),)](grad_maps.contiguous(), maps, statistics, weights, **sizes, **powers)
    inputs = x, weight, bias, mean, rstd
    write_gradient(grad_pooled, *inputs, norm, grad_x, statistics, weights, RECTIFY=True, POOL=True, **powers)


def _powers(spatial_power: float | None, channel_power: float | None) -> dict:
    return {"SPATIAL": constant_power(spatial_power), "CHANNEL": constant_power(channel_power)}


def walk_of(x: Tensor, norm: str, backward: bool = False) -> tuple[int, tuple[int], dict]:
    """Return the rows of ``x`` that the kernels of `kernels/norm.py` walk, their grid, and their constants."""
    from ..kernels import norm as kernels

    batch, *size = x.shape
    launch = kernels.norm_launch(*size, x.element_size(), norm, backward)
    quads = -(-size[1] // 2) * -(-size[2] // 2)
    rows = batch * -(-quads // (launch["TILES"] * launch["BLOCK_Q"]))
    grid = (rows * -(-size[0] // launch["BLOCK_C"]),)
    return rows, grid, dict(zip("CHW", size, strict=True)) | launch | {"EXACT": kernels.is_exact(*size, launch)}


def write_statistics(
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    eps: float,
    running: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
    momentum: float = 0.0,
) -> None:
    """Write mean and 1 / sqrt(variance + eps) [C] over the batch of ``x`` [B, C, H, W] in channels_last.

    running: offset, running mean and running variance [C] or None, as in `atom_fast.ops.batch_norm.batch_norm`.
    """
    from ..kernels import norm as kernels

    rows, grid, constants = walk_of(x, "batch")
    channels = x.shape[1]
    parts = mean.new_empty((rows, 3, channels))
    launch = kernels.rows_launch(rows)
    with device_of(x):
        kernels.statistics_kernel[grid](x, parts, **constants)
        kernels.batch_statistics_kernel[(-(-channels // launch["BLOCK_C"]),)](
            parts, *running, mean, rstd, rows, x.numel() // channels, momentum, eps, C=channels, **launch
        )


def write_gradient(
    gradient: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    norm: str,
    grad_x: Tensor,
    *maps: Tensor | None,
    affine: Tensor | tuple[Tensor, Tensor] | None = None,
    **options: float,
) -> None:
    """Write the gradient of the input of a norm, and of its parameters.

    Args:
        gradient: of the output; None for zero.
        x: [B, C, H, W] in channels_last, as ``grad_x``, which is written.
        mean, rstd: [B, C] of planes, or [C] of the batch.
        maps: statistics [B, 3] and weights [B, M] of the attention maps; None without maps.
        affine: gradients of shift and scale, written; None if they are not needed. Of InstanceNorm [C] each, of
            BatchNorm [2, C] in the dtype of ``mean``.
        options: RECTIFY, POOL, SPATIAL and CHANNEL of `kernels/norm.py`.
    """
    from ..kernels import norm as kernels

    rows, grid, constants = walk_of(x, norm, backward=True)
    channels, positions = x.shape[1], x.shape[2] * x.shape[3]
    if gradient is not None:
        gradient = gradient.contiguous(memory_format=torch.channels_last)
    inputs = x, gradient, contiguous(weight), contiguous(bias), mean, rstd, *(maps or (None, None))
    constants |= options
    if norm == "batch" and affine is None:
        affine = mean.new_empty((2, channels))
    parts = None if affine is None else mean.new_empty((rows, 2, channels))
    with device_of(x):
        if norm == "instance":
            kernels.gradient_kernel[grid](*inputs, parts, grad_x, positions, **constants, SUMS="own")
        else:
            kernels.gradient_kernel[grid](*inputs, parts, None, 1, **constants, SUMS="write")
        if parts is not None:
            launch = kernels.rows_launch(rows)
            kernels.sum_rows_kernel[(-(-channels // launch["BLOCK_C"]),)](parts, *affine, rows, C=channels, **launch)
        if norm == "batch":
            count = len(x) * positions
            kernels.gradient_kernel[grid](*inputs, affine, grad_x, count, **constants, SUMS="read")
