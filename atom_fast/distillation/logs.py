"""Records of a run: JSON lines, TensorBoard, and the environment that it ran in."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

import atom_fast
from atom_fast import _threads
from atom_fast._files import write_atomically
from atom_fast.distillation import ranks
from atom_fast.names import LOG_FILE

_PACKAGES = ("torch", "triton", "torchvision", "kornia", "numpy", "safetensors")


class RunLog:
    """Records of a run as JSON lines in ``log.jsonl`` and, where it can be imported, in TensorBoard.

    A run that continues from iteration i drops the records after i: those steps are computed again.

    Args:
        folder: the run's folder.
        iteration: the run continues after this one.

    Raises:
        OSError: the log could not be written.
    """

    def __init__(self, folder: Path, iteration: int):
        self.path = folder / LOG_FILE
        if self.path.exists():
            write_atomically(self.path, "".join(_lines_until(self.path, iteration)))
        # Unbuffered: a record is on its way when write() returns, and closing cannot fail on what is left in a buffer.
        self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115  closed by close()
        self._board = _open_tensorboard(folder / "tensorboard", iteration)

    def write(self, record: dict[str, float]) -> None:
        """Append one record, of iteration ``record["iteration"]``.

        Raises:
            OSError: the log could not be written; the message names it.
        """
        line = f"{json.dumps(record)}\n".encode()
        try:
            if self._file.write(line) < len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise type(error)(error.errno, f"cannot write {self.path}: {error.strerror}") from error
        if self._board is not None:
            try:
                for name, value in record.items():
                    if name != "iteration":
                        self._board.add_scalar(name, value, record["iteration"])
            except OSError as error:
                folder = self.path.with_name("tensorboard")
                raise type(error)(error.errno, f"cannot write to {folder}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the files; an error of TensorBoard here must not hide the one that ends a run."""
        self._file.close()
        if self._board is not None:
            with contextlib.suppress(OSError):
                self._board.close()


def environment(device: torch.device) -> dict[str, object]:
    """Return time, command, device, versions and, in a git checkout, the commit."""
    cuda = device.type == "cuda"
    return {
        "started": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": torch.cuda.get_device_name(device) if cuda else platform.processor() or platform.machine(),
        "cuda": torch.version.cuda if cuda else None,
        "threads": torch.get_num_threads(),
        "threads_from": _threads.reason(),
        "platform": platform.platform(),
        "versions": versions(),
        "commit": _commit(),
    }


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the installed packages that results depend on."""
    found = {"python": platform.python_version(), "atom_fast": atom_fast.__version__}
    for package in _PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def append_environment(path: Path, record: dict[str, object]) -> None:
    """Append a record to a JSON list of the starts of a run.

    Raises:
        OSError: the file could not be written.
    """
    try:
        starts = list(json.loads(path.read_text("utf-8")))
    except (FileNotFoundError, ValueError, TypeError):
        starts = []
    write_atomically(path, json.dumps([*starts, record], indent=2) + "\n")


def peak_memory(device: torch.device) -> int:
    """Return bytes: the most that was allocated on a GPU, or that this process occupied."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # not on Windows
        return 0
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def log(message: str) -> None:
    """Print to standard error; of several processes each names itself."""
    print(f"{ranks.label()}{message}", file=sys.stderr, flush=True)


def _lines_until(path: Path, iteration: int) -> list[str]:
    """Return the complete records up to ``iteration``; a killed run may have cut the last line short."""
    kept = []
    for line in path.read_text("utf-8", errors="replace").splitlines(keepends=True):
        try:
            if json.loads(line)["iteration"] <= iteration:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            continue
    return kept


def _open_tensorboard(folder: Path, iteration: int):
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        log("TensorBoard cannot be imported: no logs for it are written (`pip install tensorboard`)")
        return None
    return SummaryWriter(os.fspath(folder), purge_step=iteration + 1)


def _commit() -> str | None:
    """Return the commit of the checkout that holds this package, marked if files differ; None outside of one."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        run = {"cwd": root, "capture_output": True, "text": True, "check": True, "timeout": 10}
        commit = subprocess.run(["git", "rev-parse", "HEAD"], **run).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "--untracked-files=no"], **run).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit} (changed)" if changed else commit
