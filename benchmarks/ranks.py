"""Steps split among processes on a CPU: what does sharing them cost, and what does it gain?

Each process is pinned to a core and has one thread. The same step is timed in four ways, with each norm, in turns, so
that a machine that gets slower for a minute slows down all of them:

- ``split``: the classes are split among the processes. InstanceNorm sends nothing inside the step, BatchNorm its sums.
- ``apart``: every process has as many classes of its own and sends nothing. What this loses is due to the machine,
  whose cores share caches, memory and clock.
- ``part``: one process computes as many classes, and the others wait. Against it, ``split`` is weak scaling.
- ``whole``: one process computes all classes, and the others wait. Against it, ``split`` is strong scaling.

A turn is a round of steps, as in a distillation: at its end every process reads the loss terms, and so waits for the
slowest. Messages and bytes are counted, and the gathering of a checkpoint is timed; `benchmarks.communication`
estimates from them what several GPUs would need.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import multiprocessing
import os
import signal
import socket
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from atom_fast._malloc import keep_freed_memory
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import ranks
from atom_fast.distillation.config import preset
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation

from .communication import describe_checkpoint, describe_step, estimate_checkpoint, estimate_step
from .harness import FEWEST, environment, save_results, summary
from .profile import random_data
from .timings import open_results

WAYS = ("split", "apart", "part", "whole")
SHAPE = (3, 32, 32)  # of the random images
LAYERS = 3  # blocks of the ConvNet for that shape
LIMIT = 40.0  # seconds of a cell after which no turn begins


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement.

    Attributes:
        classes: per process where as many processes as cores share a step.
        ipc: images per class.
        real_batch: real images per class per step.
        width: channels of the ConvNet.
        rounds: timed rounds of each way; fewer, but at least ``FEWEST``, if they take longer than ``LIMIT``.
        steps: per round.
        norms: norms of the ConvNet.
    """

    classes: int = 5
    ipc: int = 10
    real_batch: int = 32
    width: int = 64
    rounds: int = 10
    steps: int = 5
    norms: tuple[str, ...] = ("instance", "batch")


def run(sizes: Sizes, processes: Sequence[int] | None = None, out: Path | None = None) -> dict:
    """Measure every cell that the file does not hold yet, print it, and return the records.

    A cell is a number of processes and of classes: ``sizes.classes`` for each process, and for fewer processes also as
    many classes as the most processes have.

    Args:
        sizes: of the measurement.
        processes: numbers of them; None: 2, 4 ... as there are cores.
        out: JSON file of the records, written after each cell and continued by a later call.

    Raises:
        ValueError: there are fewer cores than processes, or fewer than two processes; or the file is of other sizes,
            another version or machine, and is left unchanged.
        RuntimeError: a measuring process failed.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    counts = sorted(set(processes or [2**power for power in range(1, max(len(cores).bit_length(), 2))]))
    if counts[0] < 2:
        raise ValueError(f"a step is split among at least 2 processes; got {counts[0]}")
    if counts[-1] > len(cores):
        raise ValueError(f"{counts[-1]} processes need a core each; this machine gives {len(cores)}")
    record = _open(out, sizes)
    cells = [(count, classes * sizes.classes) for count in counts for classes in sorted({count, counts[-1]})]
    for count, classes in cells:
        cell = _find(record, count, classes)
        if cell is None:
            cell = {"processes": count, "classes": classes, **measure(cores[:count], classes, sizes)}
            record["cells"].append(cell)
            if out:
                save_results(out, record)
        print(describe(cell), flush=True)
    largest = _find(record, *cells[-1])
    assert largest is not None
    print("\n".join(describe_checkpoint(checkpoint(largest, sizes.ipc))))
    if "batch" in largest["norms"]:
        print("\n".join(describe_step(batch_norm_sums(largest, sizes.width))))
    return record


def _open(out: Path | None, sizes: Sizes) -> dict:
    """Return the records of a file, or empty ones."""
    setting = dataclasses.asdict(sizes) | {"norms": list(sizes.norms)}
    where = environment("cpu", threads=1)
    record = {"environment": where, "cells": []} if out is None else open_results(out, "ranks", "cpu", where)
    if record.setdefault("setting", setting) != setting:
        raise ValueError(f"{out} has other sizes: {record['setting']}; give another --out, or move that file away")
    return record


def _find(record: dict, count: int, classes: int) -> dict | None:
    return next((cell for cell in record["cells"] if (cell["processes"], cell["classes"]) == (count, classes)), None)


def measure(cores: Sequence[int], classes: int, sizes: Sizes) -> dict:
    """Run as many processes as cores, pinned to one each; return the cell of the first one (`measure_group`).

    Args:
        cores: their numbers.
        classes: of all processes together.
        sizes: of the measurement.

    Raises:
        RuntimeError: a process failed.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["benchmarks.ranks"])  # imported once for all
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports = context.Queue()
    arguments = [(rank, cores, port, classes, sizes, reports) for rank in range(len(cores))]
    processes = [context.Process(target=_join_and_measure, args=each, daemon=True) for each in arguments]
    try:
        for process in processes:
            process.start()
        while processes[0].is_alive() and reports.empty():
            time.sleep(0.1)
        if reports.empty():
            raise RuntimeError(f"a measuring process ended with code {processes[0].exitcode}")
        report = reports.get()
        for process in processes:
            process.join(30)  # they leave the group together
        return report
    finally:  # also when interrupted
        for process in processes:
            if process.pid is not None:
                process.kill()
                process.join()


