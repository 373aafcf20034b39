"""Replace the loss of an existing distillation loop: ``python examples/drop_in_loss.py``.

`plain_loss` is the attention-matching loss as a script would define it, called once per class. `ATOMLoss` takes all
classes in one call and returns the same number. The loop below runs once with each, in seconds on one CPU core, and
prints the largest difference between the two sets of images. Nothing else of atom_fast is used.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor, nn

from atom_fast import ATOMLoss  # instead of plain_loss

Features = tuple[list[Tensor], Tensor]  # ReLU outputs [B, C, H, W] of all layers but the last, embedding [B, D]


def plain_loss(
    real_features: Sequence[Tensor],
    synthetic_features: Sequence[Tensor],
    real_embedding: Tensor,
    synthetic_embedding: Tensor,
) -> Tensor:
    """Loss of one class: spatial and channel attention with power 4, and mean embeddings."""
    loss = 0.01 * (real_embedding.mean(0) - synthetic_embedding.mean(0)).square().sum()
    for real, synthetic in zip(real_features, synthetic_features, strict=True):
        for dims in (1, (2, 3)):
            target = F.normalize(real.abs().pow(4).sum(dims).flatten(1)).mean(0)
            found = F.normalize(synthetic.abs().pow(4).sum(dims).flatten(1)).mean(0)
            loss = loss + (target - found).square().sum()
    return loss


def loss_per_class(real: Features, synthetic: Features, real_labels: Tensor, synthetic_labels: Tensor) -> Tensor:
    """Before: sum the loss over the classes, one after the other."""
    total = torch.zeros(())
    for label in synthetic_labels.unique():
        in_real, in_synthetic = real_labels == label, synthetic_labels == label
        real_layers = [layer[in_real] for layer in real[0]]
        synthetic_layers = [layer[in_synthetic] for layer in synthetic[0]]
        total = total + plain_loss(real_layers, synthetic_layers, real[1][in_real], synthetic[1][in_synthetic])
    return total


def loss_at_once(real: Features, synthetic: Features, real_labels: Tensor, synthetic_labels: Tensor) -> Tensor:
    """After: one call for all classes."""
    return ATOMLoss()(real[0], synthetic[0], real[1], synthetic[1], real_labels, synthetic_labels)


class Network(nn.Module):
    """Three convolutions; `forward` returns what the loss matches."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Conv2d(*channels, 3, padding=1) for channels in ((1, 32), (32, 32), (32, 32)))

    def forward(self, x: Tensor) -> Features:
        outputs = []
        for layer in self.layers:
            x = F.instance_norm(layer(x)).relu()
            outputs.append(x)
            x = F.avg_pool2d(x, 2)
        return outputs[:-1], x.flatten(1)


def distill(images: Tensor, labels: Tensor, loss_of: Callable[..., Tensor], ipc: int, steps: int) -> Tensor:
    """Distil to ``ipc`` images per class with a new random network in every step; returns [K·ipc, 1, 8, 8]."""
    torch.manual_seed(0)
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    synthetic = torch.cat([images[members[:ipc]] for members in classes]).requires_grad_()
    synthetic_labels = labels.unique().repeat_interleave(ipc)
    optimizer = torch.optim.SGD([synthetic], lr=1.0, momentum=0.5)
    for _ in range(steps):
        network = Network().requires_grad_(False)
        batch = torch.cat([members[torch.randperm(len(members))[:64]] for members in classes])
        with torch.no_grad():
            real = network(images[batch])
        loss = loss_of(real, network(synthetic), labels[batch], synthetic_labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return synthetic.detach()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition(":")[0])
    parser.add_argument("--ipc", type=int, default=10, help="synthetic images per class")
    parser.add_argument("--steps", type=int, default=10, help="steps of each loop")
    options = parser.parse_args(arguments)
    digits: Any = load_digits()
    images = torch.tensor(digits.images[:, None] / 16 - 0.3, dtype=torch.float32)
    labels = torch.tensor(digits.target, dtype=torch.int64)
    results = []
    for name, loss_of in (("plain loss, class by class", loss_per_class), ("ATOMLoss, all classes", loss_at_once)):
        distill(images, labels, loss_of, options.ipc, steps=1)  # the first step loads what later ones reuse
        started = time.perf_counter()
        results.append(distill(images, labels, loss_of, options.ipc, options.steps))
        print(f"{name}: {1000 * (time.perf_counter() - started) / options.steps:.1f} ms per step")
    difference = (results[0] - results[1]).abs().max().item()
    print(f"largest difference between the images: {difference:.1e}")


if __name__ == "__main__":
    main()
