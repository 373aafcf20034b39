"""Measurement of a step in its own process: time call by call, peak memory, and the environment."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import multiprocessing
import platform
import statistics
import subprocess
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from atom_fast._device import is_out_of_memory
from atom_fast._files import write_atomically
from atom_fast._malloc import keep_freed_memory
from benchmarks.live_bytes import LiveBytes

from .methods import Workload, batched, build_step

ROOT = Path(__file__).resolve().parent.parent
FORMAT = 1  # of the JSON files; raised when their meaning changes
WARMUP, FEWEST = 3, 3
TURN = 0.2  # least seconds of a process's turn before its neighbour's
Step = Callable[[], object]  # runs one step; returns its loss on the device or a function that reads it
MEASURED = ("atom_fast", "kernels", "benchmarks/methods", "benchmarks/harness.py")


@dataclasses.dataclass(frozen=True)
class Timing:
    """Duration and conditions of a measurement.

    Attributes:
        iterations: largest number of timed calls.
        seconds: time after which no further call is timed, once there are three; the same limit holds for warm-up.
        limit: seconds after which the cell's process is ended.
        keep_memory: on a CPU, make the C library keep freed memory (`atom_fast._malloc`).
        threads: threads of each process on a CPU; None: PyTorch's default.
        beside_eager: on a CPU, take turns with a process that runs ``eager``, so that their ratio does not depend on
            changes of the machine's speed.
    """

    iterations: int = 100
    seconds: float = 60.0
    limit: float = 600.0
    keep_memory: bool = True
    threads: int | None = None
    beside_eager: bool = False


def run_cell(workload: Workload, timing: Timing) -> dict:
    """Measure one workload in its own process, so that it starts with clean memory and may crash.

    Returns:
        A record for JSON: ``status`` ("ok", "OOM", "timeout" or "failed"), and the figures of :func:`measure` when ok,
        or a ``message``.
    """
    started = time.time()
    # A server imports the modules once and never touches the GPU; each process inherits them. A process with PyTorch's
    # default memory behaviour is started afresh, like a user's.
    afresh = workload.device == "cpu" and not timing.keep_memory
    context = multiprocessing.get_context("spawn" if afresh else "forkserver")
    context.set_forkserver_preload(["benchmarks.harness", "benchmarks.methods.atom"])
    receiver, sender = context.Pipe(duplex=False)
    processes, neighbour = [], None
    if timing.beside_eager and workload.device == "cpu" and workload.implementation != "eager":
        neighbour, there = context.Pipe()
        eager = dataclasses.replace(workload, implementation="eager", class_chunk=None)
        processes.append(context.Process(target=_take_turns, args=(eager, timing, there)))
    process = context.Process(target=_measure_and_send, args=(workload, timing, sender, neighbour))
    processes.append(process)
    for each in processes:
        each.start()
    sender.close()
    if neighbour:
        neighbour.close()
        there.close()
    try:
        if receiver.poll(timing.limit):
            record = receiver.recv()
            process.join(10)  # its result has arrived; closing may take a while
        else:
            record = _ended("timeout", f"not done in {timing.limit:.0f} s")
    except EOFError:
        process.join()
        record = _ended("failed", f"the process ended with code {process.exitcode}")
    finally:
        for each in processes:
            each.kill()
            each.join()
    record["cell_seconds"] = round(time.time() - started, 2)
    return record


def _measure_and_send(workload: Workload, timing: Timing, sender, neighbour) -> None:
    try:
        if timing.keep_memory and workload.device == "cpu":
            keep_freed_memory()
        record = {"status": "ok", **measure(workload, timing, neighbour)}
    except Exception as error:
        if is_out_of_memory(error):
            record = _ended("OOM", str(error))
        else:
            traceback.print_exc()
            record = _ended("failed", f"{type(error).__name__}: {error}")
    sender.send(record)


def _ended(status: str, message: str) -> dict:
    return {"status": status, "message": message[:1000]}


def _take_turns(workload: Workload, timing: Timing, connection) -> None:
    """Run a turn of a workload's step whenever the other end asks, and send the seconds of each step."""
    if timing.keep_memory:
        keep_freed_memory()
    connection.recv()  # not before the other process is ready: neither disturbs the other
    step = _prepared_step(workload, timing)
    for _ in range(WARMUP):
        step()
    connection.send("ready")
    while connection.recv():
        connection.send(_turn(step)[0])


def _turn(step: Step) -> tuple[list[float], object]:
    """Run a turn; return the seconds of each step and the last loss."""
    step()  # not timed: the neighbour's threads look for work for some 10 ms more before they sleep
    seconds = []
    while sum(seconds) < TURN:
        taken, loss = _clocked(step)
        seconds.append(taken)
    return seconds, loss


