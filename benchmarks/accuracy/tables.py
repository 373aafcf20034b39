"""Results of a table or figure as one record, and that record as Markdown: ours beside the paper's."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from atom_fast.distillation.logs import versions
from benchmarks.accuracy.cells import CELL_FILE, Cell, cell_folder, check_same_images, read_evaluation, read_note
from benchmarks.accuracy.datasets import DATASETS
from benchmarks.accuracy.layout import Entry, Job, Section
from benchmarks.accuracy.targets import Plan

FORMAT = "atom_fast.reproduce"
NOT_MEASURED = "not measured"


def collect(plan: Plan, output: Path, failed: Mapping[str, str] | None = None) -> dict:
    """Everything that is known about a table or figure, as what JSON can hold.

    Args:
        plan: of the table or figure.
        output: folder of its cells.
        failed: cells that could not be finished, by their folders' names, and why.

    Returns:
        ``format``, ``target``, ``title``, ``kind`` ("table", "curves" or "grids"), ``data`` (what the images of each
        data set are called), ``reduced`` (what is not as in the paper, by data set), ``scales``, ``protocols``,
        ``configurations`` (full settings of the first set of every kind, by the name of its cell's folder),
        ``devices`` and ``versions`` (what sets were tested on and with), ``date``, ``failed`` as given, and
        ``sections``: ``rows`` of ``entries`` with ``paper`` ([mean, deviation]), ``source`` (the table of the paper
        that it stands in, where that is another one than this), ``ours`` (mean and population
        deviation over all networks of all sets, and every accuracy; None: not measured), ``difference``, ``wanted``,
        the number of sets, ``failed``, how many of them did and, where the section has a ``base``, ``to_base``: the
        mean difference of sets of the same seed, and its standard error.

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
        "data": {dataset: found.data.get(dataset, DATASETS[dataset][0]) for dataset in plan.scales},
        "reduced": {d: scale.reductions(evaluated=plan.kind != "grids") for d, scale in plan.scales.items()},
        "scales": {
            dataset: {"sets": scale.seeds, "networks": scale.networks, "settings": dict(scale.settings)}
            for dataset, scale in plan.scales.items()
        },
        "protocols": {p.name: {k: v for k, v in vars(p).items() if k != "name"} for p in _protocols(plan)},
        "configurations": _configurations(plan),
        "devices": sorted(found.devices),
        "versions": found.versions(),
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "failed": found.failed,
        "sections": sections,
    }


class _Found:
    """What cells hold, with notes on what they were made from and on."""

    def __init__(self, output: Path, failed: Mapping[str, str]):
        self.output = output
        self.failed = dict(failed)
        self.data: dict[str, str] = {}
        self.devices: set[str] = set()
        self._versions: list[Mapping[str, str]] = []

    def ours(self, jobs: Sequence[Job]) -> dict | None:
        results = []
        for cell, evaluation in jobs:
            if evaluation is None:  # of a figure: only looked at
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
        """Of the packages that accuracies were measured with, on whichever machine; of a figure's grids, those here."""
        found = self._versions or [versions()]
        names = dict.fromkeys(name for one in found for name in one)
        return {name: ", ".join(sorted({str(one[name]) for one in found if name in one})) for name in names}

    def _note(self, cell: Cell) -> None:
        folder = cell_folder(self.output, cell)
        if (folder / CELL_FILE).is_file():
            self.data[cell.dataset] = read_note(folder)["data"]

    def failures(self, jobs: Sequence[Job], ours: Mapping | None) -> int:
        """How many sets are missing in ``ours`` because they failed."""
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
    for row in rows if section.base else ():
        [base] = [other for other in rows if other["title"] == section.base]
        for column, entry in row["entries"].items():
            entry["to_base"] = None if row is base else _paired(entry["ours"], base["entries"][column]["ours"])
    described = {"title": section.title, "heading": section.heading, "base": section.base}
    return {**described, "columns": list(section.columns), "rows": rows}


def _paired(ours: Mapping | None, base: Mapping | None) -> list[float | None] | None:
    """Mean difference of the sets of a row and those of the same seeds in another, and its standard error."""
    means = [_set_means(one) if one else {} for one in (ours, base)]
    differences = [mean - means[1][seed] for seed, mean in means[0].items() if seed in means[1]]
    if not differences:
        return None
    error = statistics.stdev(differences) / len(differences) ** 0.5 if len(differences) > 1 else None
    return [statistics.fmean(differences), error]


def _set_means(ours: Mapping) -> dict[int, float]:
    """Mean accuracy of each set by its seed."""
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
    """Means of a row's means and deviations, as the paper's Table 2 averages; None where one is missing."""
    ours = [entry["ours"] for entry in entries.values()]
    if not ours or any(one is None or one["mean"] is None for one in ours):
        return None
    return {name: statistics.fmean(one[name] for one in ours) for name in ("mean", "std")}


def _protocols(plan: Plan):
    found = {evaluation.protocol: None for _, evaluations in plan.units for evaluation in evaluations}
    return sorted(found, key=lambda protocol: protocol.name)


def _configurations(plan: Plan) -> dict[str, dict]:
    """Full settings of the sets of seed 0, by their cells' folders; those of other seeds differ in the seed alone.

    Only the precision may be left to the device.
    """
    return {
        cell.folder_name: {**cell.to_dict(), "config": cell.resolved_config.to_dict()}
        for cell, _ in plan.units
        if cell.seed == 0
    }


