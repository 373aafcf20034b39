"""DM: dataset condensation by distribution matching (Zhao and Bilen, WACV 2023).

One step: a fresh network; for each class, 256 real images and the class's synthetic images, augmented alike, and the
squared distance of their mean embeddings; one update of the synthetic images. Image learning rate 1 (10 above 50
images per class), real initialisation. ``eager`` keeps the public code's loop: one forward per class and side.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import batched, fused, published
from .workload import Workload


def build(workload: Workload) -> Callable[[], Tensor]:
    """Return a function that runs one step and returns its loss."""
    if workload.implementation == "eager":
        return eager(workload)
    if workload.implementation in batched.IMPLEMENTATIONS:
        return batched.build(workload, spatial=False, channel=False, mmd_weight=1.0)
    return fused.build(workload, spatial=False, channel=False, mmd_weight=1.0)


def eager(workload: Workload) -> Callable[[], Tensor]:
    """Return the step as published, one class after the other."""
    data = published.RealData(workload)
    images = published.synthetic_from_real(workload, data)
    optimizer = published.image_optimizer(images, published.matching_rate(workload.ipc))

    def step() -> Tensor:
        network = published.fresh_network(workload)
        loss = images.new_zeros(())
        for label in range(workload.classes):
            real = data.batch(label, workload.real_batch)
            synthetic = images[label * workload.ipc : (label + 1) * workload.ipc]
            seed = data.seed()
            loss = loss + class_loss(network, published.augment(real, seed), published.augment(synthetic, seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def class_loss(network: published.ConvNet, real: Tensor, synthetic: Tensor) -> Tensor:
    """Return the squared distance of the mean embeddings of one class's real and synthetic images [B, C, H, W]."""
    real_embedding = network.embed(real).detach()
    return (real_embedding.mean(dim=0) - network.embed(synthetic).mean(dim=0)).square().sum()
