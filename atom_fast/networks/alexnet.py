"""AlexNet as the distillation literature uses it on small images."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from atom_fast.networks.initialization import draw_parameters
from atom_fast.networks.layers import check_image_size

# Output channels, kernel size, and whether 2x2 maximum pooling follows.
_LAYERS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class AlexNet(nn.Module):
    """Five convolutions of 128, 192, 256, 192 and 192 channels with ReLU and three poolings, without norm; one linear.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels, multiples of 8; one number for a square.

    Raises:
        ValueError: the image size does not fit.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        super().__init__()
        height, width = check_image_size(image_size, 8, "AlexNet")
        layers = []
        for outputs, kernel, pooled in _LAYERS:
            layers += [nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if pooled else []
            channels = outputs
        self.layers = nn.Sequential(*layers)
        self.embedding_size = channels * (height // 8) * (width // 8)
        self.classifier = nn.Linear(self.embedding_size, num_classes)
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
