"""The kernels in C, for CPU tensors of float32: built once for the machine they run on, and called with tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from pathlib import Path

import torch
from torch import Tensor

from . import kernels

LANES = 16  # floats in the kernels' vectors, see kernels/vectors.h
_COMPILERS = ("cc", "gcc", "clang")
# Sums may be taken in vectors, and products added in one rounding; NaN and infinity stay what they are.
_FLAGS = (
    "-std=gnu11", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-fPIC", "-shared", "-w",
)  # fmt: skip


def is_built() -> bool:
    """Whether the kernels are there; builds them at the first call, and where that fails warns once and says why."""
    return _library() is not None


# What torch.compiler.assume_constant_result sets, without the seconds that importing the compiler takes.
is_built._dynamo_marked_constant = True


def takes(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and compute with these tensors' device and types; None is taken."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors) and is_built()


def run(name: str, *arguments: Tensor | int | float | None) -> None:
    """Call the kernel ``name``, which splits its samples over PyTorch's threads.

    Args:
        name: a function of ``kernels/*.c``.
        arguments: in its order, without the number of threads, which comes last: tensors and None as pointers, int and
            bool as int64_t, float as float.
    """
    converted = [_converted(argument) for argument in arguments]
    getattr(_library(), name)(*converted, ctypes.c_int64(torch.get_num_threads()))


def _converted(argument: Tensor | int | float | None):
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or argument.dtype not in (torch.float32, torch.int64):
            raise TypeError(f"kernels in C take float32 and int64 on a CPU; got {argument.dtype} on {argument.device}")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        path = _path()
        if path.exists():
            with contextlib.suppress(OSError):  # a damaged file is built anew
                return ctypes.CDLL(str(path))
        _build(path)
        return ctypes.CDLL(str(path))
    except (OSError, RuntimeError) as error:
        warnings.warn(
            f"the fused kernels for a CPU could not be built, so PyTorch's operators take their place, several times "
            f"slower: {error}",
            stacklevel=4,
        )
        return None


def _path() -> Path:
    """Where the library of these sources, this compiler and this processor is kept."""
    digest = hashlib.sha256(f"{_FLAGS} {platform.machine()} {_processor()}".encode())
    digest.update(_output([_compiler(), "--version"]).encode())
    for file in _sources("*.[ch]"):
        digest.update(file.read_bytes())
    return _cache() / f"kernels-{digest.hexdigest()[:16]}.so"


def _build(path: Path) -> None:
    # Beside its place, then moved: another process sees a whole library or none.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        command = [_compiler(), *_FLAGS, *map(str, _sources("*.c")), "-o", str(made), "-lm"]
        try:
            _output([*command, "-fopenmp"])
        except RuntimeError:
            _output(command)  # Apple's compiler has no OpenMP: one thread
        os.replace(made, path)


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(next(iter(kernels.__path__))).glob(pattern))


def _compiler() -> str:
    named = os.environ.get("CC")
    found = next(filter(None, map(shutil.which, [named] if named else _COMPILERS)), None)
    if found is None:
        raise RuntimeError(
            f"no C compiler was found ({named or ', '.join(_COMPILERS)}); install one, or name one by the environment "
            "variable CC"
        )
    return found


def _output(command: list[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}: {done.stderr.strip()[-2000:]}")
    return done.stdout


def _processor() -> str:
    """What tells apart processors that one machine's library may not run on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


def _cache() -> Path:
    """A folder of this user's that can be written: the usual one for caches, or a temporary one."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atom_fast"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        if os.access(folder, os.W_OK):
            return folder
    except (OSError, RuntimeError):
        pass
    return Path(tempfile.mkdtemp(prefix="atom_fast-"))
