"""A study of what the paper leaves open: one setting at a time changed from the preset ``paper``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from benchmarks.accuracy.cells import architecture
from benchmarks.accuracy.entries import Entry, Job, Row, Section, jobs_for
from benchmarks.accuracy.size import RunSize
from benchmarks.paper import TABLE1, TABLE1_NAME

PROTOCOL, TESTED_NORM = "evaluation", "evaluation_norm"
BASE = "baseline"

# Settings on which the paper contradicts itself or differs from the code that it builds on, and the values they might
# have; ``image_average`` and the precisions are this project's. The last two are not settings of the distillation: the
# same sets, evaluated by other protocols, and on ConvNets with another norm (``norm`` changes both sides).
FACTORS: Mapping[str, tuple[object, ...]] = {
    "loss_scale": (1.0, 10.0, 100.0),
    "norm": ("instance", "batch"),
    "pooling": ("avg2", "avg3"),
    "network_init": ("normal", "default", "uniform"),
    "preprocessing": ("zca", "standard", "zca_standardized"),
    "image_average": (False, True),
    "precision": ("auto", "float16", "bfloat16"),
    "real_precision": (None, "float16"),
    PROTOCOL: ("paper", "paper-fixed", "paper-table7", "dc", "datadam-code"),
    TESTED_NORM: ("instance", "batch"),
}


def section(dataset: str, ipc: int, size: RunSize, factors: Sequence[str] | None = None) -> Section:
    """Return the study of one cell: a row for the preset, then one for every other value of every factor.

    Raises:
        ValueError: an unknown factor.
    """
    for factor in factors or ():
        if factor not in FACTORS:
            raise ValueError(f"factor must be one of {', '.join(FACTORS)}; got {factor!r}")
    column = "accuracy"
    base = jobs_for(size, dataset, ipc, "atom")
    rows = [Row(BASE, {column: Entry(TABLE1["ATOM"].get((dataset, ipc)), base, source=TABLE1_NAME)})]
    for factor in factors or FACTORS:
        for value in FACTORS[factor]:
            if factor == PROTOCOL:
                jobs = jobs_for(size, dataset, ipc, "atom", protocol=value)
            elif factor == TESTED_NORM:
                own = architecture(base[0][0], "convnet")["norm"]
                jobs = jobs_for(size, dataset, ipc, "atom", norm=None if value == own else value)
            else:
                jobs = jobs_for(size, dataset, ipc, "atom", changes={factor: value})
            if [_outcome(job) for job in jobs] != [_outcome(job) for job in base]:
                title = f"{factor} {value:g}" if isinstance(value, float) else f"{factor} {value}"
                rows.append(Row(title, {column: Entry(None, jobs)}))
    return Section(f"{dataset}:{ipc}", "setting", (column,), tuple(rows), BASE)


def _outcome(job: Job) -> tuple:
    """Return what a job's accuracy depends on, with settings that follow from the data set resolved."""
    cell, evaluation = job
    return cell.resolved_config, evaluation
