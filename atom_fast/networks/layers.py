"""Layers that the networks beside the ConvNet share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atom_fast.networks.initialization import draw_parameters
from atom_fast.ops.instance_norm import instance_norm


class LayeredNetwork(nn.Module):
    """Layers one after the other, whose flattened output is the embedding, and a linear classifier of it.

    Args:
        layers: from images [B, channels, H, W] to features.
        embedding_size: values of an image's embedding.
        num_classes: number of logits.
    """

    def __init__(self, layers: list[nn.Module], embedding_size: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.embedding_size = embedding_size
        self.classifier = nn.Linear(embedding_size, num_classes)
        self.reset_parameters()

    def embed(self, x: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> [B, embedding_size]."""
        return self.layers(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [B, num_classes] of images [B, channels, H, W]."""
        return self.classifier(self.embed(x))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw a new network in place; see :func:`~atom_fast.networks.initialization.draw_parameters`."""
        draw_parameters(self, generator)


class InstanceNorm(nn.GroupNorm):
    """InstanceNorm with scale and shift, as a GroupNorm of one group a channel, and ReLU unless it is left out."""

    def __init__(self, channels: int, rectify: bool = True):
        super().__init__(channels, channels)
        self.rectify = rectify

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> the same."""
        return instance_norm(x, self.weight, self.bias, self.eps, rectify=self.rectify)


class Dropout(nn.Module):
    """Dropout whose masks come from a generator that is handed in, so that a seed repeats them.

    Attributes:
        generator: of the masks, on the device of what is dropped; None draws from PyTorch's default generator.
    """

    def __init__(self, probability: float):
        super().__init__()
        self.probability = probability
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Any shape -> the same: each value is zero with that probability, and the others are scaled to keep the mean.

        In evaluation mode nothing changes.
        """
        if not self.training:
            return x
        keep = 1 - self.probability
        return x * torch.empty_like(x).bernoulli_(keep, generator=self.generator).div_(keep)


def check_image_size(image_size: int | tuple[int, int], multiple: int, network: str) -> tuple[int, int]:
    """Height and width of the images.

    Raises:
        ValueError: a side is not a multiple of ``multiple``, which the network reduces it by.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise ValueError(f"{network} needs images whose sides are multiples of {multiple}; got {height}x{width}")
    return height, width