def _join_and_measure(rank: int, cores: Sequence[int], port: int, classes: int, sizes: Sizes, reports) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal interrupts all; the parent ends this one
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    keep_freed_memory()  # as atom-fast does
    names = {"RANK": rank, "WORLD_SIZE": len(cores), "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    with ranks.join("cpu"):
        cell = measure_group(classes, sizes)
    if rank == 0:
        reports.put(cell)


def measure_group(classes: int, sizes: Sizes) -> dict:
    """Measure in a group of processes that this one is part of.

    Args:
        classes: of all processes together.
        sizes: of the measurement.

    Returns:
        ``norms``: for each norm ``seconds`` per step of each round by way, the ratios of `compare`, and what one
        process sends in a split step: ``messages``, and ``bytes_received``. ``meeting``: the time of a meeting.
        ``gather``: of a checkpoint, with ``bytes_sent`` for it. On other processes than the first the times of ways
        that they have no part in are missing.
    """
    first, part = ranks.is_first(), -(-classes // ranks.count())
    runs: dict[str, dict[str, Distillation]] = {}
    for norm in sizes.norms:
        runs[norm] = {"split": make_run(sizes, norm, classes)}
        with ranks.alone():
            runs[norm]["apart"] = own = make_run(sizes, norm, part)
            if first:
                runs[norm] |= {"part": own, "whole": make_run(sizes, norm, classes)}
    seconds = _time_turns(runs, sizes)
    norms = {}
    for norm, ways in runs.items():
        sent = count_bytes("all_gather", lambda split=ways["split"]: split.step(1))
        received = sum(sent) * (ranks.count() - 1) // ranks.count()
        counted = {"messages": len(sent), "bytes_received": received}
        ratios = compare(seconds[norm]) if first else {}
        norms[norm] = {"seconds": seconds[norm], **ratios, **counted}
    split = runs[sizes.norms[0]]["split"]

    def gather() -> None:
        for tensor in split.state().values():
            ranks.gather(tensor, classes)

    sent = sum(ranks.all_gather_object(sum(count_bytes("send", gather))))
    times = {"meeting": summary(_time(ranks.all_gather_object, 50)), "gather": summary(_time(gather, 5))}
    return {"norms": norms, **times, "bytes_sent": sent}


def make_run(sizes: Sizes, norm: str, classes: int) -> Distillation:
    """Return a run on random images of CIFAR-10's shape, of this process's share of the classes."""
    data = random_data(classes, *SHAPE, per_class=2 * sizes.real_batch)
    settings = {"ipc": sizes.ipc, "real_batch": sizes.real_batch, "width": sizes.width, "norm": norm, "depth": LAYERS}
    config = preset("paper", **settings).resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, "standard", progress=False)
    own = ranks.local_classes(data.num_classes)
    images = initial_images(config, data, preprocessing)[own.start * config.ipc : own.stop * config.ipc]
    return Distillation(config, data, preprocessing, images, classes=own)


def _time_turns(runs: Mapping[str, Mapping[str, Distillation]], sizes: Sizes) -> dict[str, dict[str, list[float]]]:
    """Return the seconds per step of each round, by norm and way; the rounds of all take turns."""
    seconds = {norm: {way: [] for way in ways} for norm, ways in runs.items()}
    started = time.perf_counter()
    for turn in range(sizes.rounds + 1):
        late = ranks.all_gather_object(time.perf_counter() - started > LIMIT)[0]  # of the first process, for all
        if late and turn > FEWEST:
            break
        for norm, ways in runs.items():
            for way in WAYS:
                ranks.all_gather_object()  # all begin together, and nobody else computes beside one that is alone
                if way not in ways:
                    continue
                with contextlib.nullcontext() if way == "split" else ranks.alone():
                    taken = _time_round(ways[way], turn * sizes.steps, sizes.steps)
                if turn > 0:  # the first round warms up
                    seconds[norm][way].append(taken)
    return seconds


def _time_round(run: Distillation, iteration: int, steps: int) -> float:
    """Return the seconds per step of a round; it ends when every rank has read the loss terms."""
    started = time.perf_counter()
    for step in range(steps):
        run.step(iteration + step + 1)
    run.terms(ranks.all_gather_object(run.read()))
    return (time.perf_counter() - started) / steps


def _time(work: Callable[[], object], count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def count_bytes(name: str, work: Callable[[], object]) -> list[int]:
    """Return the bytes of the first argument of each call that ``work`` makes of a function of ``torch.distributed``.

    Args:
        name: "send", whose tensor is sent, or "all_gather", whose list of tensors receives what all send.
        work: what is to be counted.
    """
    sizes, original = [], getattr(torch.distributed, name)

    def counting(tensors, *args, **kwargs):
        sizes.append(sum(tensor.nbytes for tensor in (tensors if isinstance(tensors, list) else [tensors])))
        return original(tensors, *args, **kwargs)

    setattr(torch.distributed, name, counting)
    try:
        work()
    finally:
        setattr(torch.distributed, name, original)
    return sizes


def compare(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Return medians of ratios, turn by turn, from the seconds by way.

    Returns:
        ``weak``: speed of a process whose step is split, relative to one that computes as many classes by itself.
        ``apart``: the same where processes share nothing. ``strong``: how many times as fast as one process.
    """

    def ratio(above: str, below: str) -> float:
        return statistics.median(a / b for a, b in zip(seconds[above], seconds[below], strict=True))

    return {"weak": ratio("part", "split"), "apart": ratio("part", "apart"), "strong": ratio("whole", "split")}


def checkpoint(cell: dict, ipc: int) -> list[dict]:
    """Estimate the gathering of a checkpoint on GPUs from a cell (`estimate_checkpoint`)."""
    first = ranks.split(cell["classes"], 0, cell["processes"])
    sent = (cell["classes"] - len(first)) * ipc * math.prod(SHAPE)
    return estimate_checkpoint(cell["bytes_sent"] / sent)


def batch_norm_sums(cell: dict, width: int) -> list[dict]:
    """Estimate BatchNorm's sums on GPUs from a cell (`estimate_step`)."""
    found = cell["norms"]["batch"]
    part = -(-cell["classes"] // cell["processes"])  # others send as many rows, some of them empty
    channels = (cell["processes"] - 1) * part * width * LAYERS
    return estimate_step(found["messages"] / LAYERS, found["bytes_received"] / channels)


def describe(cell: dict) -> str:
    """Return a cell as lines."""
    lines = [f"{cell['processes']} processes, {cell['classes']} classes:"]
    for norm, found in cell["norms"].items():
        times = ", ".join(f"{way} {1e3 * statistics.median(found['seconds'][way]):.1f}" for way in WAYS)
        lines.append(
            f"  {norm} norm: {times} ms a step; weak scaling {100 * found['weak']:.0f} % of one process's speed "
            f"({100 * found['apart']:.0f} % apart), strong scaling {found['strong']:.2f} times as fast; "
            f"{found['messages']} messages and {found['bytes_received'] / 1e3:.1f} kB received in a step"
        )
    meeting, gather = 1e3 * cell["meeting"]["median"], 1e3 * cell["gather"]["median"]
    megabytes = cell["bytes_sent"] / 1e6
    lines.append(f"  a meeting {meeting:.2f} ms; a checkpoint gathered in {gather:.1f} ms, {megabytes:.2f} MB sent")
    return "\n".join(lines)
