"""Tables and pictures of what was measured, and the sections of README and docs kept equal to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from atom_fast._files import write_atomically

from . import compilers, findings, lessons, paper, plots, reproduction, scaling, summary
from .harness import load_results
from .merging import digest, merge
from .methods import METHODS, Setting
from .plots import PRECISION_NAMES
from .sections import replace_sections
from .table3 import EDITIONS, settings

MISSING = "–"


def refresh(results: Path, root: Path, *, check: bool = False) -> list[str]:
    """Render every section from the results and put it between its marks on its page; draw the pictures.

    Args:
        results: folder of results files. What they do not hold is left out of the pages.
        root: folder of ``README.md`` and ``docs``; their sections lie between ``<!-- NAME:start -->`` and ``:end``.
        check: write nothing.

    Returns:
        A sentence for everything that was, or is, out of date.

    Raises:
        FileNotFoundError: there is no such folder or page.
        ValueError: a results file is corrupt, or a page lacks a mark.
    """
    if not results.is_dir():
        raise FileNotFoundError(f"no results folder at {results}")
    stale = []
    for name, sections in pages(results).items():
        page = root / name
        places = [(section, text, results) for section, text in sections.items()]
        text, found = replace_sections(page.read_text("utf-8"), places, page)
        if found and not check:
            write_atomically(page, text)
        stale += found
    figures = root / "docs" / "figures"
    for name, source, draw in pictures(results, figures):
        stale += _refresh_picture(figures / name, source, draw, check)
    return stale


def pages(results: Path) -> dict[str, dict[str, str]]:
    """By page, its sections by name."""
    gpu, cpu = _files(results, "table3", "gpu"), _files(results, "table3", "cpu")
    kernels, table1 = sorted(results.glob("kernels-*.json")), results / f"reproduce-{reproduction.TABLE1}.json"
    return {
        "README.md": {
            "caption": _where(summary.caption, table1),
            "gains": _where(summary.gains, table1, gpu, kernels),
            "demo": _where(summary.demo, results / "accuracy-digits.json"),
            "tables": _joined(
                _where(summary.accuracy, table1),
                _where(summary.steps, gpu, table1),
                _where(summary.methods, *cpu),
            ),
        },
        "docs/results.md": reproduction.sections(results),
        "docs/usage.md": {
            "class-chunks": _where(lessons.class_chunks, results / "scaling-cpu.json"),
            "compilers": _where(compilers.table, results / "compilers.json"),
        },
        "docs/benchmarks.md": {"table3-gpu": edition_markdown("gpu", gpu), "table3-cpu": edition_markdown("cpu", cpu)},
        "docs/performance.md": {
            "budget": lessons.budget(),
            "step": _where(lessons.step, gpu),
            "bandwidth": _where(lessons.bandwidth, kernels),
            "kept-memory": _where(lessons.kept_memory, results / "step-cpu-2-classes.json"),
            "bfloat16": _where(lessons.bfloat16, results / "step-cpu-bfloat16.json"),
            "digits": _where(lessons.digits, results / "digits-cpu.json"),
            "evaluation": _where(lessons.evaluation, results / "evaluation-gpu.json", results / "evaluation-cpu.json"),
            "ranks": _where(lessons.ranks, results / "ranks-cpu.json"),
        },
    }


def pictures(results: Path, figures: Path) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Every picture that the results suffice for: its name, what it is drawn from, and what draws it."""
    if files := _files(results, "table3", "gpu"):
        yield "table3-gpu.png", digest(files), partial(plots.plot_table3, figures / "table3-gpu.png", "gpu", files)
    for edition in scaling.EDITIONS:
        if files := _files(results, "scaling", edition):
            name = f"scaling-{edition}.png"
            yield name, digest(files), partial(plots.plot_scaling, figures / name, edition, files)
    if kernels := sorted(results.glob("kernels-*.json")):
        yield (
            "bandwidth.png",
            plots.kernels_digest(kernels),
            partial(plots.plot_bandwidth, figures / "bandwidth.png", kernels),
        )
    yield from _accuracy_pictures(results, figures)


