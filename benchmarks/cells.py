"""Settings measured one after the other into a results file, each kept as it ends, none measured twice."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from .harness import FORMAT, Plan, environment, load_results, run_cell, save_results
from .methods import METHODS, Setting

FINISHED = ("ok", "OOM")  # statuses a later call does not measure again


def measure_cells(
    path: Path, kind: str, edition: str, settings: Sequence[Setting], plan: Plan, deadline: float | None = None
) -> None:
    """Measure the settings that the results file does not hold yet; the file is written after each.

    Args:
        path: the results file; made where it is missing, continued where it is not.
        kind, edition: what the file holds.
        settings: all on one device.
        plan: how long each is measured.
        deadline: on ``time.monotonic()``'s clock; no cell is begun after it, and none runs beyond it.

    Raises:
        ValueError: the file is corrupt or was measured by another version or machine; it is left as it is.
        RuntimeError: there is no such device.
    """
    if not settings:
        return
    results = open_results(path, kind, edition, environment(settings[0].device, plan.threads))
    for number, setting in enumerate(settings, 1):
        label = f"[{number}/{len(settings)}] {describe(setting)}"
        earlier = find(results, setting)
        if earlier and earlier["status"] in FINISHED:
            print(f"{label}: {outcome(earlier)} (measured before)", flush=True)
            continue
        limited = _until(plan, deadline)
        if limited.limit <= 0:
            print(f"{label}: no time left; call again to continue", flush=True)
            break
        record = run_cell(setting, limited)
        store(results, setting, record)
        save_results(path, results)
        print(f"{label}: {outcome(record)}", flush=True)


def _until(plan: Plan, deadline: float | None) -> Plan:
    """The plan for a cell that must end by the deadline."""
    return plan if deadline is None else dataclasses.replace(plan, limit=min(plan.limit, deadline - time.monotonic()))


def measure_slow_again(
    path: Path, settings: Sequence[Setting], plan: Plan, deadline: float | None = None, by: float = 1.1
) -> None:
    """Measure once more the cells beside which ``eager`` was slow, the slowest first; keep what it was faster beside.

    The same code was faster beside another provider, so the machine was slower then, and not all code is by as much.

    Args:
        path: the results file.
        settings, plan, deadline: as for :func:`measure_cells`.
        by: how many times as long as in its fastest cell ``eager`` must have taken.
    """
    results = load_results(path)
    for setting, slowness in _slowness(results, settings):
        limited = _until(plan, deadline)
        if slowness < by or limited.limit <= 0:
            break
        earlier = find(results, setting)
        record = run_cell(setting, limited)
        if record["status"] == "ok" and _eager_seconds(record) < _eager_seconds(earlier):
            earlier = record
        store(results, setting, {**earlier, "measured_again": True})
        save_results(path, results)
        print(f"again: {describe(setting)}: {outcome(record)}", flush=True)


def _slowness(results: dict, settings: Sequence[Setting]) -> list[tuple[Setting, float]]:
    """Cells measured once beside ``eager``, and its time there over that in its fastest cell; the slowest first."""
    records = [(setting, find(results, setting)) for setting in settings]
    beside = [(setting, record) for setting, record in records if record and "eager_seconds" in record]
    fastest: dict[Setting, float] = {}
    for setting, record in beside:
        eager = _eager(setting)
        fastest[eager] = min(_eager_seconds(record), fastest.get(eager, math.inf))
    once = [
        (setting, _eager_seconds(record) / fastest[_eager(setting)])
        for setting, record in beside
        if "measured_again" not in record
    ]
    return sorted(once, key=lambda pair: -pair[1])


def _eager(setting: Setting) -> Setting:
    return dataclasses.replace(setting, provider="eager")


def _eager_seconds(record: dict) -> float:
    return statistics.median(record["eager_seconds"])


def open_results(path: Path, kind: str, edition: str, where: dict) -> dict:
    """The results in a file, to be continued, or empty ones.

    Raises:
        ValueError: what is there is corrupt, or was measured by another version or on another machine.
    """
    if not path.exists():
        return {"format": FORMAT, "kind": kind, "edition": edition, "environment": where, "cells": []}
    results = load_results(path)
    earlier = results["environment"]
    for field in ("source", "device", "torch", "triton", "driver", "threads"):
        if earlier.get(field) != where[field]:
            raise ValueError(
                f"{path} was measured with {field} {earlier.get(field)!r}, this is {where[field]!r}; "
                "figures are not mixed and nothing is overwritten: give another --out, or move that file away"
            )
    return results


def find(results: dict, setting: Setting) -> dict | None:
    """A setting's record in the results."""
    wanted = dataclasses.asdict(setting)
    return next((cell for cell in results["cells"] if cell["setting"] == wanted), None)


def store(results: dict, setting: Setting, record: dict) -> None:
    """Put a setting's record into the results, in place of one that had not ended well."""
    wanted = dataclasses.asdict(setting)
    results["cells"] = [cell for cell in results["cells"] if cell["setting"] != wanted]
    measured_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results["cells"].append({"setting": wanted, "measured_at": measured_at, **record})


def describe(setting: Setting) -> str:
    """A setting in a few words."""
    sizes = f"ipc={setting.ipc} classes={setting.classes} {setting.resolution}x{setting.resolution}"
    chunk = f" {setting.class_chunk} classes at once" if setting.class_chunk else ""
    return f"{METHODS[setting.method].title} {sizes} {setting.provider} {setting.precision}{chunk}"


def outcome(record: dict) -> str:
    """A record in a few words."""
    if record["status"] != "ok":
        return f"{record['status']} ({record['message'].splitlines()[0][:120]})" if record["status"] != "OOM" else "OOM"
    peak = record["memory"]["peak_allocated"]
    memory = "" if peak is None else f", {peak / 1e6:,.0f} MB"
    return f"{record['time']['median'] * 1e3:,.2f} ms a step over {record['time']['iterations']}{memory}"


def check_known(what: str, given: Iterable | None, known: Iterable) -> None:
    """Raise ``ValueError`` for the first of ``given`` that is not among the known."""
    known = tuple(known)
    for value in given or ():
        if value not in known:
            raise ValueError(f"{what} must be one of {', '.join(map(str, known))}; got {value!r}")
