"""Tables and plots of what was measured, and the README's sections kept equal to them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from atom_fast._files import write_atomically
from atom_fast.report import comparison_table

from . import paper, plots, reproduction, scaling
from .harness import ROOT, load_results
from .merging import digest, merge
from .methods import METHODS, Setting
from .plots import PRECISION_NAMES
from .sections import replace_sections
from .table3 import EDITIONS, settings

FIGURES = ROOT / "docs" / "figures"
NOT_MEASURED = "not measured yet"
TABLE1 = "reproduce-cifar10-table1.json"


def refresh(results: Path, readme: Path, *, check: bool = False) -> list[str]:
    """Render every section from the results and put it between its marks in the README; draw the plots.

    Args:
        results: folder of results files.
        readme: file with ``<!-- table3-cpu:start -->`` and ``:end`` marks, and the like for other sections.
        check: write nothing.

    Returns:
        A sentence for everything that was, or is, out of date.

    Raises:
        FileNotFoundError: there is no such folder or README.
        ValueError: a results file is corrupt, or the README lacks a mark.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"no results folder at {results}")
    table1 = results / TABLE1
    accuracies = reproduction.section(table1, measured=True) if table1.exists() else f"Table 1: {NOT_MEASURED}."
    sections = [
        ("measured", accuracy_markdown(sorted(results.glob("accuracy-*.json"))), results),
        ("table1", accuracies, results),
    ]
    editions = {edition: _files(results, "table3", edition) for edition in EDITIONS}
    sections += [(f"table3-{name}", edition_markdown(name, files), results) for name, files in editions.items()]
    text, stale = replace_sections(readme.read_text(), sections, readme)
    for edition, files in editions.items():
        if files:
            figure = FIGURES / f"table3-{edition}.png"
            stale += _refresh_plot(figure, digest(files), partial(plots.plot_table3, figure, edition, files), check)
    for edition in scaling.EDITIONS:
        if files := _files(results, "scaling", edition):
            figure = FIGURES / f"scaling-{edition}.png"
            stale += _refresh_plot(figure, digest(files), partial(plots.plot_scaling, figure, edition, files), check)
    for file in sorted(results.glob("kernels-*.json")):
        figure = FIGURES / f"{file.stem.replace('kernels', 'roofline', 1)}.png"
        stale += _refresh_plot(figure, plots.kernels_digest(file), partial(plots.plot_roofline, figure, file), check)
    if stale and not check:
        write_atomically(readme, text)
    return stale


def _files(results: Path, kind: str, edition: str) -> list[Path]:
    """The results files of an edition; there may be several, see :func:`benchmarks.merging.merge`."""
    files = sorted(results.glob(f"{kind}-*.json"))
    return [path for path in files if load_results(path)["edition"] == edition]


def accuracy_markdown(paths: Sequence[Path]) -> str:
    """A table for each file of what ``atom-fast demo`` or ``evaluate`` wrote, under its data's name and settings.

    Raises:
        ValueError: a file is not JSON of that kind.
    """
    sections = []
    for path in paths:
        try:
            record = json.loads(path.read_text())
            results = [{**result, "dataset": record["data"]} for result in record["results"]]
            devices = " and ".join(sorted({result["device"].upper() for result in results}))
            section = f"{record['data']}: {record['note']}. Measured on a {devices}.\n\n{comparison_table(results)}"
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a file of accuracies ({error!r}); it is left as it is") from error
        sections.append(section)
    return "\n\n".join(sections) or f"Accuracy: {NOT_MEASURED}."


def table3_markdown(paths: Sequence[Path]) -> str:
    """Every edition that the files hold, as Markdown."""
    found = {}
    for path in paths:
        found.setdefault(load_results(path)["edition"], []).append(path)
    return "\n\n".join(edition_markdown(edition, chosen) for edition, chosen in found.items())


def edition_markdown(edition: str, paths: Sequence[Path]) -> str:
    """One edition's tables, from one file or from several that were measured on one machine."""
    if not paths:
        return f"{EDITIONS[edition].title}: {NOT_MEASURED}."
    merged = merge(paths)
    sections = [
        _caption(edition, [load_results(path) for path in paths]),
        "Milliseconds a step, median (in brackets: times faster than `eager` in the same run):",
        _table(edition, merged, _time_entry, _paper_milliseconds),
        f"Peak memory in MB, {_memory_note(edition)} (in brackets: share of `eager`'s):",
        _table(edition, merged, _memory_entry, _paper_megabytes),
    ]
    if missing := _missing(edition, merged):
        sections.append(f"Rows without a figure are left out; {NOT_MEASURED}: {missing}.")
    return "\n\n".join(sections)


def _caption(edition: str, results: list[dict]) -> str:
    where = results[0]["environment"]
    place = where["device"]
    if EDITIONS[edition].device == "cpu":
        place += f", {where['threads']} thread{'s' if where['threads'] > 1 else ''}"
    elif where["driver"]:
        place += f", driver {where['driver']}"
    sources = sorted({f"{r['environment']['commit'] or r['environment']['source']}"[:12] for r in results})
    cells = [cell for r in results for cell in r["cells"]]
    dates = sorted({cell["measured_at"][:10] for cell in cells})
    counts = [cell["time"]["iterations"] for cell in cells if cell["status"] == "ok"]
    return (
        f"{EDITIONS[edition].title}. Measured on {place}; torch {where['torch']}, triton {where['triton']}; "
        f"{_sizes(results)}; {min(counts, default=0)} to {max(counts, default=0)} steps timed a cell; "
        f"{', '.join(dates)}, {', '.join(sources)}."
    )


