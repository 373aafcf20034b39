"""DSA for all classes at once in plain PyTorch, for the implementations without a loop over classes.

The same operators process every image; operations that its class did not draw are the identity. Crop, flip, scale and
rotate are one affine sampling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

COLOR, CROP, CUTOUT, FLIP, SCALE, ROTATE = range(6)


def draw(classes: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw each class's operation, int64 [classes], and parameters, uniform in [0, 1), float32 [classes, 3]."""
    operations = torch.randint(6, (classes,), device=generator.device, generator=generator)
    return operations, torch.rand(classes, 3, device=generator.device, generator=generator)


def augment(images: Tensor, operations: Tensor, uniforms: Tensor) -> Tensor:
    """Apply each class's operation to class-major images [classes * B, C, H, W]; differentiable in the images."""
    each = len(images) // len(operations)
    operations = operations.repeat_interleave(each, output_size=len(images))
    uniforms = uniforms.repeat_interleave(each, dim=0, output_size=len(images)).unbind(1)
    images = _color(images, operations, *uniforms)
    images = F.grid_sample(images, _grid(images, operations, *uniforms), align_corners=False)
    return images * _cutout_mask(images, operations, *uniforms)


def _color(images: Tensor, operations: Tensor, first: Tensor, second: Tensor, third: Tensor) -> Tensor:
    drawn = operations == COLOR
    factors = torch.where(drawn, first - 0.5, 0), torch.where(drawn, second * 2, 1), torch.where(drawn, third + 0.5, 1)
    brightness, saturation, contrast = (factor.view(-1, 1, 1, 1) for factor in factors)
    images = images + brightness
    mean = images.mean(dim=1, keepdim=True)
    images = (images - mean) * saturation + mean
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return (images - mean) * contrast + mean


def _grid(images: Tensor, operations: Tensor, first: Tensor, second: Tensor, _third: Tensor) -> Tensor:
    """Return the source of each pixel in affine_grid's coordinates: [B, H, W, 2]."""
    size = images.shape[2]
    shift = int(size * 0.125 + 0.5)
    down, right = (((r * (2 * shift + 1)).floor() - shift) * (2 / size) for r in (first, second))
    angle = torch.where(operations == ROTATE, (first - 0.5) * math.radians(30), 0)
    scaled, cropped = operations == SCALE, operations == CROP
    along, across = (torch.where(scaled, r * (1.2 - 1 / 1.2) + 1 / 1.2, 1) for r in (first, second))
    across = torch.where((operations == FLIP) & (first < 0.5), -1, across)
    rows = [
        torch.stack([across * angle.cos(), -angle.sin(), torch.where(cropped, right, 0)], dim=1),
        torch.stack([angle.sin(), along * angle.cos(), torch.where(cropped, down, 0)], dim=1),
    ]
    return F.affine_grid(torch.stack(rows, dim=1), list(images.shape), align_corners=False)


def _cutout_mask(images: Tensor, operations: Tensor, first: Tensor, second: Tensor, _third: Tensor) -> Tensor:
    """Return 0 within the square of a class that drew cutout, 1 elsewhere: [B, 1, H, W]."""
    size = images.shape[2]
    cut = int(size * 0.5 + 0.5)
    top, left = ((r * (size + 1 - cut % 2)).floor() - cut // 2 for r in (first, second))
    pixel = torch.arange(size, device=images.device)
    inside_rows, inside_columns = (
        (pixel >= start.unsqueeze(1)) & (pixel < start.unsqueeze(1) + cut) for start in (top, left)
    )
    inside = inside_rows.unsqueeze(2) & inside_columns.unsqueeze(1) & (operations == CUTOUT).view(-1, 1, 1)
    return (~inside).unsqueeze(1).to(images.dtype)
