"""Results files of timed workloads: written as each cell ends, continued by a later call, merged for tables."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import statistics
import time
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone
from pathlib import Path

from .harness import FORMAT, Timing, environment, load_results, run_cell, save_results
from .methods import METHODS, TIMED, Workload

FINISHED = ("ok", "OOM")  # statuses that a later call does not measure again


def measure_cells(
    path: Path, kind: str, edition: str, workloads: Sequence[Workload], timing: Timing, deadline: float | None = None
) -> None:
    """Measure the workloads that the results file does not hold yet; write the file after each.

    Args:
        path: results file; made if missing, continued if present.
        kind, edition: contents of the file.
        workloads: all on one device.
        timing: duration of each measurement.
        deadline: on ``time.monotonic()``'s clock; no cell begins after it or runs beyond it.

    Raises:
        ValueError: the file is corrupt or was measured by another version or machine; it is left unchanged.
        RuntimeError: there is no such device.
    """
    if not workloads:
        return
    results = open_results(path, kind, edition, environment(workloads[0].device, timing.threads))
    for number, workload in enumerate(workloads, 1):
        label = f"[{number}/{len(workloads)}] {describe(workload)}"
        earlier = find(results, workload)
        if earlier and earlier["status"] in FINISHED:
            print(f"{label}: {outcome(earlier)} (measured before)", flush=True)
            continue
        limited = _until(timing, deadline)
        if limited.limit <= 0:
            print(f"{label}: no time left; call again to continue", flush=True)
            break
        record = run_cell(workload, limited)
        store(results, workload, record)
        save_results(path, results)
        print(f"{label}: {outcome(record)}", flush=True)


def _until(timing: Timing, deadline: float | None) -> Timing:
    """Limit a timing to the deadline."""
    return (
        timing
        if deadline is None
        else dataclasses.replace(timing, limit=min(timing.limit, deadline - time.monotonic()))
    )


def measure_slow_again(
    path: Path, workloads: Sequence[Workload], timing: Timing, deadline: float | None = None, by: float = 1.1
) -> None:
    """Measure once more the cells beside which ``eager`` was slow, slowest first; keep the one with the faster eager.

    The same eager code was faster beside another implementation, so the machine was slower during that cell, and not
    all code slows down by the same factor.

    Args:
        path: results file.
        workloads, timing, deadline: as for :func:`measure_cells`.
        by: slowdown of ``eager``, relative to its fastest cell, from which a cell is measured again.
    """
    results = load_results(path)
    for workload, slowness in _slowness(results, workloads):
        limited = _until(timing, deadline)
        if slowness < by or limited.limit <= 0:
            break
        earlier = find(results, workload)
        record = run_cell(workload, limited)
        if record["status"] == "ok" and _eager_seconds(record) < _eager_seconds(earlier):
            earlier = record
        store(results, workload, {**earlier, "measured_again": True})
        save_results(path, results)
        print(f"again: {describe(workload)}: {outcome(record)}", flush=True)


def _slowness(results: dict, workloads: Sequence[Workload]) -> list[tuple[Workload, float]]:
    """Return cells measured once beside ``eager`` with its time there over that in its fastest cell; slowest first."""
    records = [(workload, find(results, workload)) for workload in workloads]
    beside = [(workload, record) for workload, record in records if record and "eager_seconds" in record]
    fastest: dict[Workload, float] = {}
    for workload, record in beside:
        eager = dataclasses.replace(workload, implementation="eager")
        fastest[eager] = min(_eager_seconds(record), fastest.get(eager, math.inf))
    once = [
        (workload, _eager_seconds(record) / fastest[dataclasses.replace(workload, implementation="eager")])
        for workload, record in beside
        if "measured_again" not in record
    ]
    return sorted(once, key=lambda pair: -pair[1])


def _eager_seconds(record: dict) -> float:
    return statistics.median(record["eager_seconds"])


def open_results(path: Path, kind: str, edition: str, where: dict) -> dict:
    """Return the results in a file, to be continued, or empty results.

    Raises:
        ValueError: the file is corrupt, or was measured by another version or on another machine.
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