def _prepared_step(workload: Workload, timing: Timing) -> Step:
    if timing.threads and workload.device == "cpu":
        torch.set_num_threads(timing.threads)
    set_precision(workload)
    torch.manual_seed(workload.seed)
    return build_step(workload)


def measure(workload: Workload, timing: Timing, neighbour=None) -> dict:
    """Build a workload's step and measure it in this process.

    Args:
        workload, timing: step to measure, and duration.
        neighbour: connection to a process in `_take_turns`, or None.

    Returns:
        ``seconds``: one per iteration; on a GPU between device events, so that nothing waits for the device. ``time``:
        their summary. ``memory``: see :func:`_cuda_memory` and :func:`_cpu_memory`. ``loss``: loss of the last step.
        ``setup_seconds``: data, compilation or capture, and the first step. With a neighbour also ``eager_seconds``,
        the seconds of its steps, and ``share_of_eager``: the median over turns of a step's time over that in the
        neighbour's next turn.
    """
    started = time.perf_counter()
    step = _prepared_step(workload, timing)
    loss = step()
    synchronize(workload.device)
    setup = time.perf_counter() - started

    on_gpu, beside = workload.device == "cuda", {}
    if on_gpu:
        torch.cuda.empty_cache()  # memory that only the first step needed: trials of convolutions, compilation
    for _ in range(WARMUP - 1):
        if time.perf_counter() - started > timing.seconds:
            break
        step()
        synchronize(workload.device)

    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
        resident = torch.cuda.memory_allocated()
        seconds, loss = _time_with_events(step, timing)
        memory = _cuda_memory(resident)
    else:
        if neighbour is None:
            seconds, loss = _time_with_clock(step, timing)
        else:
            seconds, beside, loss = _time_in_turns(step, neighbour, timing)
        memory = _cpu_memory(step, workload)
    return {
        **beside,
        "time": summary(seconds),
        "memory": memory,
        "loss": float(loss() if callable(loss) else loss),
        "setup_seconds": round(setup, 3),
        "seconds": seconds,
    }


def set_precision(workload: Workload) -> None:
    """Set PyTorch's switches for the baselines; this project's step sets its own from its configuration.

    TF32 convolutions are PyTorch's default, which the public code leaves alone. cuDNN's search for the fastest
    algorithm is off for ``eager``, as there, and on for batched code, whose shapes are fixed.
    """
    if workload.precision == "float32":
        torch.backends.cudnn.conv.fp32_precision = "ieee"
    torch.backends.cudnn.benchmark = workload.implementation in batched.IMPLEMENTATIONS


def synchronize(device: str) -> None:
    """Wait for a GPU; do nothing on a CPU."""
    if device == "cuda":
        torch.cuda.synchronize()


def _time_with_events(step: Step, timing: Timing) -> tuple[list[float], object]:
    started = time.perf_counter()
    events = [_recorded_event()]
    while len(events) <= timing.iterations:
        loss = step()
        events.append(_recorded_event())
        if len(events) > FEWEST and time.perf_counter() - started > timing.seconds:
            break
    torch.cuda.synchronize()
    return [a.elapsed_time(b) / 1000 for a, b in itertools.pairwise(events)], loss


def _recorded_event() -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _time_with_clock(step: Step, timing: Timing) -> tuple[list[float], object]:
    seconds = []
    while len(seconds) < timing.iterations:
        taken, loss = _clocked(step)
        seconds.append(taken)
        if len(seconds) >= FEWEST and sum(seconds) > timing.seconds:
            break
    return seconds, loss


def _clocked(step: Step) -> tuple[float, object]:
    started = time.perf_counter()
    loss = step()
    return time.perf_counter() - started, loss


def _time_in_turns(step: Step, neighbour, timing: Timing) -> tuple[list[float], dict, object]:
    """Return the seconds of the step, the neighbour's fields of `measure`, and the loss."""
    neighbour.send("prepare")
    neighbour.recv()
    seconds, eager_seconds, shares = [], [], []
    while len(shares) < FEWEST or sum(seconds) + sum(eager_seconds) < timing.seconds:
        own, loss = _turn(step)
        neighbour.send(True)
        others = neighbour.recv()
        seconds += own
        eager_seconds += others
        shares.append(statistics.median(own) / statistics.median(others))
    neighbour.send(False)
    beside = {"share_of_eager": statistics.median(shares), "eager_seconds": eager_seconds}
    return seconds, beside, loss


