"""``atom-fast reproduce``: plan, say what fits, do it, and write the results."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from atom_fast._files import write_atomically
from atom_fast.distill.logs import say
from atom_fast.ranks import own_device
from atom_fast.reproduce.budget import Estimator, Unit, choose, common_settings, describe, duration
from atom_fast.reproduce.figures import draw_curves, draw_grids
from atom_fast.reproduce.tables import collect, render
from atom_fast.reproduce.targets import Plan
from atom_fast.reproduce.work import Shelf, finished, work


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
) -> dict:
    """Do what is missing of a table or figure, and write ``TARGET.json``, ``TARGET.md`` and pictures.

    Cells that are finished are kept, whoever did them; those that another process is at are passed over. Several
    processes with one output folder share the work; the one that ends last writes the whole table.

    Args:
        plan: of `atom_fast.reproduce.targets`.
        output: folder of cells and results.
        data_dir, download: where the data are, see `load_named`.
        budget: minutes; what does not fit is named and left. None: no limit.
        only: numbers of units, from 1 as `list_units` gives them; None: all.
        device: where to compute; None: the GPU, if there is one.
        progress: show progress bars on standard error.
        report: is told what is done.

    Returns:
        The record that ``TARGET.json`` holds, see `collect`.

    Raises:
        FileNotFoundError: data are not there; says where they are looked for and how to get them.
        ValueError: a unit that is not there, or a damaged cell; finished ones are not touched.
        SystemExit: stopped by a signal; what was done is kept, and the results of finished cells are written.
    """
    output, common = Path(output), common_settings(plan.units)
    shelf = Shelf(data_dir, download=download, device=own_device(device), progress=progress)
    units = _chosen(plan.units, only)
    missing = [unit for unit in units if not finished(output, *unit)]
    report(f"{plan.target}: {len(units)} cells, {len(units) - len(missing)} of them finished")
    estimator = Estimator(output, plan.units, shelf)
    if budget is not None:
        missing = _fitting(missing, estimator, budget, common, report)
    try:
        elsewhere = _do(output, missing, estimator, budget, common, report)
    except (SystemExit, KeyboardInterrupt):
        report("stopped; what is done is kept, and the same command goes on with it")
        write_results(plan, output, report)  # of what is finished
        raise
    if elsewhere:
        report(f"{elsewhere} cells are in work by other processes; run the same again when they have ended")
    return write_results(plan, output, report)


def write_results(plan: Plan, output: Path, report: Callable[[str], None] = say) -> dict:
    """Write the table or figure of what is finished: JSON, Markdown, pictures."""
    record = collect(plan, output)
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
    return [units[number - 1] for number in only]


def _fitting(
    missing: list[Unit], estimator: Estimator, budget: float, common: Collection, report: Callable[[str], None]
) -> list[Unit]:
    """What fits into the budget, said beforehand, with what is left."""
    seconds = [estimator.seconds(unit) for unit in missing]
    fitting, left = choose(missing, seconds, budget)
    needed = dict(zip(missing, seconds, strict=True))
    total = sum(needed[unit] for unit in fitting)
    report(f"{len(fitting)} of {len(missing)} cells fit into {budget:g} min, by estimate {duration(total)}:")
    for unit in fitting:
        report(f"  will run, {duration(needed[unit])}: {describe(unit, common)}")
    for unit in left:
        report(f"  left, {duration(needed[unit])}: {describe(unit, common)}")
    return fitting


def _do(
    output: Path,
    units: list[Unit],
    estimator: Estimator,
    budget: float | None,
    common: Collection,
    report: Callable[[str], None],
) -> int:
    """Work through units; how many others that other processes hold are not finished in the end."""
    passed, started = [], time.monotonic()
    for place, unit in enumerate(units, start=1):
        begun = time.monotonic()
        if budget is not None and begun - started + estimator.seconds(unit) > 60 * budget:
            report(f"left, the budget being used up: {describe(unit, common)}")
            continue
        if work(output, *unit, estimator.shelf):
            report(f"{place} of {len(units)} in {duration(time.monotonic() - begun)}: {describe(unit, common)}")
        else:
            passed.append(unit)
    return sum(not finished(output, *unit) for unit in passed)
