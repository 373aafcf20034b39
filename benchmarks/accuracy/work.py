"""The work of one cell: make or resume its set, and train the networks that are missing."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation import distill
from atom_fast.distillation.checkpoint import remove_unfinished
from atom_fast.distillation.config import DistillConfig
from atom_fast.evaluation.accuracy import evaluate
from atom_fast.evaluation.sets import select
from atom_fast.synthetic import SYNTHETIC_FILE, SyntheticSet
from benchmarks.accuracy.cells import (
    Cell,
    Evaluation,
    architecture,
    cell_folder,
    claimed,
    evaluation_file,
    open_cell,
    read_evaluation,
    read_note,
)
from benchmarks.accuracy.datasets import load_named
from benchmarks.methods import get_method

RUN_FOLDER = "run"
SET_FOLDER = "sets"
SET_FILE = "set.safetensors"


class DataCache:
    """Data sets and their preprocessing on the computing device, each read and fitted once."""

    def __init__(self, data_dir: str | os.PathLike | None, *, download: bool, device: torch.device, progress: bool):
        self.device = device
        self.progress = progress
        self._source = {"data_dir": data_dir, "download": download, "progress": progress}
        self._data: dict[str, tuple[ImageData, str]] = {}
        self._fitted: dict[tuple[str, str], Preprocessing] = {}

    def data(self, name: str) -> tuple[ImageData, str]:
        """Return a data set and its title; raise as `load_named`."""
        if name not in self._data:
            data, title = load_named(name, **self._source)
            self._data[name] = data.to(self.device), title
        return self._data[name]

    def preprocessing(self, name: str, kind: str) -> Preprocessing:
        """Return the data set's map to model space of that kind."""
        if (name, kind) not in self._fitted:
            images = self.data(name)[0].train_images
            self._fitted[name, kind] = fit_preprocessing(images, kind, progress=self.progress)
        return self._fitted[name, kind]


def finished(output: Path, cell: Cell, evaluations: Sequence[Evaluation]) -> bool:
    """Return True if nothing of a cell is left to do."""
    if not evaluations:
        return final_set_file(output, cell).is_file()
    return all(read_evaluation(output, cell, evaluation) for evaluation in evaluations)


def final_set_file(output: Path, cell: Cell) -> Path:
    """Return the file of a cell's finished set."""
    folder = cell_folder(output, cell)
    if not get_method(cell.method).distils:
        return folder / SET_FILE
    return _set_file(folder, cell.config.iterations)


def work(output: Path, cell: Cell, evaluations: Sequence[Evaluation], cache: DataCache) -> bool:
    """Do what is left of a cell; return False if another process is working on it.

    Raises:
        ValueError: the folder holds another or a damaged cell, or settings do not fit the data.
        OSError, RuntimeError: as `distill`, including `DivergenceError`.
        SystemExit: stopped by a signal while distilling; the run is saved.
    """
    folder = cell_folder(output, cell)
    data, title = cache.data(cell.dataset)
    with claimed(folder) as mine:
        if not mine:
            return False
        for place in (folder, folder / SET_FOLDER):
            remove_unfinished(place)
        open_cell(folder, cell, title, data.fingerprint)
        make_set(folder, cell, cache)
        for evaluation in evaluations:
            if read_evaluation(output, cell, evaluation) is None:
                _evaluate(output, cell, evaluation, cache)
    return True


def make_set(folder: Path, cell: Cell, cache: DataCache) -> None:
    """Write the cell's set, and the sets of its milestones, into its folder."""
    if not get_method(cell.method).distils:
        if not (folder / SET_FILE).is_file():
            _choose(cell, cache).save(folder / SET_FILE)
        return
    data, _ = cache.data(cell.dataset)
    config = cell.config.resolve(data.image_shape, data.name, cache.device)
    space = cache.preprocessing(cell.dataset, config.preprocessing)
    for iterations in sorted({*cell.milestones, config.iterations}):
        if _set_file(folder, iterations).is_file():
            continue
        synthetic = distill(
            config=dataclasses.replace(config, iterations=iterations),
            data=data,
            output=folder / RUN_FOLDER,
            resume=(folder / RUN_FOLDER).exists(),
            progress=cache.progress,
            device=cache.device,
            preprocessing=space,
            how_to_go_on="run the same command again",
        )
        synthetic.save(_set_file(folder, iterations))
        (folder / RUN_FOLDER / SYNTHETIC_FILE).unlink()  # a copy of the same set


def _set_file(folder: Path, iterations: int) -> Path:
    return folder / SET_FOLDER / f"iteration-{iterations:08d}.safetensors"


def _choose(cell: Cell, cache: DataCache) -> SyntheticSet:
    data, _ = cache.data(cell.dataset)
    config = cell.config.resolve(data.image_shape, data.name, cache.device)
    space = cache.preprocessing(cell.dataset, config.preprocessing)
    options = {"preprocessing": space, "seed": cell.seed, "progress": cache.progress, "device": cache.device}
    options["partition"] = cell.partition
    if cell.selection_protocol:
        options |= {"protocol": cell.selection_protocol, "epochs": cell.selection_epochs}
    started = time.monotonic()
    chosen = select(data, cell.method, max(cell.ipc, 1), **options)
    chosen.metadata["seconds"] = time.monotonic() - started
    return chosen


def load_set(folder: Path, cell: Cell, iteration: int | None = None) -> SyntheticSet:
    """Load a set of a cell: the finished one, or that of a milestone.

    Raises:
        FileNotFoundError, ValueError: it is missing, damaged, or another cell's; the message says how to repeat it.
    """
    iterations = cell.config.iterations if iteration is None else iteration
    path = _set_file(folder, iterations) if get_method(cell.method).distils else folder / SET_FILE
    try:
        synthetic = SyntheticSet.load(path)
        if not _is_of(synthetic, cell, iterations, read_note(folder)["fingerprint"]):
            raise ValueError(f"{path} was made with other settings, another seed or other images than its folder says")
    except ValueError as error:
        raise ValueError(f"{error}; remove {folder} to run the cell again") from error
    return synthetic


def _is_of(synthetic: SyntheticSet, cell: Cell, iterations: int, fingerprint: str) -> bool:
    """Return True if a set is what a cell makes of the data with that fingerprint in so many iterations."""
    about = synthetic.metadata
    if about.get("dataset_fingerprint") != fingerprint:
        return False
    if not get_method(cell.method).distils:
        chosen = (about.get("method"), about.get("selection", {}).get("seed"), synthetic.ipc, synthetic.partition)
        return chosen == (cell.method, cell.seed, cell.ipc or synthetic.ipc, cell.partition)
    made = DistillConfig.from_dict(about.get("config", {}))
    wanted = dataclasses.replace(cell.resolved_config, iterations=iterations)
    if wanted.precision == "auto":  # the device's
        wanted = dataclasses.replace(wanted, precision=made.precision)
    return made.config_hash() == wanted.config_hash()


def _evaluate(output: Path, cell: Cell, evaluation: Evaluation, cache: DataCache) -> None:
    """Train the networks that are missing; `evaluate` keeps the results of each as it finishes."""
    synthetic = load_set(cell_folder(output, cell), cell, evaluation.iteration).to(cache.device)
    data, _ = cache.data(cell.dataset)
    evaluate(
        synthetic,
        data,
        network=evaluation.network,
        architecture=architecture(cell, evaluation.network, evaluation.norm),
        networks=evaluation.networks,
        protocol=evaluation.protocol,
        seed=cell.seed,
        device=cache.device,
        progress=cache.progress,
        record=evaluation_file(output, cell, evaluation),
    )
