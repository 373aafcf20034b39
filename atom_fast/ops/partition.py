"""Decoding of small images from sheets and their siamese augmentation as one operator, and its transpose.

A sheet [C, H, W] holds r x r small images, row by row. Decoding enlarges one to H x W bilinearly, as
``F.interpolate(mode="bilinear", align_corners=False)`` does: a line of pixels reads the small line it lies in and, with
a share of at most a half, the next one on its side; at the border there is no next one. The operator is linear but for
the brightness, so its derivative is its transpose, and the derivative of that is the operator without brightness.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import augmentation, native
from .augmentation import MAX_ANGLE, MAX_SCALE, extent
from .dispatch import dispatch, register
from .launching import accumulation_dtype, contiguous, device_of
from .operators import differentiate, fake, operator


def decode_and_augment(
    sheets: Tensor, operation: Tensor, uniforms: Tensor, groups: Tensor | None, chosen: Tensor | None, partition: int
) -> Tensor:
    """Run `partition_op` with the implementation that the backend asks for."""
    count = sheets.shape[0]
    return dispatch("partition", sheets, operation, uniforms, groups, chosen, count, partition, False, True)


def _run_triton(*arguments):
    return partition_op(*arguments, "triton")


def _run_c(images, *arguments):
    if native.upcasts(images):
        return partition_op(images.float(), *arguments, "c").to(images.dtype)
    return partition_op(images, *arguments, "c") if native.supports(images) else NotImplemented


def _run_eager(*arguments):
    return partition_op(*arguments, "eager")


register("partition", plain=(), triton=_run_triton, c=_run_c, eager=_run_eager)


@operator(
    "partition",
    schema="(Tensor images, Tensor operation, Tensor uniforms, Tensor? groups, Tensor? chosen, SymInt sheets, "
    "int partition, bool transposed, bool offset, str implementation) -> Tensor",
    differentiable=True,
)
def partition_op(
    images: Tensor,
    operation: Tensor,
    uniforms: Tensor,
    groups: Tensor | None,
    chosen: Tensor | None,
    sheets: int,
    partition: int,
    transposed: bool,
    offset: bool,
    implementation: str,
) -> Tensor:
    """Decode and augment small images, or apply the transpose of the linear part.

    Args:
        images: [S, C, H, W], sheets, or [B, C, H, W], a gradient, when ``transposed``; floating point, any strides.
        operation: int64 [G], indices into ``OPERATIONS``; any other number only decodes.
        uniforms: float32 [G, 3] in [0, 1).
        groups: int64 [B], each row's group; None if row i belongs to group i.
        chosen: int64 [B], the number of the small image that each row shows, in [0, S r r); None for all in order. Not
            checked on a GPU.
        sheets: S.
        partition: r, which divides H and W.
        transposed: apply the transpose, as a gradient needs it.
        offset: add the brightness, the only part that does not depend on the image; a derivative omits it.
        implementation: "triton", "c" (float32 on a CPU) or "eager" (PyTorch's operators).

    Returns:
        [B, C, H, W], or [S, C, H, W] when ``transposed``, of the same dtype, channels_last if ``images`` is.

    Raises:
        IndexError: on a CPU, a number in ``chosen`` is not that of a small image.
    """
    parts = sheets * partition**2
    if chosen is not None and chosen.device.type == "cpu" and ((chosen < 0) | (chosen >= parts)).any():
        raise IndexError(f"chosen must be in [0, {parts}); got {int(chosen.min())} to {int(chosen.max())}")
    output = _empty_result(images, chosen, sheets, partition, transposed)
    if images.numel() == 0 or output.numel() == 0:
        return output.zero_()
    run = {"triton": _triton, "c": _c, "eager": _eager}[implementation]
    run(images, operation, uniforms, groups, chosen, sheets, partition, transposed, offset, output)
    return output


@fake(partition_op)
def _(images, operation, uniforms, groups, chosen, sheets, partition, transposed, offset, implementation):
    return _empty_result(images, chosen, sheets, partition, transposed)


def _save(ctx, inputs, output):
    _, operation, uniforms, groups, chosen, *ctx.sizes, ctx.transposed, _, ctx.implementation = inputs
    ctx.save_for_backward(operation, uniforms, groups, chosen)


def _differentiate(ctx, gradient):
    transposed = not ctx.transposed
    gradient = partition_op(gradient, *ctx.saved_tensors, *ctx.sizes, transposed, False, ctx.implementation)
    return (gradient, *(None,) * 9)


differentiate(partition_op, _differentiate, _save)


def _empty_result(images: Tensor, chosen: Tensor | None, sheets: int, partition: int, transposed: bool) -> Tensor:
    """Allocate the result, in the layout in which the next convolution reads the images."""
    if transposed:
        count = sheets
    else:
        count = sheets * partition**2 if chosen is None else chosen.shape[0]
    layout = augmentation._layout(images)
    return torch.empty((count, *images.shape[1:]), dtype=images.dtype, device=images.device, memory_format=layout)


def _rows(chosen: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Return the rows ordered by small image, and where each small image's start.

    Nothing waits for the device, and equal inputs give equal orders.
    """
    ordered, order = torch.sort(chosen, stable=True)
    return order, torch.searchsorted(ordered, torch.arange(parts + 1, device=chosen.device))


def _triton(images, operation, uniforms, groups, chosen, sheets, partition, transposed, offset, output):
    """Fill ``output`` with a Triton kernel."""
    from atom_fast.kernels.partition import BLOCK, WARPS, partition_forward_kernel, partition_transposed_kernel

    _, channels, height, width = images.shape
    sizes = extent(height, width)
    parts = sheets * partition**2
    results = parts if transposed else output.shape[0]
    values = channels * height * width // (partition**2 if transposed else 1)
    grid = (results, -(-values // BLOCK))
    constants = dict(
        CHANNELS=channels,
        HEIGHT=height,
        WIDTH=width,
        PARTITION=partition,
        PAD_Y=sizes.pad[0],
        PAD_X=sizes.pad[1],
        CUT_Y=sizes.cut[0],
        CUT_X=sizes.cut[1],
        MAX_SCALE=MAX_SCALE,
        MAX_ANGLE=MAX_ANGLE,
        HAS_GROUPS=groups is not None,
        HAS_CHOSEN=chosen is not None,
        CHANNELS_LAST=augmentation._layout(images) == torch.channels_last,
        BLOCK=BLOCK,
        num_warps=WARPS,
    )
    operation, uniforms, groups, chosen = map(contiguous, (operation, uniforms, groups, chosen))
    groups = operation if groups is None else groups
    with device_of(images):
        if transposed:
            # A small pixel is read by lines up to r - 1 or, if r is even, r - 1/2 from its middle; these are read by
            # sources less than 1 from them.
            radius = partition if partition % 2 else partition + 0.5
            reach_y, reach_x = (augmentation._reach(aspect, radius) for aspect in (height / width, width / height))
            order, starts = (operation, operation) if chosen is None else _rows(chosen, parts)
            partition_transposed_kernel[grid](
                images, operation, uniforms, groups, order, starts, output, *images.stride(), **constants,
                REACH_Y=reach_y, REACH_X=reach_x,
            )  # fmt: skip
        else:
            chosen = operation if chosen is None else chosen
            partition_forward_kernel[grid](
                images, operation, uniforms, groups, chosen, output, *images.stride(), **constants, OFFSET=offset
            )


def _c(images, operation, uniforms, groups, chosen, sheets, partition, transposed, offset, output):
    """Fill ``output`` with the kernel in C."""
    _, channels, height, width = images.shape
    sizes = extent(height, width)
    if groups is not None:
        operation, uniforms = operation.index_select(0, groups), uniforms.index_select(0, groups)
    layout = augmentation._layout(images)
    parts = sheets * partition**2
    results = parts if transposed else output.shape[0]
    channels_last = layout == torch.channels_last
    values, lines = channels * height * width, height // partition * width * (channels if channels_last else 1)
    needed = 2 * _padded(values) + _padded(lines) + _padded(4 * (height * width + 1) + 8 * width)
    if transposed:
        rows = (None, None) if chosen is None else _rows(chosen, parts)
    else:
        rows = (contiguous(chosen),)
    native.run(
        "partition_transposed" if transposed else "partition_forward",
        results,
        images.contiguous(memory_format=layout),
        *rows,
        operation.contiguous(),
        uniforms.contiguous(),
        output,
        images.new_empty(native.threads_for(results), needed),
        results,
        *images.shape[1:],
        channels_last,
        partition,
        *sizes.pad,
        *sizes.cut,
        MAX_SCALE,
        MAX_ANGLE,
        *(() if transposed else (offset,)),
    )


def _padded(values: int) -> int:
    """Round a number of values up to whole vectors of the kernels in C."""
    return -(-values // native.LANES) * native.LANES


def _eager(images, operation, uniforms, groups, chosen, sheets, partition, transposed, offset, output):
    """Fill ``output`` with PyTorch's operators."""
    compute = accumulation_dtype(images.dtype)
    if not transposed:
        small = _parted(images, partition)
        small = small if chosen is None else small.index_select(0, chosen)
        decoded = _enlarged(_enlarged(small.to(compute), 2, partition), 3, partition)
        augmentation._forward_eager(decoded, operation, uniforms, groups, False, offset, output)
        return
    gradient = torch.empty(images.shape, dtype=compute, device=images.device)
    augmentation._forward_eager(images, operation, uniforms, groups, True, False, gradient)
    small = _reduced(_reduced(gradient, 2, partition), 3, partition)
    if chosen is not None:
        order, starts = _rows(chosen, sheets * partition**2)
        sums = F.embedding_bag(order, small.flatten(1), starts, mode="sum", include_last_offset=True)
        small = sums.view(-1, *small.shape[1:])
    output.copy_(_joined(small, partition))


def _parted(sheets: Tensor, partition: int) -> Tensor:
    """Cut sheets [S, C, H, W] into small images [S r r, C, H / r, W / r]."""
    parts = sheets.unflatten(3, (partition, -1)).unflatten(2, (partition, -1))
    return parts.permute(0, 2, 4, 1, 3, 5).flatten(0, 2)


def _joined(small: Tensor, partition: int) -> Tensor:
    """Put small images together to sheets: the inverse of `_parted`."""
    parts = small.unflatten(0, (-1, partition, partition))
    return parts.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)


def _sides(length: int, partition: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return the side, -1, 0 or 1, and the weight of the other small line that each line reads, [length, r] each."""
    small = torch.arange(length, device=like.device)[:, None]
    twice = 2 * torch.arange(partition, device=like.device) + 1 - partition
    other = small + twice.sign()
    share = twice.abs().to(like.dtype) * (0.5 / partition)
    return other - small, torch.where((other >= 0) & (other < length), share, 0.0)


def _enlarged(small: Tensor, axis: int, partition: int) -> Tensor:
    """Enlarge small images along one axis."""
    length = small.shape[axis]
    side, share = _sides(length, partition, small)
    near = torch.arange(length, device=small.device)[:, None].expand(-1, partition)
    # A line without weight may be NaN or infinite: read its neighbour twice instead.
    other = torch.where(share > 0, near + side, near)
    share = share.view(-1, *(1,) * (3 - axis))
    first, second = (small.index_select(axis, line.flatten()) for line in (near, other))
    return (1 - share) * first + share * second


def _reduced(gradient: Tensor, axis: int, partition: int) -> Tensor:
    """Apply the transpose of `_enlarged`, as sums over lines in a fixed order."""
    length = gradient.shape[axis] // partition
    side, share = _sides(length, partition, gradient)
    lines = gradient.unflatten(axis, (length, partition))
    side, share = (entry.view(*entry.shape, *(1,) * (3 - axis)) for entry in (side, share))
    result = (lines * (1 - share)).sum(axis + 1)
    before, after = ((lines * torch.where(side == sign, share, 0.0)).sum(axis + 1) for sign in (-1, 1))
    result.narrow(axis, 0, length - 1).add_(before.narrow(axis, 1, length - 1))
    result.narrow(axis, 1, length - 1).add_(after.narrow(axis, 0, length - 1))
    return result
