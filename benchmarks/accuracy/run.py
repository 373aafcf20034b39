"""``atom-fast reproduce``: plan, say what fits, do it, and write the results."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path

from atom_fast._files import write_atomically
from atom_fast.distillation.logs import log as say
from atom_fast.distillation.ranks import ALONE, World, own_device
from benchmarks.accuracy.budget import Estimator, Unit, choose, common_settings, describe, duration
from benchmarks.accuracy.cells import check_same_images
from benchmarks.accuracy.figures import draw_curves, draw_grids
from benchmarks.accuracy.tables import collect, render
from benchmarks.accuracy.targets import Plan
from benchmarks.accuracy.work import Shelf, finished, work

# What is wrong with one cell need not be with the next: it diverges, is too large (on a CPU a plain RuntimeError), is
# damaged, or does not fit its data or what was begun of it.
_OF_ONE_CELL = (ValueError, RuntimeError)


def reproduce(
    plan: Plan,
    output: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    budget: float | None = None,
    only: Sequence[int] | None = None,
    device: str | None = None,
    progress: bool = True,
    report: Callable[[str], None] = say,
    world: World = ALONE,
) -> dict:
    """Do what is missing of a table or figure, and write ``TARGET.json``, ``TARGET.md`` and pictures.

    Cells that are finished are kept, whoever did them; those that another process is at are passed over. Several
    processes with one output folder share the work; the one that ends last writes the whole table. A cell that fails is
    said, and marked in the table; the others are done nevertheless.

    Args:
        plan: of `benchmarks.accuracy.targets`.
        output: folder of cells and results.
        data_dir, download: where the data are, see `load_named`.
        budget: minutes; what does not fit is named and left. None: no limit.
        only: numbers of units, from 1 as `list_units` gives them; None: all.
        device: where to compute; None: the GPU, if there is one.
        progress: show progress bars on standard error.
        report: is told what is done.
        world: processes that were started together (`atom_fast.distillation.ranks.join`), a GPU each; each
            calls this with the same arguments, and the first one writes the results when all have ended.

    Returns:
        The record that ``TARGET.json`` holds, see `collect`.

    Raises:
        FileNotFoundError: data are not there; says where they are looked for and how to get them.
        ValueError: a budget below 0, a unit that is not there, a damaged cell, or one that was made from other images
            than the data at hand; nothing was done.
        RuntimeError: cells failed; the results of the others are written.
        SystemExit: stopped by a signal; what was done is kept, and the results of finished cells are written.
    """
    if budget is not None and not budget >= 0:  # NaN neither
        raise ValueError(f"budget must be at least 0 minutes; got {budget:g}")
    output, common = Path(output), common_settings(plan.units)

    def tell(text: str) -> None:
        report(world.label + text)

    progress = progress and world.rank == 0
    shelf = Shelf(data_dir, download=download, device=own_device(device, world), progress=progress)
    units = _chosen(plan.units, only)
    missing = [unit for unit in units if not finished(output, *unit)]
    tell(f"{plan.target}: {len(units)} cells, {len(units) - len(missing)} of them finished")
    _load_data(plan, missing, output, shelf, world)
    estimator = Estimator(output, plan.units, shelf)
    if budget is not None:
        missing = _fitting(missing, estimator, budget, common, tell)
    failed: dict[str, str] = {}
    try:
        with _sigterm_exits():
            passed = _do(output, missing, estimator, budget, common, tell, failed)
    except (SystemExit, KeyboardInterrupt):
        tell("stopped; what is done is kept, and the same command continues")
        if world.rank == 0:
            write_results(plan, output, tell, failed)  # of what is finished
        raise
    everyones = world.exchange(failed)  # when all have ended
    left = {unit[0].folder_name for unit in units if not finished(output, *unit)}
    failed = {name: error for one in everyones for name, error in one.items() if name in left}
    if world.rank > 0:
        return collect(plan, output, failed)
    elsewhere = left.intersection(cell.folder_name for cell, _ in passed) - failed.keys()
    if elsewhere:
        tell(
            f"{len(elsewhere)} cells are being run by other processes; run the same command again when they have ended"
        )
    record = write_results(plan, output, tell, failed)
    if failed:
        listed = "; ".join(f"{name}: {error.strip().partition(chr(10))[0]}" for name, error in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(units)} cells failed; the results of all others are written: {listed}"
        )
    return record


@contextlib.contextmanager
def _sigterm_exits() -> Iterator[None]:
    """Have SIGTERM raise SystemExit, as SIGINT raises KeyboardInterrupt, so that what is finished is written.

    A distillation handles both itself while it runs. Only the main thread may: elsewhere nothing changes.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def write_results(
    plan: Plan, output: Path, report: Callable[[str], None] = say, failed: Mapping[str, str] | None = None
) -> dict:
    """Write the table or figure of what is finished: JSON, Markdown, pictures; arguments and errors as `collect`."""
    record = collect(plan, output, failed)
    name = plan.target
    write_atomically(output / f"{name}.json", json.dumps(record, indent=1) + "\n")
    written = [output / f"{name}.json"]
    if plan.kind == "grids":
        written += draw_grids(plan, output)
    else:
        written.append(write_atomically(output / f"{name}.md", render(record) + "\n"))
    if plan.kind == "curves" and (picture := draw_curves(record, output / f"{name}.png")):
        written.append(picture)
    report(f"written: {', '.join(map(str, written))}")
    return record


