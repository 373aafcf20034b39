"""DC: dataset condensation by gradient matching (Zhao et al., ICLR 2021), and what DSA shares with it.

One step is one outer iteration, as in the paper's Table 3: a fresh network, then ``outer`` rounds, each of which
matches the gradients of every class, updates the synthetic images once, and (but for the last round) trains the
network for ``inner`` epochs on the synthetic images. Settings: image learning rate 0.1, network learning rate 0.01,
256 real images a class; synthetic images start from noise, no augmentation. Kept from the public code: the loop over
classes, and the DataLoader that fetches the synthetic images one by one. See ``published.py`` for what is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from . import published
from .setting import Setting

# (outer, inner) by images per class, from the public code.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
IMAGE_RATE, NETWORK_RATE, TRAIN_BATCH = 0.1, 0.01, 256


def loops(ipc: int) -> tuple[int, int]:
    """(outer, inner) for ``ipc`` images a class.

    Raises:
        ValueError: the public code names no loops for that number.
    """
    if ipc not in LOOPS:
        raise ValueError(f"DC and DSA have loops for {', '.join(map(str, LOOPS))} images a class; got {ipc}")
    return LOOPS[ipc]


def build(setting: Setting) -> Callable[[], Tensor]:
    """A function that runs one step and returns its last matching loss."""
    data = published.RealData(setting)
    shape = (setting.classes * setting.ipc, setting.channels, setting.resolution, setting.resolution)
    generator = torch.Generator(setting.device).manual_seed(setting.seed)
    images = torch.randn(shape, device=setting.device, generator=generator).requires_grad_(True)
    return outer_iteration(setting, data, images, augmented=False)


def outer_iteration(
    setting: Setting, data: published.RealData, images: Tensor, augmented: bool
) -> Callable[[], Tensor]:
    """One outer iteration of DC, or of DSA when ``augmented``, over the synthetic ``images``."""
    labels = published.synthetic_labels(setting)
    optimizer = published.image_optimizer(images, IMAGE_RATE)
    outer, inner = loops(setting.ipc)

    def step() -> Tensor:
        network = published.fresh_network(setting, trained=True)
        network_optimizer = torch.optim.SGD(network.parameters(), lr=NETWORK_RATE)
        for round_ in range(outer):
            loss = images.new_zeros(())
            for label in range(setting.classes):
                real = data.batch(label, setting.real_batch)
                synthetic = images[label * setting.ipc : (label + 1) * setting.ipc]
                if augmented:
                    seed = data.seed()
                    real, synthetic = published.augment(real, seed), published.augment(synthetic, seed)
                loss = loss + class_matching_loss(network, real, synthetic, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if round_ < outer - 1:
                snapshot = images.detach().clone()
                train(network, network_optimizer, snapshot, labels, inner // setting.inner_divisor, data, augmented)
        return loss.detach()

    return step


def class_matching_loss(network: nn.Module, real: Tensor, synthetic: Tensor, label: int) -> Tensor:
    """Distance of the network's gradients on one class's real and synthetic images; differentiable in the synthetic."""
    parameters = list(network.parameters())
    gradients = []
    for images, differentiable in ((real, False), (synthetic, True)):
        labels = torch.full((len(images),), label, dtype=torch.int64, device=images.device)
        loss = F.cross_entropy(network(images), labels)
        gradients.append(torch.autograd.grad(loss, parameters, create_graph=differentiable))
    return gradient_distance(*gradients)


def gradient_distance(real: tuple[Tensor, ...], synthetic: tuple[Tensor, ...]) -> Tensor:
    """1 - cosine for every output row of every weight, summed; one-dimensional parameters are ignored."""
    distance = synthetic[0].new_zeros(())
    for real_gradient, synthetic_gradient in zip(real, synthetic, strict=True):
        if real_gradient.dim() == 1:
            continue
        a, b = real_gradient.flatten(1), synthetic_gradient.flatten(1)
        distance = distance + (1 - (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)).sum()
    return distance


def train(network, optimizer, images: Tensor, labels: Tensor, epochs: int, data, augmented: bool) -> None:
    """Train the network on the synthetic images for a few epochs."""
    loader = DataLoader(TensorDataset(images, labels), batch_size=TRAIN_BATCH, shuffle=True)
    for _ in range(epochs):
        for batch, batch_labels in loader:
            if augmented:
                batch = published.augment(batch, data.seed(), siamese=False)
            loss = F.cross_entropy(network(batch), batch_labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
