"""Differentiable siamese augmentation as one operator, whose derivative is the same operator, transposed.

Every operation is ``mask * colour(bilinear(image, source(pixel)))``, affine in the image. ``source`` maps an output
pixel to the position that it reads, ``pixel + M (pixel - centre) + shift`` in pixels; the image is padded with zeros.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..names import OPERATIONS
from . import native
from .dispatch import dispatch, register
from .launching import device_of
from .operators import differentiate, fake, operator

COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE = range(len(OPERATIONS))

# The settings of the public DSA, DM and DataDAM code.
CROP_FRACTION = 0.125
CUTOUT_FRACTION = 0.5
MAX_SCALE = 1.2
MAX_ANGLE = math.radians(15)

CHUNK_PIXELS = 2**18  # pixels per chunk of PyTorch's operators, whose tables then take some tens of megabytes


class Extent(NamedTuple):
    """Sizes in pixels, down and across, that follow from an image's size."""

    pad: tuple[int, int]  # largest shift of a crop
    cut: tuple[int, int]  # sides of a cutout
    reach: tuple[int, int]  # largest distance of the output pixels that read a pixel from that pixel's own image


def extent(height: int, width: int) -> Extent:
    """Return the sizes for images [height, width]."""
    return Extent(
        pad=(int(CROP_FRACTION * height + 0.5), int(CROP_FRACTION * width + 0.5)),
        cut=(int(CUTOUT_FRACTION * height + 0.5), int(CUTOUT_FRACTION * width + 0.5)),
        reach=(_reach(height / width), _reach(width / height)),
    )


def _reach(aspect: float, radius: float = 1.0) -> int:
    """Return the whole pixels within the inverse image of a square, around the pixel nearest to its middle.

    The square spans ``radius`` pixels each way, as a bilinear tent spans one. Scaling stretches that by
    ``MAX_SCALE``; a rotation by t, in coordinates from -1 to 1, by cos t + aspect sin t.
    """
    steepest = min(MAX_ANGLE, math.atan(aspect))
    stretched = max(MAX_SCALE, math.cos(steepest) + aspect * math.sin(steepest))
    return int(radius * stretched + 0.5)


def augment(
    images: Tensor, operation: Tensor, uniforms: Tensor, groups: Tensor | None, transposed: bool, offset: bool
) -> Tensor:
    """Run `augment_op` with the implementation that the backend asks for."""
    return dispatch("augmentation", images, operation, uniforms, groups, transposed, offset)


def _run_triton(*arguments):
    return augment_op(*arguments, "triton")


def _run_c(images, *arguments):
    if native.upcasts(images):
        return augment_op(images.float(), *arguments, "c").to(images.dtype)
    return augment_op(images, *arguments, "c") if native.supports(images) else NotImplemented


def _run_eager(*arguments):
    return augment_op(*arguments, "eager")


register("augmentation", plain=(), triton=_run_triton, c=_run_c, eager=_run_eager)


@operator(
    "augment",
    schema="(Tensor images, Tensor operation, Tensor uniforms, Tensor? groups, bool transposed, bool offset, "
    "str implementation) -> Tensor",
    differentiable=True,
)
def augment_op(
    images: Tensor,
    operation: Tensor,
    uniforms: Tensor,
    groups: Tensor | None,
    transposed: bool,
    offset: bool,
    implementation: str,
) -> Tensor:
    """Apply each image's operation, or the transpose of its linear part.

    Args:
        images: [B, C, H, W], floating point, any strides.
        operation: int64 [G], indices into ``OPERATIONS``; any other number leaves an image as it is.
        uniforms: float32 [G, 3] in [0, 1).
        groups: int64 [B], each image's group; None if image i belongs to group i.
        transposed: apply the transpose, as a gradient needs it.
        offset: add the brightness, the only part that does not depend on the image; a derivative omits it.
        implementation: "triton", "c" (float32 on a CPU) or "eager" (PyTorch's operators).

    Returns:
        [B, C, H, W] of the same dtype, channels_last if ``images`` is.
    """
    output = _empty_result(images)
    if images.numel() == 0:
        return output
    forward = {"triton": _forward_triton, "c": _forward_c, "eager": _forward_eager}[implementation]
    forward(images, operation, uniforms, groups, transposed, offset, output)
    return output