def list_units(plan: Plan, output: str | os.PathLike) -> list[str]:
    """Every unit of a plan with its number, and whether it is finished; for ``--only`` and a scheduler's array."""
    lines, common = [], common_settings(plan.units)
    for number, unit in enumerate(plan.units, start=1):
        state = "finished" if finished(Path(output), *unit) else "to do"
        lines.append(f"{number:3d}  {state:8s}  {describe(unit, common)}")
    return lines


def _chosen(units: list[Unit], only: Sequence[int] | None) -> list[Unit]:
    if only is None:
        return units
    for number in only:
        if not 1 <= number <= len(units):
            raise ValueError(f"there are cells 1 to {len(units)}; got {number}")
    return [units[number - 1] for number in dict.fromkeys(only)]


def _load_data(plan: Plan, missing: list[Unit], output: Path, shelf: Shelf, world: World) -> None:
    """Load the data of missing cells, on each machine by one process first, and compare them with what is there.

    Raises:
        FileNotFoundError, ValueError: as `load_named` and `check_same_images`.
    """
    found = world.exchange(sorted({cell.dataset for cell, _ in missing}))  # another process may be finishing cells
    at_hand = {}
    for name in sorted(set().union(*found)):
        data, title = world.after_first(lambda name=name: shelf.data(name))
        at_hand[name] = data.fingerprint, title
    check_same_images(output, (cell for cell, _ in plan.units), at_hand)


def _fitting(
    missing: list[Unit], estimator: Estimator, budget: float, common: Collection, report: Callable[[str], None]
) -> list[Unit]:
    """What fits into the budget, said beforehand, with what is left."""
    from tqdm import tqdm

    report(
        f"estimating {len(missing)} cells: where none like it is finished, a few steps and epochs of a cell are timed, "
        "for up to a minute or two"
    )
    seconds = []
    with tqdm(missing, desc="estimating", unit="cell", disable=not estimator.shelf.progress) as bar:
        for unit in bar:
            bar.set_postfix_str(describe(unit, common))
            seconds.append(_estimate(estimator, unit))
    fitting, left = choose(missing, seconds, budget)
    needed = dict(zip(missing, seconds, strict=True))
    total = sum(needed[unit] for unit in fitting)
    report(
        f"{len(fitting)} of {len(missing)} cells fit into {budget:g} min, by estimate {duration(total)} (not counted: "
        "fitting the whitening, once for each data set, and herding for starting images):"
    )
    for unit in fitting:
        report(f"  will run, {duration(needed[unit])}: {describe(unit, common)}")
    for unit in left:
        report(f"  left, {duration(needed[unit])}: {describe(unit, common)}")
    return fitting


def _estimate(estimator: Estimator, unit: Unit) -> float:
    """Seconds of a unit; 0 where that fails, as the unit then will, and say why."""
    try:
        return estimator.seconds(unit)
    except _OF_ONE_CELL:
        return 0.0


def _do(
    output: Path,
    units: list[Unit],
    estimator: Estimator,
    budget: float | None,
    common: Collection,
    report: Callable[[str], None],
    failed: dict[str, str],
) -> list[Unit]:
    """Work through units, noting in ``failed`` which fail and why; those that other processes hold are returned."""
    passed, started = [], time.monotonic()
    for place, unit in enumerate(units, start=1):
        if finished(output, *unit):
            continue  # by another process, meanwhile
        begun = time.monotonic()
        if budget is not None and begun - started + _estimate(estimator, unit) > 60 * budget:
            report(f"left, because the budget is used up: {describe(unit, common)}")
            continue
        try:
            mine = work(output, *unit, estimator.shelf)
        except _OF_ONE_CELL as error:
            failed[unit[0].folder_name] = str(error)
            report(f"{place} of {len(units)} failed: {describe(unit, common)}: {error}")
            continue
        if mine:
            report(f"{place} of {len(units)} in {duration(time.monotonic() - begun)}: {describe(unit, common)}")
        else:
            passed.append(unit)
    return passed
