"""The results of a table or figure as one record for JSON: ours beside the paper's."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from atom_fast.distillation.logs import versions
from benchmarks.accuracy.cells import CELL_FILE, Cell, cell_folder, check_same_images, read_evaluation, read_note
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.entries import Entry, Job, Section
from benchmarks.accuracy.tables import Plan

FORMAT = "atom_fast.accuracy"


def collect(plan: Plan, output: Path, failed: Mapping[str, str] | None = None) -> dict:
    """Return everything that is known about a table or figure, as JSON can hold it.

    Args:
        plan: table or figure.
        output: folder of its cells.
        failed: reasons of cells that could not be finished, by the names of their folders.

    Returns:
        ``format``, ``target``, ``title``, ``kind`` ("table", "curves" or "grids"), ``data`` (title of each data set's
        images), ``reduced`` (differences from the paper by data set, see `RunSize.reductions`), ``sizes``,
        ``protocols``, ``configurations`` (full settings of the first set of every kind, by the name of its cell's
        folder), ``devices`` and ``versions`` (of the evaluations), ``date``, ``failed`` as given, and ``sections``:
        ``rows`` of ``entries`` with

        - ``paper``: [mean, deviation] or None, and ``source``: the table of the paper that it comes from, if not this;
        - ``ours``: mean and population deviation over all networks of all sets, and every accuracy; None if not
          measured; ``difference``: ours minus the paper's mean;
        - ``wanted``: number of sets, ``failed``: number of failed sets, ``cited``: True if nothing is to be measured;
        - ``to_base``, if the section has a ``base``: mean difference to the row's base, of sets of the same seed, and
          its standard error.

    Raises:
        ValueError: cells of one data set were made from different images, or one is damaged.
    """
    check_same_images(output, (cell for cell, _ in plan.units))
    found = _Found(output, failed or {})
    sections = [_section(section, found) for section in plan.sections]
    return {
        "format": FORMAT,
        "target": plan.target,
        "title": plan.title,
        "kind": plan.kind,
        "data": {dataset: found.data.get(dataset, DATASETS[dataset][0]) for dataset in plan.sizes},
        "reduced": {d: size.reductions(plan.methods, evaluated=plan.kind != "grids") for d, size in plan.sizes.items()},
        "sizes": {
            dataset: {"sets": size.seeds, "networks": size.networks, "settings": dict(size.settings)}
            for dataset, size in plan.sizes.items()
        },
        "protocols": {p.name: {k: v for k, v in p.to_dict().items() if k != "name"} for p in _protocols(plan)},
        "configurations": _configurations(plan),
        "devices": sorted(found.devices),
        "versions": found.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "failed": found.failed,
        "sections": sections,
    }


class _Found:
    """Results read from cells, with notes on their images, devices and versions."""

    def __init__(self, output: Path, failed: Mapping[str, str]):
        self.output = output
        self.failed = dict(failed)
        self.data: dict[str, str] = {}
        self.devices: set[str] = set()
        self._versions: list[Mapping[str, str]] = []

    def ours(self, jobs: Sequence[Job]) -> dict | None:
        results = []
        for cell, evaluation in jobs:
            if evaluation is None:  # a picture's set, which is not evaluated
                self._note(cell)
                continue
            if (result := read_evaluation(self.output, cell, evaluation)) is None:
                continue
            self.data[cell.dataset] = result["data"]
            self.devices.add(result["device"])
            self._versions.append(result["versions"])
            results.append({**result, "seed": cell.seed})
        return _summary(results) if results else None

    def versions(self) -> dict[str, str]:
        """Return the versions of packages that measured the accuracies; for pictures, the versions here."""
        found = self._versions or [versions()]
        names = dict.fromkeys(name for one in found for name in one)
        return {name: ", ".join(sorted({str(one[name]) for one in found if name in one})) for name in names}

    def _note(self, cell: Cell) -> None:
        folder = cell_folder(self.output, cell)
        if (folder / CELL_FILE).is_file():
            self.data[cell.dataset] = read_note(folder)["data"]

    def failures(self, jobs: Sequence[Job], ours: Mapping | None) -> int:
        """Return the number of sets that are missing in ``ours`` because they failed."""
        measured = ours["seeds"] if ours else ()
        return sum(cell.folder_name in self.failed and cell.seed not in measured for cell, _ in jobs)


def _summary(results: Sequence[Mapping]) -> dict:
    accuracies = [result["accuracies"] for result in results]
    known = [value for one in accuracies for value in one if value is not None]
    means = [statistics.fmean(v for v in one if v is not None) for one in accuracies if any(v is not None for v in one)]
    times = [result["set_seconds"] for result in results if result["set_seconds"] is not None]
    return {
        "mean": statistics.fmean(known) if known else None,
        "std": statistics.pstdev(known) if known else None,
        "std_of_sets": statistics.pstdev(means) if len(means) > 1 else None,
        "sets": len(results),
        "seeds": [result["seed"] for result in results],
        "networks": sum(len(one) for one in accuracies),
        "diverged": sum(value is None for one in accuracies for value in one),
        "accuracies": accuracies,
        "set_seconds": statistics.fmean(times) if times else None,
        "evaluation_seconds": statistics.fmean(result["seconds"] for result in results),
    }


def _section(section: Section, found: _Found) -> dict:
    rows = []
    for row in section.rows:
        entries = {}
        for column in section.columns:
            entry = row.entries.get(column)
            if entry is None:
                continue
            ours = _average(entries) if entry.average else found.ours(entry.jobs)
            entries[column] = _entry(entry, ours, 0 if entry.average else found.failures(entry.jobs, ours))
        rows.append({"title": row.title, "entries": entries})
    by_title = {row["title"]: row for row in rows}
    for row, described in zip(rows, section.rows, strict=True) if section.base else ():
        base = by_title.get(described.base or section.base, row)
        for column, entry in row["entries"].items():
            entry["to_base"] = None if row is base else _paired(entry["ours"], base["entries"][column]["ours"])
    described = {"title": section.title, "heading": section.heading, "base": section.base}
    return {**described, "columns": list(section.columns), "rows": rows}


def _paired(ours: Mapping | None, base: Mapping | None) -> list[float | None] | None:
    """Return the mean difference of two rows' sets of the same seeds, and its standard error."""
    means = [_set_means(one) if one else {} for one in (ours, base)]
    differences = [mean - means[1][seed] for seed, mean in means[0].items() if seed in means[1]]
    if not differences:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return [statistics.fmean(differences), error]


