"""Networks trained on the real images, kept in the user's cache by everything that they depend on.

Runs of other sizes, seeds and methods share them. A file holds the tensors of one network.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
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

FORMAT_VERSION = 1  # of the files and of the recipes: a change of either leaves older files unused

Tensors = dict[str, Tensor]


@dataclasses.dataclass(frozen=True)
class NetworkCache:
    """The files of networks of one kind, trained by one recipe on some data.

    Attributes:
        kind: what the networks are together: "pool" or "experts".
        format: key of the files' metadata.
        parts: names of the tensors in a file.
        folder: of the files, named after everything that the networks depend on.
    """

    kind: str
    format: str
    parts: tuple[str, ...]
    folder: Path

    @classmethod
    def open(
        cls,
        kind: str,
        folder: str,
        format: str,
        parts: tuple[str, ...],
        data: ImageData,
        preprocessing: Preprocessing,
        config: DistillConfig,
        recipe: dict[str, object],
    ) -> NetworkCache:
        """Return the cache of a recipe; ``folder`` is its name in the user's cache folder, which may not exist yet."""
        settings = {
            "version": FORMAT_VERSION,
            "data": data.fingerprint,
            "architecture": config.convnet_settings(),
            "protocol": recipe,
        }
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode())
        add_tensors(digest, preprocessing.tensors())
        identity = f"{data.name}-{digest.hexdigest()[:16]}"
        return cls(kind, format, parts, cache_folder() / folder / identity)

    def file(self, index: int) -> Path:
        """Return the path of a network."""
        return self.folder / f"network-{index:03d}.safetensors"

    def complete(
        self,
        wanted: Sequence[int],
        train: Callable[[Sequence[int]], Iterator[tuple[int, Tensors]]],
        about: str,
        is_enough: Callable[[Tensors], bool] = lambda tensors: True,
    ) -> None:
        """Train the networks that are missing, damaged or not enough.

        Processes that need the same networks at the same time share them: each trains those that no other one is
        training, and waits for the rest.

        Args:
            wanted: numbers of networks.
            train: yields (number, tensors) of the networks of some numbers, as they are finished.
            about: how they are trained, for the log.
            is_enough: False for tensors that are to be made again.

        Raises:
            OSError: a file could not be written, or was damaged meanwhile.
        """

        def is_missing(index: int) -> bool:
            tensors = self.read(index)
            return tensors is None or not is_enough(tensors)

        missing = [index for index in wanted if is_missing(index)]
        if not missing:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for part, wait in ((ranks.own_jobs(missing), False), (missing, True)):  # then what no process has finished
            with contextlib.ExitStack() as stack:
                # Without locks the worst is that two processes train the same network.
                mine = [index for index in part if stack.enter_context(claimed(self._lock_file(index), wait=wait))]
                todo = [index for index in mine if is_missing(index)]
                if todo:
                    log(f"training {len(todo)} networks {about}, for {self.folder}")
                    for index, tensors in train(todo):
                        self._write(index, tensors)
        if any(is_missing(index) for index in missing):
            raise OSError(f"networks of the {self.kind} in {self.folder} were damaged or removed while others trained")

    def read(self, index: int) -> Tensors | None:
        """Read a network; None where there is none, or one that is damaged or another's, which is said and removed."""
        from safetensors import safe_open

        path = self.file(index)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                about = json.loads((file.metadata() or {})[self.format])
                tensors = {name: file.get_tensor(name).clone() for name in self.parts}
            if about != {self.kind: path.parent.name, "network": path.stem, "sha256": about["sha256"]}:
                reason = f"it is {about['network']} of {about[self.kind]}"
            elif about["sha256"] != digest_of(tensors):
                reason = "its content does not match its checksum"
            else:
                return tensors
        except Exception as error:  # a damaged file can fail in many ways
            reason = str(error)
        log(f"{path} cannot be used ({reason}): the network is trained again")
        with contextlib.suppress(OSError):
            path.unlink()
        return None

    def _write(self, index: int, tensors: Tensors) -> None:
        from safetensors.torch import save

        path = self.file(index)
        about = {self.kind: path.parent.name, "network": path.stem, "sha256": digest_of(tensors)}
        write_atomically(path, save(tensors, metadata={self.format: json.dumps(about, sort_keys=True)}))

    def _lock_file(self, index: int) -> Path:
        return self.folder / f".network-{index:03d}.lock"