def _sizes(results: list[dict]) -> str:
    setting = results[0]["cells"][0]["setting"]
    batches = {}
    for name, method in METHODS.items():
        for size in {c["setting"]["real_batch"] for r in results for c in r["cells"] if c["setting"]["method"] == name}:
            batches.setdefault(size, []).append(method.title)
    batch = ", ".join(f"{size} ({', '.join(titles)})" for size, titles in batches.items() if size)
    return (
        f"{setting['classes']} classes, {setting['resolution']}×{setting['resolution']}, "
        f"ConvNet-D{setting['depth']} W{setting['width']} with InstanceNorm, {setting['precision']} unless named; "
        f"{batch} real images a class"
    )


def _memory_note(edition: str) -> str:
    if EDITIONS[edition].device == "cpu":
        return "counted as the live tensors a step makes, without data set and state"
    return "as PyTorch allocated it, with data set and all state, without the CUDA context"


def _table(edition: str, merged: dict[Setting, dict], entry: Callable, printed: Callable) -> str:
    ipcs = EDITIONS[edition].ipcs
    lines = ["| Method | | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |", "|---|---|" + "---:|" * len(ipcs)]
    for method, described in METHODS.items():
        rows = []
        if EDITIONS[edition].device == "cuda":
            rows.append((f"paper, {paper.DEVICE}", [printed(method, place) for place in range(len(ipcs))]))
        for label, cells in _rows(edition, merged, method).items():
            if any(cells):
                rows.append((label, [entry(cell) if cell else NOT_MEASURED for cell in cells]))
        for row, (label, entries) in enumerate(rows):
            lines.append(f"| {described.title if row == 0 else ''} | {label} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _rows(edition: str, merged: dict[Setting, dict], method: str) -> dict[str, list[dict | None]]:
    """A method's cells for every provider and precision that was measured or is to be, None where a cell is missing."""
    ipcs = EDITIONS[edition].ipcs
    by_key = {(s.method, s.provider, s.precision, s.ipc): cell for s, cell in merged.items()}
    to_measure = {(s.method, s.provider, s.precision, s.ipc) for s in settings(EDITIONS[edition])}
    rows = {}
    for provider in METHODS[method].providers:
        for precision, name in PRECISION_NAMES.items():
            keys = [(method, provider, precision, ipc) for ipc in ipcs]
            if any(key in by_key or key in to_measure for key in keys):
                rows[f"{provider}{name}"] = [by_key.get(key) for key in keys]
    return rows


def _missing(edition: str, merged: dict[Setting, dict]) -> str:
    """The rows of which no cell was measured: "DC (eager), DSA (eager)"."""
    missing = {}
    for method, described in METHODS.items():
        if labels := [label for label, cells in _rows(edition, merged, method).items() if not any(cells)]:
            missing[described.title] = ", ".join(labels)
    return ", ".join(f"{title} ({labels})" for title, labels in missing.items())


def _time_entry(cell: dict) -> str:
    if cell["status"] != "ok":
        return cell["status"]
    median = cell["time"]["median"]
    text = _three_digits(median * 1e3)
    if "share_of_eager" in cell:
        text += f" ({_three_digits(1 / cell['share_of_eager'])}×)"
    elif cell["setting"]["provider"] != "eager" and cell["eager"] and cell["eager"]["status"] == "ok":
        text += f" ({_three_digits(cell['eager']['time']['median'] / median)}×)"
    return text


def _memory_entry(cell: dict) -> str:
    if cell["status"] != "ok":
        return cell["status"]
    peak = cell["memory"]["peak_allocated"]
    if peak is None:
        return "–"
    text = f"{peak / 1e6:,.0f}" if peak >= 1e7 else f"{peak / 1e6:.1f}"
    if cell["setting"]["provider"] != "eager" and cell["eager"] and cell["eager"]["status"] == "ok":
        text += f" ({peak / cell['eager']['memory']['peak_allocated']:.0%})"
    return text


def _three_digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _paper_milliseconds(method: str, place: int) -> str:
    seconds = paper.SECONDS[method][place]
    return seconds if isinstance(seconds, str) else f"{seconds[0] * 1e3:,.0f} ± {seconds[1] * 1e3:,.0f}"


def _paper_megabytes(method: str, place: int) -> str:
    megabytes = paper.MEGABYTES[method][place]
    return megabytes if isinstance(megabytes, str) else f"{megabytes:,}"


def _refresh_plot(path: Path, source: str, draw: Callable[[], None], check: bool) -> list[str]:
    """Draw a picture, unless it names the same source."""
    if path.is_file() and _picture_digest(path) == source:
        return []
    if not check:
        draw()
    return [f"{path.relative_to(ROOT)} was not drawn from the figures that are kept"]


def _picture_digest(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get("Source")
