"""One ATOM step, every implementation side by side: ``python -m benchmarks step --classes 2 --ipc 50``.

Prints the time of a step, its ratio to the eager step of the same run (all classes at once, equations 1 to 4 in plain
PyTorch), and the memory of the tensors it makes. On a CPU the bytes are counted operation by operation and do not
depend on the machine. Each implementation runs in its own process, on a CPU twice: with the C library as it is, which
gives freed memory back to the system and pays for having it cleared again, and with one that keeps it, as PyTorch's
allocator does on a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from pathlib import Path

from .harness import Timing, environment, run_cell, save_results
from .methods import Workload

EAGER = "eager-batched"


def main(arguments: list[str] | None = None) -> None:
    """Measure, print a line each, and keep the records."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks step", description=__doc__)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="where to run (default cpu)")
    parser.add_argument("--classes", type=int, default=10, help="number of classes (default 10)")
    parser.add_argument("--ipc", type=int, default=50, help="synthetic images per class (default 50)")
    parser.add_argument("--real-batch", type=int, default=128, help="real images per class (default 128)")
    parser.add_argument("--resolution", type=int, default=32, help="pixels per side (default 32)")
    parser.add_argument("--width", type=int, default=128, help="channels of the ConvNet (default 128)")
    parser.add_argument(
        "--precision", action="append", help="float32, tf32 or bfloat16 (default float32); may be repeated"
    )
    parser.add_argument("--implementation", action="append", help="only this one; may be repeated")
    parser.add_argument("--iterations", type=int, default=5, help="timed steps (default 5)")
    parser.add_argument("--out", type=Path, help="JSON file of the records")
    options = parser.parse_args(arguments)
    workload = Workload(
        method="atom", implementation=EAGER, ipc=options.ipc, classes=options.classes, resolution=options.resolution,
        real_batch=options.real_batch, class_images=max(200, options.real_batch), width=options.width,
        device=options.device,
    )  # fmt: skip
    ours = ["fused", "fused-graph"] if options.device == "cuda" else ["fused"]
    implementations = options.implementation or [EAGER, "compile", *ours]
    record = {"environment": environment(options.device), "workload": dataclasses.asdict(workload), "cells": []}
    for keep_memory in (True,) if options.device == "cuda" else (False, True):
        if options.device == "cpu":
            print(f"freed memory is {'kept' if keep_memory else 'given back'}:")
        timing, eager = Timing(options.iterations, 120, 900, keep_memory), None
        for implementation, precision in itertools.product(implementations, options.precision or ["float32"]):
            cell = run_cell(dataclasses.replace(workload, implementation=implementation, precision=precision), timing)
            record["cells"].append(
                {"implementation": implementation, "precision": precision, "keep_memory": keep_memory, **cell}
            )
            if cell["status"] == "ok" and implementation == EAGER and eager is None:
                eager = cell
            print(_line(f"{implementation} {precision}", cell, eager), flush=True)
            if options.out:
                save_results(options.out, record)


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


if __name__ == "__main__":
    main()