def _accuracy_pictures(results: Path, figures: Path) -> Iterator[tuple[str, str, Callable[[], None]]]:
    def file(name: str) -> Path:
        return results / f"reproduce-{name}.json"

    studies = [file("cifar10-ipc1-study"), file("cifar10-ipc10-study")]
    unit = [file("cifar10-ipc10-herding"), file("cifar10-ipc10-unit")]
    table1, scale, average = file(reproduction.TABLE1), file("cifar10-ipc10-scale"), file("cifar10-ipc10-average")
    drawn = figures / "cifar10-ipc10.png"
    known = [
        ("accuracy-seconds.png", [table1], lambda path: findings.plot_accuracy(path, table1)),
        ("norm-schedule.png", studies, lambda path: findings.plot_norm_and_schedule(path, studies)),
        ("loss-scale.png", [scale, *studies], lambda path: findings.plot_loss_scale(path, scale, studies)),
        ("running-mean.png", [average], lambda path: findings.plot_running_mean(path, average)),
        ("unit-variance.png", unit, lambda path: findings.plot_unit_variance(path, *unit)),
        ("cifar10-classes.png", [drawn], lambda path: findings.draw_classes(path, drawn)),
    ]
    for name, files, draw in known:
        if all(path.exists() for path in files):
            yield name, plots.files_digest(files), partial(draw, figures / name)


def _joined(*parts: str) -> str:
    return "\n\n".join(filter(None, parts))


def _where(render: Callable[..., str], *files: Path | Sequence[Path]) -> str:
    """A section, or nothing where a file that it shows is not there."""
    given = [path for entry in files for path in ([entry] if isinstance(entry, Path) else entry or [Path("/nowhere")])]
    return render(*files) if files and all(path.exists() for path in given) else ""


def _files(results: Path, kind: str, edition: str) -> list[Path]:
    """The results files of an edition; there may be several, see :func:`benchmarks.merging.merge`."""
    files = sorted(results.glob(f"{kind}-*.json"))
    return [path for path in files if load_results(path)["edition"] == edition]


def table3_markdown(paths: Sequence[Path]) -> str:
    """Every edition that the files hold, as Markdown."""
    found = {}
    for path in paths:
        found.setdefault(load_results(path)["edition"], []).append(path)
    return "\n\n".join(edition_markdown(edition, chosen) for edition, chosen in found.items())


def edition_markdown(edition: str, paths: Sequence[Path]) -> str:
    """One edition's tables, from one file or from several that were measured on one machine."""
    if not paths:
        return ""
    merged = merge(paths)
    sections = [
        _caption(edition, [load_results(path) for path in paths]),
        f"Milliseconds per step, median; in brackets, how many times faster than `eager` in the same run"
        f"{_other_runs(merged)}:",
        _table(edition, merged, partial(_time_entry, merged), _paper_milliseconds),
        f"Peak memory in MB, {_memory_note(edition)}; in brackets, the share of `eager`'s:",
        _table(edition, merged, _memory_entry, _paper_megabytes),
    ]
    if _has_gaps(edition, merged):
        sections.append(f"{MISSING}: no figure yet. Rows and columns without any figure are left out.")
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
        f"{_sizes(results)}; {min(counts, default=0)} to {max(counts, default=0)} steps timed per cell; "
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
        f"{batch} real images per class"
    )


def _memory_note(edition: str) -> str:
    if EDITIONS[edition].device == "cpu":
        return "counted as the live tensors of a step, without data set and state"
    return "as PyTorch allocated it, with data set and all state, without the CUDA context"


