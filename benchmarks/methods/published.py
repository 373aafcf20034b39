"""What the public code of DC, DSA, DM, MTT and DataDAM shares, written anew in plain PyTorch.

One rule decides what of the public code is kept. Kept is whatever gives its step the cost it has: a fresh network built
on the host and copied, a NumPy permutation of the whole class for every batch, one augmentation call a class and side,
3x2 matrices and sampling grids made on the host, data held as float32 on the device. Left out, in the baselines'
favour, is whatever only prints or frees: ``.item()`` for a log line, accuracy computed on the host, ``empty_cache()``,
features and losses moved to the CPU.

The images are random: no time or memory here depends on what they show.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .setting import Setting

POWER = 4.0


class ConvNet(nn.Module):
    """The field's ConvNet: depth x [3x3 convolution, GroupNorm(C, C), ReLU, 2x2 average pooling], then a linear layer.

    Initialised as PyTorch does by default, like the public code. Images [B, channels, H, W] -> logits [B, classes].
    """

    def __init__(self, setting: Setting):
        super().__init__()
        channels, width = setting.channels, setting.width
        blocks = []
        for _ in range(setting.depth):
            blocks += [nn.Conv2d(channels, width, kernel_size=3, padding=1), nn.GroupNorm(width, width)]
            blocks += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (setting.resolution // 2**setting.depth) ** 2, setting.classes)

    def embed(self, images: Tensor) -> Tensor:
        """Images [B, channels, H, W] -> flattened last pooled features [B, D]."""
        return self.blocks(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


def fresh_network(setting: Setting, trained: bool = False) -> ConvNet:
    """A new random network, built on the host and copied; its parameters take no gradient unless it is ``trained``."""
    network = ConvNet(setting).to(setting.device)
    return network.requires_grad_(trained)


def random_pixels(setting: Setting) -> Tensor:
    """uint8 images of the data set's shape, [classes * class_images, channels, H, W], class-major, on the device."""
    shape = (setting.classes * setting.class_images, setting.channels, setting.resolution, setting.resolution)
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=setting.device, generator=generator)


def normalize(pixels: Tensor) -> Tensor:
    """uint8 -> float32 with the mean and deviation of uniformly random pixels."""
    return (pixels.float() / 255 - 0.5) * math.sqrt(12)


class RealData:
    """The whole data set as the public code holds it: float32 on the device, and each class's indices on the host."""

    def __init__(self, setting: Setting):
        # In slices: the float32 copy is the method's, a second one made on the way would not be.
        self.images = torch.cat([normalize(pixels) for pixels in random_pixels(setting).split(setting.class_images)])
        labels = np.repeat(np.arange(setting.classes), setting.class_images)
        self.class_indices = [np.flatnonzero(labels == label) for label in range(setting.classes)]
        self.random = np.random.RandomState(setting.seed)

    def batch(self, label: int, size: int) -> Tensor:
        """``size`` different images of one class, [size, channels, H, W]."""
        return self.images[self.random.permutation(self.class_indices[label])[:size]]

    def seed(self) -> int:
        """Seed of one augmentation call."""
        return int(self.random.randint(100_000))


def synthetic_from_real(setting: Setting, data: RealData) -> Tensor:
    """Synthetic images started from real ones, [classes * ipc, channels, H, W], class-major; they take gradients."""
    start = torch.cat([data.batch(label, setting.ipc) for label in range(setting.classes)])
    return start.detach().clone().requires_grad_(True)


def synthetic_labels(setting: Setting) -> Tensor:
    """int64 [classes * ipc], class-major."""
    return torch.arange(setting.classes, device=setting.device).repeat_interleave(setting.ipc)


def image_optimizer(images: Tensor, learning_rate: float) -> torch.optim.SGD:
    """SGD with momentum 0.5 over the synthetic images, as in every method of the line."""
    return torch.optim.SGD([images], lr=learning_rate, momentum=0.5)


def matching_rate(ipc: int) -> float:
    """Image learning rate of DM, DataDAM and ATOM: 1 up to 50 images a class, 10 above."""
    return 1.0 if ipc <= 50 else 10.0


def attentions(spatial: bool, channel: bool) -> list[Callable[[Tensor], Tensor]]:
    """The chosen attention maps, each from features [B, C, H, W]."""
    return [attention for attention, chosen in ((spatial_attention, spatial), (channel_attention, channel)) if chosen]


def spatial_attention(features: Tensor) -> Tensor:
    """Equation 1 with power 4: [B, C, H, W] -> [B, H*W] of unit length."""
    return F.normalize(features.abs().pow(POWER).sum(dim=1).flatten(1))


