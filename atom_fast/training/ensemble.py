"""Training of several networks at a time: the one place that decides how.

Each network has its own :class:`~atom_fast.training.trainer.Trainer` and seed, so that its result does not depend on
the others. On a CPU each has a thread. Measured on two cores with 100 digits per step, a network's step takes 7.3 ms,
against 8.7 ms where both cores share each step; grouped convolutions and ``vmap``, which run the same arithmetic in
PyTorch's own norms and poolings, took 17 ms and more. On a GPU the steps of several networks are one CUDA graph in
which each network has a stream, so that small kernels of one network fill gaps that another leaves.
"""

from __future__ import annotations

import functools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import TypeVar

import torch
from torch import Tensor

from atom_fast._device import is_out_of_memory
from atom_fast.ops.launching import unfused_if_refused
from atom_fast.training.trainer import Trainer

_Result = TypeVar("_Result")  # of a test

# Images in a GPU's graph: four networks at a batch of 256, more networks at smaller batches.
_IMAGES_TOGETHER = 1024
_WARM_UP_STEPS = 3  # before a capture, so that libraries choose algorithms and allocate workspaces outside it


def train_networks(
    make_trainer: Callable[[], Trainer],
    jobs: Sequence[int],
    start: Callable[[Trainer, int], None],
    test: Callable[[Trainer], _Result],
    *,
    evaluate_every: int | None,
    together: int | None,
    advance: Callable[[], object],
) -> Iterator[tuple[int, dict[int, _Result]]]:
    """Train and test networks, several at a time.

    Args:
        make_trainer: makes a trainer; networks are trained in a few of them, one after the other.
        jobs: the networks' numbers.
        start: prepares a trainer for a network by its number: its set and its initial weights.
        test: returns what is wanted of a trainer's network, such as its accuracy; called in any thread.
        evaluate_every: test also after every so many epochs; None tests after the last one only.
        together: train at most so many networks at a time; None chooses.
        advance: called after each epoch of each network, from any thread.

    Yields:
        (number, ``test``'s result after each tested epoch) of each network, as networks finish.
    """
    if not jobs:
        return
    trainer = make_trainer()
    train = _on_threads if trainer.images.device.type == "cpu" else _in_graphs
    yield from train(trainer, make_trainer, jobs, start, test, evaluate_every, together, advance)


def _is_tested(epoch: int, protocol, evaluate_every: int | None) -> bool:
    """True if networks are tested after ``epoch``, counted from 1."""
    return epoch == protocol.epochs or (evaluate_every is not None and epoch % evaluate_every == 0)


# CPU


