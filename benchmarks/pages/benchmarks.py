"""Sections of docs/benchmarks.md: every edition of Table 3."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from benchmarks import paper
from benchmarks.harness import load_results
from benchmarks.markdown import three_digits
from benchmarks.methods import TIMED, Workload
from benchmarks.table3 import EDITIONS, workloads
from benchmarks.timings import in_order, merge, variant

MISSING = "–"
Cells = dict[Workload, dict]


def table3_markdown(paths: Sequence[Path]) -> str:
    """Return every edition that the files hold."""
    found = {}
    for path in paths:
        found.setdefault(load_results(path)["edition"], []).append(path)
    return "\n\n".join(edition(name, chosen) for name, chosen in found.items())


def edition(name: str, paths: Sequence[Path]) -> str:
    """Return the tables of one edition, from one or several files measured on one machine."""
    if not paths:
        return ""
    merged = merge(paths)
    sections = [
        _caption(name, [load_results(path) for path in paths]),
        f"Milliseconds per step, median; in brackets, how many times faster than `eager` in the same run"
        f"{_other_runs(merged)}:",
        _table(name, merged, partial(_time_entry, merged), _paper_milliseconds),
        f"Peak memory in MB, {_memory_note(name)}; in brackets, the share of `eager`'s:",
        _table(name, merged, _memory_entry, _paper_megabytes),
    ]
    if _has_gaps(name, merged):
        sections.append(f"{MISSING}: no figure yet. Rows and columns without any figure are left out.")
    return "\n\n".join(sections)


def _caption(name: str, results: list[dict]) -> str:
    where = results[0]["environment"]
    place = where["device"]
    if EDITIONS[name].device == "cpu":
        place += f", {where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    elif where["driver"]:
        place += f", driver {where['driver']}"
    sources = sorted({f"{r['environment']['commit'] or r['environment']['source']}"[:12] for r in results})
    cells = [cell for r in results for cell in r["cells"]]
    dates = sorted({cell["measured_at"][:10] for cell in cells})
    counts = [cell["time"]["iterations"] for cell in cells if cell["status"] == "ok"]
    return (
        f"{EDITIONS[name].title}. Measured on {place}; torch {where['torch']}, triton {where['triton']}; "
        f"{_sizes(results)}; {min(counts, default=0)} to {max(counts, default=0)} steps timed per cell; "
        f"{', '.join(dates)}, {', '.join(sources)}."
    )


def _sizes(results: list[dict]) -> str:
    workload = results[0]["cells"][0]["workload"]
    batches = {}
    for name, method in TIMED.items():
        own = {c["workload"]["real_batch"] for r in results for c in r["cells"] if c["workload"]["method"] == name}
        for size in own:
            batches.setdefault(size, []).append(method.title)
    batch = ", ".join(f"{size} ({', '.join(titles)})" for size, titles in batches.items() if size)
    return (
        f"{workload['classes']} classes, {workload['resolution']}×{workload['resolution']}, "
        f"ConvNet-D{workload['depth']} W{workload['width']} with InstanceNorm, {workload['precision']} unless named; "
        f"{batch} real images per class"
    )


def _memory_note(name: str) -> str:
    if EDITIONS[name].device == "cpu":
        return "counted as the live tensors of a step, without data set and state"
    return "as PyTorch allocated it, with data set and all state, without the CUDA context"


def _table(name: str, merged: Cells, entry: Callable, printed: Callable) -> str:
    ipcs = _ipcs(name, merged)
    lines = ["| Method | | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |", "|---|---|" + "---:|" * len(ipcs)]
    for method, described in TIMED.items():
        rows: list[tuple[str, list[str]]] = []
        if EDITIONS[name].device == "cuda":
            places = [paper.TABLE3_IPCS.index(ipc) for ipc in ipcs]
            rows.append((f"paper, {paper.TABLE3_DEVICE}", [printed(method, place) for place in places]))
        for label, cells in _rows(name, merged, method).items():
            if any(cells):
                rows.append((label, [entry(cell) if cell else MISSING for cell in cells]))
        rows = [(label, entries) for label, entries in rows if set(entries) != {MISSING}]
        for row, (label, entries) in enumerate(rows):
            lines.append(f"| {described.title if row == 0 else ''} | {label} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _ipcs(name: str, merged: Cells) -> list[int]:
    """Return the numbers of images per class with any measurement."""
    measured = {workload.ipc for workload in merged}
    return [ipc for ipc in EDITIONS[name].ipcs if ipc in measured]


def _rows(name: str, merged: Cells, method: str) -> dict[str, list[dict | None]]:
    """Return a method's cells by implementation, precision and norm; None for a cell that is not measured yet."""
    own = {workload: cell for workload, cell in merged.items() if workload.method == method}
    to_measure = [workload for workload in workloads(EDITIONS[name]) if workload.method == method]
    rows: dict[str, dict[int, dict]] = {}
    for workload in in_order([*own, *to_measure]):
        row = rows.setdefault(f"`{workload.implementation}`{variant(workload)}", {})
        if workload in own:
            row[workload.ipc] = own[workload]
    return {label: [row.get(ipc) for ipc in _ipcs(name, merged)] for label, row in rows.items()}


