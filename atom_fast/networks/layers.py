"""Layers shared by the networks other than the ConvNet, and the memory layout in which networks train fastest."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atom_fast.networks.initialization import draw_parameters
from atom_fast.ops.instance_norm import instance_norm


class LayeredNetwork(nn.Module):
    """A sequence of layers, whose flattened output is the embedding, and a linear classifier of it.

    Args:
        layers: from images [B, channels, H, W] to features.
        embedding_size: number of values of an image's embedding.
        num_classes: number of logits.
    """

    def __init__(self, layers: list[nn.Module], embedding_size: int, num_classes: int):
        super().__init__()
        self.layers = nn.Sequential(*layers)
        self.embedding_size = embedding_size
        self.classifier = nn.Linear(embedding_size, num_classes)
        self.reset_parameters()

    def embed(self, x: Tensor) -> Tensor:
        """Return the embedding [B, embedding_size] of images [B, channels, H, W]."""
        return self.layers(x).flatten(1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits [B, num_classes] of images [B, channels, H, W]."""
        return self.classifier(self.embed(x))

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Draw new parameters in place; see :func:`~atom_fast.networks.initialization.draw_parameters`."""
        draw_parameters(self, generator)


class InstanceNorm(nn.GroupNorm):
    """InstanceNorm with scale and shift (a GroupNorm with one group per channel), then ReLU unless ``relu=False``."""

    def __init__(self, channels: int, relu: bool = True):
        super().__init__(channels, channels)
        self.relu = relu

    def forward(self, input: Tensor) -> Tensor:
        """Normalise [B, C, H, W]; apply ReLU unless ``relu=False``."""
        return instance_norm(input, self.weight, self.bias, self.eps, relu=self.relu)


class Dropout(nn.Module):
    """Dropout whose masks come from a given generator, so that a seed repeats them.

    Attributes:
        generator: source of the masks, on the input's device; None for PyTorch's default generator.
    """

    def __init__(self, p: float):
        super().__init__()
        self.p = p
        self.generator: torch.Generator | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Zero each value with the given probability and scale the others to keep the mean; identity in evaluation."""
        if not self.training:
            return x
        keep = 1 - self.p
        return x * torch.empty_like(x).bernoulli_(keep, generator=self.generator).div_(keep)


def check_image_size(image_size: int | tuple[int, int], multiple: int, network: str) -> tuple[int, int]:
    """Return height and width of the images.

    Raises:
        ValueError: a side is not a multiple of ``multiple``, the factor by which the network reduces it.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    if height < multiple or width < multiple or height % multiple or width % multiple:
        raise ValueError(f"{network} needs images whose sides are multiples of {multiple}; got {height}x{width}")
    return height, width


def is_instance_norm(norm: nn.Module) -> bool:
    """Return True for a GroupNorm with one group per channel."""
    return isinstance(norm, nn.GroupNorm) and norm.num_groups == norm.num_channels


def memory_format(network: nn.Module, device: torch.device) -> torch.memory_format:
    """Return the layout of weights and images in which a network trains fastest.

    Convolutions are fastest with adjacent channels, on a CPU as on tensor cores; but on a CPU PyTorch's norms over
    several channels at once are many times slower in that layout.
    """
    joint = any(
        (isinstance(module, nn.GroupNorm) and not is_instance_norm(module))
        or (isinstance(module, nn.LayerNorm) and len(module.normalized_shape) == 3)
        for module in network.modules()
    )
    return torch.contiguous_format if joint and device.type == "cpu" else torch.channels_last
