"""The paper's figures as PNG: accuracy over iterations, and grids of synthetic images."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from atom_fast.pictures import describe, save_curves, save_synthetic_grid
from benchmarks.accuracy.cells import cell_folder
from benchmarks.accuracy.tables import Plan
from benchmarks.accuracy.work import final_set_file, load_set


def draw_curves(record: Mapping, path: Path) -> Path | None:
    """Draw the mean accuracy of a record's rows over its columns (iterations), with deviations as bands.

    Returns:
        The path written; None if nothing is measured yet.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    sections = [section for section in record["sections"] if any(_points(row) for row in section["rows"])]
    if not sections:
        return None
    figure = Figure(figsize=(6 * len(sections), 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, section in zip(figure.subplots(1, len(sections), squeeze=False)[0], sections, strict=True):
        for row in section["rows"]:
            if points := _points(row):
                iterations, means, deviations = zip(*points, strict=True)
                (line,) = axes.plot(iterations, means, marker=".", linewidth=1.2, label=row["title"])
                low = [mean - deviation for mean, deviation in zip(means, deviations, strict=True)]
                high = [mean + deviation for mean, deviation in zip(means, deviations, strict=True)]
                axes.fill_between(iterations, low, high, color=line.get_color(), alpha=0.15, linewidth=0)
        dataset, _, ipc = section["title"].partition(":")
        title = f"{record['data'].get(dataset, dataset)}, {ipc} image{'' if ipc == '1' else 's'} per class"
        axes.set(xlabel="iteration", ylabel="test accuracy, %", title=title)
    return save_curves(figure, path)


def _points(row: Mapping) -> list[tuple[int, float, float]]:
    return [
        (int(iteration), entry["ours"]["mean"], entry["ours"]["std"])
        for iteration, entry in row["entries"].items()
        if entry["ours"] and entry["ours"]["mean"] is not None
    ]


def draw_grids(plan: Plan, output: Path) -> list[Path]:
    """Draw every finished set of a plan as a PNG, through the inverse of its preprocessing."""
    written = []
    for cell, _ in plan.units:
        if final_set_file(output, cell).is_file():
            synthetic = load_set(cell_folder(output, cell), cell)
            path = output / f"{plan.target}-{cell.dataset}-ipc{cell.ipc}.png"
            written.append(save_synthetic_grid(synthetic, path, title=describe(synthetic)))
    return written
