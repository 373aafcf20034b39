"""The first block from the image as one operator: 3x3 convolution, then the block of `atom_fast.ops.norm_block`.

The convolution's output is never written to memory, forward or backward: it is recomputed from the image. Filters,
scale and shift are constants, as they are during distillation. A second derivative is not implemented and raises.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .._device import Chip, chip_of
from . import native, norm_block
from .dispatch import dispatch, register
from .joint_batch import is_joint, join_sums
from .launching import KERNELS, constant_power, contiguous, device_of, int32_indexable
from .norm_block import BlockOutput
from .operators import differentiate, fake, operator

IMAGE_CHANNELS = 4  # the most that the fused kernels accept


def conv_block(
    images: Tensor,
    filters: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-5,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    norm: str = "instance",
) -> BlockOutput:
    """Apply a 3x3 convolution with padding 1, then `atom_fast.ops.norm_block.norm_block`.

    The convolution has no bias: the norm subtracts the mean of every plane or channel, so a bias has no effect.
    Precision follows PyTorch's convolutions: autocast, and TF32 by ``torch.backends.cudnn.conv.fp32_precision``.

    Args:
        images: [B, C_in, H, W], H and W at least 2, any floating dtype, rounded to the dtype of the filters (except in
            the kernels in C, which compute half precision in float32).
        filters: [C, C_in, 3, 3], constants; float64, float32, float16 or bfloat16.
        weight, bias, eps, spatial_power, channel_power, norm: as in `norm_block`.

    Returns:
        The pooled features in the filters' dtype, channels_last where fused, and the maps. Differentiable once, in
        ``images``.

    Raises:
        TypeError: images or filters are not floating-point tensors.
        ValueError: a shape, power or norm is not accepted, or filters, scale or shift require a gradient.
    """
    norm_block.check_powers(spatial_power, channel_power)
    norm_block.check_norm(norm)
    norm_block.check_constants(filters=filters, weight=weight, bias=bias)
    _check_input(images, filters)
    if torch.is_autocast_enabled(images.device.type):
        filters = filters.to(torch.get_autocast_dtype(images.device.type))
    norm_block.check_affine(weight, bias, filters.shape[0])
    arguments = images, filters, weight, bias, eps, spatial_power, channel_power, norm
    return BlockOutput(*dispatch("conv_block", *arguments))


def _run_triton(images, filters, *arguments):
    if launch_kind(images.shape[1:], filters.shape[0], filters.dtype, images.device) == "apart":
        return _run_apart(images, filters, *arguments)
    measured = KERNELS["conv_block"] == "measured" or is_joint()  # the successors join moments, not statistics
    implementation = "triton" if measured else "successor"
    return conv_block_op(images, filters, *arguments, implementation)[:2]


def _run_c(images, filters, weight, bias, *options):
    if images.shape[1] > IMAGE_CHANNELS:
        return _run_apart(images, filters, weight, bias, *options)
    if native.upcasts(filters):
        wide = images.float(), filters.float(), native.upcast(weight), native.upcast(bias)
        with torch.autocast(images.device.type, enabled=False):
            pooled, maps, *_ = conv_block_op(*wide, *options, "c")
        return pooled.to(filters.dtype), maps
    if not native.supports(images, filters, weight, bias):
        return NotImplemented
    return conv_block_op(images, filters, weight, bias, *options, "c")[:2]


def _run_apart(images, filters, weight, bias, eps, spatial_power, channel_power, norm):
    """Run PyTorch's convolution, then `norm_block`."""
    convolved = F.conv2d(images.to(filters.dtype), filters, padding=1)
    powers = {"spatial_power": spatial_power, "channel_power": channel_power}
    return norm_block.norm_block(convolved, weight, bias, eps=eps, **powers, norm=norm)


def _run_eager(images, filters, *arguments):
    return norm_block.run_eager(F.conv2d(images.to(filters.dtype), filters, padding=1), *arguments)


register("conv_block", triton=_run_triton, c=_run_c, eager=_run_eager)


