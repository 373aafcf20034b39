"""Time and memory of a step of ATOM against classes, images per class and resolution, one varied at a time."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from .harness import Timing
from .methods import Workload
from .timings import check_known, measure_cells

AXES = {"classes": "classes", "ipc": "images per class", "resolution": "pixels per side"}


@dataclasses.dataclass(frozen=True)
class Edition:
    """One size of the measurement.

    Attributes:
        title: heading in reports.
        base: workload that the others differ from in one field.
        values: values of each varied field.
        implementations: measured implementations; the last is this project's.
        chunk: classes per chunk of this project's step when it is also measured in chunks of classes.
        timing: duration of each measurement.
    """

    title: str
    base: Workload
    values: dict[str, tuple[int, ...]]
    implementations: tuple[str, ...]
    chunk: int
    timing: Timing


EDITIONS = {
    "gpu": Edition(
        title="a GPU",
        base=Workload("atom", "eager", ipc=10, class_images=500),
        values={"classes": (10, 20, 50, 100, 200), "ipc": (1, 10, 50, 100), "resolution": (32, 64, 128)},
        implementations=("eager", "fused-graph"),
        chunk=10,
        timing=Timing(iterations=50, seconds=10, limit=120),
    ),
    "cpu": Edition(
        title="a CPU, reduced width and batch",
        base=Workload(
            "atom", "eager", ipc=1, class_images=100, real_batch=16, width=16, precision="float32", device="cpu"
        ),
        values={"classes": (10, 20, 50, 100, 200), "ipc": (1, 10, 50, 100), "resolution": (32, 64, 128)},
        implementations=("eager", "fused"),
        chunk=10,
        timing=Timing(iterations=20, seconds=1.5, limit=120),
    ),
}


def workloads(edition: Edition) -> list[Workload]:
    """Return every cell once; the base lies on every axis."""
    cells = [cell for field in edition.values for line in lines(edition, field).values() for cell in line.values()]
    return list(dict.fromkeys(cells))


def lines(edition: Edition, field: str) -> dict[str, dict[int, Workload]]:
    """Return the workload of every value of a varied field, by label of the line."""
    values = edition.values[field]
    found = {
        implementation: {value: workload(edition, field, value, implementation) for value in values}
        for implementation in edition.implementations
    }
    if field == "classes":
        *_, (implementation, line) = found.items()
        found[f"{implementation}, {edition.chunk} classes at once"] = {
            value: dataclasses.replace(cell, class_chunk=edition.chunk) for value, cell in line.items()
        }
    return found


def workload(edition: Edition, field: str, value: int, implementation: str) -> Workload:
    """Return the base with one field changed."""
    changed = dataclasses.replace(edition.base, implementation=implementation, **{field: value})
    # One more block per doubling of the side, so that the embedding stays 4x4, as in the paper.
    return dataclasses.replace(changed, depth=changed.resolution.bit_length() - 3)


def results_path(out: Path, edition: str) -> Path:
    """Return the results file of an edition in a folder."""
    return out / f"scaling-{edition}.json"


def run(edition_name: str, out: Path, *, deadline: float | None = None) -> Path:
    """Measure the cells of an edition that the results file does not hold yet.

    Raises:
        ValueError, RuntimeError: as :func:`benchmarks.timings.measure_cells`, or an unknown edition.
    """
    check_known("edition", [edition_name], EDITIONS)
    edition = EDITIONS[edition_name]
    path = results_path(out, edition_name)
    measure_cells(path, "scaling", edition_name, workloads(edition), edition.timing, deadline)
    return path
