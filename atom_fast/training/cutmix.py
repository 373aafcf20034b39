"""CutMix (Yun et al. 2019): a box of each image of a mini-batch comes from another one, and so does a part of the loss.

As in the public code of CutMix and of IDC (Kim et al. 2022), with one box and one permutation per mini-batch:

- lambda is uniform in [0, 1), which is Beta(1, 1);
- the box is centred on a pixel, all alike, reaches ``int(side * sqrt(1 - lambda)) // 2`` pixels from there each way and
  is clipped at the border;
- lambda is then set to the share of pixels outside of the box, and the loss is lambda times the cross-entropy with an
  image's own label plus 1 - lambda times that with the label of the image that fills its box.

A mini-batch without CutMix has an empty box and lambda 1. Nothing waits for the device, so that a step can be captured.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class CutMix(NamedTuple):
    """What is mixed in a mini-batch of B images [H, W].

    Attributes:
        box: bool [H, W], the pixels that come from another image.
        other: int64 [B], a permutation: the image that they come from.
        kept: float32 scalar, lambda: the share of pixels outside of the box.
    """

    box: Tensor
    other: Tensor
    kept: Tensor


def draw_cutmix(shape: Sequence[int], generator: torch.Generator, probability: float = 1.0) -> CutMix:
    """Draw a mini-batch's box and permutation without host synchronisation.

    Args:
        shape: of the images, [B, C, H, W].
        generator: source of randomness; the tensors are on its device. It draws as much without CutMix as with it.
        probability: of CutMix; otherwise the box is empty.
    """
    count, _, height, width = shape
    device = generator.device
    uniforms = torch.rand(4 + count, generator=generator, device=device)
    applied, kept, *centre = uniforms[:4].unbind()
    lines = []
    for side, place in zip((height, width), centre, strict=True):
        middle = (side * place).long()  # below side: the largest uniform is 1 - 2^-24
        reach = (side * (1 - kept).sqrt()).long() // 2
        pixels = torch.arange(side, device=device)
        lines.append((pixels >= middle - reach) & (pixels < middle + reach))
    box = lines[0][:, None] & lines[1] & (applied < probability)
    # Not randperm: the order of random keys has no special cases to capture; two are equal in one pair of 2^24.
    return CutMix(box, uniforms[4:].argsort(), 1 - box.sum() / (height * width))


def mix_images(images: Tensor, mixture: CutMix) -> Tensor:
    """Fill the box of every image [B, C, H, W] from its other image; same dtype and layout, differentiable."""
    # The images come before their reordered copy, which is always NCHW: where() follows its first operand.
    return torch.where(~mixture.box, images, images.index_select(0, mixture.other))


def mixed_cross_entropy(predicted: Tensor, labels: Tensor, mixture: CutMix) -> Tensor:
    """Return the mean loss of logits [B, K] of mixed images; their own labels are int64 [B] or [B, K] probabilities."""
    own = F.cross_entropy(predicted, labels)
    others = F.cross_entropy(predicted, labels.index_select(0, mixture.other))
    return mixture.kept * own + (1 - mixture.kept) * others
