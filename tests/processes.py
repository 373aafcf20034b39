"""Run ``atom-fast`` in real processes that start fast: a server with all imports done forks one per command.

``python -m tests.processes`` reads jobs, lines of JSON, and answers each with its process's exit code. A job contains
the arguments of ``atom-fast``, a file for its output, and the faults to inject from inside (see `_prepare`) or from
outside (see `_signalled`).
"""

from __future__ import annotations

import contextlib
import fnmatch
import io
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

WARM_UP = ("distill", "--iterations=1", "--real-batch=2", "--width=4", "--depth=1", "--device=cpu", "--quiet")
ROOT = Path(__file__).resolve().parents[1]


class Server:
    """Run ``atom-fast`` any number of times."""

    def __init__(self):
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1", "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("TRITON_INTERPRET", None)
        self._server = subprocess.Popen(
            [sys.executable, "-m", "tests.processes"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, cwd=ROOT,
            env=environment,
        )  # fmt: skip

    def run(self, *arguments: object, printed: Path, signalled: dict | None = None, **faults: object) -> int:
        """Run a process, append its output to ``printed``; return its exit code, or minus the signal that ended it."""
        job = {"arguments": [str(argument) for argument in arguments], "printed": str(printed), "faults": faults}
        return self._ask({**job, "signalled": signalled})

    def start(self, *arguments: object, printed: Path) -> None:
        """Start a process and leave it running."""
        job = {"arguments": [str(argument) for argument in arguments], "printed": str(printed), "faults": {}}
        self._ask({**job, "background": True})

    def stop(self, number: int | None = None) -> int:
        """Wait for the process that `start` left running, after sending a signal if given; return its exit code."""
        return self._ask({"stop": number})

    def _ask(self, job: dict) -> int:
        self._server.stdin.write(json.dumps(job) + "\n")
        self._server.stdin.flush()
        return json.loads(self._server.stdout.readline())

    def close(self) -> None:
        """End the server."""
        self._server.stdin.close()
        self._server.stdout.close()
        self._server.wait(timeout=60)


def serve() -> None:
    """Fork a process for every job."""
    import torch

    import atom_fast.cli

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        atom_fast.cli.main([*WARM_UP, f"--output={folder}/run"], prog_name="atom-fast", standalone_mode=False)
    background = None
    for line in sys.stdin:
        job = json.loads(line)
        if "stop" in job:
            if job["stop"] is not None:
                os.kill(background[0], job["stop"])
            answer = _ended(background[0])
            _print(*background[1:])
        else:
            output, end = os.pipe()  # not a file, which could not grow on a full disk
            child = os.fork()
            if child == 0:
                _child(job, end)
            os.close(end)
            if job.get("background"):
                background, answer = (child, output, job["printed"]), 0
            else:
                answer = _signalled(child, **(job["signalled"] or {}))
                _print(output, job["printed"])
        sys.stdout.write(f"{answer}\n")
        sys.stdout.flush()


def _print(output: int, path: str) -> None:
    """Append the output of an ended process, at most a pipe's capacity, to a file."""
    with open(output, "rb") as printed, open(path, "ab") as file:
        file.write(printed.read())


def _ended(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def _signalled(child: int, number: int = 0, file: str = "", size: int = 0, after: float = 0.0) -> int:
    """Wait for a process; send it signal ``number``, ``after`` seconds after ``file`` has ``size`` bytes."""
    while number:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if not file or (os.path.exists(file) and os.path.getsize(file) >= size):
            time.sleep(after)
            os.kill(child, number)  # its process id is not reused before waitpid
            break
        time.sleep(0.001)
    return _ended(child)


def _child(job: dict, output: int) -> None:
    from atom_fast.cli import main

    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 1
    try:
        _prepare(**job["faults"])
        sys.argv = ["atom-fast", *job["arguments"]]
        main(job["arguments"], prog_name="atom-fast")
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _prepare(
    kill: str | None = None, call: int = 1, when: str = "before", full: str | None = None, limit: int = 0,
    user: int | None = None, nan_at: int | None = None,
) -> None:  # fmt: skip
    """Inject faults into this process.

    Args:
        kill: send SIGKILL to this process at a call of ``os.fsync``, ``os.replace``, or ``write`` (of an atomic write).
        call: which call, counted from 1.
        when: "before" or "after" the call; a ``write`` is half done.
        full: limit files to ``limit`` bytes from the first write to a file whose name matches this pattern, or at once
            if it is "*".
        user: run as this user.
        nan_at: make an image of class 3 NaN after this iteration.
    """
    if user is not None:
        os.setgroups([])
        os.setgid(user)
        os.setuid(user)
    if kill == "write":
        _replace_open(_Killing(call, when))
    elif kill is not None:
        setattr(os, kill, _Killing(call, when, getattr(os, kill)))
    if full is not None:
        _fill(full, limit)
    if nan_at is not None:
        _spoil(nan_at)


class _Killing:
    """Wrap a function so that its n-th call kills the process."""

    def __init__(self, call: int, when: str, function=None):
        self.left, self.when, self.function = call, when, function

    def __call__(self, *arguments, **keywords):
        self.left -= 1
        if self.left == 0 and self.when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        result = self.function(*arguments, **keywords)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return result


def _replace_open(killing: _Killing) -> None:
    """Kill the process when half of the n-th file's content is written."""
    import atom_fast._files

    class Half(io.FileIO):
        def write(self, content):
            killing.left -= 1
            if killing.left == 0:
                super().write(content[: len(content) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return super().write(content)

    atom_fast._files.open = Half


def _fill(pattern: str, limit: int) -> None:
    """Limit files to ``limit`` bytes from the first write to a file whose name matches ``pattern``."""
    import resource

    import atom_fast._files

    def open_when_full(path, mode):
        if fnmatch.fnmatch(Path(path).name, f".{pattern}.*.part"):
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        return open(path, mode)

    if pattern == "*":
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    atom_fast._files.open = open_when_full


def _spoil(iteration: int) -> None:
    """Make an image of class 3 NaN after an iteration."""
    from atom_fast.distillation.step import Distillation

    step = Distillation.step

    def spoiled(self, number):
        step(self, number)
        if number == iteration:
            self.images.view(self.data.num_classes, -1)[3, 0] = float("nan")

    Distillation.step = spoiled


if __name__ == "__main__":
    serve()
