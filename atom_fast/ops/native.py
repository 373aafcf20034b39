"""Build the kernels in C, once for the machine they run on, and call them with tensors on a CPU."""

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
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from .. import kernels
from .._files import cache_folder

LANES = 16  # floats in the kernels' vectors, see kernels/vectors.h
_BYTES_PER_THREAD = 1 << 19  # some 50 microseconds of work; a thread that sleeps needs some 10 to start
_COMPILERS = ("cc", "gcc", "clang")
_TIMEOUT = 300  # seconds per run of the compiler; a busy machine needs more than a minute
_QUIET = 4  # seconds of compiling without a message
_ROOM = 32 << 20  # bytes that a build needs at most: assembly, object files, the library
_STALE = 3600  # seconds after which a build's folder belongs to a process that was killed
# Allow vectorised sums and fused multiply-add; keep NaN and infinity.
_FLAGS = (
    "-std=gnu11", "-O3", "-fno-math-errno", "-fno-trapping-math", "-fno-signed-zeros",
    "-fassociative-math", "-fPIC", "-shared", "-w",
)  # fmt: skip
# Tried in this order: Apple's compiler has no OpenMP, and some compilers select the processor by -mcpu.
_TARGETS = ("-march=native", "-fopenmp"), ("-march=native",), ("-mcpu=native",)


def is_built() -> bool:
    """Return True if the kernels can be called; build them at the first call, and warn once if that fails."""
    return _library() is not None


# As torch.compiler.assume_constant_result would set it, without the seconds that importing the compiler takes.
is_built._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]


def compiler_version() -> str | None:
    """Return the first line of the C compiler's ``--version``; None if there is no compiler."""
    try:
        return _output([*_compiler(), "--version"]).partition("\n")[0]
    except (OSError, RuntimeError, subprocess.SubprocessError):
        return None


def description() -> str:
    """Return the library's path, and whether it uses several threads."""
    library = _library()
    if library is None:
        return "not built: see the warning"
    return (
        f"{library._name} ({'several threads' if _is_threaded(library) else 'one thread: the compiler has no OpenMP'})"
    )


def _is_threaded(library: ctypes.CDLL) -> bool:
    return any(hasattr(library, symbol) for symbol in ("GOMP_parallel", "__kmpc_fork_call"))


def supports(*tensors: Tensor | None) -> bool:
    """Return True if the kernels compute with tensors of these devices and dtypes; None is accepted."""
    return all(t is None or (t.device.type == "cpu" and t.dtype == torch.float32) for t in tensors) and is_built()


def takes(*tensors: Tensor) -> bool:
    """Return True if the tensors are on a CPU, and the kernels can be called: for kernels of every floating dtype."""
    return all(t.device.type == "cpu" for t in tensors) and is_built()


def upcasts(x: Tensor) -> bool:
    """Return True if the kernels compute ``x`` in float32: half precision on a CPU."""
    return x.device.type == "cpu" and x.dtype in (torch.float16, torch.bfloat16) and is_built()


def upcast(parameter: Tensor | None) -> Tensor | None:
    """Convert a parameter that accompanies an upcast input to float32; None stays None."""
    return None if parameter is None else parameter.float()


def powers(*powers: float | None) -> tuple[float, ...]:
    """Convert powers to arguments of the kernels: 0 for a map that is left out."""
    return tuple(0.0 if power is None else float(power) for power in powers)


def suffix(dtype: torch.dtype) -> str:
    """Return the end of the name of a kernel that exists for several dtypes."""
    return str(dtype).removeprefix("torch.")


def threads_for(samples: int) -> int:
    """Return the number of PyTorch's threads to use at most for this number of samples."""
    return max(1, min(torch.get_num_threads(), samples))


