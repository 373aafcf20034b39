"""Everything worth measuring on a GPU, the most valuable first.

Needs a checkout and a Python with torch, triton, numpy and pytest; with images of CIFAR-10 also everything that the
package requires (kornia, to whiten). Nothing is installed or fetched. Each part has its own time limit, and what a part
has measured is kept however it ends. The folder of the results holds at most 14 files: ``summary.json``, ``log.txt``,
``table3-gpu.json``, ``scaling-gpu.json``, ``kernels.json``, ``evaluation.json``, ``best.json``, ``successors.json``
and, with images, ``table1.json``, ``study.json``, ``table6.json`` and three records, whose sets stay in
``runs/gpu-accuracy``: another run continues them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from . import scaling, table3
from .harness import ROOT, Timing, environment, save_results
from .timings import FINISHED

PLANNED_MINUTES = 8.0  # time of the run that the limits of the parts are made for; others scale them
CELLS_FOLDER = ROOT / "runs" / "gpu-accuracy"
BENCHMARKS = ["-m", "benchmarks"]
_LIKE_THE_PAPER = ["--iterations", "8000", "--networks", "5", "--protocol", "datadam-code", "--quiet"]
TABLE1 = [
    *("table1", "--cells", "cifar10:1,cifar10:10,cifar10:50", "--methods", "dm,dam,atom", "--seeds", "5"),
    *_LIKE_THE_PAPER,
]
STUDY = ["study", "--cells", "cifar10:10,cifar10:50", "--factors", "loss_scale,image_average", "--seeds", "3"]
STUDY += _LIKE_THE_PAPER
TABLE6 = ["table6", "--dataset", "cifar10", "--proxies", "atom", "--reference-epochs", "0", "--quiet"]
# The shape of CIFAR-10 at 50 images per class; the preset paper as it is there.
STEP = ["profile", "--shape", "10", "3", "32", "32", "--ipc", "50", "--steps", "30", "--warm-up", "5", "--quiet"]
STEPS_OF = {
    "paper": ["--preset", "paper", "--norm", "batch", "--preprocessing", "zca"],
    "best": ["--preset", "best", "--norm", "batch"],
}
# Steps with the kernels that were measured and with those to follow, in turns.
SUCCESSORS = {
    f"{name}, {kernels}": ["--preset", "paper", "--preprocessing", "zca", *options, "--kernels", kernels]
    for name, options in {
        "tf32": ["--norm", "instance"],
        "tf32, real images in float16": ["--norm", "instance", "--real-precision", "float16"],
        "float16": ["--norm", "instance", "--precision", "float16"],
        "BatchNorm": ["--norm", "batch"],
    }.items()
    for kernels in ("measured", "successor")
}
RECORD = ["record", "--dataset", "cifar10", "--preset", "best", "--protocol", "idc", "--networks", "5", "--quiet"]
_SECONDS_TO_STOP = 25  # in which a stopped command writes its results and reports failures


@dataclasses.dataclass
class GpuRun:
    """One run of parts.

    Attributes:
        out: folder of the results.
        deadline: on ``time.monotonic()``'s clock.
        cifar: folder of CIFAR-10 as images, or None.
        parts: outcomes of finished parts.
    """

    out: Path
    deadline: float
    cifar: Path | None
    parts: list[dict]

    def command(self, arguments: list[str], limit: float, stop: int = signal.SIGTERM) -> tuple[str, str]:
        """Run Python with arguments in the checkout; return how it ended, and its last line.

        Before the limit it gets the signal ``stop``, early enough to write its results.
        """
        grace = min(_SECONDS_TO_STOP, limit / 2)
        with open(self.out / "log.txt", "a+") as log:
            print(f"$ python {' '.join(arguments)}", file=log, flush=True)
            before = log.tell()
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group, so that its children end with it
            )  # fmt: skip
            try:
                code = process.wait(limit - grace)
                ending = "ok" if code == 0 else f"failed (exit status {code})"
            except subprocess.TimeoutExpired:
                ending = f"stopped after {limit:.0f} s"
                process.send_signal(stop)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(grace)
            finally:
                _end(process)
            log.seek(before)
            lines = [line.strip() for line in log if line.strip()]
        return ending, lines[-1] if lines else ""


def _end(process: subprocess.Popen) -> None:
    """End a command and its children."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine(run: GpuRun, limit: float) -> str:
    """Check what runs fused here against the equations; the whole answer is in the log."""
    return run.command(["-m", "atom_fast", "doctor"], limit)[0]


