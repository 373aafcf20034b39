"""Algorithm 1 of the ATOM paper in one file of plain PyTorch: ``python examples/plain_atom.py``.

Distils the handwritten digits of scikit-learn into one image per class, then trains networks on those ten images and
prints their accuracy on real ones: about a minute on one CPU core. It uses atom_fast only to load the digits. It is
written to be read, one class after the other; atom_fast computes the same steps for all classes at once, and its tests
and benchmarks compare it with `distill` below.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast import load_data

WIDTH, DEPTH, REAL_BATCH, CLASSES = 64, 2, 32, 10


def spatial_attention(features: Tensor, power: float) -> Tensor:
    """Equation 1: sum of |f|^p over the channels, as a unit vector. [B, C, H, W] -> [B, H*W]."""
    return F.normalize(features.abs().pow(power).sum(dim=1).flatten(1), dim=1)


def channel_attention(features: Tensor, power: float) -> Tensor:
    """Equation 2: sum of |f|^p over the positions, as a unit vector. [B, C, H, W] -> [B, C]."""
    return F.normalize(features.abs().pow(power).sum(dim=(2, 3)), dim=1)


def mean_distance(real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared distance of the means of two batches of vectors."""
    return (real.mean(dim=0) - synthetic.mean(dim=0)).square().sum()


def class_loss(
    network,
    real: Tensor,
    synthetic: Tensor,
    spatial_power: float | None,
    channel_power: float | None,
    mmd_weight: float,
) -> Tensor:
    """Equations 3 and 4 for the images of one class; attention is taken of all layers but the last.

    Args:
        network: ``features(images)`` gives the embedding [B, D] and the feature maps [B, C, H, W] of every layer.
        real: [B, C, H, W]; synthetic: [B', C, H, W], to which the gradient flows.
        spatial_power, channel_power: exponents p of equations 1 and 2; None leaves that attention out.
        mmd_weight: lambda of equation 4.
    """
    with torch.no_grad():
        real_embedding, real_layers = network.features(real)
    embedding, layers = network.features(synthetic)
    loss = mmd_weight * mean_distance(real_embedding, embedding)
    for f_real, f_synthetic in zip(real_layers[:-1], layers[:-1], strict=True):
        for attention, power in ((spatial_attention, spatial_power), (channel_attention, channel_power)):
            if power is not None:
                loss = loss + mean_distance(attention(f_real, power), attention(f_synthetic, power))
    return loss


def distill(
    images: Tensor,
    draw: Callable[[int], tuple[nn.Module, Sequence[Tensor], Callable[[Tensor, int], Tensor]]],
    *,
    image_lr: float = 1.0,
    momentum: float = 0.5,
    loss_scale: float = 10.0,
    spatial_power: float | None = 4.0,
    channel_power: float | None = 4.0,
    mmd_weight: float = 0.01,
) -> Iterator[Tensor]:
    """Algorithm 1; yields the loss after every iteration, without end.

    Args:
        images: float32 [K*ipc, C, H, W], the initial images, class after class (line 1); changed in place.
        draw: for an iteration (1, 2, ...) the network, a batch of real images of each of the K classes, and the
            augmentation of one batch of class k, the same for its real and its synthetic images.
    """
    images.requires_grad_()
    optimizer = torch.optim.SGD([images], lr=image_lr, momentum=momentum)
    iteration = 0
    while True:  # line 2
        iteration += 1
        network, batches, augment = draw(iteration)  # lines 3 and 4
        loss = images.new_zeros(())
        for k, (real, synthetic) in enumerate(zip(batches, images.chunk(len(batches)), strict=True)):  # line 5
            real, synthetic = augment(real, k), augment(synthetic, k)
            loss = loss + class_loss(network, real, synthetic, spatial_power, channel_power, mmd_weight)
        optimizer.zero_grad()
        (loss_scale * loss).backward()  # line 6
        optimizer.step()  # line 7
        yield loss_scale * loss.detach()


