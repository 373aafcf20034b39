"""What fits into a time: each cell estimated from others like it that are finished, or from a few steps of its own."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation
from atom_fast.evaluation import evaluate, get_protocol, random_selection
from benchmarks.accuracy.cells import Cell, Evaluation, architecture, networks_left, read_evaluation
from benchmarks.accuracy.methods import get_method
from benchmarks.accuracy.work import Shelf, final_set_file, iterations_done

_PROBE_SECONDS = 1.0
_PROBE_STEPS = 3
_PROBE_EPOCHS = 5_000  # beyond which an epoch takes no time worth estimating
_SECONDS_TO_CHOOSE_RANDOMLY = 1.0

Unit = tuple[Cell, tuple[Evaluation, ...]]


class Estimator:
    """Seconds that units take: as measured on a set of the same kind, otherwise on a short probe.

    Not in it: reading the data and fitting the whitening, once a process, and choosing images to start from.
    """

    def __init__(self, output: Path, units: Sequence[Unit], shelf: Shelf):
        self.shelf = shelf
        self._output = output
        self._units = units
        self._probed: dict[object, float] = {}

    def seconds(self, unit: Unit) -> float:
        """What is left to do of a unit: iterations after the newest checkpoint, and networks without a result."""
        cell, evaluations = unit
        total = 0.0
        if not final_set_file(self._output, cell).is_file():
            total += self._set_seconds(cell) * (1 - iterations_done(self._output, cell) / cell.config.iterations)
        for evaluation in evaluations:
            if left := networks_left(self._output, cell, evaluation):
                total += self._evaluation_seconds(cell, evaluation) * left / evaluation.networks
        return total

    def _set_seconds(self, cell: Cell) -> float:
        """All of a set; a milestone's seconds are those of a part."""
        for other, evaluations in self._units:
            if _kind(other) == _kind(cell):
                for evaluation in evaluations:
                    if (found := read_evaluation(self._output, other, evaluation)) and found["set_seconds"]:
                        iterations = cell.config.iterations
                        return found["set_seconds"] * iterations / (evaluation.iteration or iterations)
        key = "set", _kind(cell)
        if key not in self._probed:
            self._probed[key] = self._probe_set(cell)
        return self._probed[key]

    def _evaluation_seconds(self, cell: Cell, evaluation: Evaluation) -> float:
        settings = architecture(cell, evaluation.network, evaluation.norm)
        for other, evaluations in self._units:
            if (other.dataset, other.ipc) == (cell.dataset, cell.ipc) and evaluation in evaluations:
                if architecture(other, evaluation.network, evaluation.norm) != settings:
                    continue
                if found := read_evaluation(self._output, other, evaluation):
                    return found["seconds"]
        iteration_free = dataclasses.replace(evaluation, iteration=None)
        key = cell.dataset, cell.ipc, str(settings), iteration_free
        if key not in self._probed:
            self._probed[key] = self._probe_evaluation(cell, evaluation)
        return self._probed[key]

    def _probe_set(self, cell: Cell) -> float:
        if get_method(cell.method).distils:
            return cell.config.iterations * self._probe_step(cell)
        if cell.method in ("random", "full"):
            return _SECONDS_TO_CHOOSE_RANDOMLY
        data, _ = self.shelf.data(cell.dataset)
        per_image = self._probe_epoch(cell, "convnet", None, min(256, len(data.train_images)))
        return cell.selection_epochs * per_image * len(data.train_images)

    def _probe_step(self, cell: Cell) -> float:
        """Seconds of a step, which depend little on whitening and start: those take long to fit and to choose."""
        data, _ = self.shelf.data(cell.dataset)
        config = dataclasses.replace(cell.config, preprocessing="standard", image_init="noise")
        config = config.resolve(data.image_shape, data.name, self.shelf.device)
        space = fit_preprocessing(data.train_images, "standard", progress=False)
        run = Distillation(config, data, space, initial_images(config, data, space))
        if config.cuda_graph and self.shelf.device.type == "cuda":
            run.capture()
        run.step(1)
        run.read_terms()
        steps, started = 0, time.monotonic()
        while steps < _PROBE_STEPS or time.monotonic() - started < _PROBE_SECONDS:
            steps += 1
            run.step(1 + steps)
        run.read_terms()  # waits for the device
        return (time.monotonic() - started) / steps

    def _probe_epoch(self, cell: Cell, network: str, norm: str | None, count: int, networks: int = 1) -> float:
        """Seconds of training a network on an image once, in batches; without tests."""

        def seconds(epochs: int) -> float:
            return self._time_training(cell, network, norm, count, epochs, test=False, networks=networks)

        seconds(1)  # what only a first call needs: compiled kernels, chosen algorithms
        one = seconds(1)  # mostly what every call needs, on a GPU: networks that are made, steps that are captured
        epochs = max(2, min(50, round(_PROBE_SECONDS / max(one, 1e-3))))
        while (several := seconds(epochs)) < 2 * one and epochs < _PROBE_EPOCHS:
            epochs *= 4
        return max(several - one, several / 10) / (epochs - 1) / count / networks  # the clock may have been off

    def _probe_evaluation(self, cell: Cell, evaluation: Evaluation) -> float:
        data, _ = self.shelf.data(cell.dataset)
        images = cell.ipc * data.num_classes or len(data.train_images)
        count = min(images, evaluation.protocol.batch_size, len(data.train_images))
        network, norm = evaluation.network, evaluation.norm
        together = evaluation.networks if self.shelf.device.type == "cuda" else 1
        step = self._probe_epoch(cell, network, norm, count, together) * count
        test = max(0.0, self._time_training(cell, network, norm, count, 1, test=True) - step)
        epochs = evaluation.protocol.epochs * math.ceil(images / count)
        return evaluation.networks * (epochs * step + test)

    def _time_training(
        self, cell: Cell, network: str, norm: str | None, count: int, epochs: int, *, test: bool, networks: int = 1
    ) -> float:
        """Seconds of epochs of ``count`` images, with a test on all test images or on hardly any."""
        data, _ = self.shelf.data(cell.dataset)
        if not test:
            data = dataclasses.replace(data, test_images=data.test_images[:1], test_labels=data.test_labels[:1])
        space = fit_preprocessing(data.train_images, "standard", progress=False)
        ipc = max(1, count // data.num_classes)
        chosen = random_selection(data, min(ipc, min(data.class_sizes)), 0)[:count]
        chosen = chosen.repeat(math.ceil(count / len(chosen)))[:count]
        images, labels = space.to_model(data.train_images[chosen]), data.train_labels[chosen]
        protocol = get_protocol("paper", epochs=epochs, batch_size=count)
        return evaluate(
            images, labels, data, space, protocol=protocol, networks=networks, network=network,
            architecture=architecture(cell, network, norm), device=self.shelf.device, progress=False,
        ).seconds  # fmt: skip


def _kind(cell: Cell) -> Cell:
    """What sets that take equally long have in common."""
    return dataclasses.replace(cell, seed=0)


def choose(units: Sequence[Unit], seconds: Sequence[float], minutes: float) -> tuple[list[Unit], list[Unit]]:
    """The units that fit into a time, in order, and those that are left; one too long does not keep out the next."""
    fitting, left, used = [], [], 0.0
    for unit, needed in zip(units, seconds, strict=True):
        if used + needed <= 60 * minutes:
            used += needed
            fitting.append(unit)
        else:
            left.append(unit)
    return fitting, left


def common_settings(units: Sequence[Unit]) -> set:
    """Settings that all cells share: the scale's, which need not be said with each."""
    return set.intersection(*(set(cell.settings) for cell, _ in units)) if units else set()


def describe(unit: Unit, common: Collection = ()) -> str:
    """A unit in a line, but for settings that are ``common``."""
    cell, evaluations = unit
    changed = {name: value for name, value in cell.settings if (name, value) not in common}
    networks = ", ".join(
        f"{evaluation.networks} {evaluation.network}"
        + (f" with norm {evaluation.norm}" if evaluation.norm is not None else "")
        + (f" at {evaluation.iteration}" if evaluation.iteration is not None else "")
        + (f" by {evaluation.protocol.name}" if len({e.protocol for e in evaluations}) > 1 else "")
        for evaluation in evaluations
    )
    size = f"ipc {cell.ipc}" if cell.ipc else "all images"
    settings = " ".join(f"{name}={value}" for name, value in changed.items())
    return f"{cell.dataset} {size} {cell.method} seed {cell.seed} [{networks}] {settings}".rstrip()


def duration(seconds: float) -> str:
    """Seconds as a person would say them."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
