"""What candidates are trained on: small sets, real images for as many steps, and the whole data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.logs import log
from atom_fast.evaluation.sets import read_set
from atom_fast.foreign.files import is_foreign
from atom_fast.names import SYNTHETIC_FILE, first_few
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import in_model_space
from benchmarks.accuracy.cells import Cell, cell_folder
from benchmarks.accuracy.work import DataCache, load_set, work
from benchmarks.search.plan import EARLY, REFERENCE, Search

_SECONDS_TO_WAIT = 2  # for a set that another process makes


@dataclasses.dataclass(frozen=True, eq=False)
class Proxy:
    """Images that candidates are trained on, and those that they are tested on, on the device that trains.

    Attributes:
        name: of `benchmarks.search.plan.MADE`, ``"early"``, ``"reference"``, or the name of a given file.
        seed: of the set and of the networks.
        images: float32 [N, C, H, W], contiguous, in model space.
        labels: int64 [N], or probabilities, float32 [N, K].
        test_images, test_labels: the test set in the same space, float32 and int64.
        protocol: how candidates are trained.
        count: images per epoch. Fewer than ``images`` for early stopping, which takes others in every epoch.
        stored: images to store.
        classes: number of classes K.
        digest: hash of all that a candidate's result depends on beside its name and the seed.
    """

    name: str
    seed: int
    images: Tensor
    labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    protocol: Protocol
    count: int
    stored: int
    classes: int
    digest: str

    @property
    def key(self) -> str:
        """Name of the training in a candidate's file."""
        return f"{self.name}-seed{self.seed}-{self.digest}"


def make_proxies(search: Search, output: Path, cache: DataCache) -> Iterator[Proxy]:
    """Make or read every set, and yield the proxies of a search, those of the first seed first.

    The whole data is trained on for the first seed alone.

    Args:
        search: what to search.
        output: folder of the cells of sets.
        cache: the data on the device that trains.

    Raises:
        ValueError: a set does not fit the data, or a setting is not accepted.
        OSError, RuntimeError: as `distill`.
    """
    data, _ = cache.data(search.dataset)
    spaces = _Spaces(data, cache)
    given = {name: _read(file, data, cache) for name, file in search.proxies.items() if file is not None}
    usual = _cell("random", 0, search).resolved_config.preprocessing
    for seed in range(search.seeds):
        if seed == 0 and search.reference is not None:
            yield spaces.real(REFERENCE, seed, usual, search.reference, len(data.train_images))
        for name in search.proxies:
            if name == EARLY:
                yield spaces.real(EARLY, seed, usual, search.protocol, search.ipc * data.num_classes)
            else:
                synthetic = given.get(name) or _made(name, seed, search, output, cache)
                yield spaces.of_set(name, seed, synthetic, search.protocol)


class _Spaces:
    """The test set, and the training set, in every model space that a proxy is in; each brought there once."""

    def __init__(self, data: ImageData, cache: DataCache):
        self._data, self._cache = data, cache
        self._mapped: dict[tuple, Tensor] = {}

    def of_set(self, name: str, seed: int, synthetic: SyntheticSet, protocol: Protocol) -> Proxy:
        """Return a set as a proxy."""
        device, space = self._cache.device, synthetic.preprocessing
        known = hashlib.sha256(b"".join(part.cpu().numpy().tobytes() for part in space.tensors().values())).hexdigest()
        return self._proxy(
            name, seed, synthetic.images.to(device).contiguous(), synthetic.targets.to(device), space, known, protocol,
            count=len(synthetic), stored=len(synthetic.sheets), content=synthetic.fingerprint,
        )  # fmt: skip

    def real(self, name: str, seed: int, kind: str, protocol: Protocol, count: int) -> Proxy:
        """Return the whole data as a proxy that takes ``count`` images per epoch."""
        space = self._cache.preprocessing(self._data.name, kind)
        images = self._in(space, kind, protocol, self._data.train_images, "train")
        return self._proxy(
            name, seed, images, self._data.train_labels, space, kind, protocol,
            count=count, stored=len(images), content=f"{kind} {count}", scaled=True,
        )  # fmt: skip

    def _proxy(self, name, seed, images, labels, space, known, protocol, *, count, stored, content, scaled=False):
        tested = self._in(space, known, protocol, self._data.test_images, "test")
        about = {"data": self._data.fingerprint, "content": content, "protocol": protocol.to_dict()}
        return Proxy(
            name, seed, images if scaled else images * _scale(space, protocol), labels, tested, self._data.test_labels,
            protocol, count, stored, self._data.num_classes,
            hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:8],
        )  # fmt: skip

    def _in(self, space: Preprocessing, known: str, protocol: Protocol, pixels: Tensor, split: str) -> Tensor:
        key = known, protocol.unit_variance, split
        if key not in self._mapped:
            mapped = in_model_space(pixels, space, self._cache.device, torch.contiguous_format)
            self._mapped[key] = mapped.mul_(_scale(space, protocol))
        return self._mapped[key]


def _scale(space: Preprocessing, protocol: Protocol) -> float:
    return 1 / space.deviation if protocol.unit_variance else 1.0


def _cell(name: str, seed: int, search: Search) -> Cell:
    size = search.size
    watches = {"selection_epochs": size.selection_epochs, "selection_protocol": size.protocol}
    own = watches if name in ("herding", "k-center", "forgetting") else {}
    return Cell(search.dataset, search.ipc, name, seed, tuple(sorted(size.settings.items())), **own)


def _made(name: str, seed: int, search: Search, output: Path, cache: DataCache) -> SyntheticSet:
    """Make a set, or take the one that was made before."""
    cell = _cell(name, seed, search)
    while not work(output, cell, (), cache):
        log(f"another process makes the set {cell.folder_name}; waiting for it")
        time.sleep(_SECONDS_TO_WAIT)
    return load_set(cell_folder(output, cell), cell)


def _read(file: Path, data: ImageData, cache: DataCache) -> SyntheticSet:
    """Read a set of any kind, and check that it is for the data.

    Raises:
        ValueError: it is not.
    """
    if file.is_dir() and (file / SYNTHETIC_FILE).is_file():
        file = file / SYNTHETIC_FILE
    if file.is_dir() or is_foreign(file):
        found = read_set(file, data, device=cache.device, progress=cache.progress)
    else:
        found = SyntheticSet.load(file)
    if found.class_names != data.class_names or tuple(found.sheets.shape[1:]) != data.image_shape:
        raise ValueError(
            f"{file} holds images {list(found.sheets.shape[1:])} of the classes {first_few(found.class_names)}; "
            f"{data.name} has {list(data.image_shape)} of {first_few(data.class_names)}"
        )
    return found
