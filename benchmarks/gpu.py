"""Everything worth measuring on a GPU, the most valuable first: ``python -m benchmarks.gpu --out DIR``.

Needs a checkout and a Python with torch, triton, numpy and pytest, for ``--cifar`` with all that the package requires
(kornia, to whiten); nothing is installed or fetched. Each part has its own time limit, and what a part has measured is
kept however it ends. In DIR, at most eight files: ``summary.json``,
``log.txt``, ``table3-gpu.json``, ``scaling-gpu.json``, ``kernels.json``, ``evaluation.json``, and with ``--cifar``
``table1.json`` and ``study.json``, whose sets stay in ``runs/gpu-reproduce``: another run goes on with them.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from . import cells, report, scaling, table3
from .harness import ROOT, Plan, environment, save_results

PLANNED_MINUTES = 8  # the run that the parts' limits below are for; they are scaled to --minutes
REPRODUCE_FOLDER = ROOT / "runs" / "gpu-reproduce"
REPRODUCE = ["-m", "atom_fast", "reproduce"]
_LIKE_THE_PAPER = ["--iterations", "8000", "--networks", "5", "--protocol", "datadam-code", "--quiet"]
TABLE1 = [
    *("table1", "--cells", "cifar10:1,cifar10:10,cifar10:50", "--methods", "dm,dam,atom", "--seeds", "5"),
    *_LIKE_THE_PAPER,
]
STUDY = [
    *("study", "--cells", "cifar10:10,cifar10:50", "--factors", "loss_scale,image_average,image_init"),
    *("--seeds", "3", *_LIKE_THE_PAPER),
]
_SECONDS_TO_STOP = 25  # for what a command does before it ends: results are written, failures told


@dataclasses.dataclass
class GpuRun:
    """One run: where it writes, and until when it may.

    Attributes:
        out: folder of the results.
        deadline: on ``time.monotonic()``'s clock.
        cifar: folder of CIFAR-10 as images, or None.
        parts: what has been run, for the summary.
    """

    out: Path
    deadline: float
    cifar: Path | None
    parts: list[dict]

    def command(self, arguments: list[str], limit: float, stop: int = signal.SIGTERM) -> tuple[str, str]:
        """Run Python with arguments in the checkout; returns how it ended, and its last line.

        At the limit, less the time to write what it has, it gets the signal ``stop``.
        """
        grace = min(_SECONDS_TO_STOP, limit / 2)
        with open(self.out / "log.txt", "a+") as log:
            print(f"$ python {' '.join(arguments)}", file=log, flush=True)
            before = log.tell()
            process = subprocess.Popen(
                [sys.executable, *arguments], cwd=ROOT, stdout=log, stderr=subprocess.STDOUT,
                preexec_fn=os.setpgrp,  # a group to end with what it started, in the session that may itself be ended
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
    """End a command and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def machine(run: GpuRun, limit: float) -> str:
    """What runs fused here, checked against the equations; the whole answer is in the log."""
    return run.command(["-m", "atom_fast", "doctor"], limit)[0]


def gpu_tests(run: GpuRun, limit: float) -> str:
    """The tests that need CUDA."""
    arguments = ["-m", "pytest", "tests", "-m", "gpu", "-p", "no:cacheprovider", "--continue-on-collection-errors"]
    return ": ".join(run.command([*arguments, "--tb=short"], limit, signal.SIGINT))  # then it tells what failed


def kernel_benchmarks(run: GpuRun, limit: float) -> str:
    """Every operator against the bandwidth of a copy."""
    return ": ".join(run.command(["-m", "benchmarks.kernels", "--out", str(run.out / "kernels.json")], limit))


def headline(run: GpuRun, limit: float) -> str:
    """ATOM at 50 images a class, every implementation."""
    return _table3(run, limit, methods=["atom"], ipcs=[50], seconds=10)


def whole_table(run: GpuRun, limit: float) -> str:
    """The rest of Table 3."""
    return _table3(run, limit, methods=None, ipcs=None, seconds=8)


def _table3(run: GpuRun, limit: float, methods: list[str] | None, ipcs: list[int] | None, seconds: float) -> str:
    plan = Plan(iterations=100, seconds=seconds, limit=120)
    path = table3.run("gpu", run.out, methods=methods, ipcs=ipcs, plan=plan, deadline=time.monotonic() + limit)
    return _count(path)


def growth(run: GpuRun, limit: float) -> str:
    """Time and memory against classes, images a class and resolution."""
    return _count(scaling.run("gpu", run.out, deadline=time.monotonic() + limit))


