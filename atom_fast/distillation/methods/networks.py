"""Networks that learn while a set is learnt: how they are made and trained."""

from __future__ import annotations

from typing import Any

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.distillation.config import DistillConfig
from atom_fast.networks.convnet import ConvNet
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import empty_network


def make_network(config: DistillConfig, data: ImageData, device: torch.device) -> ConvNet:
    """Return the ConvNet of the settings, its weights not drawn yet, in the layout that trains fastest."""
    network: Any = empty_network("convnet", config.convnet_settings(), data, device)
    return network.to(memory_format=torch.channels_last)


def plain_sgd(name: str, epochs: int, batch_size: int, learning_rate: float, augmentation: str) -> Protocol:
    """Return the protocol of SGD at one rate, without momentum and weight decay."""
    return Protocol(
        name=name, epochs=epochs, batch_size=batch_size, learning_rate=learning_rate, momentum=0.0, weight_decay=0.0,
        decay_factor=1.0, decay_every=None, augmentation=augmentation,
    )  # fmt: skip
