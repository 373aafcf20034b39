"""DM: dataset condensation by distribution matching (Zhao and Bilen, WACV 2023).

One step: a fresh network; for each class, 256 real images and the class's synthetic images, augmented alike, and the
squared distance of their mean embeddings; one update of the synthetic images. Image learning rate 1 (10 above 50
images a class), real initialisation. ``eager`` keeps the public code's loop: one forward a class and side.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import batched, fused, published
from .setting import Setting


def build(setting: Setting) -> Callable[[], Tensor]:
    """A function that runs one step and returns its loss."""
    if setting.provider == "eager":
        return eager(setting)
    if setting.provider in batched.PROVIDERS:
        return batched.build(setting, spatial=False, channel=False, mmd_weight=1.0)
    return fused.build(setting, spatial=False, channel=False, mmd_weight=1.0)


def eager(setting: Setting) -> Callable[[], Tensor]:
    """One class after the other."""
    data = published.RealData(setting)
    images = published.synthetic_from_real(setting, data)
    optimizer = published.image_optimizer(images, published.matching_rate(setting.ipc))

    def step() -> Tensor:
        network = published.fresh_network(setting)
        loss = images.new_zeros(())
        for label in range(setting.classes):
            real = data.batch(label, setting.real_batch)
            synthetic = images[label * setting.ipc : (label + 1) * setting.ipc]
            seed = data.seed()
            loss = loss + class_loss(network, published.augment(real, seed), published.augment(synthetic, seed))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.detach()

    return step


def class_loss(network: published.ConvNet, real: Tensor, synthetic: Tensor) -> Tensor:
    """Squared distance of the mean embeddings of one class's real and synthetic images [B, C, H, W]."""
    real_embedding = network.embed(real).detach()
    return (real_embedding.mean(dim=0) - network.embed(synthetic).mean(dim=0)).square().sum()
