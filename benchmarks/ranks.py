"""Weak scaling on a CPU: more processes, more classes, the same time?

Each process is pinned to a core, has one thread and the same number of classes, whatever the
number of processes. Rounds of steps are timed, as in a distillation: at the end of a round every rank reads the loss
terms, and so waits for the slowest. The same number of independent processes is timed beside it: what these lose is due
to the machine, whose cores share caches, memory and clock. Then the time to gather images and momentum for a
checkpoint, and the bytes sent for it. An estimate for GPUs follows from the bytes and an assumed bandwidth.
"""

from __future__ import annotations

import dataclasses
import math
import multiprocessing
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation import ranks
from atom_fast.distillation.config import preset
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation

from .harness import environment, save_results, summary
from .profile import random_data

# Bytes per second into one process. Assumed: half of the nominal rate, since small messages and one receiver do not
# fill a link.
LINKS = {"NVLink 4, 450 GB/s": 225e9, "PCIe 5 x16, 64 GB/s": 32e9, "100 Gbit/s network": 6.25e9}
LATENCY = 50e-6  # seconds per message, assumed
GPUS = 8  # of the estimate
WORKLOADS = {
    "CIFAR-10, 50 images per class": (10, 50, (3, 32, 32)),
    "CIFAR-100, 50 images per class": (100, 50, (3, 32, 32)),
    "Tiny ImageNet, 50 images per class": (200, 50, (3, 64, 64)),
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Sizes of the measurement.

    Attributes:
        classes: per process.
        ipc: images per class.
        real_batch: real images per class per step.
        width: channels of the ConvNet.
        rounds: timed rounds.
        steps: per round.
    """

    classes: int = 5
    ipc: int = 10
    real_batch: int = 32
    width: int = 64
    rounds: int = 10
    steps: int = 3


def run(sizes: Sizes, processes: Sequence[int] | None = None, out: Path | None = None) -> dict:
    """Measure every number of processes, print a line each, and return the records.

    Args:
        sizes: the same for each process.
        processes: numbers to measure; None: 1, 2, 4 ... as there are cores.
        out: JSON file of the records.

    Raises:
        ValueError: there are fewer cores than processes.
    """
    cores = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
    processes = processes or [2**power for power in range(len(cores).bit_length())]
    if max(processes) > len(cores):
        raise ValueError(f"{max(processes)} processes need a core each; this machine gives {len(cores)}")
    record = {"environment": environment("cpu"), "setting": dataclasses.asdict(sizes), "cells": []}
    for count in processes:
        apart = measure(cores[:count], sizes, together=False)
        cell = {"processes": count, **measure(cores[:count], sizes, together=True), "apart": apart}
        record["cells"].append(cell)
        print(describe(cell, record["cells"][0]), flush=True)
    if processes[-1] > 1:
        record["estimate"] = estimate(record["cells"][-1], sizes)
        print("\n".join(describe_estimate(record["estimate"])))
    if out:
        save_results(out, record)
    return record


def measure(cores: list[int], sizes: Sizes, *, together: bool) -> dict:
    """Run as many processes as cores, pinned to one each; return the figures of the first one.

    Args:
        cores: their numbers.
        sizes: of the measurement.
        together: share one distillation; otherwise each runs its own, at the same time.
    """
    context = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    reports, begin = context.Queue(), context.Barrier(len(cores))
    processes = [
        context.Process(target=_measure_rank, args=(rank, cores, port if together else None, sizes, begin, reports))
        for rank in range(len(cores))
    ]
    for process in processes:
        process.start()
    while processes[0].is_alive() and reports.empty():
        time.sleep(0.1)
    if reports.empty():
        raise RuntimeError(f"a measuring process ended with code {processes[0].exitcode}")
    report = reports.get()
    for process in processes:
        process.join()
    return report


def _measure_rank(rank: int, cores: list[int], port: int | None, sizes: Sizes, begin, reports) -> None:
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, {cores[rank]})
    torch.set_num_threads(1)
    if port is None:
        apart = make_run(sizes)
        begin.wait()
        rounds = _time_rounds(apart, sizes.rounds, sizes.steps)
        if rank == 0:
            reports.put({"seconds_per_step": rounds, "time": summary(rounds)})
        return
    names = {"RANK": rank, "WORLD_SIZE": len(cores), "LOCAL_RANK": rank, "MASTER_PORT": port}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", **{name: str(value) for name, value in names.items()}})
    with ranks.join("cpu"):
        shared = make_run(sizes)
        rounds = _time_rounds(shared, sizes.rounds, sizes.steps)
        meetings = _time(ranks.all_gather_object, 50)

        def gather() -> None:
            for part in shared.state().values():
                ranks.gather(part, shared.data.num_classes)

        sent, gathers = _count_sent(gather), _time(gather, 5)
        own = 2 * shared.images.numel() * shared.images.element_size()
    if rank == 0:
        record = {"seconds_per_step": rounds, "time": summary(rounds), "meeting": summary(meetings)}
        reports.put({**record, "gather": summary(gathers), "bytes_sent": sent, "bytes_a_rank": own})


def make_run(sizes: Sizes) -> Distillation:
    """Return a run on random images of CIFAR-10's shape; each process has ``sizes.classes`` classes."""
    data = random_data(sizes.classes * ranks.count(), 3, 32, 32, per_class=2 * sizes.real_batch)
    settings = {"ipc": sizes.ipc, "real_batch": sizes.real_batch, "width": sizes.width}
    config = preset("paper", **settings).resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, "standard", progress=False)
    own = ranks.local_classes(data.num_classes)
    images = initial_images(config, data, preprocessing)[own.start * config.ipc : own.stop * config.ipc]
    return Distillation(config, data, preprocessing, images, classes=own)


