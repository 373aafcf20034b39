"""What tables and figures are put together from: sections of rows of entries, and the cells behind an entry."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from benchmarks.accuracy.cells import Cell, Evaluation
from benchmarks.accuracy.methods import get_method
from benchmarks.accuracy.paper import Accuracy
from benchmarks.accuracy.scale import Scale

Job = tuple[Cell, Evaluation | None]


@dataclasses.dataclass(frozen=True)
class Entry:
    """One figure of a table.

    Attributes:
        paper: the paper's mean and deviation.
        jobs: what ours is the mean of, one a set; none where the paper's figure stands alone.
        average: ours is the mean of the row's other entries.
        source: the table of the paper that its figure stands in, where that is not the one reproduced.
    """

    paper: Accuracy | None = None
    jobs: tuple[Job, ...] = ()
    average: bool = False
    source: str = ""


@dataclasses.dataclass(frozen=True)
class Row:
    """Entries by the names of their columns."""

    title: str
    entries: Mapping[str, Entry]


@dataclasses.dataclass(frozen=True)
class Section:
    """A table of its own under a title.

    Attributes:
        title: of the section; a cell as DATASET:IPC, or nothing.
        heading: stands above the rows' titles.
        columns, rows: what it consists of.
        base: title of the row that the others are compared with, set by set.
    """

    title: str
    heading: str
    columns: tuple[str, ...]
    rows: tuple[Row, ...]
    base: str | None = None


def make_cell(
    scale: Scale,
    dataset: str,
    ipc: int,
    method: str,
    seed: int,
    milestones: tuple[int, ...] = (),
    changes: Mapping[str, object] | None = None,
) -> Cell:
    """A cell at a scale; ``changes`` are settings in place of the scale's and the method's."""
    watched = method in ("herding", "k-center", "forgetting")
    return Cell(
        dataset,
        ipc,
        method,
        seed,
        tuple({**scale.settings, **(changes or {})}.items()),
        scale.selection_epochs if watched else 0,
        scale.protocol if watched else "",
        milestones,
    )


def jobs_for(
    scale: Scale,
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
    """What an entry is the mean of: the scale's number of sets, or the one full data set, each evaluated alike."""
    get_method(method)
    evaluation = Evaluation(network, scale.training(protocol), scale.networks, iteration, norm)
    seeds = 1 if method == "full" else scale.seeds
    cells = (make_cell(scale, dataset, ipc, method, seed, milestones, changes) for seed in range(seeds))
    return tuple((cell, evaluation) for cell in cells)
