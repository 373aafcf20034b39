"""What candidates are trained on: small sets, real images for as many steps, and the whole data."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.logs import log
from atom_fast.evaluation.sets import read_set
from atom_fast.foreign.files import is_foreign
from atom_fast.names import first_few, suggestion
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import in_model_space
from benchmarks.accuracy.cells import Cell, cell_folder
from benchmarks.accuracy.size import RunSize
from benchmarks.accuracy.work import DataCache, load_set, work
from benchmarks.methods import MAKES_SETS, METHODS

EARLY, REFERENCE = "early", "reference"
TITLES = {EARLY: "early stopping", REFERENCE: "whole data"}
MADE = ("random", "herding", "k-center", "forgetting", "dm", "dam", "atom-channel", "atom")  # made here, if asked for
_SECONDS_TO_WAIT = 2  # for a set that another process makes


@dataclasses.dataclass(frozen=True)
class Proxy:
    """Images that candidates are trained on, and those that they are tested on, on the device that trains.

    Attributes:
        name: of `MADE`, ``"early"``, ``"reference"``, or the name of a given file.
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


def check_names(names: Sequence[str]) -> dict[str, Path | None]:
    """Return proxies by name, with the file of each that is given as ``NAME=FILE``; None for one that is made here.

    Raises:
        ValueError: an unknown name, or one given twice.
        FileNotFoundError: there is no such file or folder.
    """
    found: dict[str, Path | None] = {}
    for text in names:
        name, given, file = text.partition("=")
        name = name.strip()
        if name in found:
            raise ValueError(f"proxy {name!r} is given twice")
        if given:
            if name in (*MADE, EARLY, REFERENCE) or not name.replace("-", "").isalnum():
                raise ValueError(
                    f"the name of a file's proxy must be of letters, digits and hyphens, and none of "
                    f"{', '.join((*MADE, EARLY, REFERENCE))}; got {name!r}"
                )
            if not Path(file).exists():
                raise FileNotFoundError(f"no set at {file} for the proxy {name!r}")
        elif name not in (*MADE, EARLY):
            raise ValueError(
                f"a proxy must be one of {', '.join((*MADE, EARLY))}, or NAME=FILE; got {name!r}"
                f"{suggestion(name, (*MADE, EARLY))}"
            )
        found[name] = Path(file) if given else None
    return found


def title(name: str) -> str:
    """Return the name of a proxy in tables."""
    return METHODS[name].title if name in METHODS else TITLES.get(name, name)


def make_proxies(
    names: dict[str, Path | None],
    dataset: str,
    ipc: int,
    seeds: int,
    size: RunSize,
    protocol: Protocol,
    reference: Protocol | None,
    output: Path,
    cache: DataCache,
) -> Iterator[Proxy]:
    """Make or read every set, and yield the proxies, those of the first seed first.

    Args:
        names: from `check_names`.
        dataset, ipc: the data, and the stored images per class of sets that are made here and of early stopping.
        seeds: number of seeds: of sets that are made here, and of networks.
        size: settings of sets that are made here.
        protocol: training on a proxy.
        reference: training on the whole data; None leaves it out. It is done for the first seed alone.
        output: folder of the cells of sets.
        cache: the data on the device that trains.

    Raises:
        ValueError: a set does not fit the data, or a setting is not accepted.
        OSError, RuntimeError: as `distill`.
    """
    data, _ = cache.data(dataset)
    spaces = _Spaces(data, cache)
    given = {name: _read(file, data, cache) for name, file in names.items() if file is not None}
    usual = _cell("random", dataset, ipc, 0, size).resolved_config.preprocessing
    for seed in range(seeds):
        if seed == 0 and reference is not None:
            yield spaces.real(REFERENCE, seed, usual, reference, len(data.train_images))
        for name in names:
            if name == EARLY:
                yield spaces.real(EARLY, seed, usual, protocol, ipc * data.num_classes)
            else:
                yield spaces.of_set(
                    name, seed, given.get(name) or _made(name, dataset, ipc, seed, size, output, cache), protocol
                )


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


def _cell(name: str, dataset: str, ipc: int, seed: int, size: RunSize) -> Cell:
    watches = {"selection_epochs": size.selection_epochs, "selection_protocol": size.protocol}
    own = watches if name in ("herding", "k-center", "forgetting") else {}
    return Cell(dataset, ipc, name, seed, tuple(sorted(size.settings.items())), **own)


def _made(name: str, dataset: str, ipc: int, seed: int, size: RunSize, output: Path, cache: DataCache) -> SyntheticSet:
    """Make a set, or take the one that was made before."""
    assert name in MAKES_SETS
    cell = _cell(name, dataset, ipc, seed, size)
    while not work(output, cell, (), cache):
        log(f"another process makes the set {cell.folder_name}; waiting for it")
        time.sleep(_SECONDS_TO_WAIT)
    return load_set(cell_folder(output, cell), cell)


def _read(file: Path, data: ImageData, cache: DataCache) -> SyntheticSet:
    """Read a set of any kind, and check that it is for the data.

    Raises:
        ValueError: it is not.
    """
    if file.is_dir() and not (file / "synthetic.safetensors").is_file() or file.is_file() and is_foreign(file):
        found = read_set(file, data, device=cache.device, progress=cache.progress)
    else:
        found = SyntheticSet.load(file / "synthetic.safetensors" if file.is_dir() else file)
    if found.class_names != data.class_names or tuple(found.sheets.shape[1:]) != data.image_shape:
        raise ValueError(
            f"{file} holds images {list(found.sheets.shape[1:])} of the classes {first_few(found.class_names)}; "
            f"{data.name} has {list(data.image_shape)} of {first_few(data.class_names)}"
        )
    return found
