"""What a report says, as plain data: read from the folders of runs, measured where it is not on record."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import re
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

import atom_fast
from atom_fast.data.dataset import ImageData
from atom_fast.data.sources import load_data
from atom_fast.distillation.config import read_settings
from atom_fast.evaluation.results import LARGEST_CONFUSION, read_records
from atom_fast.foreign.files import is_foreign, named_dataset
from atom_fast.names import CONFIG_FILE, ENVIRONMENT_FILE, LOG_FILE, SOURCES
from atom_fast.pictures import count_images, describe, loss_curves, method_name, read_log
from atom_fast.report import charts
from atom_fast.report.accuracies import Accuracy, Classes, class_accuracies, measured
from atom_fast.report.gallery import Gallery, make_gallery
from atom_fast.report.measure import Measures, coreset_name, read_coreset, train_missing
from atom_fast.report.places import CELL_FILE, Place, find_places
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import check_count

_PICTURES = 3_000_000  # bytes of all pictures of a page: with everything else it stays below 5 MB
# Errors of one run that the others need not have: it is damaged, its data are not there, its networks do not fit.
_OF_ONE_RUN = (ValueError, OSError, RuntimeError, ImportError)

Facts = list[tuple[str, str]]


@dataclasses.dataclass
class Run:
    """What a page says of one run, or of a set alone.

    Attributes:
        name: its heading.
        problem: why there is no set; empty if there is one.
        left_out: parts that are missing, each with the reason.
        title: data set, size, method and iterations, in a line.
        facts, hashes, settings, versions: names and values.
        command: that started the run, as a shell takes it; empty if nothing says it.
        gallery: the images; None if they cannot be shown.
        accuracies: of networks trained on the set and on what it is compared with.
        dots: a chart of them.
        class_names: of the set.
        classes: accuracy by class, and confusions.
        losses: a chart of the loss.
        dataset, size, method, seconds: for the overview, as text.
    """

    name: str
    problem: str = ""
    left_out: list[str] = dataclasses.field(default_factory=list)
    title: str = ""
    facts: Facts = dataclasses.field(default_factory=list)
    hashes: Facts = dataclasses.field(default_factory=list)
    settings: Facts = dataclasses.field(default_factory=list)
    versions: Facts = dataclasses.field(default_factory=list)
    command: str = ""
    gallery: Gallery | None = None
    accuracies: list[Accuracy] = dataclasses.field(default_factory=list)
    dots: charts.Dots | None = None
    class_names: tuple[str, ...] = ()
    classes: Classes | None = None
    losses: charts.Lines | None = None
    dataset: str = ""
    size: str = ""
    method: str = ""
    seconds: str = ""

    def accuracy_of(self, kind: str) -> Accuracy | None:
        """Return the first accuracy of a kind: "set", "random" or "coreset"."""
        return next((accuracy for accuracy in self.accuracies if accuracy.kind == kind), None)


@dataclasses.dataclass
class Report:
    """What a page says.

    Attributes:
        title: its heading.
        collection: True if it is about a folder of runs or a benchmark, and begins with an overview.
        runs: of which it tells.
        version: of this package.
    """

    title: str
    collection: bool
    runs: list[Run]
    version: str = atom_fast.__version__


def gather(
    source: str | os.PathLike,
    *,
    data: ImageData | None = None,
    dataset: str | None = None,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    networks: int = 3,
    protocol: str | None = None,
    epochs: int | None = None,
    train: bool = True,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> Report:
    """Gather what a report says, and train the networks that are not on record.

    What is damaged or missing in a run is left out and named, and costs neither the rest of the run nor the others.

    Args:
        source: a run's folder, a set's file, a folder of runs and sets, or the output folder of a benchmark, for whose
            cells nothing is trained.
        data: real images of every run; None loads each set's own data set.
        dataset: name of the data set to load; None: the one that a set names.
        data_dir, download: location of the data, see `atom_fast.load_data`.
        networks: to train on a set, on random real images and on a coreset, each.
        protocol: name of how they are trained; None: the data set's.
        epochs: passes over a set; None: the protocol's.
        train: False: nothing is trained; the report says what is not on record.
        device: where to compute; None: the GPU, if there is one.
        progress: show progress bars on standard error.

    Raises:
        FileNotFoundError: ``source`` holds no run.
        ValueError: an unknown protocol or data set, or a number that is not accepted.
    """
    source = Path(source)
    check_count("networks", networks)
    where = (*(("--dataset", dataset) if dataset else ()), *(("--data-dir", str(data_dir)) if data_dir else ()))
    measures = Measures(networks, protocol, epochs, train, device, progress, where)
    measures.protocol_for(dataset or "")
    if dataset is not None and dataset not in SOURCES:
        raise ValueError(f"data set must be one of {', '.join(SOURCES)}; got {dataset!r}")
    places, collection = find_places(source)
    load = functools.cache(functools.partial(load_data, data_dir=data_dir, download=download, progress=progress))

    def data_for(name: str | None, side: int | None) -> ImageData:
        if data is not None:
            return data
        wanted = dataset or name
        if wanted == "digits32":  # a benchmark's name for enlarged digits
            wanted = "digits"
        if wanted not in SOURCES:
            said = f"names the data set {wanted!r}" if wanted else "names no data set"
            raise ValueError(f"the set {said}: give --dataset, one of {', '.join(SOURCES)}")
        return load(wanted, resolution=side)

    groups = _groups(places)
    room = _PICTURES // len(groups)
    runs = [_run(group, data_for, measures, room) for group in groups]
    _compare_cells(groups, runs)
    _shorten_names(groups, runs)
    return Report(title=source.resolve().name, collection=collection, runs=runs)


def _groups(places: Sequence[Place]) -> list[list[Place]]:
    """Put cells together that differ in nothing but their seed; every other run stands alone."""
    groups: dict[str, list[Place]] = {}
    for place in places:
        key = place.name
        if place.cell:
            with contextlib.suppress(*_OF_ONE_RUN):  # said where the cell is read
                cell = _cell_of(place)
                key = json.dumps([value for name, value in sorted(cell.items()) if name not in ("seed", "config_hash")])
        groups.setdefault(f"{place.cell} {key}", []).append(place)
    return list(groups.values())


def _cell_of(place: Place) -> Mapping[str, Any]:
    """The identity of a cell in its note.

    Raises:
        ValueError: the note is missing or damaged.
    """
    path = place.source / CELL_FILE
    if not path.is_file():
        raise ValueError(f"{CELL_FILE} is missing")
    found = _json(path)
    cell = found.get("cell") if isinstance(found, dict) else None
    if not isinstance(cell, dict) or not {"dataset", "ipc", "method", "seed"} <= set(cell):
        raise ValueError(f"{CELL_FILE} is not the note of a benchmark's cell")
    return cell


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path.name} is damaged ({error})") from error


def _run(group: Sequence[Place], data_for, measures: Measures, room: int) -> Run:
    """Gather what is said of a run; of cells that differ in their seed, of the first that has a set."""
    place = next((one for one in group if one.set_file), group[0])
    run = Run(place.name)
    if place.folder is not None:
        _add_log(run, place.folder)
        _add_environment(run, place.folder)
    try:
        if place.cell:
            cell = _cell_of(place)
            run.dataset, run.method, run.size = str(cell["dataset"]), str(cell["method"]), str(cell["ipc"] or "all")
        if place.set_file is None:
            raise ValueError(_progress(place))
        synthetic, data, reason = _open(place.set_file, data_for)
    except _OF_ONE_RUN as error:
        run.problem = str(error)
        if place.folder is not None:
            _add_settings(run, place.folder)
        return run
    chosen = "selection" in synthetic.metadata
    if data is None and not chosen:
        run.left_out.append(f"nearest real images: {reason}")
    _add_facts(run, place, synthetic, data)
    try:
        run.gallery = make_gallery(synthetic, None if chosen else data, room, progress=measures.progress)
    except _OF_ONE_RUN as error:
        run.left_out.append(f"pictures: {error}")
    if place.cell:
        _add_cells(run, group)
    else:
        _add_accuracies(run, place, synthetic, data, reason, measures)
    return run


def _progress(place: Place) -> str:
    """How far an unfinished run has come."""
    if place.folder is None:
        return "unfinished: there is no set in it"
    how = "run the same benchmark again" if place.cell else "run its command with --resume"
    try:
        done = max((record.get("iteration", 0) for record in read_log(place.folder / LOG_FILE)), default=0)
        wanted = read_settings(place.folder / CONFIG_FILE).get("iterations")
        return f"unfinished: {done} of {wanted} iterations are logged, and there is no set yet; to continue, {how}"
    except (*_OF_ONE_RUN, TypeError):
        return "unfinished: there is no set in it"


def _open(file: Path, data_for) -> tuple[SyntheticSet, ImageData | None, str]:
    """A set, and its real images, or else why they are not at hand.

    Raises:
        ValueError, OSError: the set cannot be read.
    """
    foreign = is_foreign(file)
    synthetic = None if foreign else SyntheticSet.load(file)
    name = named_dataset(file) if synthetic is None else synthetic.metadata.get("dataset")
    side = None
    if synthetic is not None and synthetic.sheets.shape[2] == synthetic.sheets.shape[3]:
        side = synthetic.sheets.shape[2]
    try:
        data = data_for(name, side)
    except _OF_ONE_RUN as error:
        return synthetic or SyntheticSet.load(file), None, str(error)
    synthetic = synthetic or SyntheticSet.load(file, data)
    if synthetic.class_names != data.class_names or tuple(synthetic.sheets.shape[1:]) != data.image_shape:
        shapes = f"{list(synthetic.sheets.shape[1:])} and {list(data.image_shape)}"
        return synthetic, None, f"{data.name} has other classes or images than the set (images of {shapes})"
    return synthetic, data, ""


def _add_facts(run: Run, place: Place, synthetic: SyntheticSet, data: ImageData | None) -> None:
    metadata, file = synthetic.metadata, place.set_file
    assert file is not None
    config = metadata.get("config", {})
    run.title, run.class_names = describe(synthetic), synthetic.class_names
    run.dataset = run.dataset or str(metadata.get("dataset") or "")
    run.method = run.method or str(metadata.get("method") or method_name(config))
    size = f"{synthetic.ipc}" if synthetic.ipc else f"{len(synthetic.sheets)} in all"
    run.size = size + (f" sheets of {synthetic.partition**2} images" if synthetic.partition > 1 else "")
    seconds = metadata.get("seconds")
    run.seconds = "" if seconds is None else f"{seconds:.1f}"
    shape = " x ".join(map(str, synthetic.sheets.shape[2:]))
    colours = {1: "grey", 3: "RGB"}.get(synthetic.sheets.shape[1], f"{synthetic.sheets.shape[1]} channels")
    run.facts[:0] = [
        ("data set", run.dataset or "not named in the file"),
        ("images", f"{count_images(synthetic)} of {len(synthetic.class_names)} classes, {shape}, {colours}"),
        ("method", run.method),
        ("model space", synthetic.preprocessing.kind),
        *([("labels", "soft: probabilities of the classes")] if synthetic.soft_labels is not None else []),
        *([("distillation", f"{run.seconds} s")] if run.seconds else []),
    ]
    for name in ("selection", "recognised", "source"):
        if name in metadata:
            run.facts += _flat(name, metadata[name])
    made_from = metadata.get("dataset_fingerprint")
    run.hashes += [
        (f"sha256 of {file.name}", hashlib.sha256(file.read_bytes()).hexdigest()),
        ("configuration", str(metadata.get("config_hash") or "none recorded")),
        ("data fingerprint", str(made_from or "none recorded")),
    ]
    if data is not None and made_from is not None and made_from != data.fingerprint:
        run.hashes.append(("fingerprint of the data at hand", data.fingerprint))
        run.left_out.append("certainty: the real images at hand are not the ones that the set was made from")
    run.settings = [(name, _text(value)) for name, value in config.items()]
    if not run.versions and isinstance(metadata.get("versions"), dict):
        run.versions = [(str(name), str(version)) for name, version in metadata["versions"].items()]
    if not config and not run.versions:
        run.left_out.append("settings, command and versions: the file does not hold them")


def _flat(name: str, value: object) -> Facts:
    """Names and values of metadata, without lists of positions."""
    if isinstance(value, dict):
        return [fact for key, inner in value.items() for fact in _flat(str(key), inner)]
    return [] if isinstance(value, list) else [(name, _text(value))]


def _text(value: object) -> str:
    return "none" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _add_log(run: Run, folder: Path) -> None:
    try:
        run.losses = charts.lines(loss_curves(read_log(folder / LOG_FILE)))
        if run.losses is None:
            run.left_out.append(f"loss curves: {LOG_FILE} contains no losses")
    except _OF_ONE_RUN as error:
        run.left_out.append(f"loss curves: {error}")


def _add_environment(run: Run, folder: Path) -> None:
    """Add the command, versions and device of the last start."""
    path = folder / ENVIRONMENT_FILE
    try:
        starts = _json(path)
        start = dict(starts[-1])
        run.command = shlex.join(map(str, start["command"]))
        versions = dict(start["versions"])
        run.versions = [(str(name), str(version)) for name, version in versions.items()]
    except (*_OF_ONE_RUN, TypeError, LookupError, AttributeError) as error:
        known = isinstance(error, (ValueError, OSError)) and str(error)
        run.left_out.append(f"command, versions and device: {known or f'{path.name} is damaged'}")
        return
    facts = [("started", start.get("started")), ("device", start.get("device")), ("commit", start.get("commit"))]
    run.facts += [(name, str(value)) for name, value in facts if value]
    if len(starts) > 1:
        run.facts.append(("starts", f"{len(starts)}: the run was resumed; command and device are the last start's"))


def _add_settings(run: Run, folder: Path) -> None:
    """Add the settings of a run without a set."""
    try:
        settings = read_settings(folder / CONFIG_FILE)
    except _OF_ONE_RUN as error:
        run.left_out.append(f"settings: {error}")
        return
    run.settings = [(name, _text(value)) for name, value in settings.items()]
    run.size = run.size or str(settings.get("ipc", ""))


def _add_accuracies(
    run: Run, place: Place, synthetic: SyntheticSet, data: ImageData | None, reason: str, measures: Measures
) -> None:
    """Train what is not on record, and read the record."""
    [record], coreset_file = place.records, place.coreset_file
    assert coreset_file is not None
    if data is not None and measures.train:
        run.left_out += train_missing(synthetic, data, record, coreset_file, measures)
    try:
        records = read_records(record)
        coreset = read_coreset(coreset_file, synthetic)
    except _OF_ONE_RUN as error:
        run.left_out.append(f"accuracies: {error}")
        return
    others, own, beside = 0, synthetic.fingerprint, coreset and coreset.fingerprint
    for found in records:
        if found.get("set_fingerprint") == own:
            name = "this set, on other images than its own" if found.get("same_data") is False else "this set"
            run.accuracies.append(measured("set", name, [found]))
        elif coreset is not None and found.get("set_fingerprint") == beside:
            run.accuracies.append(measured("coreset", coreset_name(coreset), [found]))
        elif found.get("method") == "random" and _same_size(found, synthetic, data):
            run.accuracies.append(measured("random", "random real images", [found]))
        else:
            others += 1
    if others:
        run.left_out.append(f"records in {record.name} that are of another set: {others}")
    dataset = data.name if data is not None else str(synthetic.metadata.get("dataset"))
    wanted = measures.protocol_for(dataset).name
    order = {"set": 0, "random": 1, "coreset": 2}
    run.accuracies.sort(key=lambda one: (one.protocol != wanted, one.network != "convnet", order[one.kind]))
    _add_charts(run)
    if data is None or not measures.train:
        _name_missing(run, place, measures, wanted, reason)


def _same_size(record: Mapping[str, Any], synthetic: SyntheticSet, data: ImageData | None) -> bool:
    names = {synthetic.metadata.get("dataset"), None if data is None else data.name}
    size = record.get("ipc"), record.get("partition", 1)
    return size == (synthetic.ipc, synthetic.partition) and record.get("dataset") in names


def _name_missing(run: Run, place: Place, measures: Measures, protocol: str, reason: str) -> None:
    """Name the evaluations that are not on record, with the command that trains them, or why they cannot be."""
    names = {"set": "the set", "random": "random real images", "coreset": "a coreset"}
    missing = []
    for kind, name in names.items():
        fitting = [one.networks for one in run.accuracies if one.kind == kind and one.protocol == protocol]
        if (finished := max(fitting, default=0)) < measures.networks and (kind != "coreset" or run.method != "herding"):
            missing.append(f"{finished} of {measures.networks} on {name}")
    if not missing:
        return
    options = ["--networks", str(measures.networks), *measures.where]
    options += ["--protocol", measures.protocol] if measures.protocol else []
    options += ["--epochs", str(measures.epochs)] if measures.epochs else []
    rest = reason or shlex.join(["atom-fast", "report", str(place.source), *options])
    run.left_out.append(f"accuracies: of networks trained by {protocol}, {', '.join(missing)} are on record; {rest}")


def _add_charts(run: Run) -> None:
    first = run.accuracy_of("set")
    shown = [one for one in run.accuracies if first and (one.protocol, one.network) == (first.protocol, first.network)]
    run.dots = charts.dots([(one.name, one.known) for one in shown])
    if first is None:
        return
    run.classes = class_accuracies(first, run.accuracy_of("random"), run.class_names)
    if run.classes is None:
        if len(run.class_names) > LARGEST_CONFUSION:
            why = f"kept for at most {LARGEST_CONFUSION} classes"
        elif not first.known:
            why = "no network has finished without diverging"
        else:
            why = "the record is of an earlier version, which kept no confusion matrix; remove it to train again"
        run.left_out.append(f"accuracy by class, and confusion matrix: {why}")


def _add_cells(run: Run, group: Sequence[Place]) -> None:
    """Add the accuracies of a benchmark's cells, which differ in their seed: over all networks of all sets."""
    by_name: dict[str, list[Mapping[str, Any]]] = {}
    for place in group:
        for path in place.records:
            try:
                for record in read_records(path)[-1:]:
                    by_name.setdefault(path.name, []).append(record)
            except _OF_ONE_RUN as error:
                run.left_out.append(f"an evaluation of {place.name}: {error}")
        if not place.records:
            run.left_out.append(f"accuracies of {place.name}: nothing is on record")
    # Files of milestones, whose names end in their iteration, come behind the finished set's.
    for name in sorted(by_name, key=lambda name: ("-iteration-" in name, name)):
        _, milestone, iteration = name.removesuffix(".json").partition("-iteration-")
        label = f"this set after {int(iteration)} iterations" if milestone else "this set"
        run.accuracies.append(measured("milestone" if milestone else "set", label, by_name[name], name))
    if len(group) > 1:
        seeds = ", ".join(str(_cell_of(place)["seed"]) for place in group)
        run.facts.append(("sets", f"{len(group)}, of seeds {seeds}; pictures, settings and losses are the first one's"))


