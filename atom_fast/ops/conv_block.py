"""The first block from the image as one operator: 3x3 convolution, then the block of `atom_fast.ops.norm_block`.

Nothing of the size of the convolution's output is written, forward or backward: it is recomputed from the image.
Filters, scale and shift are constants, as they are while distilling. There is no formula for a second derivative.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import _native
from .._backend import resolve_backend
from .._device import Chip, chip_of
from . import norm_block
from .launching import addressable, constant_power, device_of
from .norm_block import BlockOutput
from .norm_block_torch import backward_torch, forward_torch, piece_bytes

IMAGE_CHANNELS = 4  # at most, for the fused kernels


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
    """3x3 convolution with padding 1, then `atom_fast.ops.norm_block.norm_block`, fused.

    The convolution takes no bias: the norm takes the mean of every plane or channel away, so nothing depends on one.
    Precision is that of PyTorch's convolutions: autocast, and TF32 by ``torch.backends.cudnn.conv.fp32_precision``.

    Args:
        images: [B, C_in, H, W], H and W at least 2, any floating dtype, rounded to that of the filters (but not by the
            kernels in C, which compute narrower types in float32).
        filters: [C, C_in, 3, 3], constants; float64, float32, float16 or bfloat16.
        weight, bias, eps, spatial_power, channel_power, norm: as in `norm_block`.

    Returns:
        The pooled features in the filters' dtype, channels_last where fused, and the maps. Differentiable once, in
        ``images``.

    Raises:
        TypeError: images or filters are no floating-point tensors.
        ValueError: a shape, power or norm is not accepted, or filters, scale or shift require a gradient.
    """
    norm_block.check_powers(spatial_power, channel_power)
    norm_block.check_norm(norm)
    norm_block.check_constants(filters=filters, weight=weight, bias=bias)
    _check_input(images, filters)
    if torch.is_autocast_enabled(images.device.type):
        filters = filters.to(torch.get_autocast_dtype(images.device.type))
    backend = resolve_backend(images)
    if backend == "native" and _native.widens(filters) and images.shape[1] <= IMAGE_CHANNELS:
        wide = images.float(), filters.float(), _native.widened(weight), _native.widened(bias)
        options = {"eps": eps, "spatial_power": spatial_power, "channel_power": channel_power, "norm": norm}
        with torch.autocast(images.device.type, enabled=False):
            pooled, maps = conv_block(*wide, **options)
        return BlockOutput(pooled.to(filters.dtype), maps)
    if backend == "native" and not _is_native(images, filters, weight, bias):
        backend = "torch"
    fusible = backend == "native" or norm == "instance"
    if backend == "triton":
        fusible = launch_kind(images.shape[1:], filters.shape[0], filters.dtype, images.device) != "apart"
    if backend == "reference" or not fusible:
        convolved = F.conv2d(images.to(filters.dtype), filters, padding=1)
        return norm_block.norm_block(
            convolved, weight, bias, eps=eps, spatial_power=spatial_power, channel_power=channel_power, norm=norm
        )
    norm_block.check_affine(weight, bias, filters.shape[0])
    pooled, maps, *_ = conv_block_op(images, filters, weight, bias, eps, spatial_power, channel_power, backend, norm)
    return BlockOutput(pooled, maps)


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
    image_shape: tuple[int, int, int],
    channels: int,
    dtype: torch.dtype,
    device: torch.device,
    chip: Chip | None = None,
) -> str:
    """Return how Triton's kernels run the first block of images [C_in, H, W].

    Args:
        channels: C of the filters.
        dtype: of the filters.
        device: a GPU, or the CPU that interprets the kernels.
        chip: a GPU that is not here; None for the device's own.

    Returns:
        ``"planes"``: convolution and block are one kernel that keeps an image's neighbourhoods on the chip.
        ``"tiles"``: the same in tiles, for chips with less shared memory; the convolution is computed twice.
        ``"apart"``: PyTorch's convolution, then `norm_block`.
    """
    from ..kernels.conv_block import conv_block_launch, is_resident

    chip = chip or chip_of(device)
    if dtype == torch.float64:
        multiplied = device.type == "cpu"  # interpreted, in tests
    else:  # without matrix instructions for 16 bits, cuDNN is faster
        multiplied = dtype == torch.float32 or chip.capability >= 80
    if not multiplied or not is_resident(*image_shape):
        return "apart"
    image_channels, height, width = image_shape
    launch = conv_block_launch(image_channels, channels, height, width, dtype.itemsize, chip.shared)
    return "tiles" if launch is None else "planes"


@torch.library.custom_op("atom_fast::conv_block", mutates_args=())
def conv_block_op(
    images: Tensor,
    filters: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    spatial_power: float | None,
    channel_power: float | None,
    backend: str,
    norm: str = "instance",
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `atom_fast.ops.norm_block.norm_block_op` returns for the convolution of the images."""
    norm_block.check_is_fused(norm, backend)
    outputs = _empty_outputs(images, filters, spatial_power, channel_power)
    if images.numel() > 0:
        if backend == "triton":
            _forward_triton(images, filters, weight, bias, eps, spatial_power, channel_power, norm, outputs)
        elif backend == "native":
            _forward_native(images, filters, weight, bias, eps, spatial_power, channel_power, norm, *outputs)
        else:
            pieces = functools.partial(_convolved_pieces, images, filters)
            forward_torch(pieces, weight, bias, eps, spatial_power, channel_power, outputs)
    return outputs


