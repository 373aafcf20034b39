"""Run a table or figure: do the cells that are missing, and write the results beside the paper's."""

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
from typing import TypeVar

from atom_fast._files import write_atomically
from atom_fast.distillation import ranks
from atom_fast.distillation.logs import log
from benchmarks.accuracy.cells import cells_of_earlier_versions, check_same_images
from benchmarks.accuracy.figures import draw_curves, draw_grids
from benchmarks.accuracy.record import collect
from benchmarks.accuracy.render import Record, render
from benchmarks.accuracy.tables import Plan, Unit
from benchmarks.accuracy.work import DataCache, finished, work

_T = TypeVar("_T")

# Errors of one cell that the next need not have: it diverges, is too large (a plain RuntimeError on a CPU), is damaged,
# or does not fit its data or the part of it that exists.
_OF_ONE_CELL = (ValueError, RuntimeError)


def reproduce(
    plan: Plan,
    output: str | os.PathLike,
    *,
    data_dir: str | os.PathLike | None = None,
    download: bool = False,
    only: Sequence[int] | None = None,
    device: str | None = None,
    progress: bool = True,
    report: Callable[[str], None] = log,
) -> dict:
    """Do the missing cells of a table or figure, and write ``TARGET.json``, ``TARGET.md`` and pictures.

    Finished cells are kept, whichever process did them; cells that another process holds are passed over. Several
    processes with one output folder share the work, and the last one to end writes the whole table. A cell that fails
    is reported and marked in the table, and the other cells are done. Processes started together (`ranks.join`) each
    call this with the same arguments, use one GPU each, and the first one writes the results when all have ended.

    Args:
        plan: from `benchmarks.accuracy.tables.plan`.
        output: folder of cells and results.
        data_dir, download: location of the data, see `load_named`.
        only: numbers of units, from 1 as `list_units` gives them; None: all.
        device: device that computes; None: the GPU, if there is one.
        progress: show progress bars on standard error.
        report: called with each message.

    Returns:
        The record in ``TARGET.json``, see `collect`.

    Raises:
        FileNotFoundError: data are missing; the message says where they are looked for and how to get them.
        ValueError: a number in ``only`` that is not there, a damaged cell, or one made from other images than the data
            at hand; nothing was done.
        RuntimeError: cells failed; the results of the others are written.
        SystemExit: stopped by a signal; finished cells are kept and their results are written.
    """
    output, common = Path(output), _common_settings(plan.units)
    progress = progress and ranks.is_first()
    cache = DataCache(data_dir, download=download, device=ranks.own_device(device), progress=progress)
    units = _chosen(plan.units, only)
    missing = [unit for unit in units if not finished(output, *unit)]
    report(f"{plan.target}: {len(units)} cells, {len(units) - len(missing)} of them finished")
    if earlier := cells_of_earlier_versions(output, (cell for cell, _ in missing)):
        report(
            f"{len(earlier)} cells of an earlier version, such as {earlier[0]}, are kept but not used: their folders "
            "are named by another hash of the settings"
        )
    _load_data(plan, missing, output, cache)
    failed: dict[str, str] = {}
    try:
        with sigterm_exits():
            passed = _do(output, missing, cache, common, report, failed)
    except (SystemExit, KeyboardInterrupt):
        report("stopped; finished work is kept, and the same command continues")
        if ranks.is_first():
            write_results(plan, output, report, failed)
        raise
    failures = ranks.all_gather_object(failed)  # waits for all
    left = {unit[0].folder_name for unit in units if not finished(output, *unit)}
    failed = {name: error for one in failures for name, error in one.items() if name in left}
    if not ranks.is_first():
        return collect(plan, output, failed)
    elsewhere = left.intersection(cell.folder_name for cell, _ in passed) - failed.keys()
    if elsewhere:
        report(
            f"{len(elsewhere)} cells are being run by other processes; run the same command again when they have ended"
        )
    record = write_results(plan, output, report, failed)
    if failed:
        listed = "; ".join(f"{name}: {error.strip().partition(chr(10))[0]}" for name, error in failed.items())
        raise RuntimeError(
            f"{len(failed)} of {len(units)} cells failed; the results of all others are written: {listed}"
        )
    return record


