"""Properties of the compute device: architecture, shared memory and number formats, queried once."""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
OLDEST_CAPABILITY = 75  # the oldest GPUs that the kernels are compiled for
# Bytes of shared memory that one program may use, by compute capability (CUDA C++ Programming Guide, technical
# specifications).
SHARED_MEMORY = {
    75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10,
    90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10, 121: 99 << 10,
}  # fmt: skip


class Chip(NamedTuple):
    """Properties of a GPU that launch tables and settings depend on."""

    capability: int  # 10 * major + minor, such as 86
    shared: int  # bytes of shared memory that one program may use

    @property
    def has_tf32(self) -> bool:
        """True if tensor cores multiply float32 rounded to TF32."""
        return self.capability >= 80

    @property
    def has_bfloat16(self) -> bool:
        """True if the GPU computes in bfloat16 instead of emulating it."""
        return self.capability >= 80

    def __str__(self) -> str:
        """Format as ``sm_86, 99 KB of shared memory per program``."""
        return f"sm_{self.capability}, {self.shared >> 10} KB of shared memory per program"


# The chip that kernels are launched for when Triton interprets them on a CPU.
INTERPRETED = Chip(90, SHARED_MEMORY[90])


def chip_of(device: torch.device) -> Chip:
    """Return the chip that kernels are launched on for tensors on ``device``."""
    return _chip(_index(device)) if device.type == "cuda" else INTERPRETED


def has_tf32(device: torch.device) -> bool:
    """Return True if convolutions on ``device`` can run in TF32."""
    return device.type == "cuda" and torch.version.hip is None and chip_of(device).has_tf32


#: Dtype of the convolutions' operands by precision; those that are left out compute in float32.
NARROW = {"bfloat16": torch.bfloat16, "float16": torch.float16}


def check_precision(precision: str, device: torch.device) -> None:
    """Raise ValueError for a precision of convolutions that ``device`` does not have.

    CPUs are accepted for both types of 16 bits: there they save memory whether or not they save time.
    """
    if precision == "tf32" and not has_tf32(device):
        raise ValueError(
            f"precision 'tf32' needs an NVIDIA GPU of compute capability 8.0 or above; got {device}. Use 'float32'"
        )
    if precision == "bfloat16":
        check_bfloat16(device)


def check_bfloat16(device: torch.device) -> None:
    """Raise ValueError for a GPU that emulates bfloat16, which is slower than float32.

    CPUs are accepted: there bfloat16 saves memory whether or not it saves time.
    """
    if device.type == "cuda" and torch.version.hip is None and not chip_of(device).has_bfloat16:
        raise ValueError(
            f"precision 'bfloat16' needs a GPU of compute capability 8.0 or above; {device} has "
            f"{chip_of(device).capability / 10} and emulates it, slower than float32. Use 'float32'"
        )


_refused: dict[torch.device, str] = {}


def triton_refusal(device: torch.device) -> str | None:
    """Return why Triton's kernels do not run on ``device``, or None if they do; warn at the first refusal.

    The smallest kernel is compiled and launched once per process and GPU. This finds an old driver, a Triton that does
    not support the GPU or a missing C compiler before the work begins.
    """
    return _refused.get(device) or (_triton_refusal(_index(device)) if device.type == "cuda" else None)


def refuse_triton(device: torch.device, reason: str) -> None:
    """Use PyTorch's operators on ``device`` from now on, and warn."""
    _refused[device] = reason
    _warn(str(device), reason)


# As torch.compiler.assume_constant_result sets it, without the seconds that importing the compiler takes.
chip_of._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]
triton_refusal._dynamo_marked_constant = True  # pyrefly: ignore[missing-attribute]


@functools.cache
def _triton_refusal(index: int) -> str | None:
    reason = _hardware_refusal(index) or _launch_refusal(index)
    if reason:
        _warn(torch.cuda.get_device_name(index), reason)
    return reason


def _warn(device: str, reason: str) -> None:
    warnings.warn(
        f"the fused kernels do not run on {device} ({reason}); PyTorch's operators run instead, slower and with more "
        "memory. Run `atom-fast doctor` for details",
        stacklevel=4,
    )


def _hardware_refusal(index: int) -> str | None:
    if torch.version.hip is not None:
        return "they are written for NVIDIA GPUs, and run unfused on AMD's"
    if _chip(index).capability < OLDEST_CAPABILITY:
        return f"compute capability {_chip(index).capability / 10} is below {OLDEST_CAPABILITY / 10}"
    return None


def _launch_refusal(index: int) -> str | None:
    try:
        from .kernels.probe import probe_kernel

        with torch.cuda.device(index):
            probe_kernel[(1,)](torch.empty(1, device=f"cuda:{index}"))
    except Exception as error:  # compiler, driver and loader raise many types
        if is_out_of_memory(error):
            raise
        reason = str(error).strip() or type(error).__name__
        return f"Triton cannot compile or launch a kernel: {reason.splitlines()[0]}"
    return None


@functools.cache
def _chip(index: int) -> Chip:
    properties: Any = torch.cuda.get_device_properties(index)
    return Chip(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)


def _index(device: torch.device) -> int:
    return torch.cuda.current_device() if device.index is None else device.index


# Messages of libraries that allocate outside PyTorch, and of PyTorch's CPU allocator, which raises RuntimeError.
_OUT_OF_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "CUDA error: out of memory",
    "Triton Error [CUDA]: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_INTERNAL_ERROR_DEVICE_ALLOCATION_FAILED",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if an exception reports that a GPU or the CPU is out of memory."""
    known = isinstance(error, (torch.OutOfMemoryError, MemoryError))
    return known or any(part in str(error) for part in _OUT_OF_MEMORY)


@contextlib.contextmanager
def convolution_precision(precision: str, device: torch.device, deterministic: bool = False) -> Iterator[None]:
    """Run the enclosed convolutions in one of `DistillConfig`'s precisions; ``deterministic`` repeats bits."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.conv.fp32_precision, cudnn.deterministic
    cudnn.conv.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    cudnn.deterministic = deterministic or cudnn.deterministic
    try:
        with torch.autocast(device.type, NARROW.get(precision), enabled=precision in NARROW):
            yield
    finally:
        cudnn.conv.fp32_precision, cudnn.deterministic = before