def _count(path: Path) -> str:
    records = json.loads(path.read_text())["cells"] if path.exists() else []
    return f"{sum(record['status'] in cells.FINISHED for record in records)} cells measured"


def evaluation(run: GpuRun, limit: float) -> str:
    """Twenty networks of 1,000 epochs on 50 images a class, beside a tenth of the public code's loop for one."""
    arguments = ["--loop-networks", "1", "--loop-epochs", "100", "--out", str(run.out / "evaluation.json")]
    return ": ".join(run.command(["-m", "benchmarks.evaluation", *arguments], limit))


def table1(run: GpuRun, limit: float) -> str:
    """CIFAR-10's columns of Table 1 at the paper's size: as many of five sets as fit, one of every cell first."""
    return _reproduce(run, limit, TABLE1)


def study(run: GpuRun, limit: float) -> str:
    """What loss scale, running mean and a chosen start are worth at 10 and 50 images a class."""
    return _reproduce(run, limit, STUDY)


def _reproduce(run: GpuRun, limit: float, arguments: list[str]) -> str:
    if run.cifar is None:
        return "left out: no --cifar DIR"
    results = REPRODUCE_FOLDER / f"{arguments[0]}.json"
    results.unlink(missing_ok=True)  # made anew from the cells
    where = ["--output", str(REPRODUCE_FOLDER), "--data-dir", str(run.cifar)]
    outcome = ": ".join(run.command([*REPRODUCE, *arguments, *where], limit))
    if results.exists():
        shutil.copy(results, run.out)
    return outcome


# By worth; seconds that each may take of the eight minutes. The last of those asked for may take all that is left.
PARTS: tuple[tuple[Callable[[GpuRun, float], str], float], ...] = (
    (machine, 30),
    (gpu_tests, 90),
    (headline, 100),
    (kernel_benchmarks, 60),
    (table1, 240),
    (study, 240),
    (evaluation, 180),
    (whole_table, 600),
    (growth, 120),
)


def main(arguments: list[str] | None = None) -> int:
    """Run the parts; the exit status is 0 when the time was kept, whatever the parts' outcomes."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--minutes", type=float, default=PLANNED_MINUTES, help="time for everything (default 8)")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10 as folders of images, train/ and test/")
    parser.add_argument("--part", action="append", choices=[part.__name__ for part, _ in PARTS], help="only this part")
    options = parser.parse_args(arguments)
    if options.minutes <= 0:
        parser.error(f"--minutes must be above 0; got {options.minutes}")
    if options.cifar and not (options.cifar / "train").is_dir():
        parser.error(f"--cifar must hold train/ and test/; {options.cifar} does not")
    if options.cifar and importlib.util.find_spec("kornia") is None:
        parser.error("--cifar needs kornia (and kornia_rs), which whitens; it is not installed")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    try:
        where = environment("cuda")
    except RuntimeError as error:
        parser.error(str(error))
    run = GpuRun(options.out, time.monotonic() + options.minutes * 60, options.cifar, [])
    parts = [(part, seconds) for part, seconds in PARTS if not options.part or part.__name__ in options.part]
    for part, seconds in parts:
        limit = math.inf if part is parts[-1][0] else seconds * options.minutes / PLANNED_MINUTES
        _run_part(run, part, limit)
        save_results(options.out / "summary.json", {"environment": where, "parts": run.parts})
    _print_summary(run)
    return 0


def _run_part(run: GpuRun, part: Callable[[GpuRun, float], str], limit: float) -> None:
    started = time.monotonic()
    limit = min(limit, run.deadline - started)
    if limit < 5:
        outcome = "left out: no time left"
    else:
        try:
            outcome = part(run, limit)
        except Exception as error:  # one part's defect must not cost the others' figures
            outcome = f"failed ({type(error).__name__}: {error})"
    seconds = round(time.monotonic() - started, 1)
    run.parts.append({"part": part.__name__, "outcome": outcome, "seconds": seconds})
    print(f"{part.__name__} ({seconds:.0f} s): {outcome}", flush=True)


def _print_summary(run: GpuRun) -> None:
    path = table3.results_path(run.out, "gpu")
    if path.exists():
        print(report.table3_markdown([path]))
    for part in run.parts:
        print(f"{part['part']:20} {part['seconds']:6.0f} s  {part['outcome']}")


if __name__ == "__main__":
    sys.exit(main())
