"""A designed study of what the paper leaves open: one setting at a time around the preset ``paper``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.accuracy.cells import architecture
from benchmarks.accuracy.layout import Entry, Row, Section, jobs_for
from benchmarks.accuracy.paper import TABLE1, TABLE1_NAME
from benchmarks.accuracy.scale import Scale

PROTOCOL, TESTED_NORM = "evaluation", "evaluation_norm"
BASE = "preset paper"

# Settings on which the paper contradicts itself, or the code that it builds on differs from it; and what else they
# might be. DataDAM's code can start from a chosen set; ``image_average`` is this project's own. The last two are no
# settings of the distillation: the same sets, evaluated by other protocols, and on ConvNets of another norm (where
# ``norm`` changes both sides).
FACTORS: Mapping[str, tuple[object, ...]] = {
    "loss_scale": (1.0, 10.0, 100.0),
    "norm": ("instance", "batch"),
    "pooling": ("avg2", "avg3"),
    "network_init": ("normal", "default", "uniform"),
    "preprocessing": ("zca", "standard", "zca_standardized"),
    "image_init": ("real", "herding"),
    "image_average": (False, True),
    PROTOCOL: ("paper", "paper-fixed", "paper-table7", "dc", "datadam-code"),
    TESTED_NORM: ("instance", "batch"),
}


def section(dataset: str, ipc: int, scale: Scale, factors: Sequence[str] | None = None) -> Section:
    """The study at one cell: a row for the preset, then one for every other value of every factor.

    Raises:
        ValueError: an unknown factor.
    """
    for factor in factors or ():
        if factor not in FACTORS:
            raise ValueError(f"factor must be one of {', '.join(FACTORS)}; got {factor!r}")
    column = "accuracy"
    base = jobs_for(scale, dataset, ipc, "atom")
    rows = [Row(BASE, {column: Entry(TABLE1["ATOM"].get((dataset, ipc)), base, source=TABLE1_NAME)})]
    for factor in factors or FACTORS:
        for value in FACTORS[factor]:
            if factor == PROTOCOL:
                jobs = jobs_for(scale, dataset, ipc, "atom", protocol=value)
            elif factor == TESTED_NORM:
                own = architecture(base[0][0], "convnet")["norm"]
                jobs = jobs_for(scale, dataset, ipc, "atom", norm=None if value == own else value)
            else:
                jobs = jobs_for(scale, dataset, ipc, "atom", changes={factor: value})
            if [_outcome(job) for job in jobs] != [_outcome(job) for job in base]:
                rows.append(Row(f"{factor} {value:g}" if isinstance(value, float) else f"{factor} {value}",
                                {column: Entry(None, jobs)}))  # fmt: skip
    return Section(f"{dataset}:{ipc}", "setting", (column,), tuple(rows), BASE)


def _outcome(job) -> tuple:
    """What a job's accuracy depends on, with what follows from the data set put in."""
    cell, evaluation = job
    return cell.resolved_config, evaluation
