"""How a step of ATOM grows with classes, images a class and resolution, one of them varied at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .cells import check_known, measure_cells
from .harness import Plan
from .methods import Setting

AXES = {"classes": "classes", "ipc": "images per class", "resolution": "pixels per side"}


@dataclasses.dataclass(frozen=True)
class Edition:
    """One size of the measurement.

    Attributes:
        title: heading in reports.
        base: the setting that the others differ from in one field.
        values: by field, what it is varied over.
        providers: what is measured; the last is this project's.
        chunk: classes at once, where the number of classes is varied and this project's step takes them in chunks.
        plan: how long a cell is measured.
    """

    title: str
    base: Setting
    values: dict[str, tuple[int, ...]]
    providers: tuple[str, ...]
    chunk: int
    plan: Plan


EDITIONS = {
    "gpu": Edition(
        title="a GPU",
        base=Setting("atom", "eager", ipc=10, class_images=500),
        values={"classes": (10, 20, 50, 100, 200), "ipc": (1, 10, 50, 100), "resolution": (32, 64, 128)},
        providers=("eager", "fused-graph"),
        chunk=10,
        plan=Plan(iterations=50, seconds=10, limit=120),
    ),
    "cpu": Edition(
        title="a CPU, reduced width and batch",
        base=Setting(
            "atom", "eager", ipc=1, class_images=100, real_batch=16, width=16, precision="float32", device="cpu"
        ),
        values={"classes": (10, 20, 50, 100, 200), "ipc": (1, 10, 50, 100), "resolution": (32, 64, 128)},
        providers=("eager", "fused"),
        chunk=10,
        plan=Plan(iterations=20, seconds=1.5, limit=120),
    ),
}


def settings(edition: Edition) -> list[Setting]:
    """Every cell once, though the base lies on every axis."""
    cells = [cell for field in edition.values for line in lines(edition, field).values() for cell in line.values()]
    return list(dict.fromkeys(cells))


def lines(edition: Edition, field: str) -> dict[str, dict[int, Setting]]:
    """By label, the setting of every value of a varied field."""
    values = edition.values[field]
    found = {
        provider: {value: setting(edition, field, value, provider) for value in values}
        for provider in edition.providers
    }
    if field == "classes":
        *_, (provider, line) = found.items()
        found[f"{provider}, {edition.chunk} classes at once"] = {
            value: dataclasses.replace(cell, class_chunk=edition.chunk) for value, cell in line.items()
        }
    return found


def setting(edition: Edition, field: str, value: int, provider: str) -> Setting:
    """The base with one field changed."""
    changed = dataclasses.replace(edition.base, provider=provider, **{field: value})
    # One block more each time the side doubles, so that the embedding keeps its 4x4, as in the paper.
    return dataclasses.replace(changed, depth=changed.resolution.bit_length() - 3)


def results_path(out: Path, edition: str) -> Path:
    """Where an edition's figures are kept in a folder."""
    return out / f"scaling-{edition}.json"


def run(edition_name: str, out: Path, *, deadline: float | None = None) -> Path:
    """Measure the cells of an edition that the results file does not hold yet.

    Raises:
        ValueError, RuntimeError: as :func:`benchmarks.cells.measure_cells`; or there is no such edition.
    """
    check_known("edition", [edition_name], EDITIONS)
    edition = EDITIONS[edition_name]
    path = results_path(out, edition_name)
    measure_cells(path, "scaling", edition_name, settings(edition), edition.plan, deadline)
    return path