def gpu_tests(run: GpuRun, limit: float) -> str:
    """Run the tests that need CUDA."""
    arguments = ["-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return ": ".join(run.command([*arguments, "--tb=short"], limit, signal.SIGINT))  # on which pytest reports failures


def kernel_benchmarks(run: GpuRun, limit: float) -> str:
    """Time every operator against a copy."""
    return ": ".join(run.command([*BENCHMARKS, "kernels", "--out", str(run.out / "kernels.json")], limit))


def headline(run: GpuRun, limit: float) -> str:
    """Time ATOM at 50 images per class in every implementation."""
    return _table3(run, limit, methods=["atom"], ipcs=[50], seconds=10)


def whole_table(run: GpuRun, limit: float) -> str:
    """Time the rest of Table 3."""
    return _table3(run, limit, methods=None, ipcs=None, seconds=8)


def _table3(run: GpuRun, limit: float, methods: list[str] | None, ipcs: list[int] | None, seconds: float) -> str:
    timing = Timing(iterations=100, seconds=seconds, limit=120)
    path = table3.run("gpu", run.out, methods=methods, ipcs=ipcs, timing=timing, deadline=time.monotonic() + limit)
    return _count(path)


def growth(run: GpuRun, limit: float) -> str:
    """Time a step against classes, images per class and resolution."""
    return _count(scaling.run("gpu", run.out, deadline=time.monotonic() + limit))


def _count(path: Path) -> str:
    records = json.loads(path.read_text())["cells"] if path.exists() else []
    return f"{sum(record['status'] in FINISHED for record in records)} cells measured"


def evaluation(run: GpuRun, limit: float) -> str:
    """Time 20 networks of 1,000 epochs on 50 images per class, beside 100 epochs of the public code's loop."""
    arguments = ["--loop-networks", "1", "--loop-epochs", "100", "--out", str(run.out / "evaluation.json")]
    return ": ".join(run.command([*BENCHMARKS, "evaluation", *arguments], limit))


def table1(run: GpuRun, limit: float) -> str:
    """Measure CIFAR-10's columns of Table 1 at the paper's size: up to five sets per cell, one of every cell first."""
    return _accuracies(run, limit, TABLE1)


def study(run: GpuRun, limit: float) -> str:
    """Measure the effect of loss scale and running mean at 10 and 50 images per class."""
    return _accuracies(run, limit, STUDY)


def _accuracies(run: GpuRun, limit: float, arguments: list[str]) -> str:
    if run.cifar is None:
        return "left out: no --cifar DIR"
    results = CELLS_FOLDER / f"{arguments[0]}.json"
    results.unlink(missing_ok=True)  # the command writes it again from the cells
    where = ["--out", str(CELLS_FOLDER), "--data-dir", str(run.cifar)]
    outcome = ": ".join(run.command([*BENCHMARKS, *arguments, *where], limit))
    if results.exists():
        shutil.copy(results, run.out)
    return outcome


def best(run: GpuRun, limit: float) -> str:
    """Time a step of the preset best beside one of the preset paper, at 50 images per class."""
    return _steps(run, limit, STEPS_OF, "best.json")


def successors(run: GpuRun, limit: float) -> str:
    """Time a step with the measured kernels and with their successors, in every precision and norm."""
    return _steps(run, limit, SUCCESSORS, "successors.json")


def _steps(run: GpuRun, limit: float, steps: Mapping[str, list[str]], file: str) -> str:
    cells, outcomes = [], []
    for name, options in steps.items():
        folder = CELLS_FOLDER / "steps" / name
        profile = folder / "profile.json"
        profile.unlink(missing_ok=True)
        ending, _ = run.command([*BENCHMARKS, *STEP, *options, "--out", str(folder)], limit / len(steps))
        if profile.exists():
            measured = json.loads(profile.read_text("utf-8"))
            kept = ("precision", "fusion", "step_seconds", "captured_seconds", "kernels")
            cells.append({"step": name, "options": options, **{field: measured[field] for field in kept}})
            seconds = measured["captured_seconds"] or measured["step_seconds"]
            ending = f"{1e3 * seconds:.2f} ms" if ending == "ok" else ending
        outcomes.append(f"{name} {ending}")
    if cells:
        save_results(run.out / file, {"environment": environment("cuda"), "cells": cells})
    return ", ".join(outcomes)


def table6(run: GpuRun, limit: float) -> str:
    """Train the whole grid of Table 6 on a set of 50 images per class, without the whole data."""
    return _accuracies(run, limit, TABLE6)


def record(run: GpuRun, limit: float, ipc: int) -> str:
    """Measure the preset best at one size of CIFAR-10 from the data to a tested set (docs/records.md)."""
    if run.cifar is None:
        return "left out: no --cifar DIR"
    name = f"cifar10-ipc{ipc}"
    folder = CELLS_FOLDER / "records" / name
    where = ["--data-dir", str(run.cifar), "--output", str(folder)]
    which = ["--name", name, "--ipc", str(ipc), "--what", "preset best"]
    outcome = ": ".join(run.command([*BENCHMARKS, *RECORD, *which, *where], limit))
    if (folder / f"{name}.json").exists():
        shutil.copy(folder / f"{name}.json", run.out)
    return outcome


# In order of importance; seconds of each in a run of eight minutes. The last of those chosen gets all that is left.
PARTS: dict[str, tuple[Callable[[GpuRun, float], str], float]] = {
    "machine": (machine, 30),
    "tests": (gpu_tests, 90),
    "headline": (headline, 100),
    "kernels": (kernel_benchmarks, 60),
    "table1": (table1, 240),
    "study": (study, 240),
    "best": (best, 60),
    "successors": (successors, 160),
    **{f"record-{ipc}": (functools.partial(record, ipc=ipc), 240) for ipc in (1, 10, 50)},
    "evaluation": (evaluation, 180),
    "table3": (whole_table, 600),
    "scaling": (growth, 120),
    "table6": (table6, 600),
}


def run(out: Path, minutes: float = PLANNED_MINUTES, cifar: Path | None = None, parts: Sequence[str] = ()) -> None:
    """Run parts, print their outcomes, and keep them in ``summary.json``; a part that fails does not end the run.

    Args:
        out: folder of the results.
        minutes: time for everything.
        cifar: folder of CIFAR-10 as images, with train/ and test/; None leaves out accuracies.
        parts: keys of ``PARTS``; none: all.

    Raises:
        ValueError: ``cifar`` has no train/, or kornia is not installed.
        RuntimeError: there is no CUDA GPU.
    """
    if cifar and not (cifar / "train").is_dir():
        raise ValueError(f"--cifar must hold train/ and test/; {cifar} does not")
    if cifar and importlib.util.find_spec("kornia") is None:
        raise ValueError("--cifar needs kornia (and kornia_rs), which whitens; it is not installed")
    where = environment("cuda")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    state = GpuRun(out, time.monotonic() + minutes * 60, cifar, [])
    chosen = {name: part for name, part in PARTS.items() if not parts or name in parts}
    for number, (name, (part, seconds)) in enumerate(chosen.items(), start=1):
        limit = math.inf if number == len(chosen) else seconds * minutes / PLANNED_MINUTES
        _run_part(state, name, part, limit)
        save_results(out / "summary.json", {"environment": where, "parts": state.parts})
    _print_summary(state)


def _run_part(run: GpuRun, name: str, part: Callable[[GpuRun, float], str], limit: float) -> None:
    started = time.monotonic()
    limit = min(limit, run.deadline - started)
    if limit < 5:
        outcome = "left out: no time left"
    else:
        try:
            outcome = part(run, limit)
        except Exception as error:  # one part's defect must not cost the results of others
            outcome = f"failed ({type(error).__name__}: {error})"
    seconds = round(time.monotonic() - started, 1)
    run.parts.append({"part": name, "outcome": outcome, "seconds": seconds})
    print(f"{name} ({seconds:.0f} s): {outcome}", flush=True)


def _print_summary(run: GpuRun) -> None:
    from .pages.benchmarks import table3_markdown

    path = table3.results_path(run.out, "gpu")
    if path.exists():
        print(table3_markdown([path]))
    for part in run.parts:
        print(f"{part['part']:20} {part['seconds']:6.0f} s  {part['outcome']}")
