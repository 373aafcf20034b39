"""Training of candidates, each on every proxy; results are kept in one file per candidate.

A candidate's result depends on its name, the seed and the proxy alone. On a CPU every process has one core, because two
networks on a core each take less time than one after the other on both, and threads would wait for Python's lock. On a
GPU the networks of one shape are one CUDA graph (`atom_fast.training.ensemble`).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from atom_fast._device import is_out_of_memory
from atom_fast._files import claimed, write_atomically
from atom_fast._seeds import derive_seed
from atom_fast.networks import make_network
from atom_fast.networks.layers import memory_format
from atom_fast.training.ensemble import train_networks
from atom_fast.training.trainer import Trainer, accuracy, repeatable_convolutions
from benchmarks.accuracy.cells import read_json
from benchmarks.search.grid import Candidate
from benchmarks.search.plan import EARLY, REFERENCE
from benchmarks.search.proxies import Proxy

FORMAT = "benchmarks.search.candidate"
_KEPT_BYTES = 2**25  # of batches on one proxy; more are drawn again for every candidate
# A trainer that only draws batches needs a network too; this one leaves them in NCHW, which suits all candidates.
_ANY = Candidate(1, 4, "relu", "layer", "none")
DIVERGED, NO_MEMORY = "diverged", "out of memory"
# Of a training: "accuracy" in per cent, or None and the "reason"; "seconds".
Result = dict[str, Any]


def unfit_reason(candidate: Candidate, image_shape: tuple[int, int, int], classes: int) -> str | None:
    """Return why a candidate cannot be built for images [C, H, W]; None if it can."""
    try:
        _network(candidate, image_shape, classes, torch.device("meta"))
    except ValueError as error:
        return str(error)
    return None


def read_results(folder: Path, candidate: Candidate) -> dict[str, Result]:
    """Return a candidate's finished trainings by key.

    Raises:
        ValueError: its file is damaged.
    """
    path = _file(folder, candidate)
    if not path.is_file():
        return {}
    remedy = "remove it to train the candidate again"
    found = read_json(path, remedy)
    trained = found.get("trained") if isinstance(found, dict) and found.get("format") == FORMAT else None
    if not isinstance(trained, dict) or not all(_is_result(result) for result in trained.values()):
        raise ValueError(f"{path} does not hold a candidate's results; {remedy}")
    return trained


def _is_result(result: object) -> bool:
    if not isinstance(result, dict) or not isinstance(result.get("seconds"), (int, float)):
        return False
    return isinstance(result.get("accuracy"), (int, float)) or isinstance(result.get("reason"), str)


def train_candidate(
    candidate: Candidate,
    proxies: Sequence[Proxy],
    folder: Path,
    *,
    wait: bool,
    stop: Callable[[], bool] = lambda: False,
) -> bool:
    """Train a candidate on the proxies that its file lacks; each result is written as it is there.

    A candidate that diverges or needs more memory than there is has that as its result.

    Args:
        candidate: one that `unfit_reason` accepts.
        proxies: on one device.
        folder: of the candidates' files.
        wait: for another process that trains this candidate; otherwise return.
        stop: asked after every training; True ends it.

    Returns:
        False if another process is training it.

    Raises:
        ValueError: its file is damaged.
        OSError: its file cannot be written.
    """
    if not _missing(folder, candidate, proxies):
        return True
    (folder / "locks").mkdir(parents=True, exist_ok=True)
    with claimed(folder / "locks" / candidate.name, wait=wait) as mine:
        if not mine:
            return False
        for group in _groups(_missing(folder, candidate, proxies)):
            for proxy, result in _train_group(candidate, group):
                trained = {**read_results(folder, candidate), proxy.key: result}
                content = {"format": FORMAT, "candidate": candidate.name, "trained": trained}
                write_atomically(_file(folder, candidate), json.dumps(content, indent=1) + "\n")
                if stop():
                    return True
    return True


def _file(folder: Path, candidate: Candidate) -> Path:
    return folder / f"{candidate.name}.json"


def _missing(folder: Path, candidate: Candidate, proxies: Sequence[Proxy]) -> list[Proxy]:
    found = read_results(folder, candidate)
    return [proxy for proxy in proxies if proxy.key not in found]


def _groups(proxies: Sequence[Proxy]) -> list[list[Proxy]]:
    """Put proxies together that one trainer takes one after the other, and on a GPU some trainers at the same time."""
    groups: dict[tuple, list[Proxy]] = {}
    for proxy in proxies:
        whole = id(proxy.images) if _takes_real(proxy) else None
        alike = whole, proxy.count, proxy.labels.shape[1:], proxy.labels.dtype, proxy.protocol
        groups.setdefault(alike, []).append(proxy)
    return list(groups.values())


def _takes_real(proxy: Proxy) -> bool:
    return proxy.name in (EARLY, REFERENCE)


def _train_group(candidate: Candidate, group: list[Proxy]) -> Iterator[tuple[Proxy, Result]]:
    """Yield every proxy of a group with the result of its training."""
    left = list(group)
    try:
        for result in (_one_by_one if group[0].images.device.type == "cpu" else _at_once)(candidate, group):
            yield left.pop(0), result
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    for proxy in left:
        yield proxy, _result(None, NO_MEMORY, 0.0)


def _one_by_one(candidate: Candidate, group: list[Proxy]) -> Iterator[Result]:
    """Train on a CPU, on the batches that all candidates share; time it without pauses for other processes."""
    trainer = _trainer(candidate, group[0])
    for proxy in group:
        started = time.process_time()
        trainer.restart(candidate.seed(proxy.seed))
        for epoch, batches in enumerate(_batches(proxy)):
            trainer.begin_epoch(epoch)  # for its learning rate
            for batch in batches:
                trainer.update(*batch)
        found = accuracy(trainer.network, proxy.test_images, proxy.test_labels)
        yield _result(found, DIVERGED, time.process_time() - started)


def _batches(proxy: Proxy) -> Sequence[list] | Iterator[list]:
    """Return the batches of every epoch on a proxy: the same for all candidates, drawn from the proxy's seed alone.

    It saves a quarter of a small candidate's time, and candidates differ by themselves and not by their batches.
    """
    size = 4 * proxy.images[0].numel() * proxy.count * proxy.protocol.epochs
    return _kept_batches(proxy) if size <= _KEPT_BYTES else _draw_batches(proxy)


@functools.lru_cache(maxsize=64)
def _kept_batches(proxy: Proxy) -> list[list]:
    return list(_draw_batches(proxy))


def _draw_batches(proxy: Proxy) -> Iterator[list]:
    trainer = _trainer(_ANY, proxy)
    if not _takes_real(proxy):
        trainer.images.copy_(proxy.images)
    trainer.restart(derive_seed(proxy.seed, 0))
    for epoch in range(proxy.protocol.epochs):
        yield [trainer.batch(indices) for indices in trainer.begin_epoch(epoch).split(proxy.protocol.batch_size)]


def _at_once(candidate: Candidate, group: list[Proxy]) -> Iterator[Result]:
    """Train on a GPU, as one graph; each network draws its own batches there."""
    current: dict[Trainer, Proxy] = {}  # by what is trained on it

    def start(trainer: Trainer, number: int) -> None:
        current[trainer] = proxy = group[number]
        if not _takes_real(proxy):
            trainer.images.copy_(proxy.images)
            trainer.labels.copy_(proxy.labels)
        trainer.restart(candidate.seed(proxy.seed))

    def test(trainer: Trainer) -> float | None:
        return accuracy(trainer.network, current[trainer].test_images, current[trainer].test_labels)

    started = time.perf_counter()
    options = {"evaluate_every": None, "together": None, "advance": lambda: None}
    jobs = range(len(group))
    with repeatable_convolutions():
        trained = dict(train_networks(lambda: _trainer(candidate, group[0]), jobs, start, test, **options))
    seconds = (time.perf_counter() - started) / len(group)
    for number in jobs:
        [found] = trained[number].values()
        yield _result(found, DIVERGED, seconds)


def _result(found: float | None, reason: str, seconds: float) -> Result:
    outcome = {"accuracy": None, "reason": reason} if found is None else {"accuracy": round(found, 4)}
    return {**outcome, "seconds": round(seconds, 3)}


def _network(candidate: Candidate, image_shape: tuple[int, int, int], classes: int, device: torch.device) -> nn.Module:
    channels, height, width = image_shape
    with torch.device("meta"):
        network = make_network("convnet", channels, classes, (height, width), **dataclasses.asdict(candidate))
    return network if device.type == "meta" else network.to_empty(device=device)


def _trainer(candidate: Candidate, proxy: Proxy) -> Trainer:
    """Make a trainer for a proxy and those alike."""
    images, labels = proxy.images, proxy.labels
    channels, height, width = images.shape[1:]
    network = _network(candidate, (channels, height, width), proxy.classes, images.device)
    layout = memory_format(network, images.device)
    network.to(memory_format=layout)
    if not _takes_real(proxy):
        own = torch.empty(images.shape, device=images.device, memory_format=layout)
        return Trainer(network, own, labels.clone(), proxy.protocol)

    def gather(indices: Tensor) -> Tensor:
        return images.index_select(0, indices).contiguous(memory_format=layout)

    if proxy.name == REFERENCE:
        return Trainer(network, images, labels, proxy.protocol, gather=gather)
    return _Passing(network, images, labels, proxy, gather)


class _Passing(Trainer):
    """Trainer on real images that takes the next ``count`` of them in every epoch, in random order.

    Its steps are as many, and of as many images, as those of a set of ``count`` images.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, proxy: Proxy, gather: Callable):
        self._count, self._all_labels = len(images), labels
        self._rows = torch.zeros(proxy.count, dtype=torch.int64, device=images.device)
        self._queue = self._rows[:0]
        shown = images[:1].expand(proxy.count, -1, -1, -1)  # for its length
        super().__init__(
            network, shown, labels[:1].repeat(proxy.count), proxy.protocol,
            gather=lambda indices: gather(self._rows.index_select(0, indices)),
        )  # fmt: skip

    def restart(self, seed: int) -> None:
        """Draw a new network, and begin a new pass over the images."""
        super().restart(seed)
        self._queue = self._rows[:0]

    def begin_epoch(self, epoch: int) -> Tensor:
        """Take the next images; return their order."""
        while len(self._queue) < len(self._rows):
            order = torch.randperm(self._count, generator=self.generator, device=self._rows.device)
            self._queue = torch.cat([self._queue, order])
        self._rows.copy_(self._queue[: len(self._rows)])
        self._queue = self._queue[len(self._rows) :]
        self.labels.copy_(self._all_labels.index_select(0, self._rows))
        return super().begin_epoch(epoch)
