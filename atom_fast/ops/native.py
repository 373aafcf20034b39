"""The kernels in C, for CPU tensors of float32: built once for the machine they run on, and called with tensors."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import kernels

LANES = 16  # floats in the kernels' vectors, see kernels/vectors.h
_COMPILERS = ("cc", "gcc", "clang")
_PATIENCE = 120  # seconds that a compiler may take
# Sums may be taken in vectors, and products added in one rounding; NaN and infinity stay what they are.
_FLAGS = (
    "-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-fPIC", "-shared", "-w",
)  # fmt: skip
# The first that a compiler takes: Apple's has no OpenMP, and some name the processor otherwise.
_TARGETS = ("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",)


def is_built() -> bool:
    """Whether the kernels are there; builds them at the first call, and where that fails warns once and says why."""
    return _library() is not None


# What torch.compiler.assume_constant_result sets, without the seconds that importing the compiler takes.
is_built._dynamo_marked_constant = True


def compiler_version() -> str | None:
    """Return the first line that the C compiler says of itself; None where there is none."""
    try:
        return _output([*_compiler(), "--version"]).partition("\n")[0]
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def description() -> str:
    """Return where the library is, and whether it runs on several threads."""
    library = _library()
    if library is None:
        return "not built: see the warning"
    threaded = any(hasattr(library, symbol) for symbol in ("GOMP_parallel", "__kmpc_fork_call"))
    return f"{library._name} ({'several threads' if threaded else 'one thread: the compiler has no OpenMP'})"


def supports(*tensors: Tensor | None) -> bool:
    """Whether the kernels are there and compute with these tensors' device and types; None is taken."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors) and is_built()


def upcasts(x: Tensor) -> bool:
    """Whether blocks of this type are computed by the kernels, in float32."""
    return x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) and is_built()


def upcast(parameter: Tensor | None) -> Tensor | None:
    """A parameter beside input of a narrow type."""
    return None if parameter is None else parameter.float()


def threads_for(samples: int) -> int:
    """How many of PyTorch's threads work on so many samples."""
    return max(1, min(torch.get_num_threads(), samples))


def run(name: str, samples: int, *arguments: Tensor | int | float | None) -> None:
    """Call the kernel ``name``, which splits its samples over `threads_for` them.

    Args:
        name: a function of ``kernels/*.c``.
        samples: how many there are.
        arguments: in its order, without the number of threads, which comes last: tensors and None as pointers, int and
            bool as int64_t, float as float.

    Raises:
        TypeError: a tensor is not of float32 or int64 in a CPU's memory.
    """
    converted = [_converted(argument) for argument in arguments]
    getattr(_library(), name)(*converted, ctypes.c_int64(threads_for(samples)))


def _converted(argument: Tensor | int | float | None):
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or argument.dtype not in (torch.float32, torch.int64):
            raise TypeError(f"kernels in C take float32 and int64 on a CPU; got {argument.dtype} on {argument.device}")
        if argument.numel() > 0 and argument.data_ptr() == 0:
            raise TypeError(f"kernels in C take tensors with memory; got a {type(argument).__name__}")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_float(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL | None:
    reasons = []
    for folder in (_cache, _temporary_folder):
        try:
            with folder() as place:
                return _loaded(Path(place) / _name())
        except (OSError, RuntimeError, subprocess.SubprocessError) as error:
            reasons.append(str(error))
    warnings.warn(
        f"the fused kernels for a CPU could not be built, so PyTorch's operators are used instead, several times "
        f"slower: {'; '.join(dict.fromkeys(reasons))}",
        stacklevel=4,
    )
    return None


def _loaded(path: Path) -> ctypes.CDLL:
    """The library at ``path``, which is built unless it is there and whole."""
    if not _is_whole(path):
        _build(path)
    return ctypes.CDLL(str(path))


def _name() -> str:
    """Tells apart the libraries of these sources, this compiler and this processor from others."""
    digest = hashlib.sha256(f"{_compiler()} {_FLAGS} {_TARGETS} {platform.machine()} {_processor()}".encode())
    digest.update(_output([*_compiler(), "--version"]).encode())
    for file in _sources("*.[ch]"):
        digest.update(file.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def _build(path: Path) -> None:
    # Beside its place, then moved: another process sees a whole library or none.
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        made = Path(scratch) / path.name
        for target in _TARGETS:
            try:
                _output([*_compiler(), *_FLAGS, *target, *map(str, _sources("*.c")), "-o", str(made), "-lm"])
                break
            except RuntimeError:
                if target == _TARGETS[-1]:
                    raise
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, path)


def _is_whole(path: Path) -> bool:
    """Whether a library is there and ends with its checksum: half a library may load, and end the process later."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(next(iter(kernels.__path__))).glob(pattern))


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").strip()
    for command in [shlex.split(named)] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(
        f"no C compiler was found ({named or ', '.join(_COMPILERS)}); install one, or name one by the environment "
        "variable CC"
    )


def _output(command: list[str]) -> str:
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=_PATIENCE
    )
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


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """The folder for what this user's programs keep, of which nobody else is the owner: code is loaded from it."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "atom_fast"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise RuntimeError(f"{folder} belongs to another user")
    yield folder


def _temporary_folder() -> contextlib.AbstractContextManager[str]:
    """For this process alone; a library that is loaded needs its file no longer."""
    return tempfile.TemporaryDirectory(prefix="atom_fast-")
