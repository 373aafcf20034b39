"""DC: dataset condensation by gradient matching (Zhao et al., ICLR 2021), and the step that DSA shares.

One step is one outer iteration, as in the paper's Table 3: a fresh network, then ``outer`` rounds, each of which
matches the gradients of every class, updates the synthetic images once, and (except in the last round) trains the
network for ``inner`` epochs on the synthetic images. Settings: image learning rate 0.1, network learning rate 0.01,
256 real images per class; synthetic images start from noise, no augmentation. Kept from the public code: the loop over
classes, and the DataLoader that fetches the synthetic images one by one. ``published.py`` lists what is left out.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from . import fused, published
from .workload import Workload

# (outer, inner) by images per class, from the public code.
LOOPS = {1: (1, 1), 10: (10, 50), 20: (20, 25), 30: (30, 20), 40: (40, 15), 50: (50, 10)}
IMAGE_RATE, NETWORK_RATE, TRAIN_BATCH = 0.1, 0.01, 256


def loops(ipc: int) -> tuple[int, int]:
    """Return (outer, inner) for ``ipc`` images per class.

    Raises:
        ValueError: the public code defines no loops for that number.
    """
    if ipc not in LOOPS:
        raise ValueError(f"DC and DSA have loops for {', '.join(map(str, LOOPS))} images per class; got {ipc}")
    return LOOPS[ipc]


def build(workload: Workload) -> Callable[[], object]:
    """Return a function that runs one step and returns its last matching loss."""
    if workload.implementation == "fused":
        outer, inner = loops(workload.ipc)
        return fused.build_method(workload, rounds=outer, network_epochs=max(inner // workload.inner_divisor, 1))
    data = published.RealData(workload)
    shape = (workload.classes * workload.ipc, workload.channels, workload.resolution, workload.resolution)
    generator = torch.Generator(workload.device).manual_seed(workload.seed)
    images = torch.randn(shape, device=workload.device, generator=generator).requires_grad_(True)
    return outer_iteration(workload, data, images, augmented=False)


def outer_iteration(
    workload: Workload, data: published.RealData, images: Tensor, augmented: bool
) -> Callable[[], Tensor]:
    """Return one outer iteration of DC, or of DSA when ``augmented``, over the synthetic ``images``."""
    labels = published.synthetic_labels(workload)
    optimizer = published.image_optimizer(images, IMAGE_RATE)
    outer, inner = loops(workload.ipc)

    def step() -> Tensor:
        network = published.fresh_network(workload, trained=True)
        network_optimizer = torch.optim.SGD(network.parameters(), lr=NETWORK_RATE)
        for round_ in range(outer):
            loss = images.new_zeros(())
            for label in range(workload.classes):
                real = data.batch(label, workload.real_batch)
                synthetic = images[label * workload.ipc : (label + 1) * workload.ipc]
                if augmented:
                    seed = data.seed()
                    real, synthetic = published.augment(real, seed), published.augment(synthetic, seed)
                loss = loss + class_matching_loss(network, real, synthetic, label)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if round_ < outer - 1:
                snapshot = images.detach().clone()
                train(network, network_optimizer, snapshot, labels, inner // workload.inner_divisor, data, augmented)
        return loss.detach()

    return step


def class_matching_loss(network: nn.Module, real: Tensor, synthetic: Tensor, label: int) -> Tensor:
    """Return the distance of the gradients on one class's real and synthetic images; differentiable in the latter."""
    parameters = list(network.parameters())
    gradients = []
    for images, differentiable in ((real, False), (synthetic, True)):
        labels = torch.full((len(images),), label, dtype=torch.int64, device=images.device)
        loss = F.cross_entropy(network(images), labels)
        gradients.append(torch.autograd.grad(loss, parameters, create_graph=differentiable))
    return gradient_distance(*gradients)


def gradient_distance(real: tuple[Tensor, ...], synthetic: tuple[Tensor, ...]) -> Tensor:
    """Return 1 - cosine for every output row of every weight, summed; one-dimensional parameters are ignored."""
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