@fake(augment_op)
def _(images, operation, uniforms, groups, transposed, offset, implementation):
    return _empty_result(images)


def _save(ctx, inputs, output):
    _, operation, uniforms, groups, ctx.transposed, _, ctx.implementation = inputs
    ctx.save_for_backward(operation, uniforms, groups)


def _differentiate(ctx, gradient):
    operation, uniforms, groups = ctx.saved_tensors
    gradient = augment_op(gradient, operation, uniforms, groups, not ctx.transposed, False, ctx.implementation)
    return gradient, None, None, None, None, None, None


differentiate(augment_op, _differentiate, _save)


def _empty_result(images: Tensor) -> Tensor:
    """Allocate the result, in the layout in which the next convolution reads the images."""
    return torch.empty_like(images, memory_format=_layout(images))


def _layout(images: Tensor) -> torch.memory_format:
    if images.is_contiguous() or not images.is_contiguous(memory_format=torch.channels_last):
        return torch.contiguous_format
    return torch.channels_last


def _forward_triton(images, operation, uniforms, groups, transposed, offset, output):
    """Fill ``output`` with the Triton kernel."""
    from atom_fast.kernels.augmentation import BLOCK, WARPS, augmentation_kernel, split

    batch, channels, height, width = images.shape
    sizes = extent(height, width)
    programs, tiles = split(batch, channels * height * width)
    with device_of(images):
        augmentation_kernel[(batch, programs)](
            images,
            operation.contiguous(),
            uniforms.contiguous(),
            operation if groups is None else groups.contiguous(),
            output,
            *images.stride(),
            CHANNELS=channels,
            HEIGHT=height,
            WIDTH=width,
            PAD_Y=sizes.pad[0],
            PAD_X=sizes.pad[1],
            CUT_Y=sizes.cut[0],
            CUT_X=sizes.cut[1],
            REACH_Y=sizes.reach[0],
            REACH_X=sizes.reach[1],
            MAX_SCALE=MAX_SCALE,
            MAX_ANGLE=MAX_ANGLE,
            HAS_GROUPS=groups is not None,
            CHANNELS_LAST=_layout(images) == torch.channels_last,
            TRANSPOSED=transposed,
            OFFSET=offset,
            TILES=tiles,
            BLOCK=BLOCK,
            num_warps=WARPS,
        )


def _forward_c(images, operation, uniforms, groups, transposed, offset, output):
    """Fill ``output`` with the kernel in C."""
    height, width = images.shape[2:]
    sizes = extent(height, width)
    if groups is not None:
        operation, uniforms = operation.index_select(0, groups), uniforms.index_select(0, groups)
    layout = _layout(images)
    native.run(
        "augment",
        len(images),
        images.contiguous(memory_format=layout),
        operation.contiguous(),
        uniforms.contiguous(),
        output,
        images.new_empty(native.threads_for(len(images)), 4 * (height * width + 1) + 8 * width),
        *images.shape,
        layout == torch.channels_last,
        *sizes.pad,
        *sizes.cut,
        MAX_SCALE,
        MAX_ANGLE,
        transposed,
        offset,
    )


class _Table(NamedTuple):
    """The affine map of each of G groups: weighted sums of pixels, plus the means that color needs."""

    place: Tensor  # int32 [G, H * W, taps], source pixels of each output pixel
    weight: Tensor  # [G, H * W, taps]
    pixel_mean: Tensor  # [G, 1, 1], factor of a pixel's mean over its channels
    image_mean: Tensor  # [G, 1, 1], factor of an image's mean
    brightness: Tensor  # [G, 1, 1]

    def select(self, groups: Tensor | slice) -> _Table:
        """Return the table of chosen groups."""
        return _Table(*(entry[groups] for entry in self))


