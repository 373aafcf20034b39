"""Keep the measured sections of README and docs, and the pictures, equal to the results files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

from atom_fast._files import write_atomically

from . import compilers, findings, plots, scaling
from .harness import load_results
from .markdown import replace_sections
from .pages import benchmarks, performance, readme, records, results
from .timings import digest


def refresh(folder: Path, root: Path, *, check: bool = False) -> list[str]:
    """Render every section from the results and put it between its marks on its page; draw the pictures.

    Args:
        folder: folder of results files. Sections without results are empty.
        root: folder of ``README.md`` and ``docs``; their sections lie between ``<!-- NAME:start -->`` and ``:end``.
        check: write nothing.

    Returns:
        A sentence for everything that was, or with ``check`` is, out of date.

    Raises:
        FileNotFoundError: there is no such folder or page.
        ValueError: a results file is corrupt, or a page lacks a mark.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"no results folder at {folder}")
    stale = []
    for name, sections in pages(folder).items():
        page = root / name
        places = [(section, text, folder) for section, text in sections.items()]
        text, found = replace_sections(page.read_text("utf-8"), places, page)
        if found and not check:
            write_atomically(page, text)
        stale += found
    figures = root / "docs" / "figures"
    for name, source, draw in pictures(folder, figures):
        stale += _refresh_picture(figures / name, source, draw, check)
    return stale


def pages(folder: Path) -> dict[str, dict[str, str]]:
    """Return the sections of every page by name."""
    gpu, cpu = _files(folder, "table3", "gpu"), _files(folder, "table3", "cpu")
    kernels, table1 = sorted(folder.glob("kernels-*.json")), folder / "accuracy" / f"{results.TABLE1}.json"
    return {
        "README.md": {
            "caption": _where(readme.caption, table1),
            "gains": _where(readme.gains, table1, gpu, kernels, folder / "busy-cpu.json"),
            "demo": _where(readme.demo, folder / "demo.json"),
            "tables": "\n\n".join(
                filter(
                    None,
                    (
                        _where(readme.accuracy_table, table1),
                        _where(readme.steps, gpu, table1),
                        _where(readme.methods, *cpu),
                    ),
                )
            ),
        },
        "docs/results.md": results.sections(folder / "accuracy"),
        "docs/records.md": {"records": records.section(folder / "records")},
        "docs/usage.md": {
            "class-chunks": _where(performance.class_chunks, folder / "scaling-cpu.json"),
            "compilers": _where(compilers.table, folder / "compilers.json"),
        },
        "docs/benchmarks.md": {
            "table3-gpu": benchmarks.edition("gpu", gpu),
            "table3-cpu": benchmarks.edition("cpu", cpu),
        },
        "docs/performance.md": {
            "budget": performance.budget(),
            "step": _where(performance.step, gpu),
            "bandwidth": _where(performance.bandwidth, kernels),
            "instructions": _where(performance.instructions, folder / "instructions.json"),
            "precision": _where(performance.precision, folder / "precision-cpu.json"),
            "kept-memory": _where(performance.kept_memory, folder / "step-cpu-2-classes.json"),
            "bfloat16": _where(performance.bfloat16, folder / "step-cpu-bfloat16.json"),
            "busy": _where(performance.busy, folder / "busy-cpu.json"),
            "digits": _where(performance.digits, folder / "digits-cpu.json"),
            "evaluation": _where(
                performance.evaluation, folder / "evaluation-gpu.json", folder / "evaluation-cpu.json"
            ),
            "ranks": _where(performance.ranks, folder / "ranks-cpu.json"),
        },
    }


def pictures(folder: Path, figures: Path) -> Iterator[tuple[str, str, Callable[[], None]]]:
    """Yield name, digest of the sources, and drawing function of every picture whose results exist."""
    if files := _files(folder, "table3", "gpu"):
        yield "table3-gpu.png", digest(files), partial(plots.plot_table3, figures / "table3-gpu.png", "gpu", files)
    for edition in scaling.EDITIONS:
        if files := _files(folder, "scaling", edition):
            name = f"scaling-{edition}.png"
            yield name, digest(files), partial(plots.plot_scaling, figures / name, edition, files)
    if kernels := sorted(folder.glob("kernels-*.json")):
        name = "bandwidth.png"
        yield name, plots.kernels_digest(kernels), partial(plots.plot_bandwidth, figures / name, kernels)
    yield from _accuracy_pictures(folder / "accuracy", figures)


def _accuracy_pictures(folder: Path, figures: Path) -> Iterator[tuple[str, str, Callable[[], None]]]:
    def file(name: str) -> Path:
        return folder / f"{name}.json"

    studies = [file("cifar10-ipc1-study"), file("cifar10-ipc10-study")]
    unit = [file("cifar10-ipc10-herding"), file("cifar10-ipc10-unit")]
    table1, scale, average = file(results.TABLE1), file("cifar10-ipc10-scale"), file("cifar10-ipc10-average")
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


def _where(render: Callable[..., str], *files: Path | Sequence[Path]) -> str:
    """Render a section from its files; return "" if one is missing."""
    given = [path for entry in files for path in ([entry] if isinstance(entry, Path) else entry or [Path("/nowhere")])]
    return render(*files) if files and all(path.exists() for path in given) else ""


def _files(folder: Path, kind: str, edition: str) -> list[Path]:
    """Return the results files of an edition; `benchmarks.timings.merge` merges several."""
    files = sorted(folder.glob(f"{kind}-*.json"))
    return [path for path in files if load_results(path)["edition"] == edition]


def _refresh_picture(path: Path, source: str, draw: Callable[[], None], check: bool) -> list[str]:
    """Draw a picture unless the existing one names the same source."""
    if path.is_file() and _picture_digest(path) == source:
        return []
    if not check:
        draw()
    return [f"docs/figures/{path.name} was not drawn from the results that are kept"]


def _picture_digest(path: Path) -> str | None:
    from PIL import Image

    with Image.open(path) as picture:
        return picture.info.get("Source")