@contextlib.contextmanager
def sigterm_exits() -> Iterator[None]:
    """Make SIGTERM raise SystemExit, as SIGINT raises KeyboardInterrupt, so that finished results are written.

    A distillation handles both itself while it runs. Only the main thread may set handlers.
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
    plan: Plan, output: Path, report: Callable[[str], None] = log, failed: Mapping[str, str] | None = None
) -> dict:
    """Write the record of the finished cells as JSON, Markdown and pictures; arguments and errors as `collect`."""
    record = collect(plan, output, failed)
    name = plan.target
    write_atomically(output / f"{name}.json", json.dumps(record, indent=1) + "\n")
    written = [output / f"{name}.json"]
    if plan.kind == "grids":
        written += draw_grids(plan, output)
    else:
        written.append(write_atomically(output / f"{name}.md", render(Record(record)) + "\n"))
    if plan.kind == "curves" and (picture := draw_curves(record, output / f"{name}.png")):
        written.append(picture)
    report(f"written: {', '.join(map(str, written))}")
    return record


def list_units(plan: Plan, output: str | os.PathLike, only: Sequence[int] | None = None) -> list[str]:
    """Return a line per unit with its number and state, for ``--only`` and the job arrays of a scheduler.

    Raises:
        ValueError: a number in ``only`` that is not there.
    """
    lines, common = [], _common_settings(plan.units)
    chosen = _chosen(list(enumerate(plan.units, start=1)), only)
    for number, unit in chosen:
        state = "finished" if finished(Path(output), *unit) else "to do"
        lines.append(f"{number:3d}  {state:8s}  {describe(unit, common)}")
    return lines


def describe(unit: Unit, common: Collection = ()) -> str:
    """Return a unit in a line, without the ``common`` settings."""
    cell, evaluations = unit
    changed = {name: value for name, value in cell.settings if (name, value) not in common}
    networks = ", ".join(
        f"{evaluation.networks} {evaluation.network}"
        + (f" with norm {evaluation.norm}" if evaluation.norm is not None else "")
        + (f" at {evaluation.iteration}" if evaluation.iteration is not None else "")
        + (f" by {evaluation.protocol.name}" if len({e.protocol for e in evaluations}) > 1 else "")
        for evaluation in evaluations
    )
    size = f"ipc {cell.ipc}" if cell.ipc else "all images"
    settings = " ".join(f"{name}={value}" for name, value in changed.items())
    return f"{cell.dataset} {size} {cell.method} seed {cell.seed} [{networks}] {settings}".rstrip()


def _common_settings(units: Sequence[Unit]) -> set:
    """Return the settings that all cells share."""
    return set.intersection(*(set(cell.settings) for cell, _ in units)) if units else set()


def _chosen(units: list[_T], only: Sequence[int] | None) -> list[_T]:
    if only is None:
        return units
    for number in only:
        if not 1 <= number <= len(units):
            raise ValueError(f"there are cells 1 to {len(units)}; got {number}")
    return [units[number - 1] for number in dict.fromkeys(only)]


def _load_data(plan: Plan, missing: list[Unit], output: Path, cache: DataCache) -> None:
    """Load the data of missing cells, one process per machine first, and compare them with the data of existing cells.

    Raises:
        FileNotFoundError, ValueError: as `load_named` and `check_same_images`.
    """
    found = ranks.all_gather_object(sorted({cell.dataset for cell, _ in missing}))  # others may be finishing cells
    at_hand = {}
    for name in sorted(set().union(*found)):
        data, title = ranks.after_first(lambda name=name: cache.data(name))
        at_hand[name] = data.fingerprint, title
    check_same_images(output, (cell for cell, _ in plan.units), at_hand)


def _do(
    output: Path,
    units: list[Unit],
    cache: DataCache,
    common: Collection,
    report: Callable[[str], None],
    failed: dict[str, str],
) -> list[Unit]:
    """Work through units, add failures to ``failed``, and return the units that other processes hold."""
    passed = []
    for place, unit in enumerate(units, start=1):
        if finished(output, *unit):
            continue  # by another process, meanwhile
        started = time.monotonic()
        try:
            with ranks.alone():  # processes share the cells, not the steps of one
                mine = work(output, *unit, cache)
        except _OF_ONE_CELL as error:
            failed[unit[0].folder_name] = str(error)
            report(f"{place} of {len(units)} failed: {describe(unit, common)}: {error}")
            continue
        if mine:
            report(f"{place} of {len(units)} in {_duration(time.monotonic() - started)}: {describe(unit, common)}")
        else:
            passed.append(unit)
    return passed


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