def _set_means(ours: Mapping) -> dict[int, float]:
    """Return the mean accuracy of each set by its seed."""
    pairs = zip(ours["seeds"], ours["accuracies"], strict=True)
    known = {seed: [value for value in one if value is not None] for seed, one in pairs}
    return {seed: statistics.fmean(values) for seed, values in known.items() if values}


def _entry(entry: Entry, ours: dict | None, failed: int) -> dict:
    known = ours is not None and ours["mean"] is not None and entry.paper is not None
    return {
        "paper": None if entry.paper is None else list(entry.paper),
        "source": entry.source if entry.paper else "",
        "ours": ours,
        "difference": ours["mean"] - entry.paper[0] if known else None,
        "wanted": len(entry.jobs),
        "failed": failed,
        "cited": not entry.jobs and not entry.average,
    }


def _average(entries: Mapping[str, dict]) -> dict | None:
    """Return the means of a row's means and deviations, as the paper's Table 2 averages; None if one is missing."""
    ours = [entry["ours"] for entry in entries.values()]
    if not ours or any(one is None or one["mean"] is None for one in ours):
        return None
    return {name: statistics.fmean(one[name] for one in ours) for name in ("mean", "std")}


def _protocols(plan: Plan):
    found = {evaluation.protocol: None for _, evaluations in plan.units for evaluation in evaluations}
    return sorted(found, key=lambda protocol: protocol.name)


def _configurations(plan: Plan) -> dict[str, dict]:
    """Return the full settings of all sets of seed 0 by their folders; only the precision may be left open."""
    return {
        cell.folder_name: {**cell.to_dict(), "config": cell.resolved_config.to_dict()}
        for cell, _ in plan.units
        if cell.seed == 0
    }
