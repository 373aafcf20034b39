"""The parts of tables and figures: sections of rows of entries, and the cells behind an entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.accuracy.cells import Cell, Evaluation
from benchmarks.accuracy.size import RunSize
from benchmarks.methods import get_method
from benchmarks.paper import Accuracy

Job = tuple[Cell, Evaluation | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One figure of a table.

    Attributes:
        paper: mean and deviation in the paper.
        jobs: sets and evaluations whose mean is ours, one per set; empty if the paper's figure stands alone.
        average: True if ours is the mean of the row's other entries.
        source: the paper's table that the figure comes from, if it is not the reproduced one.
    """

    paper: Accuracy | None = None
    jobs: tuple[Job, ...] = ()
    average: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """Entries by the names of their columns.

    Attributes:
        title, entries: contents.
        base: title of the row that this one is compared with; None: the section's.
    """

    title: str
    entries: Mapping[str, Entry]
    base: str | None = None


@dataclasses.dataclass(frozen=True)
class Section:
    """One table under a title.

    Attributes:
        title: title of the section: a cell as DATASET:IPC, or "".
        heading: heading of the rows' titles.
        columns, rows: contents.
        base: title of the row that the others are compared with, set by set, unless they name another.
    """

    title: str
    heading: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    base: str | None = None


def make_cell(
    size: RunSize,
    dataset: str,
    ipc: int,
    method: str,
    seed: int,
    milestones: tuple[int, ...] = (),
    changes: Mapping[str, object] | None = None,
) -> Cell:
    """Return a cell of a size; ``changes`` replace settings of the size and the method."""
    watched = method in ("herding", "k-center", "forgetting")
    return Cell(
        dataset,
        ipc,
        method,
        seed,
        tuple({**size.settings_of(method), **(changes or {})}.items()),
        size.selection_epochs if watched else 0,
        size.protocol if watched else "",
        milestones,
        tuple(size.settings.items()) if method in size.of_methods else None,
    )


def jobs_for(
    size: RunSize,
    dataset: str,
    ipc: int,
    method: str,
    milestones: tuple[int, ...] = (),
    *,
    network: str = "convnet",
    protocol: str | None = None,
    changes: Mapping[str, object] | None = None,
    iteration: int | None = None,
    norm: str | None = None,
) -> tuple[Job, ...]:
    """Return the jobs of an entry: the size's number of sets, or the one full data set, each evaluated alike."""
    get_method(method)
    evaluation = Evaluation(network, size.training(protocol), size.networks, iteration, norm)
    seeds = 1 if method == "full" else size.seeds
    cells = (make_cell(size, dataset, ipc, method, seed, milestones, changes) for seed in range(seeds))
    return tuple((cell, evaluation) for cell in cells)
