"""ResNet-18 with InstanceNorm, as the distillation literature uses it on small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.networks.layers import InstanceNorm, LayeredNetwork, check_image_size

_STAGES = ((64, 1), (128, 2), (256, 2), (512, 2))  # channels of two blocks, stride of the first


class _Block(nn.Module):
    """Two 3×3 convolutions with norms, added to the input or to its 1×1 convolution."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm1 = InstanceNorm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm2 = InstanceNorm(outputs, relu=False)
        self.shortcut = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, InstanceNorm(outputs, relu=False))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm2(self.conv2(self.norm1(self.conv1(x)))) + self.shortcut(x))


class ResNet18(LayeredNetwork):
    """A 3×3 convolution, eight residual blocks of 64 to 512 channels with GroupNorm(C, C), global mean, a linear layer.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels, multiples of 8 and at least 16; one number for a square.

    Raises:
        ValueError: the image size does not fit.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        size = check_image_size(image_size, 8, "ResNet-18")
        if min(size) < 16:  # InstanceNorm of the last stage's single pixel is zero for every image
            raise ValueError(f"ResNet-18 needs images of 16x16 or larger; got {size[0]}x{size[1]}")
        layers: list[nn.Module] = [nn.Conv2d(channels, 64, 3, padding=1, bias=False), InstanceNorm(64)]
        channels = 64
        for outputs, stride in _STAGES:
            layers += [_Block(channels, outputs, stride), _Block(outputs, outputs, 1)]
            channels = outputs
        super().__init__(layers, channels, num_classes)

    def embed(self, x: Tensor) -> Tensor:
        """Return the embedding [B, embedding_size] of images [B, channels, H, W]."""
        return self.layers(x).mean((2, 3))
