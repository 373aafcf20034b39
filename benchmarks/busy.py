"""The loss, a step and an evaluation on a CPU that other processes use too.

A neighbour is a process that keeps one core busy with a Python loop. Each work runs in its own process, in turns with
what it is compared with, so that every ratio is of calls made moments apart: beside the same work on one thread, beside
plain PyTorch (the equations; for an evaluation the public code's loop), and for the loss beside torch.compile of the
equations and a copy of as many bytes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

import atom_fast as af
from atom_fast import reference
from atom_fast._malloc import keep_freed_memory
from atom_fast._threads import affinity
from atom_fast.ops import native

from .evaluation import ensemble, loop, make_data
from .harness import environment, save_results
from .methods import Workload, build_step

REAL, SYNTHETIC = (256, 128, 32, 32), (100, 128, 32, 32)  # features of the first block of the CIFAR ConvNet
STEPS, EPOCHS = 20, 10  # of a turn
WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # set by the commands, not by a program that uses the library
Work = Callable[[], object]


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured in one process.

    Attributes:
        work: key of ``WORKS``.
        neighbours: number of busy processes.
        waiting: "commands" (threads that wait sleep soon, see `atom_fast._threads`) or "library" (as PyTorch starts
            them).
    """

    work: str
    neighbours: int
    waiting: str


def run(
    works: Sequence[str] = (), neighbours: Sequence[int] = (0, 1, 2), rounds: int = 5, *, out: Path | None = None
) -> dict:
    """Measure every work beside every number of neighbours, print a line each, and return the records.

    Args:
        works: keys of ``WORKS``; empty: all.
        neighbours: numbers of busy processes.
        rounds: turns of each work and of what it is compared with.
        out: JSON file of the records, written after each.
    """
    record = {"environment": environment("cpu"), "cores": affinity(), "cells": []}
    for work in works or WORKS:
        for waiting in ("library", "commands") if work == "loss" else ("commands",):
            for count in neighbours:
                case = Case(work, count, waiting)
                with _busy(count), _waiting(waiting):
                    measured = _in_a_process(case, rounds)
                cell = {**dataclasses.asdict(case), **measured, **compare(measured["seconds"])}
                record["cells"].append(cell)
                print(describe(cell), flush=True)
                if out:
                    save_results(out, record)
    return record


def compare(seconds: dict[str, dict[str, list[float]]]) -> dict:
    """Return medians of ratios, turn by turn, from seconds by implementation and number of threads.

    Returns:
        ``to_equations``, ``to_compile`` and ``to_copy``: by number of threads, how many times as long the other takes.
        ``to_one_thread``: how many times as long as on one thread, the median and the ``worst`` call's over the median
        on one thread.
    """
    own = seconds["atom_fast"]
    ratios = {
        f"to_{name}": {threads: _ratio(other[threads], own[threads]) for threads in own}
        for name, other in seconds.items()
        if name != "atom_fast"
    }
    most = max(own, key=int)
    one = statistics.median(own["1"])
    return ratios | {"to_one_thread": _ratio(own[most], own["1"]), "worst": max(own[most]) / one}


def _ratio(above: Sequence[float], below: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def describe(cell: dict) -> str:
    """Return a cell in a line."""
    own = {threads: statistics.median(values) for threads, values in cell["seconds"]["atom_fast"].items()}
    line = f"{cell['work']:10} {cell['neighbours']} neighbours, threads as the {cell['waiting']}:"
    line += "".join(f"  {threads} threads {1e3 * value:7.1f} ms" for threads, value in own.items())
    for name in ("equations", "compile", "copy"):
        if ratios := cell.get(f"to_{name}"):
            line += f"  {name} " + " / ".join(f"{ratio:.2f}x" for ratio in ratios.values())
    line += f"  to one thread {cell['to_one_thread']:.2f}, worst {cell['worst']:.2f}"
    return line + f", first call {cell['first_seconds']:.2f} s"


@contextlib.contextmanager
def _busy(count: int) -> Iterator[list]:
    """Keep ``count`` processes busy, and yield them."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_spin, daemon=True) for _ in range(count)]
    for process in processes:
        process.start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def _spin() -> None:
    while True:
        pass


@contextlib.contextmanager
def _waiting(waiting: str) -> Iterator[None]:
    """Start processes whose threads wait as those of the commands, or as PyTorch's."""
    kept = {name: os.environ.pop(name) for name in WAITING if waiting == "library" and name in os.environ}
    try:
        yield
    finally:
        os.environ.update(kept)


def _in_a_process(case: Case, rounds: int) -> dict:
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_measure, (case, rounds))


def _measure(case: Case, rounds: int) -> dict:
    """Return ``first_seconds`` of the first call, and ``seconds`` per call by implementation and number of threads.

    The seconds are those of the turns; the kernels were built before.
    """
    keep_freed_memory()
    native.is_built()
    numbers = sorted({1, torch.get_num_threads()})
    implementations, calls = WORKS[case.work]()
    started = time.perf_counter()
    implementations["atom_fast"]()
    first = time.perf_counter() - started
    seconds = {name: {str(threads): [] for threads in numbers} for name in implementations}
    for turn in range(rounds + 1):
        for name, work in implementations.items():
            for threads in numbers:
                torch.set_num_threads(threads)
                work()  # not timed: threads of the turn before may still be awake
                started = time.perf_counter()
                for _ in range(calls):
                    work()
                if turn > 0:  # the first turn allocates, and compiles
                    seconds[name][str(threads)].append((time.perf_counter() - started) / calls)
    return {"first_seconds": first, "seconds": seconds}


def _loss() -> tuple[dict[str, Work], int]:
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(REAL, generator=generator).relu_()
    synthetic = torch.randn(SYNTHETIC, generator=generator).relu_().requires_grad_()
    # Both sides are read, the synthetic one again for the gradient, which is written.
    moved = real.numel() + 3 * synthetic.numel()
    source, target = torch.zeros(moved // 2), torch.zeros(moved // 2)

    def differentiated(loss: Callable) -> Work:
        return lambda: torch.autograd.grad(loss(real, synthetic, 4.0, 4.0), synthetic)

    def own(real, synthetic, *_):
        return af.attention_matching_loss(real, synthetic)

    return {
        "atom_fast": differentiated(own),
        "equations": differentiated(reference.attention_matching_loss),
        "compile": differentiated(torch.compile(reference.attention_matching_loss)),
        "copy": lambda: target.copy_(source),
    }, 1


def _step() -> tuple[dict[str, Work], int]:
    workload = Workload(
        "atom",
        "fused",
        10,
        channels=1,
        resolution=8,
        class_images=150,
        real_batch=64,
        precision="float32",
        device="cpu",
    )  # the size of digits
    steps = {
        "atom_fast": build_step(workload),
        "equations": build_step(dataclasses.replace(workload, implementation="eager-batched")),
    }
    return steps, STEPS


def _evaluation() -> tuple[dict[str, Work], int]:
    return {"atom_fast": ensemble(make_data(), 2, EPOCHS), "equations": loop(make_data(), 2, EPOCHS)}, 1


WORKS: dict[str, Callable[[], tuple[dict[str, Work], int]]] = {
    "loss": _loss,
    "step": _step,
    "evaluation": _evaluation,
}
