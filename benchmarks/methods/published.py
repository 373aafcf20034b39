"""Code shared by the published steps of DC, DSA, DM, MTT and DataDAM, rewritten in plain PyTorch.

Kept is everything that determines the cost of a published step: a fresh network built on the host and copied, a NumPy
permutation of the whole class for every batch, one augmentation call per class and side, 3x2 matrices and sampling
grids made on the host, float32 data on the device. Left out, in the baselines' favour, is logging and cleanup:
``.item()`` for a log line, accuracy computed on the host, ``empty_cache()``, features and losses moved to the CPU.

Images are random, because time and memory do not depend on their content.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .workload import Workload

POWER = 4.0


class ConvNet(nn.Module):
    """The usual ConvNet: depth x [3x3 convolution, norm, ReLU, 2x2 average pooling], then a linear layer.

    The norm is GroupNorm(C, C), that is InstanceNorm, or BatchNorm.

    Initialised as PyTorch does by default, like the public code. Images [B, channels, H, W] -> logits [B, classes].
    """

    def __init__(self, workload: Workload):
        super().__init__()
        channels, width = workload.channels, workload.width
        batch_norm = workload.norm == "batch"
        blocks = []
        for _ in range(workload.depth):
            norm = nn.BatchNorm2d(width) if batch_norm else nn.GroupNorm(width, width)
            blocks += [nn.Conv2d(channels, width, kernel_size=3, padding=1), norm]
            blocks += [nn.ReLU(inplace=True), nn.AvgPool2d(2)]
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.classifier = nn.Linear(width * (workload.resolution // 2**workload.depth) ** 2, workload.classes)

    def embed(self, images: Tensor) -> Tensor:
        """Return the flattened pooled features [B, D] of the last block for images [B, channels, H, W]."""
        return self.blocks(images).flatten(1)

    def forward(self, images: Tensor) -> Tensor:
        return self.classifier(self.embed(images))


def fresh_network(workload: Workload, trained: bool = False) -> ConvNet:
    """Return a new random network, built on the host and copied; its parameters require gradients if ``trained``."""
    network = ConvNet(workload).to(workload.device)
    return network.requires_grad_(trained)


def random_pixels(workload: Workload) -> Tensor:
    """Return uint8 images of the data set's shape, [classes * class_images, channels, H, W], class-major."""
    shape = (workload.classes * workload.class_images, workload.channels, workload.resolution, workload.resolution)
    generator = torch.Generator(workload.device).manual_seed(workload.seed)
    return torch.randint(0, 256, shape, dtype=torch.uint8, device=workload.device, generator=generator)


def normalize(pixels: Tensor) -> Tensor:
    """Map uint8 to float32 with the mean and deviation of uniformly random pixels."""
    return (pixels.float() / 255 - 0.5) * math.sqrt(12)


class RealData:
    """The data set as in the public code: float32 images on the device, and each class's indices on the host."""

    def __init__(self, workload: Workload):
        # Class by class, so that the peak memory is the method's float32 copy and not two of them.
        self.images = torch.cat([normalize(pixels) for pixels in random_pixels(workload).split(workload.class_images)])
        labels = np.repeat(np.arange(workload.classes), workload.class_images)
        self.class_indices = [np.flatnonzero(labels == label) for label in range(workload.classes)]
        self.random = np.random.RandomState(workload.seed)

    def batch(self, label: int, size: int) -> Tensor:
        """Return ``size`` different images of one class, [size, channels, H, W]."""
        return self.images[self.random.permutation(self.class_indices[label])[:size]]

    def seed(self) -> int:
        """Draw the seed of one augmentation call."""
        return int(self.random.randint(100_000))


def synthetic_from_real(workload: Workload, data: RealData) -> Tensor:
    """Return synthetic images copied from real ones, [classes * ipc, channels, H, W], class-major, with gradients."""
    start = torch.cat([data.batch(label, workload.ipc) for label in range(workload.classes)])
    return start.detach().clone().requires_grad_(True)


def synthetic_labels(workload: Workload) -> Tensor:
    """Return the labels, int64 [classes * ipc], class-major."""
    return torch.arange(workload.classes, device=workload.device).repeat_interleave(workload.ipc)


def image_optimizer(images: Tensor, learning_rate: float) -> torch.optim.SGD:
    """Return SGD with momentum 0.5 over the synthetic images, as in all these methods."""
    return torch.optim.SGD([images], lr=learning_rate, momentum=0.5)


def matching_rate(ipc: int) -> float:
    """Return the image learning rate of DM, DataDAM and ATOM: 1 up to 50 images per class, 10 above."""
    return 1.0 if ipc <= 50 else 10.0


def attentions(spatial: bool, channel: bool) -> list[Callable[[Tensor], Tensor]]:
    """Return the chosen attention maps, each from features [B, C, H, W]."""
    return [attention for attention, chosen in ((spatial_attention, spatial), (channel_attention, channel)) if chosen]


def spatial_attention(features: Tensor) -> Tensor:
    """Compute equation 1 with power 4: [B, C, H, W] -> [B, H*W] of unit length."""
    return F.normalize(features.abs().pow(POWER).sum(dim=1).flatten(1))


def channel_attention(features: Tensor) -> Tensor:
    """Compute equation 2 with power 4: [B, C, H, W] -> [B, C] of unit length."""
    return F.normalize(features.abs().pow(POWER).sum(dim=(2, 3)))


def augment(images: Tensor, seed: int, siamese: bool = True) -> Tensor:
    """Apply DSA in "single" mode: one of color, crop, cutout, flip, scale, rotate, drawn from ``seed``.

    Two calls with one seed draw the same operation, and when ``siamese`` the same parameters for every image.

    Args:
        images: [B, C, H, W] float32.
        seed: seed of the operation and its parameters.
        siamese: one parameter set for the whole batch; otherwise one per image.
    """
    operations = AUGMENTATIONS[np.random.RandomState(seed).randint(len(AUGMENTATIONS))]
    for operation in operations:
        images = operation(images, _Draws(images, seed, siamese))
    return images.contiguous()


class _Draws:
    """Random parameters of B images: one per image, or one for all."""

    def __init__(self, images: Tensor, seed: int, siamese: bool):
        self.batch, self.device, self.seed = len(images), images.device, seed
        self.drawn = 1 if siamese else self.batch
        self.generator = torch.Generator(images.device).manual_seed(seed)

    def uniform(self) -> Tensor:
        """Draw from [0, 1): [B, 1, 1, 1]."""
        shape = (self.drawn, 1, 1, 1)
        drawn = torch.rand(shape, device=self.device, generator=self.generator)
        return drawn.expand(self.batch, -1, -1, -1)

    def integers(self, low: int, high: int) -> Tensor:
        """Draw from [low, high): int64 [B, 1, 1]."""
        shape = (self.drawn, 1, 1)
        drawn = torch.randint(low, high, shape, device=self.device, generator=self.generator)
        return drawn.expand(self.batch, -1, -1)

    def host_uniform(self, count: int) -> list[Tensor]:
        """Draw ``count`` tensors [B] from [0, 1) on the host."""
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