def _time_rounds(run: Distillation, rounds: int, steps: int) -> list[float]:
    """Return the seconds per step of each round; a round ends when every rank has read the loss terms."""
    seconds, iteration = [], 0
    for _ in range(rounds + 1):
        started = time.perf_counter()
        for _ in range(steps):
            iteration += 1
            run.step(iteration)
        run.terms(ranks.all_gather_object(run.read()))
        seconds.append((time.perf_counter() - started) / steps)
    return seconds[1:]  # the first round warms up


def _time(work, count: int) -> list[float]:
    seconds = []
    for _ in range(count):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return seconds


def _count_sent(gather) -> int:
    """Count the bytes that all ranks together hand to ``torch.distributed.send`` while they gather."""
    counted, send = [0], torch.distributed.send

    def counting(tensor, *args, **kwargs):
        counted.append(tensor.numel() * tensor.element_size())
        return send(tensor, *args, **kwargs)

    torch.distributed.send = counting
    try:
        gather()
    finally:
        torch.distributed.send = send
    return sum(ranks.all_gather_object(sum(counted)))


def estimate(cell: dict, sizes: Sizes) -> list[dict]:
    """Estimate the time to gather a checkpoint between GPUs, from the bytes counted between processes.

    Each rank sends images and momentum, and the first one receives all but its own, one message after another.

    Args:
        cell: of more than one process.
        sizes: of the measurement.
    """
    pixels_sent = (cell["processes"] - 1) * sizes.classes * sizes.ipc * 3 * 32 * 32
    bytes_a_pixel = cell["bytes_sent"] / pixels_sent
    records = []
    for name, (classes, ipc, shape) in WORKLOADS.items():
        received = bytes_a_pixel * classes * ipc * math.prod(shape) * (GPUS - 1) / GPUS
        seconds = {link: 2 * (GPUS - 1) * LATENCY + received / rate for link, rate in LINKS.items()}
        records.append({"workload": name, "gpus": GPUS, "bytes_received": round(received), "seconds": seconds})
    return records


def describe(cell: dict, one: dict) -> str:
    """Return a cell as one line."""
    median, first = cell["time"]["median"], one["time"]["median"]
    apart = cell["apart"]["time"]["median"]
    line = f"{cell['processes']} processes: {1e3 * median:8.1f} ms a step ({1e3 * apart:.1f} apart)"
    line += f", {100 * first / median:4.0f} % of the speed of {one['processes']}, {100 * apart / median:.0f} % of apart"
    meeting, gather = 1e3 * cell["meeting"]["median"], 1e3 * cell["gather"]["median"]
    megabytes = cell["bytes_sent"] / 1e6
    return f"{line}; a meeting {meeting:.2f} ms; a checkpoint gathered in {gather:.1f} ms, {megabytes:.2f} MB sent"


def describe_estimate(records: list[dict]) -> list[str]:
    """Return the estimate as lines."""
    lines = [
        f"Estimate for {GPUS} GPUs, assuming half of each link's nominal bandwidth into one GPU and "
        f"{1e6 * LATENCY:.0f} µs a message. Inside a step nothing is sent. To gather a checkpoint:"
    ]
    for record in records:
        times = ", ".join(f"{1e3 * seconds:.1f} ms by {link}" for link, seconds in record["seconds"].items())
        lines.append(f"  {record['workload']}: {record['bytes_received'] / 1e6:.1f} MB; {times}")
    return lines