def _has_gaps(name: str, merged: Cells) -> bool:
    """Return True if a row with a figure lacks another."""
    rows = [cells for method in TIMED for cells in _rows(name, merged, method).values()]
    return any(None in cells and any(cells) for cells in rows)


def _shown_eager(merged: Cells, cell: dict) -> bool:
    """Return True if the eager step that a cell is compared with is the one in the table."""
    own = Workload(**cell["workload"])
    wanted = dataclasses.replace(own, implementation="eager", class_chunk=None, real_precision=None)
    shown = merged.get(wanted) or merged.get(dataclasses.replace(wanted, precision="tf32"))
    return shown is None or shown["measured_at"] == cell["eager"]["measured_at"]


def _other_runs(merged: Cells) -> str:
    other = any(cell["eager"] and not _shown_eager(merged, cell) for cell in merged.values())
    return ", and that run's `eager` where it is not the one shown" if other else ""


def _has_eager(cell: dict) -> bool:
    eager = cell["eager"]
    return cell["workload"]["implementation"] != "eager" and bool(eager) and eager["status"] == "ok"


def _time_entry(merged: Cells, cell: dict) -> str:
    if cell["status"] != "ok":
        return cell["status"]
    median = cell["time"]["median"]
    text = three_digits(median * 1e3)
    if "share_of_eager" in cell:
        text += f" ({three_digits(1 / cell['share_of_eager'])}×)"
    elif _has_eager(cell):
        eager = cell["eager"]["time"]["median"]
        other = "" if _shown_eager(merged, cell) else f" of {three_digits(eager * 1e3)}"
        text += f" ({three_digits(eager / median)}×{other})"
    return text


def _memory_entry(cell: dict) -> str:
    if cell["status"] != "ok":
        return cell["status"]
    peak = cell["memory"]["peak_allocated"]
    if peak is None:
        return MISSING
    text = f"{peak / 1e6:,.0f}" if peak >= 1e7 else f"{peak / 1e6:.1f}"
    if _has_eager(cell):
        text += f" ({peak / cell['eager']['memory']['peak_allocated']:.0%})"
    return text


def _paper_milliseconds(method: str, place: int) -> str:
    seconds = paper.TABLE3_SECONDS[method][place]
    return seconds if isinstance(seconds, str) else f"{seconds[0] * 1e3:,.0f} ± {seconds[1] * 1e3:,.0f}"


def _paper_megabytes(method: str, place: int) -> str:
    megabytes = paper.TABLE3_MEGABYTES[method][place]
    return megabytes if isinstance(megabytes, str) else f"{megabytes:,}"
