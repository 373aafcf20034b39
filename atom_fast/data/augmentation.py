"""Differentiable siamese augmentation (DSA, Zhao and Bilen 2021), "single" mode: one operation per call or stage.

With r uniform in [0, 1), drawn independently for each use, and images [H, W]:

======== ==============================================================================================================
color    brightness ``x + r - 0.5``, saturation ``(x - m) * 2r + m`` about the mean m of a pixel's channels, then
         contrast ``(x - m) * (r + 0.5) + m`` about the mean m of the image
crop     shift by whole pixels, up to ``int(H / 8 + 0.5)`` each way, independently down and across; fill with zeros
cutout   set a square of side ``int(H / 2 + 0.5)`` to zero, centred anywhere in the image and clipped at its border
flip     mirror left to right with probability 0.5
scale    by factors in [1 / 1.2, 1.2], independently down and across, bilinear, zeros around the image
rotate   by up to 15 degrees either way, bilinear, zeros around the image
======== ==============================================================================================================

Scale and rotate act on coordinates from -1 to 1 about the image's centre, like ``affine_grid`` and ``grid_sample``. For
square images ``align_corners`` makes no difference; otherwise rotation is as with ``align_corners=False``.

A strategy joins operations by underscores, of which one is drawn. "+" joins stages that run one after the other:
``"color+flip+crop_scale_rotate"`` applies color, then flip, then crop, scale or rotate.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from atom_fast.data.partition import check_partition
from atom_fast.names import OPERATIONS, STRATEGY, split_strategy
from atom_fast.ops import augmentation as operator
from atom_fast.ops import partition as decoder

_BITS = 4  # per code, enough for all operations


class AugmentationParameters(NamedTuple):
    """The operation and parameters of each of G groups of images, for images of any size.

    Attributes:
        operation: int64 [G], indices into ``OPERATIONS``; -1 leaves images unchanged.
        uniforms: float32 [G, 3] in [0, 1), the values r of an operation in order of use; down before across.
    """

    operation: Tensor
    uniforms: Tensor

    def of_groups(self, groups: slice) -> AugmentationParameters:
        """Return the parameters of some of the groups."""
        return AugmentationParameters(self.operation[groups], self.uniforms[groups])


def draw_augmentation(
    groups: int,
    generator: torch.Generator,
    *,
    strategy: str = STRATEGY,
    shared_operation: bool = False,
    device: torch.device | str | None = None,
) -> AugmentationParameters:
    """Draw each group's operation and parameters without host synchronisation.

    In distillation a group is a class, whose real and synthetic images get the same parameters. In training of a
    network a group is a sample, and ``shared_operation`` gives the mini-batch one operation.

    Args:
        groups: number of groups, G.
        generator: source of randomness, on ``device``.
        strategy: operations to draw with equal probability, joined by underscores; "none" or "" for none. One stage:
            :func:`draw_stages` draws for several.
        shared_operation: draw one operation for all groups; each group still gets its own parameters.
        device: device of the tensors; the generator's by default.

    Returns:
        Parameters of G groups.

    Raises:
        ValueError: a name in ``strategy`` is unknown or given twice, it has several stages, or ``groups`` is negative.
    """
    stages = _codes(strategy)
    if len(stages) > 1:
        raise ValueError(f"strategy must be one stage, without '+'; got {strategy!r}")
    device = generator.device if device is None else device
    return _draw(groups, generator, stages[0] if stages else (), shared_operation, device)


def draw_stages(
    groups: int, generator: torch.Generator, *, strategy: str, shared_operation: bool = False
) -> tuple[AugmentationParameters, ...]:
    """Draw each group's operation and parameters in every stage of a strategy, without host synchronisation.

    A strategy of one stage draws as :func:`draw_augmentation` does. So does "none", whose numbers are not used: what a
    generator draws afterwards is the same.

    Args:
        groups: number of groups, G.
        generator: source of randomness; the parameters are on its device.
        strategy: stages joined by "+", each of operations joined by underscores; "none" or "" for no stage.
        shared_operation: draw one operation per stage for all groups; each group still gets its own parameters.

    Returns:
        Parameters of G groups for each stage, in order; empty without a stage.

    Raises:
        ValueError: a name in ``strategy`` is unknown or given twice, or ``groups`` is negative.
    """
    stages = _codes(strategy)
    drawn = [_draw(groups, generator, codes, shared_operation, generator.device) for codes in stages or ((),)]
    return tuple(drawn) if stages else ()


def _draw(
    groups: int, generator: torch.Generator, codes: tuple[int, ...], shared_operation: bool, device: torch.device | str
) -> AugmentationParameters:
    """Draw one of the operations ``codes``, or none of none, for each group or all, and each group's parameters."""
    if groups < 0:
        raise ValueError(f"groups must be 0 or more; got {groups}")
    if codes:
        operation = torch.randint(len(codes), (1 if shared_operation else groups,), generator=generator, device=device)
        if codes != tuple(range(len(codes))):
            # All codes fit one integer; a tensor of codes would be copied from the host.
            table = sum(code << (_BITS * place) for place, code in enumerate(codes))
            operation = torch.bitwise_right_shift(table, operation * _BITS).bitwise_and_(2**_BITS - 1)
        operation = operation.expand(groups).contiguous()
    else:
        operation = torch.full((groups,), -1, device=device)
    return AugmentationParameters(operation, torch.rand((groups, 3), generator=generator, device=device))