def _forward_eager(images, operation, uniforms, groups, transposed, offset, output):
    """Fill ``output`` with PyTorch's operators, in chunks of images that keep the tables small."""
    batch, _, height, width = images.shape
    compute = torch.float64 if images.dtype == torch.float64 else torch.float32
    constants = height, width, transposed, compute
    if groups is not None and operation.shape[0] >= batch:
        operation, uniforms, groups = operation[groups], uniforms[groups], None
    shared = None if groups is None else _table(operation, uniforms, *constants)
    chunk = max(1, CHUNK_PIXELS // (height * width))
    for first in range(0, batch, chunk):
        rows = slice(first, first + chunk)
        table = _table(operation[rows], uniforms[rows], *constants) if shared is None else shared.select(groups[rows])
        source = images[rows].to(compute).flatten(2)
        result = _weighted_sums(source, table)
        # Contiguous, so that the rounding of an image's mean does not depend on where the image came from.
        means = (sum(source.unbind(1)) / source.shape[1]).contiguous()
        colour = table.pixel_mean[:, 0] * means + table.image_mean[:, 0] * means.mean(1, keepdim=True)
        if offset:
            colour += table.brightness[:, 0]
        output[rows] = (result + colour[:, None]).view(output[rows].shape)


def _weighted_sums(images: Tensor, table: _Table) -> Tensor:
    """Replace every pixel of images [B, C, H * W] by the weighted sum of its taps, in their order."""
    count, channels, pixels = images.shape
    first = torch.arange(count, device=images.device, dtype=table.place.dtype) * pixels
    sums = F.embedding_bag(
        (table.place + first.view(-1, 1, 1)).flatten(0, 1),
        images.transpose(1, 2).reshape(count * pixels, channels),
        per_sample_weights=table.weight.flatten(0, 1),
        mode="sum",
    )
    return sums.view(count, pixels, channels).transpose(1, 2)


class _Coefficients(NamedTuple):
    """Coefficients of each group, [G, 1] each."""

    move: tuple[Tensor, ...]  # from an output pixel to the position that it reads, see ``_displacement``
    back: tuple[Tensor, ...]  # from an input pixel to the position where it appears
    corner: tuple[Tensor, Tensor]  # first row and column of the cleared square; beyond the image without cutout
    own: Tensor  # factor of a value
    pixel_mean: Tensor
    image_mean: Tensor
    brightness: Tensor


def _coefficients(operation: Tensor, uniforms: Tensor, height: int, width: int, compute: torch.dtype) -> _Coefficients:
    """Derive each group's coefficients from its operation and its three uniforms."""
    sizes = extent(height, width)
    operation = operation[:, None]
    drawn = uniforms[:, None].unbind(-1)
    down, across, last = (u.to(compute) for u in drawn)

    def when(code, value, otherwise):
        return torch.where(operation == code, value, otherwise)

    # Whole numbers are drawn in float32 for every type of image, so that all get the same ones.
    shift_y, shift_x = (
        when(CROP, (u * (2 * pad + 1)).floor() - pad, 0.0).to(compute) for u, pad in zip(drawn, sizes.pad, strict=False)
    )
    corner_y, corner_x = (
        when(CUTOUT, (u * (size + 1 - cut % 2)).floor() - cut // 2, float(size))
        for u, cut, size in zip(drawn, sizes.cut, (height, width), strict=False)
    )
    stretch_y, stretch_x = (
        when(SCALE, 1 / MAX_SCALE - 1 + u * (MAX_SCALE - 1 / MAX_SCALE), 0.0) for u in (down, across)
    )
    stretch_x = torch.where((operation == FLIP) & (down < 0.5), -2.0, stretch_x)
    unstretch_y, unstretch_x = -stretch_y / (1 + stretch_y), -stretch_x / (1 + stretch_x)
    angle = when(ROTATE, (down - 0.5) * (2 * MAX_ANGLE), 0.0)
    sine, turn = angle.sin(), -2 * (angle / 2).sin().square()
    skew_y, skew_x = sine * (height / width), -sine * (width / height)
    contrast, saturation = when(COLOR, last + 0.5, 1.0), when(COLOR, across * 2, 1.0)
    return _Coefficients(
        move=(turn + stretch_y, skew_y, skew_x, turn + stretch_x, shift_y, shift_x),
        back=(turn + unstretch_y, -skew_y, -skew_x, turn + unstretch_x, -shift_y, -shift_x),
        corner=(corner_y, corner_x),
        own=contrast * saturation,
        pixel_mean=contrast * (1 - saturation),
        image_mean=1 - contrast,
        brightness=when(COLOR, down - 0.5, 0.0),
    )


def _displacement(move: tuple[Tensor, ...], y: Tensor, x: Tensor, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Return how far down and across pixels move: a 2x2 matrix times their offset from the centre, plus a shift.

    A displacement is a few pixels where a position may be a hundred, so its fraction has more correct digits.
    """
    yy, yx, xy, xx, shift_y, shift_x = move
    y, x = y - (height - 1) / 2, x - (width - 1) / 2
    return yy * y + yx * x + shift_y, xy * y + xx * x + shift_x


def _table(operation, uniforms, height, width, transposed, compute) -> _Table:
    """Build every group's taps and factors.

    The taps of the transpose are the output pixels that read an input pixel: also a gather, so the order is fixed.
    """
    coefficients = _coefficients(operation, uniforms, height, width, compute)
    pixels = torch.arange(height * width, device=operation.device)
    y, x = (pixels // width).to(compute), (pixels % width).to(compute)
    if transposed:
        back_y, back_x = _displacement(coefficients.back, y, x, height, width)
        reach_y, reach_x = extent(height, width).reach
        away_y = _steps((back_y + 0.5).floor(), -reach_y, reach_y)[:, None]
        away_x = _steps((back_x + 0.5).floor(), -reach_x, reach_x)
        move_y, move_x = _displacement(coefficients.move, y + away_y, x + away_x, height, width)
        weight_y, weight_x = _tent(away_y + move_y), _tent(away_x + move_x)
    else:
        move_y, move_x = _displacement(coefficients.move, y, x, height, width)
        away_y = _steps(move_y.floor(), 0, 1)[:, None]
        away_x = _steps(move_x.floor(), 0, 1)
        weight_y, weight_x = _tent(move_y - away_y), _tent(move_x - away_x)
    tap_y, tap_x = y + away_y, x + away_x
    near_y, near_x = tap_y.clamp(0, height - 1), tap_x.clamp(0, width - 1)
    kept = coefficients.own * ~_cleared(coefficients.corner, y, x, height, width)
    weight = (weight_y * (kept * (near_y == tap_y))) * (weight_x * (near_x == tap_x))
    place = near_y.int() * width + near_x.int()
    return _Table(_taps_last(place), _taps_last(weight), *(factor[..., None] for factor in coefficients[-3:]))


def _steps(whole: Tensor, first: int, last: int) -> Tensor:
    """Return ``whole`` plus each whole number from ``first`` to ``last``, along a new first dimension."""
    return whole + torch.arange(first, last + 1, device=whole.device).view(-1, *(1,) * whole.dim())


def _taps_last(taps: Tensor) -> Tensor:
    """Reorder [down, across, G, P] to [G, P, down * across] through two dimensions, which PyTorch transposes fast."""
    down, across, groups, pixels = taps.shape
    return taps.view(down * across, groups * pixels).t().contiguous().view(groups, pixels, down * across)


def _cleared(corner: tuple[Tensor, Tensor], y: Tensor, x: Tensor, height: int, width: int) -> Tensor:
    """Return a mask of the pixels inside a cutout's square."""
    cut_y, cut_x = extent(height, width).cut
    corner_y, corner_x = corner
    return (y >= corner_y) & (y < corner_y + cut_y) & (x >= corner_x) & (x < corner_x + cut_x)


def _tent(distance: Tensor) -> Tensor:
    """Return the bilinear weight at a distance along one axis, in pixels."""
    return (1 - distance.abs()).clamp_(min=0)
