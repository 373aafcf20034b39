"""What every operator needs to launch its Triton kernels: the device, and values as the kernels take them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .._device import chip_of, refuse_triton, triton_refusal

T = TypeVar("T")


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """float64 for float64, float32 for every narrower floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def addressable(x: Tensor) -> Tensor:
    """``x``, copied if 32 bits do not address one of its samples (slices of far larger tensors)."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x.contiguous() if span >= 2**31 else x


def constant_power(power: float | None) -> float | int:
    """A power as the kernels take it: whole numbers as int, so that 4 and 4.0 are one compilation; 0 for none."""
    if power is None:
        return 0
    return int(power) if float(power).is_integer() else float(power)


class KernelError(RuntimeError):
    """A kernel that cannot be compiled or launched for a device; the message names the way out."""


@contextlib.contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, which need not be the current one.

    Raises:
        KernelError: a kernel asks for more than the device has, or cannot be compiled for it.
    """
    try:
        with torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext():
            yield
    except _refusals() as error:
        raise KernelError(
            f"a kernel does not run on this device ({chip_of(tensor.device)}): {str(error).strip().splitlines()[0]} "
            "Run the call under atom_fast.backend('torch'), which needs no kernel, and report the size of its tensors"
        ) from error


@functools.cache
def _refusals() -> tuple[type[Exception], ...]:
    """What Triton raises for a kernel that asks for too much, or that it cannot compile; no RuntimeErrors."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def unfused_if_refused(work: Callable[[], T], device: torch.device) -> T:
    """Run ``work``; where a kernel does not run on ``device``, run it again with PyTorch's operators.

    From then on they take the place of Triton's kernels on that device, which a warning says.

    Raises:
        KernelError: the kernels were asked for by `atom_fast.backend`.
    """
    try:
        return work()
    except KernelError as error:
        if triton_refusal(device):
            raise
        refuse_triton(device, str(error.__cause__).strip())
    # Here, not in the handler: there the traceback would keep the failed call's tensors alive.
    return work()


def triton_dtype(dtype: torch.dtype):
    """Triton's float64 for float64, its float32 for every other dtype."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def is_traced() -> bool:
    """Whether something wants to see the operator: a compiler, a tracer, or a mode such as that of fake tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