def channel_attention(features: Tensor) -> Tensor:
    """Equation 2 with power 4: [B, C, H, W] -> [B, C] of unit length."""
    return F.normalize(features.abs().pow(POWER).sum(dim=(2, 3)))


def augment(images: Tensor, seed: int, siamese: bool = True) -> Tensor:
    """DSA, "single" mode: one of color, crop, cutout, flip, scale, rotate, drawn from ``seed``.

    Two calls with one seed draw the same operation, and when ``siamese`` the same parameters for every image.

    Args:
        images: [B, C, H, W] float32.
        seed: of the operation and its parameters.
        siamese: one parameter set for the whole batch; otherwise one an image.
    """
    operations = AUGMENTATIONS[np.random.RandomState(seed).randint(len(AUGMENTATIONS))]
    for operation in operations:
        images = operation(images, _Draws(images, seed, siamese))
    return images.contiguous()


class _Draws:
    """Random parameters of B images: one an image, or one for all, whatever B is."""

    def __init__(self, images: Tensor, seed: int, siamese: bool):
        self.batch, self.device, self.seed = len(images), images.device, seed
        self.drawn = 1 if siamese else self.batch
        self.generator = torch.Generator(images.device).manual_seed(seed)

    def uniform(self) -> Tensor:
        """In [0, 1), [B, 1, 1, 1]."""
        shape = (self.drawn, 1, 1, 1)
        drawn = torch.rand(shape, device=self.device, generator=self.generator)
        return drawn.expand(self.batch, -1, -1, -1)

    def integers(self, low: int, high: int) -> Tensor:
        """In [low, high), int64 [B, 1, 1]."""
        shape = (self.drawn, 1, 1)
        drawn = torch.randint(low, high, shape, device=self.device, generator=self.generator)
        return drawn.expand(self.batch, -1, -1)

    def host_uniform(self, count: int) -> list[Tensor]:
        """``count`` tensors in [0, 1), [B], on the host."""
        generator = torch.Generator().manual_seed(self.seed)
        return [torch.rand(self.drawn, generator=generator).expand(self.batch) for _ in range(count)]


def _brightness(images, draws):
    return images + (draws.uniform() - 0.5)


def _saturation(images, draws):
    mean = images.mean(dim=1, keepdim=True)
    return (images - mean) * (draws.uniform() * 2) + mean


def _contrast(images, draws):
    mean = images.mean(dim=[1, 2, 3], keepdim=True)
    return (images - mean) * (draws.uniform() + 0.5) + mean


def _crop(images, draws):
    size = images.shape[2]
    shift = int(size * 0.125 + 0.5)
    down, right = draws.integers(-shift, shift + 1), draws.integers(-shift, shift + 1)
    item, row, column = _pixel_grid(images, size, size)
    row, column = ((index + move + 1).clamp(0, size + 1) for index, move in ((row, down), (column, right)))
    return F.pad(images, [1, 1, 1, 1]).permute(0, 2, 3, 1)[item, row, column].permute(0, 3, 1, 2)


def _cutout(images, draws):
    size = images.shape[2]
    cut = int(size * 0.5 + 0.5)
    last = size + (1 - cut % 2)
    top, left = draws.integers(0, last), draws.integers(0, last)
    item, row, column = _pixel_grid(images, cut, cut)
    row, column = ((index + start - cut // 2).clamp(0, size - 1) for index, start in ((row, top), (column, left)))
    mask = torch.ones(len(images), size, size, dtype=images.dtype, device=images.device)
    mask[item, row, column] = 0
    return images * mask.unsqueeze(1)


def _flip(images, draws):
    return torch.where(draws.uniform() < 0.5, images.flip(3), images)


def _scale(images, draws):
    ratio = 1.2
    across, along = (row * (ratio - 1 / ratio) + 1 / ratio for row in draws.host_uniform(2))
    return _warp(images, [[[x, 0, 0], [0, y, 0]] for x, y in zip(across.tolist(), along.tolist(), strict=True)])


def _rotate(images, draws):
    (angles,) = draws.host_uniform(1)
    matrices = []
    for angle in ((angles - 0.5) * 2 * 15 / 180 * math.pi).tolist():
        matrices.append([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]])
    return _warp(images, matrices)


def _warp(images: Tensor, matrices: list) -> Tensor:
    grid = F.affine_grid(torch.tensor(matrices), list(images.shape), align_corners=False).to(images.device)
    return F.grid_sample(images, grid, align_corners=False)


def _pixel_grid(images: Tensor, height: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    axes = [torch.arange(length, device=images.device) for length in (len(images), height, width)]
    return torch.meshgrid(*axes, indexing="ij")


AUGMENTATIONS = (
    (_brightness, _saturation, _contrast),
    (_crop,),
    (_cutout,),
    (_flip,),
    (_scale,),
    (_rotate,),
)