def summary(seconds: list[float]) -> dict:
    """Return median, 20 % and 80 % quantiles, mean and standard deviation in seconds, and the number of samples."""
    quantiles = statistics.quantiles(seconds, n=5, method="inclusive") if len(seconds) > 1 else [seconds[0]] * 4
    return {
        "iterations": len(seconds),
        "median": statistics.median(seconds),
        "q20": quantiles[0],
        "q80": quantiles[3],
        "mean": statistics.fmean(seconds),
        "std": statistics.pstdev(seconds),
    }


def _cuda_memory(resident: int) -> dict:
    """Return bytes at the peak of the timed steps, including the data set and all state.

    A captured graph keeps its memory in a separate pool that replays do not report: the whole pool counts.
    """
    held = 0
    for segment in torch.cuda.memory_snapshot():
        captured = tuple(segment.get("segment_pool_id", (0, 0))) != (0, 0)
        held += segment["total_size"] if captured else segment["allocated_size"]
    return {
        "counted": "CUDA allocator",
        "peak_allocated": max(torch.cuda.max_memory_allocated(), held),
        "peak_reserved": torch.cuda.max_memory_reserved(),
        "resident": resident,
    }


def _cpu_memory(step: Step, workload: Workload) -> dict:
    """Return the peak bytes of tensors made by one more step; data set and state between steps do not count."""
    if workload.implementation in batched.MODES:
        return {"counted": "no: compiled code makes its tensors where they cannot be counted", "peak_allocated": None}
    with LiveBytes() as counter:
        step()
    return {"counted": "live tensors made by a step", "peak_allocated": counter.peak}


@functools.lru_cache(maxsize=2)
def environment(device: str, threads: int | None = None) -> dict:
    """Return device, versions, commit and a hash of the measured code; ``threads`` as in `Timing`.

    Raises:
        RuntimeError: there is no such device.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise RuntimeError(
            "device 'cuda' needs a CUDA GPU that PyTorch can use; none was found; the CPU editions need none"
        )
    return {
        "device": _gpu_name() if device == "cuda" else _processor_name(),
        "driver": _driver() if device == "cuda" else None,
        "cuda": torch.version.cuda if device == "cuda" else None,
        "threads": threads or torch.get_num_threads(),
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "source": source_identity(),
        **_commit(),
    }


def _gpu_name() -> str:
    # The driver's tool answers: asking PyTorch would open a context in this process and take memory from the cells.
    return _run("nvidia-smi", "--query-gpu=name", "--format=csv,noheader") or torch.cuda.get_device_name()


def _driver() -> str | None:
    return _run("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")


def _processor_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _version(module: str) -> str | None:
    try:
        return __import__(module).__version__
    except ImportError:
        return None


def _commit() -> dict:
    commit = _run("git", "-C", str(ROOT), "rev-parse", "HEAD")
    changes = _run("git", "-C", str(ROOT), "status", "--porcelain", "--", *MEASURED)
    return {"commit": commit, "clean": None if commit is None else changes is None}


def _run(*command: str) -> str | None:
    """Return the first line that a command prints; None if it prints nothing, fails or is missing."""
    try:
        output = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    return output.splitlines()[0].strip() if output.strip() else None


def source_identity() -> str:
    """Return a hash of the measured code: it names a version without git, and a modified tree."""
    digest = hashlib.sha256()
    for place in MEASURED:
        inside = (file for file in (ROOT / place).rglob("*") if file.suffix in (".py", ".c", ".h"))
        for file in sorted(inside) if (ROOT / place).is_dir() else [ROOT / place]:
            digest.update(str(file.relative_to(ROOT)).encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:12]


def load_results(path: Path) -> dict:
    """Read a results file.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is not JSON, or not a results file of this format.
    """
    try:
        results = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not valid JSON ({error}); move it away, it is left as it is") from error
    if not isinstance(results, dict) or results.get("format") != FORMAT or "cells" not in results:
        found = results.get("format") if isinstance(results, dict) else type(results).__name__
        raise ValueError(f"{path} is not a results file of format {FORMAT} (found {found!r}); it is left as it is")
    return results


def save_results(path: Path, results: dict) -> None:
    """Write a results file atomically, one line per cell or part, so that a change shows as that line."""
    fields = []
    for name, value in results.items():
        if isinstance(value, list) and value:
            lines = ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in value)
            fields.append(f"{json.dumps(name)}: [\n{lines}\n ]")
        else:
            fields.append(f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=False)}")
    write_atomically(path, "{\n " + ",\n ".join(fields) + "\n}\n")