def _check_input(images: Tensor, filters: Tensor) -> None:
    for name, tensor in (("images", images), ("filters", filters)):
        if not tensor.is_floating_point():
            raise TypeError(f"{name} must be a floating-point tensor; got {tensor.dtype}")
    if images.dim() != 4 or min(images.shape[2:]) < 2 or images.shape[1] < 1:
        raise ValueError(
            f"images must be [B, C, H, W] with C at least 1, H and W at least 2; got {tuple(images.shape)}"
        )
    if filters.dim() != 4 or filters.shape[0] < 1 or filters.shape[1:] != (images.shape[1], 3, 3):
        raise ValueError(f"filters must be [C, {images.shape[1]}, 3, 3]; got {tuple(filters.shape)}")


def launch_kind(
    image_shape: tuple[int, ...],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    chip: Chip | None = None,
) -> str:
    """Return how Triton's kernels run the first block of images [C_in, H, W].

    Args:
        channels: C of the filters.
        dtype: dtype of the filters.
        device: a GPU, or the CPU that interprets the kernels.
        chip: the GPU; None for the one at ``device``.

    Returns:
        ``"planes"``: convolution and block are one kernel that keeps an image's neighbourhoods on the chip. (The
            successor of these kernels walks tiles in either case.)
        ``"tiles"``: the same in tiles, for chips with less shared memory; the convolution is computed twice.
        ``"apart"``: PyTorch's convolution, then `norm_block`.
    """
    from ..kernels.conv_block import conv_block_launch, is_resident

    chip = chip or chip_of(device)
    if dtype == torch.float64:
        multiplied = device.type == "cpu"  # interpreted, in tests
    else:  # without 16-bit matrix instructions, cuDNN is faster
        multiplied = dtype == torch.float32 or chip.capability >= 80
    if not multiplied or not is_resident(*image_shape):
        return "apart"
    image_channels, height, width = image_shape
    launch = conv_block_launch(image_channels, channels, height, width, dtype.itemsize, chip.shared)
    return "tiles" if launch is None else "planes"


