"""AlexNet as the distillation literature uses it on small images."""

from __future__ import annotations

from torch import nn

from atom_fast.networks.layers import LayeredNetwork, check_image_size

# Output channels, kernel size, and whether 2x2 maximum pooling follows.
_LAYERS = ((128, 5, True), (192, 5, True), (256, 3, False), (192, 3, False), (192, 3, True))


class AlexNet(LayeredNetwork):
    """Five convolutions of 128, 192, 256, 192 and 192 channels with ReLU, three poolings, no norm, one linear layer.

    Args:
        channels: channels of the images.
        num_classes: number of logits.
        image_size: height and width in pixels, multiples of 8; one number for a square.

    Raises:
        ValueError: the image size does not fit.
    """

    def __init__(self, channels: int, num_classes: int, image_size: int | tuple[int, int]):
        height, width = check_image_size(image_size, 8, "AlexNet")
        layers = []
        for outputs, kernel, pooled in _LAYERS:
            layers += [nn.Conv2d(channels, outputs, kernel, padding=kernel // 2), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)] if pooled else []
            channels = outputs
        super().__init__(layers, channels * (height // 8) * (width // 8), num_classes)