def _empty_outputs(images, filters, spatial_power, channel_power):
    batch, _, height, width = images.shape
    shape = (batch, filters.shape[0], height, width)
    return norm_block.empty_outputs(shape, filters, True, spatial_power, channel_power)


@conv_block_op.register_fake
def _(images, filters, weight, bias, eps, spatial_power, channel_power, backend, norm="instance"):
    return _empty_outputs(images, filters, spatial_power, channel_power)


@torch.library.custom_op("atom_fast::conv_block_backward", mutates_args=())
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
    backend: str,
    norm: str = "instance",
) -> Tensor:
    """Gradient [B, C_in, H, W] of the images; a gradient that is None is zero."""
    if images.numel() == 0:
        return torch.empty_like(images, memory_format=torch.contiguous_format)
    saved = weight, bias, maps, mean, rstd, statistics
    if backend == "native":
        powers = spatial_power, channel_power
        return _backward_native(grad_pooled, grad_maps, images, filters, saved, powers, norm)
    batch, _, height, width = images.shape
    if grad_pooled is None:
        grad_pooled = filters.new_zeros(()).expand(batch, filters.shape[0], height // 2, width // 2)
    powers = (None, None) if grad_maps is None else (spatial_power, channel_power)
    if backend == "triton":
        return _backward_triton(grad_pooled, grad_maps, images, filters, saved, powers, norm)
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    pieces = ((rows, convolved, None) for rows, convolved in _convolved_pieces(images, filters))
    for rows, grad_convolved in backward_torch(pieces, grad_pooled, grad_maps, *saved, *powers):
        shape = gradient[rows].shape
        gradient[rows] = torch.nn.grad.conv2d_input(shape, filters, grad_convolved, padding=1)
    return gradient


@conv_block_backward_op.register_fake
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


conv_block_op.register_autograd(_backward, setup_context=_setup_context)


# C: see kernels/conv_block.c.


def _is_native(images: Tensor, filters: Tensor, weight: Tensor | None, bias: Tensor | None) -> bool:
    """Whether the kernel in C takes this input."""
    return _native.takes(images, filters, weight, bias) and images.shape[1] <= IMAGE_CHANNELS


def _forward_native(
    images, filters, weight, bias, eps, spatial_power, channel_power, norm, pooled, maps, mean, rstd, statistics
):
    own, image_values, values = _native_sizes(images, filters)
    inputs, sizes = (images, _strides(images), own), (*images.shape, filters.shape[0])
    scratch = _scratch(images, image_values + values)
    if norm == "batch":
        means, variances = torch.empty_like(mean), torch.empty_like(mean)
        _native.run("conv_block_statistics", len(images), *inputs, means, variances, scratch, *sizes)
        norm_block.write_batch_statistics(means, variances, eps, mean, rstd)
    _native.run(
        "conv_block_forward", len(images), *inputs, norm_block.dense(weight), norm_block.dense(bias), pooled, maps,
        mean, rstd, statistics, scratch, *sizes, eps,
        *norm_block.native_powers(spatial_power, channel_power), norm == "batch",
    )  # fmt: skip


def _backward_native(grad_pooled, grad_maps, images, filters, saved, powers, norm):
    weight, bias, maps, mean, rstd, statistics = saved
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    own, image_values, values = _native_sizes(images, filters)
    height, width = images.shape[2:]
    framed = (height + 2) * (width + 2) * own.shape[-1]
    scratch = _scratch(images, image_values + framed + values + _padded(maps.shape[1] + 2 * filters.shape[0]))
    gradients = norm_block.native_gradients(grad_pooled, grad_maps)
    saved = norm_block.dense(weight), norm_block.dense(bias), maps, mean, rstd, statistics
    sizes = *images.shape, filters.shape[0], *norm_block.native_powers(*powers)
    for sums, mode in norm_block.sums_passes(norm, mean.new_empty((len(mean), 2, mean.shape[1]))):
        _native.run(
            "conv_block_backward", len(images), *gradients, images, _strides(images), own, *saved, sums, gradient,
            scratch, *sizes, mode,
        )  # fmt: skip
    return gradient


def _native_sizes(images: Tensor, filters: Tensor) -> tuple[Tensor, int, int]:
    """Filters as [3, 3, C_in, C], C filled up with zeros to whole vectors; values of a framed image, of its planes."""
    channels, (_, image_channels, height, width) = filters.shape[0], images.shape
    own = F.pad(filters.permute(2, 3, 1, 0), (0, _padded(channels) - channels)).contiguous()
    return own, _padded((height + 2) * (width + 2) * image_channels), height * width * own.shape[-1]


def _padded(values: int) -> int:
    """A number of values rounded up to whole vectors."""
    return values + -values % _native.LANES


def _strides(images: Tensor) -> Tensor:
    return torch.tensor(images.stride())


def _scratch(images: Tensor, values: int) -> Tensor:
    """Memory of each thread."""
    return images.new_empty((_native.threads_for(len(images)), values))


# Triton: see kernels/conv_block.py.


def _forward_triton(images, filters, weight, bias, eps, spatial_power, channel_power, norm, outputs):
    import triton

    from ..kernels import conv_block as kernels
    from ..kernels.norm_block import is_exact

    batch, image_channels, height, width = images.shape
    channels = filters.shape[0]
    pooled, maps, mean, rstd, statistics = outputs
    images, filters = addressable(images), filters.contiguous()
    constants = _constants(images, filters, weight, spatial_power, channel_power)
    launch = kernels.conv_block_launch(
        image_channels, channels, height, width, filters.element_size(), chip_of(images.device).shared
    )
    with device_of(images):
        if norm == "batch":
            _batch_statistics(images, filters, eps, constants, launch, mean, rstd)
        inputs = images, filters, norm_block.dense(weight), norm_block.dense(bias)
        others = *images.stride(), *pooled.stride(), eps
        if launch is not None:
            kernels.conv_block_forward_kernel[(batch,)](
                *inputs, *outputs, *others, **constants, GIVEN=norm == "batch",
                EXACT=is_exact(channels, height, width, launch),
                CHUNKS=triton.next_power_of_2(triton.cdiv(channels, launch["BLOCK_C"])), **launch,
            )  # fmt: skip
            return
        launch = kernels.tiled_conv_block_launch(image_channels)
        chunks = triton.cdiv(channels, launch["BLOCK_C"])
        sums = norm_block.chunk_sums(maps, chunks, (batch, channels, height, width), spatial_power, channel_power)
        kernels.tiled_conv_block_forward_kernel[(batch, chunks)](
            *inputs, pooled, *sums, mean, rstd, *others, **constants, GIVEN=norm == "batch", **launch
        )
    norm_block.join_chunks(*sums, launch["BLOCK_C"], spatial_power, channel_power, maps, statistics)


def _batch_statistics(images, filters, eps, constants, launch, mean, rstd) -> None:
    """Write what `atom_fast.ops.norm_block` takes of a convolution's output, here of one that is nowhere in memory."""
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
    images, filters = addressable(images), filters.contiguous()
    grad_pooled = addressable(grad_pooled)
    constants = _constants(images, filters, weight, *powers)
    launch = kernels.conv_block_backward_launch(image_channels, chip_of(images.device).capability)
    tiles = triton.cdiv(triton.cdiv(height, 2) * triton.cdiv(width, 2), launch["BLOCK_P"])
    shape = (batch, channels, height, width)
    sums = mean.new_empty((batch, tiles, 2, channels))
    columns = mean.new_empty((batch, 9 * image_channels, height * width))
    gradient = torch.empty_like(images, memory_format=torch.contiguous_format)
    with device_of(images):
        weights = norm_block.map_weights(grad_maps, maps, statistics, shape, *powers)
        affine = norm_block.dense(weight), norm_block.dense(bias)
        inputs = (images, filters, *affine, grad_pooled, weights, mean, rstd, statistics)
        strides = *images.stride(), *grad_pooled.stride()
        constants["EXACT"] = is_exact(channels, height, width, launch, tiles)
        kernels.conv_block_sums_kernel[(batch, tiles)](*inputs, sums, *strides, **constants, **launch)
        if norm == "batch":
            sums = (sums.sum((0, 1)) / batch).expand(batch, 1, 2, channels).contiguous()
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
    tf32 = torch.backends.cudnn.conv.fp32_precision == "tf32" and chip_of(images.device).has_tf32
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


# Lean PyTorch: pieces of samples go through the convolution and the block while they are in the cache.


def _sample_pieces(images: Tensor, filters: Tensor) -> list[slice]:
    output_bytes = filters.shape[0] * images[0, 0].numel() * filters.element_size()
    rows = max(2, piece_bytes(images.device) // output_bytes)
    # A last piece of one image joins the one before it: PyTorch convolves a batch of one in another way, with other
    # rounding, and an image's bits would depend on its place.
    edges = [*range(0, max(images.shape[0] - 1, 1), rows), images.shape[0]]
    return [slice(*piece) for piece in itertools.pairwise(edges)]


def _convolved_pieces(images: Tensor, filters: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Runs of images, and their convolution."""
    filters = filters.contiguous(memory_format=torch.channels_last)
    for rows in _sample_pieces(images, filters):
        piece = images[rows].to(filters.dtype).contiguous(memory_format=torch.channels_last)
        yield rows, F.conv2d(piece, filters, padding=1)
