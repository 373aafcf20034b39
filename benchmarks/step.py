"""One ATOM step, every implementation side by side.

The result is the time of a step, its ratio to the eager step of the same run (all classes at once, equations 1 to 4 in
plain PyTorch), and the memory of the tensors it makes. On a CPU the bytes are counted operation by operation and do not
depend on the machine. Each implementation runs in its own process, on a CPU twice: with the C library as it is, which
gives freed memory back to the system and pays for having it cleared again, and with one that keeps it, as PyTorch's
allocator does on a GPU.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

from .harness import Timing, environment, run_cell, save_results
from .methods import Workload

EAGER = "eager-batched"


def run(
    workload: Workload,
    *,
    implementations: Sequence[str] | None = None,
    precisions: Sequence[str] = ("float32",),
    iterations: int = 5,
    out: Path | None = None,
) -> dict:
    """Measure every implementation in every precision, print a line each, and return the records.

    Args:
        workload: method, sizes and device; its implementation and precision are replaced.
        implementations: None: eager-batched, compile and fused, on a GPU also fused-graph.
        precisions: as in `atom_fast.distillation.DistillConfig`.
        iterations: timed steps.
        out: JSON file of the records, written after each.

    Raises:
        RuntimeError: there is no such device.
    """
    on_gpu = workload.device == "cuda"
    implementations = implementations or [EAGER, "compile", "fused", *(["fused-graph"] if on_gpu else [])]
    record = {"environment": environment(workload.device), "workload": dataclasses.asdict(workload), "cells": []}
    for keep_memory in (True,) if on_gpu else (False, True):
        if not on_gpu:
            print(f"freed memory is {'kept' if keep_memory else 'given back'}:")
        timing, eager = Timing(iterations, 120, 900, keep_memory), None
        for implementation, precision in itertools.product(implementations, precisions):
            cell = run_cell(dataclasses.replace(workload, implementation=implementation, precision=precision), timing)
            record["cells"].append(
                {"implementation": implementation, "precision": precision, "keep_memory": keep_memory, **cell}
            )
            if cell["status"] == "ok" and implementation == EAGER and eager is None:
                eager = cell
            print(_line(f"{implementation} {precision}", cell, eager), flush=True)
            if out:
                save_results(out, record)
    return record


def _line(name: str, cell: dict, eager: dict | None) -> str:
    if cell["status"] != "ok":
        return f"{name:24} {cell['status']}: {cell['message']}"
    seconds, peak = cell["time"]["median"], cell["memory"]["peak_allocated"]
    line = f"{name:24} {1e3 * seconds:9.1f} ms"
    line += f" {eager['time']['median'] / seconds:5.2f}x" if eager else ""
    if peak is not None:
        line += f"   {peak / 1e6:8.1f} MB"
        line += f" ({100 * peak / eager['memory']['peak_allocated']:.0f} %)" if eager else ""
    return line
