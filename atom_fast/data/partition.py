"""Sheets: stored images that hold several smaller ones, so that few images train a network as many do.

A sheet [C, H, W] of partition r holds r x r images, row by row. Each is cropped out and enlarged to H x W before use
(IDC, Kim et al. 2022). Decoded images are numbered sheet by sheet: ``sheet * r * r + row * r + column``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast.ops import partition as operator

if TYPE_CHECKING:
    from atom_fast.data.whitening import Preprocessing


def check_partition(partition: int, height: int, width: int) -> None:
    """Check that sheets of a size can be cut into ``partition`` rows and columns.

    Raises:
        ValueError: they cannot, or ``partition`` is no whole number; the message names the numbers that divide both
            sides.
    """
    whole = isinstance(partition, int) and not isinstance(partition, bool)
    if not whole or partition < 1 or height % partition or width % partition:
        fitting = [str(r) for r in range(1, min(height, width) + 1) if height % r == 0 and width % r == 0]
        raise ValueError(
            f"partition must be a whole number that divides the sides of images of {height}x{width}: one of "
            f"{', '.join(fitting)}; got {partition!r}"
        )


def make_sheets(images: Tensor, partition: int) -> Tensor:
    """Shrink images and put each r x r consecutive ones on a sheet.

    An image is shrunk by averaging r x r pixels, its antialiased bilinear shrinking.

    Args:
        images: floating point [N * r * r, C, H, W].
        partition: r; 1 returns the images themselves.

    Returns:
        [N, C, H, W], such that `decode` returns blurred ``images`` in their order.

    Raises:
        ValueError: ``partition`` does not divide H, W, or r * r the number of images.
    """
    check_partition(partition, *images.shape[2:])
    if partition == 1:
        return images
    if len(images) % partition**2:
        raise ValueError(f"sheets of partition {partition} take {partition**2} images each; got {len(images)} images")
    small = F.avg_pool2d(images, partition)
    count, channels, height, width = small.shape
    grid = small.view(count // partition**2, partition, partition, channels, height, width)
    return grid.permute(0, 3, 1, 4, 2, 5).reshape(-1, channels, partition * height, partition * width)


def decode(sheets: Tensor, partition: int) -> Tensor:
    """Cut all images out of sheets and enlarge them; differentiable in the sheets to every order.

    They are enlarged as ``F.interpolate(mode="bilinear", align_corners=False)`` does it.

    Args:
        sheets: [N, C, H, W], floating point, any strides.
        partition: r; 1 returns the sheets themselves.

    Returns:
        [N r r, C, H, W] in the dtype of ``sheets``, channels_last if they are.

    Raises:
        ValueError: ``partition`` does not divide H and W.
    """
    check_partition(partition, *sheets.shape[2:])
    if partition == 1:
        return sheets
    count = len(sheets) * partition**2
    operation = torch.full((count,), -1, device=sheets.device)  # none: an image is only decoded
    uniforms = torch.zeros((count, 3), device=sheets.device)
    return operator.decode_and_augment(sheets, operation, uniforms, None, None, partition)


def sheet_pixels(sheets: Tensor, partition: int, preprocessing: Preprocessing) -> Tensor:
    """Return sheets in model space as pixels in [0, 1], to look at: float32 [N, C, H, W].

    A preprocessing acts on whole images. Those of a sheet are cut out and enlarged, brought to pixels, and shrunk back
    onto their sheet, which blurs them a little; without a partition nothing is.
    """
    return make_sheets(preprocessing.to_pixels(decode(sheets, partition)), partition)
