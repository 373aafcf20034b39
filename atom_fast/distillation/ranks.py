"""Several processes that share the work, a GPU each or some CPU cores, as ``torchrun`` starts them.

The functions of this module act on the group of processes that `join` made this process (a rank) part of; alone, they
do nothing or return what they are given. Nothing else in the package knows how many processes there are.

Each rank has its part of the classes, or of an evaluation's networks. Every rank draws the randomness of a step for all
classes from the same seed and uses its own rows, so that the number of ranks does not matter. Inside a step nothing is
sent but the sums per channel through which BatchNorm couples classes. Ranks meet where something is read, saved or
agreed on. Small values go through the key-value store that started them; images and sums go by NCCL between GPUs and by
gloo between CPUs.

A rank that ends by an error leaves a message in the store. A killed one stops beating: a thread of each rank counts up
a number there, and ranks that wait for another watch it.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

BEAT = 1.0  # seconds between two signs of life, and between two looks at those of others
SILENCE = 20.0  # seconds without one after which a rank is given up; torchrun waits 30 before it kills the others
_JOINING = 45.0  # seconds in which all ranks must have started, and in which what is sent must arrive
_LINGER = 10.0  # seconds that the first rank, where it holds the store, waits for the others to leave


class RankError(RuntimeError):
    """Another rank failed or is lost; the message names it where it is known."""


def launched() -> bool:
    """Return True if this process is one of several started together (by torchrun: it sets ``WORLD_SIZE``)."""
    return int(os.environ.get("WORLD_SIZE") or 1) > 1


_group: _Group | None = None  # of this process, set by `join`; None: alone


@contextlib.contextmanager
def join(device: torch.device | str | None = None) -> Iterator[None]:
    """Make the processes started beside this one its group; leave them at the end, with the reason on failure.

    Unless several were `launched`, the process stays alone, at no cost.

    Args:
        device: where ranks compute; None: GPUs, if there are any.

    Raises:
        RankError: a rank did not start, or is lost.
    """
    global _group
    if not launched():
        yield
        return
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    before, group = _group, _Group(torch.device(device).type)
    failure: BaseException | None = None
    try:
        group.begin()
        _group = group
        yield
    except BaseException as error:
        failure = error
        raise
    finally:
        _group = before
        group.leave(failure)


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let the functions of this module act on this process by itself, for work that is not shared with the group."""
    global _group
    before, _group = _group, None
    try:
        yield
    finally:
        _group = before


def is_first() -> bool:
    """Return True in the process that writes files: rank 0, or one alone."""
    return _group is None or _group.rank == 0


def count() -> int:
    """Return the number of processes in the group."""
    return 1 if _group is None else _group.size


def label() -> str:
    """Return the prefix of this rank's messages, such as "rank 1: "; empty alone."""
    return "" if _group is None else f"rank {_group.rank}: "


def local_classes(classes: int) -> range:
    """Return the classes out of ``classes`` that this rank computes; they are consecutive."""
    return range(classes) if _group is None else split(classes, _group.rank, _group.size)


