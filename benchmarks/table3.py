"""Table 3 of the paper: time and peak memory of a step of every method; each cell is kept as it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from .harness import Timing
from .methods import AUTOTUNED, NEED_GPU, TIMED, Workload
from .timings import check_known, measure_cells, measure_slow_again


@dataclasses.dataclass(frozen=True)
class Edition:
    """One size of the table.

    Attributes:
        title: heading in reports.
        device: ``"cuda"`` or ``"cpu"``.
        ipcs: images per class.
        sizes: fields of :class:`Workload` that all methods share.
        real_divisor: divisor of the methods' real batches.
        precision: precision of every implementation.
        variants: methods, implementations and fields of :class:`Workload` of further rows.
        timing: duration of each measurement.
    """

    title: str
    device: str
    ipcs: tuple[int, ...]
    sizes: dict
    real_divisor: int
    precision: str
    variants: tuple[tuple[str, str, dict], ...]
    timing: Timing


COMPILED = ("compile", "compile-graph")
EDITIONS = {
    "gpu": Edition(
        title="GPU edition: CIFAR-10's shape, the paper's sizes",
        device="cuda",
        ipcs=(1, 10, 50),
        sizes={},
        real_divisor=1,
        precision="tf32",
        variants=(
            ("atom", "fused-graph", {"real_precision": "float16"}),
            ("atom", "fused-graph", {"precision": "float16"}),
            ("atom", "fused-graph", {"precision": "bfloat16"}),
            ("atom", "compile", {"precision": "bfloat16"}),
            *(("atom", name, {"norm": "batch"}) for name in ("fused-graph", "eager-batched", *COMPILED)),
        ),
        timing=Timing(iterations=100, seconds=60, limit=900),
    ),
    "cpu": Edition(
        title="CPU edition: one thread, reduced width, batch and inner training, not comparable with GPU figures",
        device="cpu",
        ipcs=(1, 10),
        sizes={"width": 32, "class_images": 500, "inner_divisor": 10},
        real_divisor=8,
        precision="float32",
        variants=(),
        # One thread: two on the two cores of a shared machine wait for each other, by varying amounts.
        timing=Timing(iterations=100, seconds=3, limit=180, threads=1, beside_eager=True),
    ),
}
AGAIN_UNTIL = 560.0  # seconds after the start until which cells are measured again
# The order of a run that may be cut short: this project's method, its relatives, then the bi-level methods.
ORDER = ("atom", "dam", "atom-channel", "dm", "mtt", "dsa", "dc")


def workloads(
    edition: Edition,
    methods: Sequence[str] | None = None,
    implementations: Sequence[str] | None = None,
    ipcs: Sequence[int] | None = None,
) -> list[Workload]:
    """Return the cells of an edition, or some of them, the most important first.

    Raises:
        ValueError: a name or number that is not in the edition.
    """
    known = {implementation for method in TIMED.values() for implementation in method.implementations}
    check_known("method", methods, TIMED)
    check_known("implementation", implementations, sorted(known))
    check_known("ipc", ipcs, edition.ipcs)
    cells = []
    for name in ORDER:
        for ipc in reversed(edition.ipcs):
            for implementation in TIMED[name].implementations:
                if implementation in NEED_GPU and edition.device == "cpu":
                    continue
                if implementation == AUTOTUNED and ipc != max(edition.ipcs):
                    continue
                chosen = (not methods or name in methods) and (not ipcs or ipc in ipcs)
                if chosen and (not implementations or implementation in implementations):
                    cells += _with_variants(edition, name, implementation, ipc)
    return sorted(cells, key=_lateness)


def _lateness(cell: Workload) -> int:
    """Return 1 for what is compiled, which takes most of the time, except for ATOM as published; 2 for autotuning."""
    if cell.implementation == AUTOTUNED:
        return 2
    as_published = cell.method == "atom" and cell.precision in ("tf32", "float32") and cell.norm is None
    return int(cell.implementation in COMPILED and not as_published)


def _with_variants(edition: Edition, method: str, implementation: str, ipc: int) -> list[Workload]:
    workload = Workload(
        method=method,
        implementation=implementation,
        ipc=ipc,
        real_batch=TIMED[method].real_batch // edition.real_divisor,
        device=edition.device,
        precision=edition.precision,
        **edition.sizes,
    )
    changes = [fields for name, other, fields in edition.variants if (name, other) == (method, implementation)]
    return [workload, *(dataclasses.replace(workload, **fields) for fields in changes)]


def results_path(out: Path, edition: str) -> Path:
    """Return the results file of an edition in a folder."""
    return out / f"table3-{edition}.json"


def run(
    edition_name: str,
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    implementations: Sequence[str] | None = None,
    ipcs: Sequence[int] | None = None,
    timing: Timing | None = None,
    deadline: float | None = None,
) -> Path:
    """Measure the cells of an edition that the results file does not hold yet; write each as it ends.

    Args:
        edition_name: key of :data:`EDITIONS`.
        out: folder of the results file.
        methods, implementations, ipcs: cells to measure; None: all.
        timing: replaces the edition's timing.
        deadline: on ``time.monotonic()``'s clock; no cell begins after it or runs beyond it.

    Returns:
        The results file.

    Raises:
        ValueError: a name is unknown, or the file there is corrupt or was measured by another version or machine.
        RuntimeError: there is no device for the edition.
    """
    check_known("edition", [edition_name], EDITIONS)
    edition = EDITIONS[edition_name]
    path, started = results_path(out, edition_name), time.monotonic()
    chosen = workloads(edition, methods, implementations, ipcs)
    timing = timing or edition.timing
    measure_cells(path, "table3", edition_name, chosen, timing, deadline)
    if timing.beside_eager:
        measure_slow_again(path, chosen, timing, deadline or started + AGAIN_UNTIL)
    return path