def run(name: str, samples: int, *arguments: Tensor | int | float | None) -> None:
    """Call the kernel ``name``, which splits its samples over as many threads as they and their bytes are worth.

    Args:
        name: a function of ``kernels/*.c``; one for another dtype than float32 ends with it.
        samples: number of samples.
        arguments: arguments of the function without the last, the number of threads: tensors and None are passed as
            pointers, int and bool as int64_t, float as double.

    Raises:
        TypeError: a tensor is not in a CPU's memory, or of another dtype than int64, float32 and the name's.
    """
    accepted = torch.int64, torch.float32, getattr(torch, name.rpartition("_")[2], torch.float32)
    converted = [_converted(argument, accepted) for argument in arguments]
    touched = sum(argument.nbytes for argument in arguments if isinstance(argument, Tensor))
    threads = max(1, min(threads_for(samples), touched // _BYTES_PER_THREAD))
    getattr(_library(), name)(*converted, ctypes.c_int64(threads))


def _converted(argument: Tensor | int | float | None, accepted: tuple[torch.dtype, ...]):
    if argument is None:
        return ctypes.c_void_p(None)
    if isinstance(argument, Tensor):
        if argument.device.type != "cpu" or argument.dtype not in accepted:
            names = " and ".join(dict.fromkeys(map(str, accepted)))
            raise TypeError(f"a kernel in C takes {names} on a CPU; got {argument.dtype} on {argument.device}")
        if argument.numel() > 0 and argument.data_ptr() == 0:
            raise TypeError(f"kernels in C take tensors with memory; got a {type(argument).__name__}")
        return ctypes.c_void_p(argument.data_ptr())
    return ctypes.c_double(argument) if isinstance(argument, float) else ctypes.c_int64(argument)


@functools.cache
def _library() -> ctypes.CDLL | None:
    reasons = []
    for folder in (_cache, _temporary_folder):
        try:
            with folder() as place:
                library = _loaded(Path(place) / _name())
                if not _is_threaded(library) and torch.get_num_threads() > 1:
                    warnings.warn(
                        f"the C compiler ({_compiler()[0]}) has no OpenMP, so the fused kernels for a CPU use one "
                        "thread; set the environment variable CC to a compiler that has it, and start again",
                        stacklevel=4,
                    )
                return library
        except OSError as error:  # this folder is full, not writable or not executable
            reasons.append(str(error))
        except (RuntimeError, subprocess.SubprocessError) as error:  # the compiler fails in any folder
            reasons.append(str(error))
            break
    warnings.warn(
        f"the fused kernels for a CPU could not be built, so PyTorch's operators are used instead, several times "
        f"slower: {'; '.join(dict.fromkeys(reasons))}",
        stacklevel=4,
    )
    return None


def _loaded(path: Path) -> ctypes.CDLL:
    """Load the library at ``path``; build it first unless it exists and is complete."""
    if not _is_whole(path):
        _build(path)
    return ctypes.CDLL(str(path))


def _name() -> str:
    """Return a file name that depends on the sources, the compiler and the processor."""
    digest = hashlib.sha256(f"{_compiler()} {_FLAGS} {_TARGETS} {platform.machine()} {_processor()}".encode())
    digest.update(_output([*_compiler(), "--version"]).encode())
    for file in _sources("*.[ch]"):
        digest.update(file.read_bytes())
    return f"kernels-{digest.hexdigest()[:16]}.so"


def _build(path: Path) -> None:
    # In a folder beside the target, then moved: another process sees a complete library or none.
    with tempfile.TemporaryDirectory(prefix="build-", dir=path.parent) as scratch:
        _check_room(Path(scratch))
        made = Path(scratch) / path.name
        _compile(made)
        _check_loads(made)
        with made.open("ab") as file:
            file.write(hashlib.sha256(made.read_bytes()).digest())
        os.replace(made, path)


def _check_room(folder: Path) -> None:
    """Raise OSError if there is no room for a build; the compiler would fail only after half a minute."""
    file = folder / "room"
    with file.open("wb") as opened:
        for _ in range(_ROOM >> 20):
            opened.write(bytes(1 << 20))
    file.unlink()


def _compile(made: Path) -> None:
    sources = [str(source) for source in _sources("*.c")]
    for target in _TARGETS:
        try:
            _output([*_compiler(), *_FLAGS, *target, *sources, "-o", str(made), "-lm"], scratch=made.parent)
            return
        except RuntimeError:
            if target == _TARGETS[-1]:
                raise


def _check_loads(library: Path) -> None:
    """Raise RuntimeError if loading the library ends the process, as a sanitizer does."""
    _output([sys.executable, "-c", "import ctypes, sys; ctypes.CDLL(sys.argv[1])", str(library)])


def _is_whole(path: Path) -> bool:
    """Return True if a library ends with its checksum: a truncated library may load and crash later."""
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _sources(pattern: str) -> list[Path]:
    return sorted(Path(next(iter(kernels.__path__))).glob(pattern))  # pyrefly: ignore[missing-attribute]


def _compiler() -> list[str]:
    named = os.environ.get("CC", "").strip()
    for command in [shlex.split(named)] if named else [[name] for name in _COMPILERS]:
        if shutil.which(command[0]):
            return command
    raise RuntimeError(
        f"no C compiler was found ({named or ', '.join(_COMPILERS)}); install one, or set the environment "
        "variable CC to one"
    )


def _output(command: list[str], scratch: Path | None = None) -> str:
    """Run a command and return its standard output.

    Args:
        scratch: folder for the temporary files of a compilation, which is reported on stderr after a few seconds; None
            for other commands.

    Raises:
        RuntimeError: the command failed.
        subprocess.TimeoutExpired: it took longer than two minutes.
    """
    environment = os.environ if scratch is None else {**os.environ, "TMPDIR": str(scratch)}
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, errors="replace",
        env=environment,
    ) as process:  # fmt: skip
        try:
            try:
                printed, errors = process.communicate(timeout=_QUIET if scratch else _TIMEOUT)
            except subprocess.TimeoutExpired:
                if scratch is None:
                    raise
                print("atom_fast: compiling the kernels for this CPU, once: up to a minute", file=sys.stderr)
                printed, errors = process.communicate(timeout=_TIMEOUT - _QUIET)
        except BaseException:
            process.kill()
            raise
    if process.returncode != 0:
        raise RuntimeError(f"{shlex.join(command)} ended with status {process.returncode}: {errors.strip()[-2000:]}")
    return printed


def _processor() -> str:
    """Return the processor's features: a library runs only on processors with the features it was built for."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), "")


@contextlib.contextmanager
def _cache() -> Iterator[Path]:
    """Yield this user's cache folder. Code is loaded from it, so no other user may own it."""
    folder = cache_folder()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if hasattr(os, "getuid") and folder.stat().st_uid != os.getuid():
        raise PermissionError(f"{folder} belongs to another user")
    _remove_stale_builds(folder)
    yield folder


def _remove_stale_builds(folder: Path) -> None:
    """Remove the folders of builds that were killed."""
    for build in folder.glob("build-*"):
        with contextlib.suppress(OSError):  # another process removes it too, or has just finished
            if time.time() - build.stat().st_mtime > _STALE:
                shutil.rmtree(build)


def _temporary_folder() -> contextlib.AbstractContextManager[str]:
    """Make a folder for this process only; a loaded library does not need its file."""
    return tempfile.TemporaryDirectory(prefix="atom_fast-")
