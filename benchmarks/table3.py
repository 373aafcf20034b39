"""Table 3 of the ATOM paper: time and peak memory of a step of every method; each cell is kept as it ends."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path

from .cells import check_known, measure_cells, measure_slow_again
from .harness import Plan
from .methods import METHODS, Setting


@dataclasses.dataclass(frozen=True)
class Edition:
    """One size of the table.

    Attributes:
        title: heading in reports.
        device: ``"cuda"`` or ``"cpu"``.
        ipcs: images a class.
        sizes: fields of :class:`Setting` that are the same for every method.
        real_divisor: by what the methods' real batches are divided.
        precision: of every provider.
        bfloat16: methods and providers that are measured in bfloat16 as well.
        plan: how long a cell is measured.
    """

    title: str
    device: str
    ipcs: tuple[int, ...]
    sizes: dict
    real_divisor: int
    precision: str
    bfloat16: tuple[tuple[str, str], ...]
    plan: Plan


EDITIONS = {
    "gpu": Edition(
        title="GPU edition: CIFAR-10's shape, the paper's sizes",
        device="cuda",
        ipcs=(1, 10, 50),
        sizes={},
        real_divisor=1,
        precision="tf32",
        bfloat16=(("atom", "compile"), ("atom", "fused-graph")),
        plan=Plan(iterations=100, seconds=60, limit=900),
    ),
    "cpu": Edition(
        title="CPU edition: one thread, reduced width, batch and inner training, not comparable with GPU figures",
        device="cpu",
        ipcs=(1, 10),
        sizes={"width": 32, "class_images": 500, "inner_divisor": 10},
        real_divisor=8,
        precision="float32",
        bfloat16=(),
        # One thread: two on a shared machine's two cores wait for each other, now more, now less.
        plan=Plan(iterations=100, seconds=3, limit=180, threads=1, beside_eager=True),
    ),
}
AGAIN_UNTIL = 560.0  # seconds after the start: no cell is measured again beyond these
# What a short run should have measured: this project's method at its largest, then its like, then the bi-level methods.
WORTH = ("atom", "dam", "atom-channel", "dm", "mtt", "dsa", "dc")
FIRST = (("atom", "tf32"), ("atom", "float32"))


def settings(
    edition: Edition,
    methods: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    ipcs: Sequence[int] | None = None,
) -> list[Setting]:
    """The cells of an edition, or a choice of them, the ones of most worth first.

    Raises:
        ValueError: a name or number that is not in the edition.
    """
    known_providers = {provider for method in METHODS.values() for provider in method.providers}
    check_known("method", methods, METHODS)
    check_known("provider", providers, sorted(known_providers))
    check_known("ipc", ipcs, edition.ipcs)
    cells = []
    for name in WORTH:
        for ipc in reversed(edition.ipcs):
            for provider in METHODS[name].providers:
                if provider == "fused-graph" and edition.device == "cpu":
                    continue
                chosen = (not methods or name in methods) and (not ipcs or ipc in ipcs)
                if chosen and (not providers or provider in providers):
                    cells += _with_precisions(edition, name, provider, ipc)
    # Compilation takes most of the time there is: but for ATOM itself, it comes last.
    return sorted(cells, key=lambda cell: cell.provider == "compile" and (cell.method, cell.precision) not in FIRST)


def _with_precisions(edition: Edition, method: str, provider: str, ipc: int) -> list[Setting]:
    setting = Setting(
        method=method,
        provider=provider,
        ipc=ipc,
        real_batch=METHODS[method].real_batch // edition.real_divisor,
        device=edition.device,
        precision=edition.precision,
        **edition.sizes,
    )
    low = (method, provider) in edition.bfloat16
    return [setting, dataclasses.replace(setting, precision="bfloat16")] if low else [setting]


def results_path(out: Path, edition: str) -> Path:
    """Where an edition's figures are kept in a folder."""
    return out / f"table3-{edition}.json"


def run(
    edition_name: str,
    out: Path,
    *,
    methods: Sequence[str] | None = None,
    providers: Sequence[str] | None = None,
    ipcs: Sequence[int] | None = None,
    plan: Plan | None = None,
    deadline: float | None = None,
) -> Path:
    """Measure the cells of an edition that the results file does not hold yet; each is written as it ends.

    Args:
        edition_name: key of :data:`EDITIONS`.
        out: folder of the results file.
        methods, providers, ipcs: a choice; None for all.
        plan: in place of the edition's.
        deadline: on ``time.monotonic()``'s clock; no cell is begun after it, and none runs beyond it.

    Returns:
        The results file.

    Raises:
        ValueError: a name is unknown, or the file there is corrupt or was measured by another version or machine.
        RuntimeError: there is no device for the edition.
    """
    check_known("edition", [edition_name], EDITIONS)
    edition = EDITIONS[edition_name]
    path, started = results_path(out, edition_name), time.monotonic()
    chosen = settings(edition, methods, providers, ipcs)
    plan = plan or edition.plan
    measure_cells(path, "table3", edition_name, chosen, plan, deadline)
    if plan.beside_eager:
        measure_slow_again(path, chosen, plan, deadline or started + AGAIN_UNTIL)
    return path