def _on_threads(first, make_trainer, jobs, start, test, evaluate_every, together, advance):
    cores = torch.get_num_threads()
    workers = min(len(jobs), together or cores)
    trainers = [first, *(make_trainer() for _ in range(workers - 1))]
    stopped = threading.Event()

    def run(job: int) -> tuple[int, dict]:
        if workers > 1:
            torch.set_num_threads(max(1, cores // workers))  # for this thread and threads that start later
        trainer = trainers.pop()
        try:
            start(trainer, job)
            curve = {}
            for epoch in range(1, trainer.protocol.epochs + 1):
                if stopped.is_set():
                    break
                trainer.train_epoch(epoch - 1)
                if _is_tested(epoch, trainer.protocol, evaluate_every):
                    curve[epoch] = test(trainer)
                advance()
            return job, curve
        finally:
            trainers.append(trainer)

    if workers == 1:
        yield from map(run, jobs)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            for future in as_completed([pool.submit(run, job) for job in jobs]):
                yield future.result()
        finally:  # also when the caller is interrupted: no thread goes on training
            stopped.set()
            pool.shutdown(wait=True, cancel_futures=True)
            torch.set_num_threads(cores)


# GPU


def _in_graphs(first, make_trainer, jobs, start, test, evaluate_every, together, advance):
    batch = min(first.protocol.batch_size, len(first.images))
    size = min(len(jobs), together or max(1, _IMAGES_TOGETHER // batch))
    while True:
        size = math.ceil(len(jobs) / math.ceil(len(jobs) / size))  # as many groups, of even sizes
        try:
            ensemble = unfused_if_refused(
                lambda size=size: _Ensemble([first, *(make_trainer() for _ in range(size - 1))]), first.images.device
            )
            break
        except RuntimeError as error:
            if size == 1 or not is_out_of_memory(error):
                raise
        size //= 2
        torch.cuda.empty_cache()
    remaining = list(jobs)
    while remaining:
        group, remaining = remaining[:size], remaining[size:]
        # The last group may be smaller: the other trainers run unused, which costs less than another capture.
        active = list(zip(ensemble.trainers, group, strict=False))
        for trainer, job in active:
            start(trainer, job)
        curves: dict[int, dict] = {job: {} for job in group}
        for epoch in range(1, first.protocol.epochs + 1):
            ensemble.train_epoch(epoch - 1)
            tested = _is_tested(epoch, first.protocol, evaluate_every)
            for trainer, job in active:
                if tested:
                    curves[job][epoch] = test(trainer)
                advance()
        yield from curves.items()


class _Ensemble:
    """Trainers whose steps are one CUDA graph per batch size, with a stream per trainer.

    Args:
        trainers: with sets of one size, on one device.
    """

    def __init__(self, trainers: Sequence[Trainer]):
        self.trainers = trainers
        count, batch = len(trainers[0].images), trainers[0].protocol.batch_size
        self._device = trainers[0].images.device
        *self._streams, self._capture_stream = (_stream(self._device, number) for number in range(len(trainers) + 1))
        self._pool = torch.cuda.graph_pool_handle()
        self._indices, self._graphs = {}, {}
        for size in (min(batch, count), count % batch if count > batch else 0):
            if size:
                self._indices[size] = torch.arange(size, device=self._device).repeat(len(trainers), 1)
                self._graphs[size] = self._capture(self._indices[size])

    def train_epoch(self, epoch: int) -> None:
        """Pass every trainer once over its set, each in its own order; epochs count from 0."""
        orders = torch.stack([trainer.begin_epoch(epoch) for trainer in self.trainers])
        for indices in orders.split(self.trainers[0].protocol.batch_size, dim=1):
            size = indices.shape[1]
            self._indices[size].copy_(indices)
            self._graphs[size].replay()

    def _steps(self, indices: Tensor) -> None:
        """Take a step of every trainer on its row of ``indices``, int64 [trainers, B]."""
        current = torch.cuda.current_stream(self._device)
        for stream in self._streams:
            stream.wait_stream(current)
        try:
            for trainer, stream, row in zip(self.trainers, self._streams, indices.unbind(0), strict=True):
                with torch.cuda.stream(stream):
                    trainer.step(row)
        finally:  # also when memory runs out: a capture that ends with an unjoined stream raises another error
            for stream in self._streams:
                current.wait_stream(stream)

    def _capture(self, indices: Tensor) -> torch.cuda.CUDAGraph:
        """Capture the steps as one graph: one launch instead of some fifty per network."""
        with torch.cuda.device(self._device):
            stream = self._capture_stream  # PyTorch's default is on the device of the process's first capture
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(_WARM_UP_STEPS):
                    self._steps(indices)
            torch.cuda.current_stream().wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            for trainer in self.trainers:
                graph.register_generator_state(trainer.generator)
            # Replays never overlap and pass nothing on, so that graphs can share their memory.
            with torch.cuda.graph(graph, pool=self._pool, stream=stream):
                self._steps(indices)
        return graph


@functools.cache
def _stream(device: torch.device, number: int) -> torch.cuda.Stream:
    """Return the same stream for every ensemble: cuBLAS keeps a workspace for each stream that it ever ran on."""
    return torch.cuda.Stream(device)