def train(
    jobs: Sequence[int],
    data: ImageData,
    preprocessing: Preprocessing,
    config: DistillConfig,
    protocol: Protocol,
    result: Callable[[Trainer], Tensors],
    *,
    seed: int,
    name: str,
    every_epoch: bool = False,
    progress: bool,
) -> Iterator[tuple[int, Tensor, dict[int, Tensors]]]:
    """Train networks.

    Args:
        jobs: their numbers.
        data: the real images, on the device that computes.
        preprocessing: to the model space of the distillation.
        config: resolved settings, for the architecture.
        protocol: how to train.
        result: what is wanted of a network, at the end or after every epoch.
        seed: of networks of this kind, apart from those of evaluations.
        name: of the networks together, for messages.
        every_epoch: take the result after every epoch.
        progress: show a progress bar on standard error.

    Yields:
        (number, flattened initial weights, results by epoch) as networks finish.

    Raises:
        RuntimeError: a network diverged.
    """
    device = data.train_images.device
    architecture = config.convnet_settings()
    layout = memory_format(empty_network("convnet", architecture, data, device), device)
    images, gather = training_images(data, preprocessing, device, layout)
    started: dict[int, Tensor] = {}

    def make_trainer() -> Trainer:
        network = empty_network("convnet", architecture, data, device).to(memory_format=layout)
        return Trainer(network, images, data.train_labels, protocol, gather=gather)

    def start(trainer: Trainer, index: int) -> None:
        trainer.restart(network_seed(seed, index))
        started[index] = flat(trainer.network)

    total = len(jobs) * protocol.epochs
    with (
        repeatable_convolutions(),
        one_thread_each(len(jobs), device),
        tqdm(total=total, desc=f"training the {name}", unit="epoch", disable=not progress) as bar,
    ):
        every = 1 if every_epoch else None
        options = {"evaluate_every": every, "together": None, "advance": bar.update}
        for index, results in train_networks(make_trainer, jobs, start, result, **options):
            tensors = [tensor for found in results.values() for tensor in found.values()]
            if not all(tensor.isfinite().all() for tensor in tensors):
                raise RuntimeError(f"network {index} of the {name} diverged")
            yield index, started.pop(index), results


@contextlib.contextmanager
def one_thread_each(networks: int, device: torch.device) -> Iterator[None]:
    """Give each network one CPU thread, so that its bits depend neither on the cores nor on how many are trained."""
    threads = torch.get_num_threads()
    if device.type == "cpu":
        torch.set_num_threads(min(threads, networks))
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def flat(network: nn.Module) -> Tensor:
    """Return all parameters, flattened in the network's order: float32 [P] on the CPU."""
    return torch.cat([parameter.detach().reshape(-1) for parameter in network.parameters()]).float().cpu()


def set_parameters(network: nn.Module, weights: Tensor) -> None:
    """Copy flattened weights [P] into a network's parameters."""
    parameters = [parameter.detach() for parameter in network.parameters()]
    parts = weights.split([parameter.numel() for parameter in parameters])
    views = [part.view(parameter.shape) for part, parameter in zip(parts, parameters, strict=True)]
    torch._foreach_copy_(parameters, views)


def digest_of(tensors: Tensors) -> str:
    """Return the SHA-256 of tensors by name, hexadecimal."""
    digest = hashlib.sha256()
    add_tensors(digest, tensors)
    return digest.hexdigest()