class ConvNet(nn.Module):
    """The literature's network for 8x8 digits: blocks of convolution, InstanceNorm, ReLU and 2x2 pooling."""

    def __init__(self):
        super().__init__()
        sizes = [1, *[WIDTH] * DEPTH]
        convolutions = [nn.Conv2d(*pair, 3, padding=1) for pair in zip(sizes, sizes[1:], strict=False)]
        self.convolutions = nn.ModuleList(convolutions)
        self.norms = nn.ModuleList(nn.GroupNorm(WIDTH, WIDTH) for _ in range(DEPTH))
        self.classifier = nn.Linear(WIDTH * (8 // 2**DEPTH) ** 2, CLASSES)
        for convolution in convolutions:
            nn.init.kaiming_normal_(convolution.weight, nonlinearity="relu")

    def features(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        layers = []
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            layers.append(F.relu(norm(convolution(x))))
            x = F.avg_pool2d(layers[-1], 2)
        return x.flatten(1), layers

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x)[0])


def draw_augmentation() -> Callable[[Tensor], Tensor]:
    """Draw one operation of DSA: brightness, contrast, shift, cutout, or rotation and scale."""
    operation, (a, b) = int(torch.randint(5, ())), torch.rand(2).tolist()
    if operation == 0:
        return lambda x: x + a - 0.5
    if operation == 1:
        return lambda x: (x - x.mean(dim=(1, 2, 3), keepdim=True)) * (a + 0.5) + x.mean(dim=(1, 2, 3), keepdim=True)
    down, right = int(3 * a), int(3 * b)  # 0, 1, 2
    if operation == 2:  # by up to an eighth of the side
        return lambda x: F.pad(x, (1, 1, 1, 1))[:, :, down : down + 8, right : right + 8]
    if operation == 3:
        mask = torch.ones(8, 8)
        mask[2 * down : 2 * down + 4, 2 * right : 2 * right + 4] = 0
        return lambda x: x * mask
    angle, size = math.radians(30) * (a - 0.5), 1 / 1.2 + b * (1.2 - 1 / 1.2)
    matrix = torch.tensor([[math.cos(angle), -math.sin(angle), 0], [math.sin(angle), math.cos(angle), 0]]) * size
    return lambda x: F.grid_sample(
        x, F.affine_grid(matrix.expand(len(x), 2, 3), list(x.shape), align_corners=False), align_corners=False
    )


def accuracy(images: Tensor, labels: Tensor, test_images: Tensor, test_labels: Tensor, epochs: int) -> float:
    """Train a network on a small set, all of it at once; return its accuracy on the test set in per cent."""
    network = ConvNet()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    for _ in range(epochs):
        augment = draw_augmentation()
        optimizer.zero_grad()
        F.cross_entropy(network(augment(images)), labels).backward()
        optimizer.step()
    with torch.no_grad():
        return 100 * (network(test_images).argmax(dim=1) == test_labels).float().mean().item()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--iterations", type=int, default=300, help="steps of the distillation")
    parser.add_argument("--epochs", type=int, default=300, help="epochs of each network trained on the images")
    parser.add_argument("--ipc", type=int, default=1, help="synthetic images per class")
    options = parser.parse_args(arguments)
    torch.manual_seed(0)
    data = load_data("digits", progress=False)
    train, test = data.train_images / 255, data.test_images / 255
    mean, std = train.mean(), train.std()
    train, test = (train - mean) / std, (test - mean) / std
    of_class = [(data.train_labels == k).nonzero().flatten() for k in range(CLASSES)]

    def batch(k: int, size: int) -> Tensor:
        return train[of_class[k][torch.randperm(len(of_class[k]))[:size]]]

    def draw(iteration: int):
        operations = [draw_augmentation() for _ in range(CLASSES)]
        network = ConvNet().requires_grad_(False)
        return network, [batch(k, REAL_BATCH) for k in range(CLASSES)], lambda x, k: operations[k](x)

    images = torch.cat([batch(k, options.ipc) for k in range(CLASSES)])  # line 1: real images
    labels = torch.arange(CLASSES).repeat_interleave(options.ipc)
    start = images.clone()
    for iteration, loss in zip(range(1, options.iterations + 1), distill(images, draw), strict=False):
        if iteration % 100 == 0:
            print(f"iteration {iteration}: loss {loss:.3f}")
    for name, chosen in (("random real images", start), ("distilled images", images.detach())):
        found = torch.tensor([accuracy(chosen, labels, test, data.test_labels, options.epochs) for _ in range(3)])
        print(f"{name}: accuracy {found.mean():.1f} ± {found.std():.1f} %")


if __name__ == "__main__":
    main()
