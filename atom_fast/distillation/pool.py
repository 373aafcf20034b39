"""A pool of networks trained on the real images, from which every step draws one of any age.

Embeddings of trained networks tell classes apart that those of random ones do not (DANCE, Zhang et al. 2024). A step
draws a network of the pool and a point between its initial and its trained weights. Networks are kept in the user's
cache by everything that they depend on, so that runs of other sizes, seeds and methods share them.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation import network_cache, ranks
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.network_cache import NetworkCache, Tensors, digest_of, flat, set_parameters
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import Trainer

FORMAT = "atom_fast.pool_network"
_PARTS = ("initial", "trained", "scores")
_SEED = 0x706F6F6C  # of the pool's networks, apart from those of evaluations


@dataclasses.dataclass(frozen=True)
class Pool:
    """Networks at the beginning and at the end of their training, and how hard they find each training image.

    Attributes:
        initial, trained: float32 [n, P], all parameters of each network, flattened in the network's order.
        scores: float32 [N], the mean over networks of the error L2 norm (EL2N, Paul et al. 2021) of each training
            image: the distance of its predicted probabilities from its label, 0 (easy) to sqrt(2).
        digest: SHA-256 of the weights, hexadecimal.
    """

    initial: Tensor
    trained: Tensor
    scores: Tensor
    digest: str

    def to(self, device: torch.device) -> Pool:
        """Return the pool with its tensors on a device."""
        return Pool(self.initial.to(device), self.trained.to(device), self.scores.to(device), self.digest)

    @torch.no_grad()
    def draw(self, network: nn.Module, generator: torch.Generator) -> None:
        """Set a network to a point, uniform between the initial and the trained weights, of a random network.

        Nothing is read back to the host. Buffers of BatchNorm are left alone: matching uses each batch's statistics.
        """
        device = self.initial.device
        index = torch.randint(len(self.initial), (1,), generator=generator, device=device)
        age = torch.rand(1, generator=generator, device=device)
        weights = torch.lerp(self.initial.index_select(0, index), self.trained.index_select(0, index), age)[0]
        set_parameters(network, weights)


def recipe(config: DistillConfig) -> Protocol:
    """Return how the networks of a pool are trained."""
    return Protocol(
        name="pool",
        epochs=config.pool_epochs,
        batch_size=64,
        learning_rate=0.01,
        momentum=0.9,
        weight_decay=5e-4,
        decay_factor=0.1,
        decay_every=None,
        decay_at=(0.75,),
        augmentation=config.augmentation,
        unit_variance=False,
    )


def trained_pool(
    data: ImageData, preprocessing: Preprocessing, config: DistillConfig, *, progress: bool = True
) -> Pool:
    """Return the pool that a configuration asks for: from the cache, and what is missing there trained.

    Args:
        data: the real images, on the device that computes.
        preprocessing: to the model space of the distillation.
        config: resolved settings, with ``pool_networks`` at least 1.
        progress: show a progress bar on standard error.

    Raises:
        OSError: the cache could not be written.
        RuntimeError: a network diverged, or processes of one run hold different networks.
    """
    protocol = recipe(config)
    cache = NetworkCache.open("pool", "pools", FORMAT, _PARTS, data, preprocessing, config, protocol.to_dict())
    wanted = range(config.pool_networks)

    def train(jobs: Sequence[int]) -> Iterator[tuple[int, Tensors]]:
        arguments = jobs, data, preprocessing, config, protocol, _result
        for index, initial, results in network_cache.train(*arguments, seed=_SEED, name="pool", progress=progress):
            yield index, {"initial": initial, **results[protocol.epochs]}

    cache.complete(wanted, train, f"on {data.name}, {protocol.epochs} epochs each")
    networks = [tensors for tensors in map(cache.read, wanted) if tensors is not None]
    if len(networks) < len(wanted):
        raise OSError(f"networks of the pool in {cache.folder} were damaged or removed while others were read")
    initial, trained, scores = (torch.stack([tensors[name] for tensors in networks]) for name in _PARTS)
    digest = hashlib.sha256("".join(map(digest_of, networks)).encode()).hexdigest()
    if len(set(ranks.all_gather_object(digest))) > 1:
        raise RuntimeError(
            f"the processes of this run trained different networks in {cache.folder}; let them share a folder"
        )
    pool = Pool(initial, trained, scores.mean(0), digest)
    return pool.to(data.train_images.device)


def easiest(data: ImageData, scores: Tensor, fraction: float) -> ImageData:
    """Return the data with only the easiest images of each class in its class index; the images stay as they are.

    Args:
        data: the real images.
        scores: float [N], one per training image; lower is easier.
        fraction: share of each class that stays, rounded up to whole images.
    """
    kept = []
    for indices in data.class_index.split(data.class_sizes):
        count = math.ceil(fraction * len(indices))
        order = torch.argsort(scores[indices], stable=True)[:count]
        kept.append(indices[order].sort().values)
    return data.of_images(kept)


def _result(trainer: Trainer) -> Tensors:
    return {"trained": flat(trainer.network), "scores": _scores(trainer)}


@torch.no_grad()
def _scores(trainer: Trainer) -> Tensor:
    """Return the error L2 norm of every training image, float32 [N] on the CPU."""
    network, parts = trainer.network.eval(), []
    for predicted, labels in trainer.in_batches(network):
        error = predicted.float().softmax(1)
        error.scatter_add_(1, labels[:, None], torch.full_like(error[:, :1], -1.0))
        parts.append(error.norm(dim=1))
    return torch.cat(parts).cpu()