@operator("conv_block", differentiable=True)
def conv_block_op(
    images: Tensor,
    filters: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    norm: str,
    implementation: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `atom_fast.ops.norm_block.norm_block_op` returns for the convolution of the images."""
    outputs = _empty_outputs(images, filters, spatial_power, channel_power)
    if images.numel() > 0:
        forward = {"triton": _forward_triton, "successor": _forward_successor, "c": _forward_c}[implementation]
        forward(images, filters, weight, bias, eps, spatial_power, channel_power, norm, *outputs)
    return outputs


def _empty_outputs(images, filters, spatial_power, channel_power):
    batch, _, height, width = images.shape
    shape = (batch, filters.shape[0], height, width)
    return norm_block.empty_outputs(shape, filters, True, spatial_power, channel_power)


@fake(conv_block_op)
def _(images, filters, weight, bias, eps, spatial_power, channel_power, norm, implementation):
    return _empty_outputs(images, filters, spatial_power, channel_power)


@operator("conv_block_backward")
def conv_block_backward_op(
    grad_pooled: Tensor | None,
    grad_maps: Tensor | None,
    images: Tensor,
    filters: Tensor,
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
    """Return the gradient [B, C_in, H, W] of the images; a gradient that is None counts as zero."""
    if images.numel() == 0:
        return torch.empty_like(images, memory_format=torch.contiguous_format)
    backward = {"triton": _backward_triton, "successor": _backward_successor, "c": _backward_c}[implementation]
    saved = weight, bias, maps, mean, rstd, statistics
    return backward(grad_pooled, grad_maps, images, filters, saved, (spatial_power, channel_power), norm)


@fake(conv_block_backward_op)
def _(grad_pooled, grad_maps, images, *_):
    return torch.empty_like(images, memory_format=torch.contiguous_format)


def _setup_context(ctx, inputs, output):
    images, filters, weight, bias, _, *ctx.options = inputs
    _, *saved = output
    ctx.mark_non_differentiable(*saved[1:])
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(images, filters, weight, bias, *saved)


def _backward(ctx, grad_pooled, grad_maps, *_):
    gradient = None
    if grad_pooled is not None or grad_maps is not None:
        gradient = conv_block_backward_op(grad_pooled, grad_maps, *ctx.saved_tensors, *ctx.options)
    return gradient, None, None, None, None, None, None, None, None


differentiate(conv_block_op, _backward, _setup_context)


# C: see kernels/conv_block.c.


def _forward_c(
    images, filters, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics
):
    own, image_values, values = _c_sizes(images, filters)
    inputs, sizes = (images, _strides(images), own), (*images.shape, filters.shape[0])
    scratch = _scratch(images, image_values + values)
    if norm == "batch":
        means, variances = torch.empty_like(mean), torch.empty_like(mean)
        native.run("conv_block_statistics", len(images), *inputs, means, variances, scratch, *sizes)
        norm_block.write_batch_statistics(means, variances, eps, mean, rstd)
    native.run(
        "conv_block_forward", len(images), *inputs, contiguous(weight), contiguous(bias), pooled, maps,
        mean, rstd, statistics, scratch, *sizes, eps,
        *native.powers(spatial_power, channel_power), norm == "batch",
    )  # fmt: skip


def _backward_c(grad_pooled, grad_maps, images, filters, saved, powers, norm):
    weight, bias, maps, mean, rstd, statistics = saved
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    own, image_values, values = _c_sizes(images, filters)
    height, width = images.shape[2:]
    framed = (height + 2) * (width + 2) * own.shape[-1]
    scratch = _scratch(images, image_values + framed + values + _padded(maps.shape[1] + 2 * filters.shape[0]))
    gradients = norm_block.c_gradients(grad_pooled, grad_maps)
    saved = contiguous(weight), contiguous(bias), maps, mean, rstd, statistics
    sizes = *images.shape, filters.shape[0], *native.powers(*powers)
    for sums, mode in norm_block.sums_passes(norm, mean.new_empty((len(mean), 2, mean.shape[1]))):
        native.run(
            "conv_block_backward", len(images), *gradients, images, _strides(images), own, *saved, sums, gradient,
            scratch, *sizes, mode,
        )  # fmt: skip
    return gradient


def _c_sizes(images: Tensor, filters: Tensor) -> tuple[Tensor, int, int]:
    """Return filters [3, 3, C_in, C], C zero-padded to whole vectors; values of a framed image; and of its planes."""
    channels, (_, image_channels, height, width) = filters.shape[0], images.shape
    own = F.pad(filters.permute(2, 3, 1, 0), (0, _padded(channels) - channels)).contiguous()
    return own, _padded((height + 2) * (width + 2) * image_channels), height * width * own.shape[-1]


def _padded(values: int) -> int:
    """Round a number of values up to whole vectors."""
    return values + -values % native.LANES


def _strides(images: Tensor) -> Tensor:
    return torch.tensor(images.stride())


def _scratch(images: Tensor, values: int) -> Tensor:
    """Allocate scratch memory for each thread."""
    return images.new_empty((native.threads_for(len(images)), values))


# Triton: see kernels/conv_block.py.


def _forward_triton(
    images, filters, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics
):
    import triton

    from ..kernels import conv_block as kernels
    from ..kernels.norm_block import is_exact

    batch, image_channels, height, width = images.shape
    channels = filters.shape[0]
    images, filters = int32_indexable(images), filters.contiguous()
    constants = _constants(images, filters, weight, spatial_power, channel_power)
    launch = kernels.conv_block_launch(
        image_channels, channels, height, width, filters.element_size(), chip_of(images.device).shared
    )
    with device_of(images):
        if norm == "batch":
            _batch_statistics(images, filters, eps, constants, launch, mean, rstd)
        inputs = images, filters, contiguous(weight), contiguous(bias)
        others = *images.stride(), *pooled.stride(), eps
        if launch is not None:
            kernels.conv_block_forward_kernel[(batch,)](
                *inputs, pooled, maps, mean, rstd, statistics, *others, **constants, USE_STATISTICS=norm == "batch",
                EXACT=is_exact(channels, height, width, launch),
                CHUNKS=triton.next_power_of_2(triton.cdiv(channels, launch["BLOCK_C"])), **launch,
            )  # fmt: skip
            return
        launch = kernels.tiled_conv_block_launch(image_channels)
        chunks = triton.cdiv(channels, launch["BLOCK_C"])
        sums = norm_block.chunk_sums(maps, chunks, (batch, channels, height, width), spatial_power, channel_power)
        kernels.tiled_conv_block_forward_kernel[(batch, chunks)](
            *inputs, pooled, *sums, mean, rstd, *others, **constants, USE_STATISTICS=norm == "batch", **launch
        )
    norm_block.join_chunks(*sums, launch["BLOCK_C"], spatial_power, channel_power, maps, statistics)


def _batch_statistics(images, filters, eps, constants, launch, mean, rstd) -> None:
    """Write the batch statistics of the convolution's output, computed from the images."""
    import triton

    from ..kernels import conv_block as kernels
    from ..kernels.norm_block import is_exact

    batch, image_channels, height, width = images.shape
    channels = filters.shape[0]
    means, variances = torch.empty_like(mean), torch.empty_like(mean)
    arguments = images, filters, means, variances, *images.stride()
    shared = {name: constants[name] for name in ("CI", "C", "H", "W", "PRECISION")}
    if launch is not None:
        blocks = {name: launch[name] for name in ("BLOCK_P", "BLOCK_C", "BLOCK_K", "num_warps")}
        exact = is_exact(channels, height, width, launch)
        kernels.conv_block_statistics_kernel[(batch,)](*arguments, **shared, EXACT=exact, **blocks)
    else:
        launch = kernels.tiled_conv_block_launch(image_channels)
        grid = batch, triton.cdiv(channels, launch["BLOCK_C"])
        kernels.tiled_conv_block_statistics_kernel[grid](*arguments, **shared, **launch)
    norm_block.write_batch_statistics(means, variances, eps, mean, rstd)


def _backward_triton(grad_pooled, grad_maps, images, filters, saved, powers, norm):
    import triton

    from ..kernels import conv_block as kernels
    from ..kernels.norm_block import is_exact

    weight, bias, maps, mean, rstd, statistics = saved
    batch, image_channels, height, width = images.shape
    channels = filters.shape[0]
    if grad_pooled is None:
        grad_pooled = filters.new_zeros(()).expand(batch, channels, height // 2, width // 2)
    if grad_maps is None:
        powers = None, None
    images, filters = int32_indexable(images), filters.contiguous()
    grad_pooled = int32_indexable(grad_pooled)
    constants = _constants(images, filters, weight, *powers)
    launch = kernels.conv_block_backward_launch(image_channels, chip_of(images.device).capability)
    tiles = triton.cdiv(triton.cdiv(height, 2) * triton.cdiv(width, 2), launch["BLOCK_P"])
    shape = (batch, channels, height, width)
    sums = mean.new_empty((batch, tiles, 2, channels))
    columns = mean.new_empty((batch, 9 * image_channels, height * width))
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    with device_of(images):
        weights = norm_block.map_weights(grad_maps, maps, statistics, shape, *powers)
        affine = contiguous(weight), contiguous(bias)
        inputs = (images, filters, *affine, grad_pooled, weights, mean, rstd, statistics)
        strides = *images.stride(), *grad_pooled.stride()
        constants["EXACT"] = is_exact(channels, height, width, launch, tiles)
        kernels.conv_block_sums_kernel[(batch, tiles)](*inputs, sums, *strides, **constants, **launch)
        if norm == "batch":
            sums = join_sums(sums.sum(1)).expand(batch, 1, 2, channels).contiguous()
        kernels.conv_block_columns_kernel[(batch, tiles)](
            *inputs, sums, columns, *strides, **constants, TILES=sums.shape[1], **launch
        )
        pixels = min(triton.next_power_of_2(height * width), 1024)
        kernels.fold_kernel[(batch * image_channels, triton.cdiv(height * width, pixels))](
            columns, gradient, CI=image_channels, H=height, W=width, BLOCK=pixels, num_warps=4
        )
    return gradient


def _constants(images, filters, weight, spatial_power, channel_power) -> dict:
    _, image_channels, height, width = images.shape
    # Read here, where torch.compile need not trace it. After ``allow_tf32 = False`` it is "none".
    cudnn: Any = torch.backends.cudnn
    tf32 = cudnn.conv.fp32_precision == "tf32" and chip_of(images.device).has_tf32
    return {
        "CI": image_channels,
        "C": filters.shape[0],
        "H": height,
        "W": width,
        "SPATIAL": constant_power(spatial_power),
        "CHANNEL": constant_power(channel_power),
        "AFFINE": weight is not None,
        "PRECISION": "tf32" if tf32 and filters.dtype == torch.float32 else "ieee",
    }


# Triton, successor: see kernels/folded_conv_block.py.


def _forward_successor(
    images, filters, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics
):
    import triton

    from ..kernels import folded_conv_block as kernels

    batch, channels = mean.shape
    height, width = images.shape[2:]
    images, filters = int32_indexable(images), filters.contiguous()
    walk = _walk_constants(images, filters, weight, (spatial_power, channel_power), norm)
    block_k = walk["BLOCK_K"]
    with device_of(images):
        moments = mean.new_empty((batch, block_k, block_k))
        shared = {name: walk[name] for name in ("CI", "H", "W", "BATCH", "PRECISION", "BLOCK_K")}
        kernels.moments_kernel[(batch,)](
            images, filters, moments, *images.stride(), **shared, BLOCK_N=64, num_warps=4, num_stages=1
        )
        if norm == "batch":
            moments = moments.sum(0, keepdim=True)
        folded = _fold_filters(images, filters, weight, bias, moments, mean, rstd, eps, walk)
        if norm == "batch":
            mean[1:], rstd[1:] = mean[:1], rstd[:1]
        spatial = mean.new_empty((batch, walk["CHUNKS"], height * width))
        channel = mean.new_empty((batch, walk["SPLITS"], channels))
        inputs = images, folded
        kernels.features_kernel[(batch, walk["SPLITS"], walk["CHUNKS"])](
            *inputs, pooled, spatial, channel, 2, *images.stride(), **walk,
            maxnreg=kernels.forward_registers(chip_of(images.device).capability),
        )  # fmt: skip
        kernels.maps_kernel[(batch,)](
            *inputs, spatial, channel, maps, statistics, 2, *images.stride(), **walk,
            BLOCK_SPATIAL=triton.next_power_of_2(height * width), BLOCK_CHANNEL=triton.next_power_of_2(channels),
        )  # fmt: skip


def _fold_filters(images, filters, weight, bias, moments, mean, rstd, eps, walk) -> Tensor:
    """Return the folded filters [rows, channels, BLOCK_K]; those of saved statistics, without moments, transposed."""
    from ..kernels import folded_conv_block as kernels

    rows, padded, block_k = 1 if walk["BATCH"] else len(images), walk["CHUNKS"] * walk["BLOCK_C"], walk["BLOCK_K"]
    folded = filters.new_empty((rows, padded, block_k) if moments is not None else (rows, block_k, padded))
    strides = folded.stride()[1:] if moments is not None else folded.stride()[:0:-1]
    block = min(padded, 32)
    kernels.fold_filters_kernel[(rows, padded // block)](
        images, filters, contiguous(weight), contiguous(bias), moments, mean, rstd, folded, *strides, eps,
        *images.stride(), **{name: walk[name] for name in ("CI", "C", "H", "W", "PRECISION", "BLOCK_K")},
        EXACT_PRECISION=_exact_precision(images, filters), BLOCK_C=block, num_warps=4,
    )  # fmt: skip
    return folded


def _backward_successor(grad_pooled, grad_maps, images, filters, saved, powers, norm):
    import triton

    from ..kernels import folded_conv_block as kernels

    weight, bias, maps, mean, rstd, statistics = saved
    batch, image_channels, height, width = images.shape
    channels = filters.shape[0]
    if grad_maps is None:
        powers = None, None
    if grad_pooled is not None:
        grad_pooled = grad_pooled.contiguous(memory_format=torch.channels_last)
    images, filters = int32_indexable(images), filters.contiguous()
    walk = _walk_constants(images, filters, weight, powers, norm)
    splits, chunks, block_k = walk["SPLITS"], walk["CHUNKS"], walk["BLOCK_K"]
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    with device_of(images):
        weights = norm_block.map_weights(grad_maps, maps, statistics, (batch, channels, height, width), *powers)
        folded = _fold_filters(images, filters, weight, None, None, mean, rstd, 0.0, walk)
        columns = mean.new_empty((batch, chunks, 9 * image_channels, (height + 2) * (width + 2)))
        column_sums = mean.new_empty((batch, splits, chunks, block_k))
        products = mean.new_empty((batch, splits, channels))
        kernels.gradients_kernel[(batch, splits, chunks)](
            images, folded, contiguous(bias), grad_pooled, weights, statistics, columns, column_sums, products,
            4, *images.stride(), **walk,
        )  # fmt: skip
        if norm == "batch":
            column_sums, products = column_sums.mean(0, keepdim=True), products.mean(0, keepdim=True)
        taps = mean.new_empty((batch, image_channels, image_channels, 25))
        constant = mean.new_empty((batch, image_channels))
        names = "CI", "C", "H", "W", "BATCH", "SPLITS", "CHUNKS", "BLOCK_K"
        kernels.correction_kernel[(batch,)](
            images, filters, mean, rstd, column_sums, products, mean.new_empty((batch, block_k, block_k)), columns,
            taps, constant, *images.stride(), **{name: walk[name] for name in names},
            EXACT_PRECISION=_exact_precision(images, filters), BLOCK_C=32, BLOCK_N=64,
            BLOCK_T=triton.next_power_of_2(taps[0].numel()), num_warps=4,
        )  # fmt: skip
        pixels = min(triton.next_power_of_2(height * width), 512)
        kernels.image_gradient_kernel[(batch, triton.cdiv(height * width, pixels))](
            images, columns, taps, constant, gradient, *images.stride(), CI=image_channels, H=height, W=width,
            CHUNKS=chunks, BLOCK_CI=triton.next_power_of_2(image_channels), BLOCK=pixels, num_warps=4,
        )  # fmt: skip
    return gradient


def _walk_constants(images, filters, weight, powers, norm) -> dict:
    import triton

    from ..kernels import folded_conv_block as kernels
    from ..kernels.norm_block import is_exact

    constants = _constants(images, filters, weight, *powers)
    del constants["AFFINE"]  # the norm's parameters are folded
    channels, height, width = (constants[name] for name in ("C", "H", "W"))
    tensor_cores = filters.dtype.itemsize == 2 or constants["PRECISION"] == "tf32"
    launch = kernels.launch_table(constants["CI"], channels, tensor_cores)
    tiles = triton.cdiv(triton.cdiv(height, 2) * triton.cdiv(width, 2), launch["BLOCK_P"])
    return constants | launch | {
        "BATCH": norm == "batch",
        "EXACT": is_exact(channels, height, width, launch, tiles),
        "SPLITS": triton.cdiv(tiles, launch["TILES"]),
        "CHUNKS": triton.cdiv(channels, launch["BLOCK_C"]),
    }  # fmt: skip


def _exact_precision(images: Tensor, filters: Tensor) -> str:
    """Return the precision of products of float32 whose rounding would be magnified."""
    return "tf32x3" if filters.dtype != torch.float64 and chip_of(images.device).has_tf32 else "ieee"