def split(classes: int, rank: int, size: int) -> range:
    """Return the classes of one of ``size`` ranks: consecutive, and at most one more than another rank has."""
    return range(rank * classes // size, (rank + 1) * classes // size)


def all_gather_object(value: Any = None) -> list:
    """Return every rank's value in the order of ranks; wait until all have called this. Values must be JSON."""
    return [value] if _group is None else _group.all_gather_object(value)


def gather(part: Tensor, classes: int, *, everywhere: bool = False) -> Tensor | None:
    """Return the rows of all classes on the first rank, None on the others unless ``everywhere``.

    Args:
        part: rows of this rank's `local_classes`, class-major, equally many per class.
        classes: number of classes in all.
        everywhere: return all rows on every rank.
    """
    return part if _group is None else _group.gather(part, classes, everywhere)


def scatter(whole: Tensor | None, like: Tensor, classes: int) -> Tensor | None:
    """Return this rank's rows of the first rank's ``whole``: the reverse of `gather`; alone, ``whole`` itself.

    Args:
        whole: rows of all classes, class-major; not used on the other ranks.
        like: a tensor of the shape, type and device of this rank's rows.
        classes: number of classes in all.
    """
    return whole if _group is None else _group.scatter(whole, like, classes)


def all_gather(part: Tensor, classes: int) -> Tensor:
    """Return the rows of all classes on every rank, from within a step: nobody meets, and a CUDA graph captures it.

    Args:
        part: [len(local_classes), ...], a row for each of this rank's classes.
        classes: number of classes in all.

    Raises:
        RankError: another rank is gone.
    """
    return part if _group is None else _group.all_gather(part, classes)


def own_jobs(jobs: Sequence[int]) -> Sequence[int]:
    """Return the jobs that `share` gives to this rank."""
    return jobs if _group is None else jobs[_group.rank :: _group.size]


def share(
    jobs: Sequence[int], work: Callable[[Sequence[int]], Iterable[tuple[int, Mapping]]]
) -> Iterator[tuple[int, Mapping]]:
    """Yield (job, result) of all jobs on every rank, as results arrive; each rank works on its `own_jobs`.

    Args:
        jobs: numbers.
        work: yields (job, result) for each job that it is given; results map whole numbers to JSON values.
    """
    return iter(work(jobs)) if _group is None else _group.share(jobs, work)


def after_first(work: Callable[[], Any]) -> Any:
    """Return ``work()``, run on the first rank of each machine before the others, which find what it downloaded."""
    return work() if _group is None else _group.after_first(work)


def own_device(device: torch.device | str | None) -> torch.device:
    """Return the device of this process: in a group the GPU of its number on its machine, unless the CPU is named.

    Args:
        device: None: a GPU, if there is one.

    Raises:
        ValueError: there is no such device, or it is neither a CPU nor a GPU of CUDA, or there are fewer GPUs than
            processes on this machine.
    """
    named = ("cuda" if torch.cuda.is_available() else "cpu") if device is None else device
    try:
        device = torch.device(named)
    except RuntimeError:  # names every kind of device that PyTorch was ever ported to
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(
            "device must be 'cpu', 'cuda' or a GPU by number such as 'cuda:1', and no other kind is supported; "
            f"got {str(named)!r}"
        )
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {str(device)!r} is not available: PyTorch sees no GPU; use 'cpu'")
    if device.type != "cuda" or _group is None:
        return device
    here, gpus = _group.local_rank, torch.cuda.device_count()
    if device.index not in (None, here):
        raise ValueError(f"device {str(device)!r} cannot be shared by several processes; use 'cuda' or 'cpu'")
    if here >= gpus:
        raise ValueError(f"process {here + 1} on this machine finds {gpus} GPUs; start at most {gpus}, or use 'cpu'")
    torch.cuda.set_device(here)
    return torch.device("cuda", here)


def _agent_holds_store() -> bool:
    """Return True if torchrun holds the key-value store; otherwise rank 0 does."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


class StopSign:
    """The decision to stop, the same on all ranks: they compare signals about once a second, at the same steps."""

    def __init__(self, iteration: int):
        self._next = self._last = iteration
        self._then = time.monotonic()

    def asked(self, iteration: int, received: Sequence[int], *, at_once: bool = False) -> int | None:
        """Return the signal that ends the run after ``iteration``, or None.

        Args:
            iteration: steps that are done; every rank asks after every step.
            received: signals that came to this process.
            at_once: wait for all ranks now.
        """
        if _group is None:
            return received[0] if received else None
        if iteration < self._next and not at_once:
            return None
        steps, now = max(iteration - self._last, 1), time.monotonic()
        notes = _group.all_gather_object([list(received[:1]), (now - self._then) / steps])
        slowest = max(seconds for _, seconds in notes)
        # At most twice as many as before: a GPU's first steps seem to take no time, since nobody waits for them.
        self._last, self._then = iteration, now
        self._next = iteration + max(1, min(2 * steps, int(1 / max(slowest, 1e-6))))
        return next((signals[0] for signals, _ in notes if signals), None)


class _Group:
    """The processes started together, as this one, number ``rank`` of ``size``, sees them."""

    def __init__(self, device: str):
        import torch.distributed as dist

        self._dist = dist
        limit = datetime.timedelta(seconds=_JOINING)
        store, self.rank, self.size = next(dist.rendezvous("env://", timeout=limit))
        self.local_rank = int(os.environ.get("LOCAL_RANK", self.rank))
        self._backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
        _Group._groups += 1
        self._store = dist.PrefixStore(f"atom_fast/{_Group._groups}", store)
        self._meeting = self._rounds = 0
        self._heard: dict[int, tuple[bytes, float]] = {}
        self._looked = 0.0
        self._stopped = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="atom_fast heartbeat")

    _groups = 0  # of this process so far: what an earlier one left in the store is not to be read again

    def begin(self) -> None:
        """Wait for the others and connect to them."""
        self._heart.start()
        self.all_gather_object()
        limit = datetime.timedelta(seconds=_JOINING)
        with self._explained("while the ranks connected"):
            self._dist.init_process_group(
                self._backend, store=self._dist.PrefixStore("group", self._store), rank=self.rank,
                world_size=self.size, timeout=limit,
            )  # fmt: skip

    def leave(self, failure: BaseException | None) -> None:
        """Disconnect; if this rank failed, tell the others why."""
        failed = failure is not None and not isinstance(failure, SystemExit)
        with contextlib.suppress(RuntimeError):  # the store may be gone
            if failed:
                message = str(failure) or type(failure).__name__
                self._store.compare_set("failed", "", json.dumps([self.rank, message]))  # unless another one did before
            self._store.set(f"left/{self.rank}", "")
            if self.rank == 0 and not _agent_holds_store():
                # The store ends with this process: the others must have read what is in it.
                limit = time.monotonic() + (3 * BEAT if isinstance(failure, RankError) else _LINGER)
                others = [f"left/{rank}" for rank in range(1, self.size)]
                while not self._store.check(others) and time.monotonic() < limit:
                    time.sleep(0.02)
        self._stopped.set()
        if not failed and self._dist.is_initialized():
            self._dist.destroy_process_group()

    def all_gather_object(self, value: Any = None) -> list:
        self._meeting += 1
        keys = [f"meeting/{self._meeting}/{rank}" for rank in range(self.size)]
        with self._explained("while the ranks met"):
            self._store.set(keys[self.rank], json.dumps(value))
            self._wait_for(keys)
            values = [json.loads(self._store.get(key)) for key in keys]
            # A rank that has come to this meeting has read all of the one before.
            self._store.delete_key(f"meeting/{self._meeting - 1}/{self.rank}")
        return values

    def gather(self, part: Tensor, classes: int, everywhere: bool) -> Tensor | None:
        self.all_gather_object()  # so that nobody who sends has to wait for one who is not there yet
        part = part.contiguous()
        rows = self._rows(part, classes)
        received = self.rank == 0 or everywhere
        whole = part.new_empty(rows[-1].stop if received else 0, *part.shape[1:])
        if self.rank == 0:
            whole[rows[0]] = part
            for rank in range(1, self.size):
                with self._explained(f"while it received the images of rank {rank}"):
                    self._dist.recv(whole[rows[rank]], rank)
        else:
            with self._explained("while it sent images to rank 0"):
                self._dist.send(part, 0)
        if everywhere:
            with self._explained("while images were sent to all ranks"):
                self._dist.broadcast(whole, 0)
        return whole if received else None

    def scatter(self, whole: Tensor | None, like: Tensor, classes: int) -> Tensor:
        self.all_gather_object()
        received = torch.empty_like(like, memory_format=torch.contiguous_format)
        if self.rank == 0:
            assert whole is not None
            rows = self._rows(like, classes)
            whole = whole.to(like.device, like.dtype).contiguous()
            received.copy_(whole[rows[0]])
            for rank in range(1, self.size):
                with self._explained(f"while it sent images to rank {rank}"):
                    self._dist.send(whole[rows[rank]], rank)
        else:
            with self._explained("while it received images of rank 0"):
                self._dist.recv(received, 0)
        return received

    def all_gather(self, part: Tensor, classes: int) -> Tensor:
        sizes = [len(split(classes, rank, self.size)) for rank in range(self.size)]
        padded = part.new_zeros((max(sizes), *part.shape[1:]))
        padded[: len(part)] = part
        whole = [torch.empty_like(padded) for _ in sizes]
        with self._explained("while BatchNorm's sums were gathered"):
            try:
                self._dist.all_gather(whole, padded)
            except RuntimeError:
                self._look_for_the_lost()
                raise
        return torch.cat([rows[:size] for rows, size in zip(whole, sizes, strict=True)])

    def share(
        self, jobs: Sequence[int], work: Callable[[Sequence[int]], Iterable[tuple[int, Mapping]]]
    ) -> Iterator[tuple[int, Mapping]]:
        self._rounds += 1
        missing = {job: f"result/{self._rounds}/{job}" for job in jobs}
        for job, result in work(jobs[self.rank :: self.size]):
            with self._explained("while it reported a result"):
                self._store.set(missing[job], json.dumps(list(result.items())))
            yield from self._arrived(missing)
        while missing:
            time.sleep(0.02)
            with self._explained("while it waited for results"):
                self._look_at_others()
            yield from self._arrived(missing)

    def after_first(self, work: Callable[[], Any]) -> Any:
        done = work() if self.local_rank == 0 else None
        self.all_gather_object()
        return done if self.local_rank == 0 else work()

    def _rows(self, part: Tensor, classes: int) -> list[slice]:
        """Return each rank's rows of the whole."""
        each = len(part) // len(split(classes, self.rank, self.size))
        shares = (split(classes, rank, self.size) for rank in range(self.size))
        return [slice(share.start * each, share.stop * each) for share in shares]

    def _arrived(self, missing: dict[int, str]) -> Iterator[tuple[int, Mapping]]:
        with self._explained("while it waited for results"):
            found = [job for job, key in missing.items() if self._store.check([key])]
            results = [(job, dict(json.loads(self._store.get(missing.pop(job))))) for job in found]
        yield from results

    def _wait_for(self, keys: list[str]) -> None:
        delay = 0.0005
        while not self._store.check(keys):
            self._look_at_others()
            time.sleep(delay)
            delay = min(2 * delay, 0.02)

    def _look_at_others(self) -> None:
        """Check, at most every ``BEAT`` seconds, that no rank has failed and that all are alive.

        Raises:
            RankError: one is not.
        """
        now = time.monotonic()
        if now - self._looked < BEAT:
            return
        self._looked = now
        failure = self._failure()
        if failure:
            raise RankError(failure)
        for rank in range(self.size):
            if rank == self.rank:
                continue
            key = f"beat/{rank}"
            beat = self._store.get(key) if self._store.check([key]) else b""
            before, since = self._heard.get(rank, (None, now))
            self._heard[rank] = beat, since if beat == before else now
            if not beat and now - since > _JOINING:
                raise RankError(f"rank {rank} of {self.size} did not start within {_JOINING:.0f} s")
            if beat and beat == before and now - since > SILENCE:
                raise RankError(
                    f"rank {rank} of {self.size} has given no sign of life for {now - since:.0f} s: it was killed, or "
                    "its machine or network is down"
                )

    def _look_for_the_lost(self) -> None:
        """Watch the others for as long as it takes to tell that one is gone.

        Raises:
            RankError: one is, or has failed; otherwise the connection was lost for another reason.
        """
        limit = time.monotonic() + SILENCE + 3 * BEAT
        while time.monotonic() < limit:
            self._look_at_others()
            time.sleep(0.02)

    def _failure(self) -> str | None:
        """Return the message of the first rank that failed."""
        if not self._store.check(["failed"]):
            return None
        rank, message = json.loads(self._store.get("failed"))
        return f"rank {rank} of {self.size} failed: {message}"

    @contextlib.contextmanager
    def _explained(self, when: str) -> Iterator[None]:
        """Turn a failed connection into a RankError that names the rank that is gone, where that can be known."""
        try:
            yield
        except RankError:
            raise
        except RuntimeError as error:
            reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            said = f"rank {self.rank} of {self.size} lost contact with the others {when}"
            try:
                said = self._failure() or f"{said}: {reason}"
            except RuntimeError:
                said += f": {'torchrun' if _agent_holds_store() else 'rank 0'}, which connects them, is gone ({reason})"
            raise RankError(said) from error

    def _beat(self) -> None:
        count = 0
        while not self._stopped.is_set():
            count += 1
            try:
                self._store.set(f"beat/{self.rank}", str(count))
            except RuntimeError:
                return  # the main thread finds out when it next asks for anything
            self._stopped.wait(BEAT)