def render(record: Mapping) -> str:
    """A record as Markdown: what it is and how far it is reduced, then a table for each section."""
    parts = [_caption(record)]
    for section in record["sections"]:
        if section["title"] and len(record["sections"]) > 1:
            parts.append(f"**{_place(section['title'], record)}**")
        parts.append(_table(section, record))
    return "\n\n".join(part for part in parts if part)


def _caption(record: Mapping) -> str:
    places = [
        f"{name}: {'; '.join(record['reduced'][dataset]) or 'at the size of the paper'}"
        for dataset, name in record["data"].items()
    ]
    titles = [section["title"] for section in record["sections"] if section["title"]]
    if not titles and len(record["sections"][0]["columns"]) == 1:
        titles = record["sections"][0]["columns"]  # of one column the heading does not say which
    where = f", {_place(titles[0], record)}" if len(titles) == 1 else ""
    lines = [f"{record['title']}{where}. {'. '.join(places)}."]
    if record["devices"]:
        lines.append(
            f"Test accuracy of the last epoch in per cent, mean ± population standard deviation over all networks of "
            f"all sets. Measured on {' and '.join(map(_device_name, record['devices']))}, {record['date']}, "
            f"torch {record['versions']['torch']}."
        )
    if any(section.get("base") and len(section["columns"]) == 1 for section in record["sections"]):
        lines.append("Comparisons with a row pair sets of the same seed: mean difference ± its standard error.")
    return "\n".join(lines)


def _device_name(device: str) -> str:
    return "a CPU" if device == "cpu" else device


def _place(title: str, record: Mapping) -> str:
    dataset, _, ipc = title.partition(":")
    return f"{record['data'][dataset]}, {_images(ipc)}" if dataset in record["data"] else title


def _images(ipc: str) -> str:
    return f"{ipc} image{'' if ipc == '1' else 's'} per class"


def _table(section: Mapping, record: Mapping) -> str:
    if len(section["columns"]) == 1:
        return _detailed(section, record)
    head = [section["heading"], *(_place(column, record) for column in section["columns"])]
    rows = []
    for row in section["rows"]:
        rows.append([row["title"], *(_combined(row["entries"].get(column)) for column in section["columns"])])
    return markdown(head, rows)


def _detailed(section: Mapping, record: Mapping) -> str:
    """One column in full: ours, the paper's, the difference, and the time of a set and of its evaluation."""
    column = section["columns"][0]
    printed = any((row["entries"].get(column) or {}).get("paper") for row in section["rows"])
    base = section.get("base")
    head = [section["heading"], "ours", "sets × networks"]
    head += ["paper", "difference"] if printed else []
    head += [f"to {base}"] if base else []
    head += ["s per set", "s evaluation"]
    rows = []
    for row in section["rows"]:
        entry = row["entries"].get(column)
        if entry is None:
            continue
        ours = entry["ours"]
        cells = [row["title"], _ours(entry), f"{ours['sets']} × {ours['networks'] // ours['sets']}" if ours else ""]
        paper = _figure(entry["paper"]) + (f" ({entry['source']})" if entry.get("source") else "")
        cells += [paper, _signed(entry["difference"])] if printed else []
        cells += [_with_error(entry["to_base"])] if base else []
        cells += [_number(ours and ours["set_seconds"]), _number(ours and ours["evaluation_seconds"])]
        rows.append(cells)
    return markdown(head, rows)


def _combined(entry: Mapping | None) -> str:
    """Ours, the paper's and the difference in one cell."""
    if entry is None:
        return "–"
    source = f", {entry['source']}" if entry.get("source") else ""
    if entry["cited"]:
        return f"{_figure(entry['paper'])} (cited{source})" if entry["paper"] else "–"
    if entry["paper"] is None:
        return _ours(entry)
    difference = "" if entry["difference"] is None else f", {_signed(entry['difference'])}"
    return f"{_ours(entry)} (paper{source}{':' if source else ''} {_figure(entry['paper'])}{difference})"


def _ours(entry: Mapping) -> str:
    ours, failed = entry["ours"], entry.get("failed", 0)
    if entry["cited"]:
        return "(cited)" if entry["paper"] else "–"
    if ours is None:
        return "failed" if failed else NOT_MEASURED if entry["wanted"] else "–"
    if ours["mean"] is None:
        return "diverged"
    notes = [f"{ours['sets']} of {entry['wanted']} sets"] if ours.get("sets", entry["wanted"]) < entry["wanted"] else []
    notes += [f"{failed} failed"] if failed else []
    notes += [f"{ours['diverged']} networks diverged"] if ours.get("diverged") else []
    return f"{ours['mean']:.1f} ± {ours['std']:.1f}" + (f" ({', '.join(notes)})" if notes else "")


def _figure(value: Sequence | None) -> str:
    if value is None:
        return "–"
    mean, deviation = value
    return f"{mean:.1f}" if deviation is None else f"{mean:.1f} ± {deviation:.1f}"


def _signed(value: float | None) -> str:
    return "" if value is None else f"{value:+.1f}"


def _with_error(value: Sequence | None) -> str:
    if value is None:
        return ""
    return _signed(value[0]) + ("" if value[1] is None else f" ± {value[1]:.1f}")


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.0f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """An aligned Markdown table."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = (head, ["-" * width for width in widths], *rows)
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in lines
    )