@functools.cache
def _codes(strategy: str) -> tuple[tuple[int, ...], ...]:
    """Return, for each stage of a strategy, the codes of its operations."""
    return tuple(tuple(OPERATIONS.index(name) for name in stage) for stage in split_strategy(strategy))


def unchanged(groups: int, device: torch.device | str) -> AugmentationParameters:
    """Return parameters that leave the images of G groups as they are."""
    return AugmentationParameters(torch.full((groups,), -1, device=device), torch.zeros(groups, 3, device=device))


def augment(images: Tensor, parameters: AugmentationParameters, groups: Tensor | None = None) -> Tensor:
    """Apply each group's operation to its images; differentiable in the images to every order.

    The same inputs give the same bits, forward and backward. Crop, cutout and flip copy values exactly.

    Args:
        images: [B, C, H, W], floating point, any strides. Half-precision types are computed in float32.
        parameters: parameters of G groups, on the images' device.
        groups: int64 [B] in [0, G), each image's group (not checked on a GPU); None if image i belongs to group i.

    Returns:
        [B, C, H, W] in the dtype of ``images``, channels_last if they are.

    Raises:
        ValueError: a shape, dtype or device does not fit.
    """
    _check_images(images)
    _check_parameters(images.shape[0], images.device, parameters, groups)
    return operator.augment(images, parameters.operation, parameters.uniforms, groups, False, True)


def augment_stages(images: Tensor, stages: Iterable[AugmentationParameters], groups: Tensor | None = None) -> Tensor:
    """Apply the stages that :func:`draw_stages` drew, one after the other, each as :func:`augment` does."""
    for parameters in stages:
        images = augment(images, parameters, groups)
    return images


def decode_and_augment(
    sheets: Tensor,
    parameters: AugmentationParameters,
    groups: Tensor | None = None,
    *,
    partition: int,
    chosen: Tensor | None = None,
) -> Tensor:
    """Decode small images from sheets and augment them in one pass: ``augment(decode(sheets)[chosen], ...)``.

    Differentiable in the sheets to every order; the same inputs give the same bits, forward and backward.

    Args:
        sheets: [S, C, H, W], floating point, any strides. Half-precision types are computed in float32.
        parameters: parameters of G groups, on the sheets' device.
        groups: int64 [B] in [0, G), each decoded image's group (not checked on a GPU); None if image i of the result
            belongs to group i.
        partition: small images along each side of a sheet, r; divides H and W. With 1 a sheet is one image.
        chosen: int64 [B] in [0, S r r), numbers of decoded images in any order, also several times (not checked on a
            GPU); None for all in order. Number ``sheet * r * r + row * r + column``.

    Returns:
        [B, C, H, W] in the dtype of ``sheets``, channels_last if they are.

    Raises:
        ValueError: ``partition`` does not divide the sheets, or a shape, dtype or device does not fit.
        IndexError: on a CPU, a number in ``chosen`` or ``groups`` is out of range.
    """
    _check_images(sheets)
    check_partition(partition, *sheets.shape[2:])
    count = len(sheets) * partition**2
    if chosen is not None:
        if chosen.dim() != 1 or chosen.dtype != torch.int64:
            raise ValueError(f"chosen must be int64 [B]; got {chosen.dtype} of shape {tuple(chosen.shape)}")
        if chosen.device != sheets.device:
            raise ValueError(f"chosen must be on the images' device {sheets.device}; got {chosen.device}")
        count = chosen.shape[0]
    _check_parameters(count, sheets.device, parameters, groups)
    return decoder.decode_and_augment(sheets, *parameters, groups, chosen, partition)


def _check_images(images: Tensor) -> None:
    if images.dim() != 4 or not images.is_floating_point():
        raise ValueError(
            f"images must be floating point [B, C, H, W]; got {images.dtype} of shape {tuple(images.shape)}"
        )


def _check_parameters(
    count: int, device: torch.device, parameters: AugmentationParameters, groups: Tensor | None
) -> None:
    """Raise ValueError if parameters or groups do not fit a number of images on a device."""
    operation, uniforms = parameters
    if operation.dim() != 1 or operation.dtype != torch.int64:
        raise ValueError(f"operation must be int64 [G]; got {operation.dtype} of shape {tuple(operation.shape)}")
    if uniforms.shape != (operation.shape[0], 3) or uniforms.dtype != torch.float32:
        raise ValueError(
            f"uniforms must be float32 [{operation.shape[0]}, 3]; got {uniforms.dtype} of shape {tuple(uniforms.shape)}"
        )
    if groups is None and operation.shape[0] != count:
        raise ValueError(
            f"without groups each image needs its own parameters; got {count} images and {operation.shape[0]} groups"
        )
    if groups is not None and (groups.shape != (count,) or groups.dtype != torch.int64):
        raise ValueError(f"groups must be int64 [{count}]; got {groups.dtype} of shape {tuple(groups.shape)}")
    for name, tensor in (("operation", operation), ("uniforms", uniforms), ("groups", groups)):
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on the images' device {device}; got {tensor.device}")