def find(results: dict, workload: Workload) -> dict | None:
    """Return the record of a workload, or None."""
    wanted = dataclasses.asdict(workload)
    return next((cell for cell in results["cells"] if cell["workload"] == wanted), None)


def store(results: dict, workload: Workload, record: dict) -> None:
    """Put the record of a workload into the results; replace an earlier one."""
    wanted = dataclasses.asdict(workload)
    results["cells"] = [cell for cell in results["cells"] if cell["workload"] != wanted]
    measured_at = datetime.now(timezone.utc).isoformat(timespec="seconds")
    results["cells"].append({"workload": wanted, "measured_at": measured_at, **record})


def describe(workload: Workload) -> str:
    """Return a workload in a few words."""
    sizes = f"ipc={workload.ipc} classes={workload.classes} {workload.resolution}x{workload.resolution}"
    chunk = f" {workload.class_chunk} classes at once" if workload.class_chunk else ""
    name = METHODS[workload.method].title
    return f"{name} {sizes} {workload.implementation}{variant(workload)}{chunk}"


PRECISION_NAMES = {"float32": "", "tf32": "", "float16": ", float16", "bfloat16": ", bfloat16"}


def variant(workload: Workload) -> str:
    """Return in words what sets a workload apart from the usual precision and norm; "" for neither."""
    norm = ", BatchNorm" if workload.norm == "batch" else ""
    real = f", real images in {workload.real_precision}" if workload.real_precision else ""
    return norm + PRECISION_NAMES[workload.precision] + real


def in_order(workloads: Iterable[Workload]) -> list[Workload]:
    """Return a method's workloads in the order of the tables, without former implementations."""

    def place(workload: Workload) -> tuple:
        precision = list(PRECISION_NAMES).index(workload.precision)
        implementation = TIMED[workload.method].implementations.index(workload.implementation)
        return workload.norm or "", implementation, precision, workload.real_precision or ""

    known = (work for work in workloads if work.implementation in TIMED[work.method].implementations)
    return sorted(known, key=place)


def outcome(record: dict) -> str:
    """Return a record in a few words."""
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


def merge(paths: Sequence[Path]) -> dict[Workload, dict]:
    """Return the newest finished record of every workload in several files of one machine.

    Each record has ``eager`` added: the record of its eager twin in the same file, or None.

    Raises:
        ValueError: the files were measured on different machines or with different libraries.
    """
    merged: dict[Workload, dict] = {}
    places = {}
    for path in paths:
        results = load_results(path)
        places[tuple(results["environment"].get(field) for field in ("device", "torch", "triton"))] = path
        own = {Workload(**record["workload"]): record for record in results["cells"]}
        for workload, record in own.items():
            if workload not in merged or _worth(merged[workload]) < _worth(record):
                merged[workload] = {**record, "eager": _eager(own, workload)}
    if len(places) > 1:
        names = ", ".join(f"{path.name}: {' / '.join(map(str, place))}" for place, path in places.items())
        raise ValueError(f"one table cannot show several machines or libraries ({names})")
    return merged


def _worth(record: dict) -> tuple[bool, str]:
    """Order finished before failed records, then by time."""
    return record["status"] in FINISHED, record["measured_at"]


def _eager(own: dict[Workload, dict], workload: Workload) -> dict | None:
    """Return the eager record of the same method, sizes and norm; in tf32 if there is none in 16 bits."""
    eager = dataclasses.replace(workload, implementation="eager", class_chunk=None, real_precision=None)
    return own.get(eager) or own.get(dataclasses.replace(eager, precision="tf32"))


def given(workload: Workload) -> dict:
    """Return the fields that are not None, so that a field added later with default None changes no cell's name."""
    return {name: value for name, value in dataclasses.asdict(workload).items() if value is not None}


def digest(paths: Sequence[Path]) -> str:
    """Return a name of the figures that a picture is drawn from."""
    cells = sorted(json.dumps([given(workload), cell["measured_at"]]) for workload, cell in merge(paths).items())
    return hashlib.sha256("\n".join(cells).encode()).hexdigest()[:16]