def _compare_cells(groups: Sequence[Sequence[Place]], runs: Sequence[Run]) -> None:
    """Put the cells of real images beside the other cells of their data set and size."""
    cells = [run for run, group in zip(runs, groups, strict=True) if group[0].cell and not run.problem]
    kinds = {"random": "random", "herding": "coreset"}
    own = {id(run): list(run.accuracies) for run in cells}
    for run in cells:
        for other in cells:
            if other.method in kinds and other is not run and (other.dataset, other.size) == (run.dataset, run.size):
                files = {one.file for one in own[id(run)]}
                run.accuracies += [
                    dataclasses.replace(
                        one,
                        kind=kinds[other.method],
                        name="random real images" if other.method == "random" else f"real images by {other.method}",
                    )
                    for one in own[id(other)]
                    if one.file in files
                ]
        _add_charts(run)


def _shorten_names(groups: Sequence[Sequence[Place]], runs: Sequence[Run]) -> None:
    """Leave out seed and hash of a cell's name where it stays distinct without them."""
    short = [
        re.sub(r"-seed\d+-[0-9a-f]{8}$", "", run.name) if group[0].cell else run.name
        for run, group in zip(runs, groups, strict=True)
    ]
    for run, name in zip(runs, short, strict=True):
        if short.count(name) == 1:
            run.name = name
