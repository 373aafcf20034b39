"""A pool of networks trained on the real images, from which every step draws one of any age.

Embeddings of trained networks tell classes apart that those of random ones do not (DANCE, Zhang et al. 2024). A step
draws a network of the pool and a point between its initial and its trained weights. Networks are kept in the user's
cache by everything that they depend on, so that runs of other sizes, seeds and methods share them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm import tqdm

from atom_fast._files import cache_folder, claimed, write_atomically
from atom_fast._hashing import add_tensors
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation import ranks
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.logs import log
from atom_fast.networks.layers import memory_format
from atom_fast.training.ensemble import train_networks
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import (
    Trainer,
    empty_network,
    network_seed,
    repeatable_convolutions,
    training_images,
)

FORMAT = "atom_fast.pool_network"
FORMAT_VERSION = 1  # of the files and of the recipe: a change of either leaves older files unused
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


def set_parameters(network: nn.Module, weights: Tensor) -> None:
    """Copy flattened weights [P] into a network's parameters."""
    parameters = [parameter.detach() for parameter in network.parameters()]
    parts = weights.split([parameter.numel() for parameter in parameters])
    views = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
    torch._foreach_copy_(parameters, views)


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

    Processes that need the same networks at the same time share them: each trains those that no other one is training,
    and waits for the rest.

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
    folder = cache_folder() / "pools" / _identity(data, preprocessing, config, protocol)
    wanted = range(config.pool_networks)
    found = {index: _read(_file(folder, index)) for index in wanted}
    missing = [index for index in wanted if found[index] is None]
    if missing:
        folder.mkdir(parents=True, exist_ok=True)
        for part, wait in ((ranks.own_jobs(missing), False), (missing, True)):  # then what no process has finished
            with contextlib.ExitStack() as stack:
                # Without locks the worst is that two processes train the same network.
                mine = [index for index in part if stack.enter_context(claimed(_lock_file(folder, index), wait=wait))]
                todo = [index for index in mine if not _file(folder, index).is_file()]
                if todo:
                    log(f"training {len(todo)} networks on {data.name}, {protocol.epochs} epochs each, for {folder}")
                for index, tensors in _train(todo, data, preprocessing, config, protocol, progress):
                    _write(_file(folder, index), tensors)
        found = {index: _read(_file(folder, index)) for index in wanted}
    networks = [tensors for tensors in found.values() if tensors is not None]
    if len(networks) < len(wanted):
        raise OSError(f"networks of the pool in {folder} were damaged or removed while others were trained")
    initial, trained, scores = (torch.stack([tensors[name] for tensors in networks]) for name in _PARTS)
    digest = hashlib.sha256("".join(map(_digest, networks)).encode()).hexdigest()
    if len(set(ranks.all_gather_object(digest))) > 1:
        raise RuntimeError(f"the processes of this run trained different networks in {folder}; let them share a folder")
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


def _train(
    jobs: Sequence[int],
    data: ImageData,
    preprocessing: Preprocessing,
    config: DistillConfig,
    protocol: Protocol,
    progress: bool,
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Train networks; yield the tensors of each as it is finished."""
    if not jobs:
        return
    device = data.train_images.device
    architecture = config.convnet_settings()
    layout = memory_format(empty_network("convnet", architecture, data, device), device)
    images, gather = training_images(data, preprocessing, device, layout)
    initial: dict[Trainer, Tensor] = {}

    def make_trainer() -> Trainer:
        network = empty_network("convnet", architecture, data, device).to(memory_format=layout)
        return Trainer(network, images, data.train_labels, protocol, gather=gather)

    def start(trainer: Trainer, index: int) -> None:
        trainer.restart(network_seed(_SEED, index))
        initial[trainer] = _flat(trainer.network)

    def result(trainer: Trainer) -> dict[str, Tensor]:
        return {"initial": initial[trainer], "trained": _flat(trainer.network), "scores": _scores(trainer)}

    total = len(jobs) * protocol.epochs
    with (
        repeatable_convolutions(),
        _one_thread_each(len(jobs), device),
        tqdm(total=total, desc="training the pool", unit="epoch", disable=not progress) as bar,
    ):
        training = train_networks(
            make_trainer, jobs, start, result, evaluate_every=None, together=None, advance=bar.update
        )
        for index, results in training:
            tensors = results[protocol.epochs]
            if not all(tensor.isfinite().all() for tensor in tensors.values()):
                raise RuntimeError(f"network {index} of the pool diverged")
            yield index, tensors


@contextlib.contextmanager
def _one_thread_each(networks: int, device: torch.device) -> Iterator[None]:
    """Give each network one CPU thread, so that its bits depend neither on the cores nor on how many are trained."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(threads, networks))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _flat(network: nn.Module) -> Tensor:
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()]).float().cpu()


@torch.no_grad()
def _scores(trainer: Trainer) -> Tensor:
    """Return the error L2 norm of every training image, float32 [N] on the CPU."""
    network, parts = trainer.network.eval(), []
    for predicted, labels in trainer.in_batches(network):
        error = predicted.float().softmax(1)
        error.scatter_add_(1, labels[:, None], torch.full_like(error[:, :1], -1.0))
        parts.append(error.norm(dim=1))
    return torch.cat(parts).cpu()


def _identity(data: ImageData, preprocessing: Preprocessing, config: DistillConfig, protocol: Protocol) -> str:
    """Return a name that differs whenever anything that the networks depend on differs."""
    settings = {
        "version": FORMAT_VERSION,
        "data": data.fingerprint,
        "architecture": config.convnet_settings(),
        "protocol": protocol.to_dict(),
    }
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
    add_tensors(digest, preprocessing.tensors())
    return f"{data.name}-{digest.hexdigest()[:16]}"


def _file(folder: Path, index: int) -> Path:
    return folder / f"network-{index:03d}.safetensors"


def _lock_file(folder: Path, index: int) -> Path:
    return folder / f".network-{index:03d}.lock"


def _write(path: Path, tensors: dict[str, Tensor]) -> None:
    from safetensors.torch import save

    about = {"pool": path.parent.name, "network": path.stem, "sha256": _digest(tensors)}
    write_atomically(path, save(tensors, metadata={FORMAT: json.dumps(about, sort_keys=True)}))


def _read(path: Path) -> dict[str, Tensor] | None:
    """Read a network; None where there is none, or one that is damaged or another's, which is said and removed."""
    from safetensors import safe_open

    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            about = json.loads((file.metadata() or {})[FORMAT])
            tensors = {name: file.get_tensor(name).clone() for name in _PARTS}
        if about != {"pool": path.parent.name, "network": path.stem, "sha256": about["sha256"]}:
            reason = f"it is {about['network']} of {about['pool']}"
        elif about["sha256"] != _digest(tensors):
            reason = "its content does not match its checksum"
        else:
            return tensors
    except Exception as error:  # a damaged file can fail in many ways
        reason = str(error)
    log(f"{path} cannot be used ({reason}): the network is trained again")
    with contextlib.suppress(OSError):
        path.unlink()
    return None


def _digest(tensors: dict[str, Tensor]) -> str:
    digest = hashlib.sha256()
    add_tensors(digest, tensors)
    return digest.hexdigest()