def _table(edition: str, merged: dict[Setting, dict], entry: Callable, printed: Callable) -> str:
    ipcs = _ipcs(edition, merged)
    lines = ["| Method | | " + " | ".join(f"IPC {ipc}" for ipc in ipcs) + " |", "|---|---|" + "---:|" * len(ipcs)]
    for method, described in METHODS.items():
        rows: list[tuple[str, list[str]]] = []
        if EDITIONS[edition].device == "cuda":
            rows.append((f"paper, {paper.DEVICE}", [printed(method, paper.IPCS.index(ipc)) for ipc in ipcs]))
        for label, cells in _rows(edition, merged, method).items():
            if any(cells):
                rows.append((label, [entry(cell) if cell else MISSING for cell in cells]))
        rows = [(label, entries) for label, entries in rows if set(entries) != {MISSING}]
        for row, (label, entries) in enumerate(rows):
            lines.append(f"| {described.title if row == 0 else ''} | {label} | {' | '.join(entries)} |")
    return "\n".join(lines)


def _ipcs(edition: str, merged: dict[Setting, dict]) -> list[int]:
    """The numbers of images per class that anything was measured at."""
    measured = {setting.ipc for setting in merged}
    return [ipc for ipc in EDITIONS[edition].ipcs if ipc in measured]


def _rows(edition: str, merged: dict[Setting, dict], method: str) -> dict[str, list[dict | None]]:
    """A method's cells for every provider and precision that was measured or is to be, None where a cell is missing."""
    ipcs = _ipcs(edition, merged)
    by_key = {(s.method, s.provider, s.precision, s.ipc): cell for s, cell in merged.items()}
    to_measure = {(s.method, s.provider, s.precision, s.ipc) for s in settings(EDITIONS[edition])}
    rows = {}
    for provider in METHODS[method].providers:
        for precision, name in PRECISION_NAMES.items():
            keys = [(method, provider, precision, ipc) for ipc in ipcs]
            if any(key in by_key or key in to_measure for key in keys):
                rows[f"`{provider}`{name}"] = [by_key.get(key) for key in keys]
    return rows


def _has_gaps(edition: str, merged: dict[Setting, dict]) -> bool:
    """Whether a row that is shown lacks a cell."""
    rows = [cells for method in METHODS for cells in _rows(edition, merged, method).values()]
    return any(None in cells and any(cells) for cells in rows)


def _shown_eager(merged: dict[Setting, dict], cell: dict) -> bool:
    """Whether the eager step that a cell is compared with is the one in the table."""
    wanted = dataclasses.replace(Setting(**cell["setting"]), provider="eager", class_chunk=None)
    shown = merged.get(wanted) or merged.get(dataclasses.replace(wanted, precision="tf32"))
    return shown is None or shown["measured_at"] == cell["eager"]["measured_at"]


def _other_runs(merged: dict[Setting, dict]) -> str:
    other = any(cell["eager"] and not _shown_eager(merged, cell) for cell in merged.values())
    return ", and that run's `eager` where it is not the one shown" if other else ""


def _time_entry(merged: dict[Setting, dict], cell: dict) -> str:
    if cell["status"] != "ok":
        return cell["status"]
    median = cell["time"]["median"]
    text = _three_digits(median * 1e3)
    if "share_of_eager" in cell:
        text += f" ({_three_digits(1 / cell['share_of_eager'])}×)"
    elif cell["setting"]["provider"] != "eager" and cell["eager"] and cell["eager"]["status"] == "ok":
        eager = cell["eager"]["time"]["median"]
        other = "" if _shown_eager(merged, cell) else f" of {_three_digits(eager * 1e3)}"
        text += f" ({_three_digits(eager / median)}×{other})"
    return text


def _memory_entry(cell: dict) -> str:
    if cell["status"] != "ok":
        return cell["status"]
    peak = cell["memory"]["peak_allocated"]
    if peak is None:
        return MISSING
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


def _refresh_picture(path: Path, source: str, draw: Callable[[], None], check: bool) -> list[str]:
    """Draw a picture, unless it names the same source."""
    if path.is_file() and _picture_digest(path) == source:
        return []
    if not check:
        draw()
    return [f"docs/figures/{path.name} was not drawn from the figures that are kept"]


def _picture_digest(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get("Source")
