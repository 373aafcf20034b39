"""Experts: networks trained on the real images whose weights after each epoch MTT and TESLA follow."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.placement import readable
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation import network_cache
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.network_cache import NetworkCache, Tensors, flat
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import Trainer, empty_network

FORMAT = "atom_fast.expert"
_SEED = 0x65787074  # of the experts, apart from networks of pools and evaluations


class Experts(NamedTuple):
    """Files of trained experts; of their weights only what a step needs is read.

    Attributes:
        cache: the files.
        count: how many experts are used.
        last_start, target_epochs: as in the settings.
    """

    cache: NetworkCache
    count: int
    last_start: int
    target_epochs: int

    def draw(self, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return weights [P] of a random expert, after one of its first ``last_start`` epochs and some epochs later.

        Args:
            generator: on the CPU.
        """
        from safetensors import safe_open

        index = int(torch.randint(self.count, (), generator=generator))
        epoch = int(torch.randint(self.last_start, (), generator=generator))
        with safe_open(self.cache.file(index), framework="pt", device="cpu") as file:
            weights = file.get_slice("weights")
            later = epoch + self.target_epochs
            return weights[epoch : epoch + 1][0].clone(), weights[later : later + 1][0].clone()


def recipe(config: DistillConfig, epochs: int) -> Protocol:
    """Return how experts are trained: as in MTT's code."""
    return Protocol(
        name="expert", epochs=epochs, batch_size=256, learning_rate=0.01, momentum=0.0, weight_decay=0.0,
        decay_factor=1.0, decay_every=None, augmentation=config.augmentation, unit_variance=False,
    )  # fmt: skip


def trained_experts(
    data: ImageData, preprocessing: Preprocessing, config: DistillConfig, *, progress: bool = True
) -> Experts:
    """Return the experts that a configuration asks for: from the cache, and what is missing there trained.

    They are trained for as many epochs as a run reads, of which shorter runs use the first ones.

    Args:
        data: the real images, on the device that computes.
        preprocessing: to the model space of the distillation.
        config: resolved settings.
        progress: show a progress bar on standard error.

    Raises:
        OSError: the cache could not be written.
        RuntimeError: an expert diverged.
    """
    assert config.last_start is not None and config.target_epochs is not None  # numbers in resolved settings
    epochs = config.last_start - 1 + config.target_epochs
    protocol = recipe(config, epochs)
    endless = {name: value for name, value in protocol.to_dict().items() if name != "epochs"}
    cache = NetworkCache.open("experts", "experts", FORMAT, ("weights",), data, preprocessing, config, endless)

    def result(trainer: Trainer) -> Tensors:
        return {"weights": flat(trainer.network)}

    def train(jobs: Sequence[int]) -> Iterator[tuple[int, Tensors]]:
        trained = network_cache.train(
            jobs, data, preprocessing, config, protocol, result,
            seed=_SEED, name="experts", every_epoch=True, progress=progress,
        )  # fmt: skip
        for index, initial, results in trained:
            later = [results[epoch]["weights"] for epoch in range(1, epochs + 1)]
            yield index, {"weights": torch.stack([initial, *later])}

    size = config.experts * (epochs + 1) * _parameters(config, data) * 4
    about = f"on {data.name}, {epochs} epochs each, {readable(size)} of weights in all"
    cache.complete(range(config.experts), train, about, lambda tensors: len(tensors["weights"]) > epochs)
    return Experts(cache, config.experts, config.last_start, config.target_epochs)


def _parameters(config: DistillConfig, data: ImageData) -> int:
    network = empty_network("convnet", config.convnet_settings(), data, torch.device("meta"))
    return sum(parameter.numel() for parameter in network.parameters())
