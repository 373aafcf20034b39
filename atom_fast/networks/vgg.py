"""VGG-11 with InstanceNorm, as the distillation literature uses it."""

from __future__ import annotations

from torch import nn

from atom_fast.networks.layers import InstanceNorm, LayeredNetwork, check_image_size

# Output channels of each convolution, and whether 2x2 maximum pooling follows.
_LAYERS = (
    *((64, True), (128, True), (256, False), (256, True)),
    *((512, False), (512, True), (512, False), (512, True)),
)


class VGG11(LayeredNetwork):
    """Eight 3×3 convolutions of 64 to 512 channels, with GroupNorm(C, C) and ReLU, five poolings, one linear layer.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels, multiples of 32; one number for a square.

    Raises:
        ValueError: the image size does not fit.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        height, width = check_image_size(image_size, 32, "VGG-11")
        layers = []
        for outputs, pooled in _LAYERS:
            layers += [nn.Conv2d(channels, outputs, 3, padding=1), InstanceNorm(outputs)]
            layers += [nn.MaxPool2d(2)] if pooled else []
            channels = outputs
        super().__init__(layers, channels * (height // 32) * (width // 32), num_classes)
