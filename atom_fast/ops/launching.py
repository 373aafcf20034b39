"""Helpers of the operators that launch kernels: devices, dtypes, layouts and constants."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

from .._device import chip_of, refuse_triton, triton_refusal

T = TypeVar("T")

#: Which kernels for a GPU run, of operations that have two: the "measured" ones, or their "successor", which no GPU has
#: run yet.
KERNELS = dict.fromkeys(("attention", "batch_norm", "conv_block", "instance_norm", "norm_block"), "measured")


@contextlib.contextmanager
def chosen_kernels(choice: str) -> Iterator[None]:
    """Run ``"measured"`` kernels or their ``"successor"`` in the enclosed calls, and in their backward passes."""
    before = dict(KERNELS)
    KERNELS.update(dict.fromkeys(KERNELS, choice))
    try:
        yield
    finally:
        KERNELS.update(before)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """Return float64 for float64, and float32 for every narrower floating dtype."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def int32_indexable(x: Tensor) -> Tensor:
    """Return ``x``, or a copy if one of its samples (a slice of a far larger tensor) exceeds 32-bit offsets."""
    span = sum((size - 1) * stride for size, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    return x.contiguous() if span >= 2**31 else x


def contiguous(x: Tensor | None) -> Tensor | None:
    """Return ``x`` contiguous, as kernels index parameters; None stays None."""
    return None if x is None else x.contiguous()


def constant_power(power: float | None) -> float | int:
    """Convert a power to a kernel's constant: int if it is whole, so that 4 and 4.0 compile once; 0 for None."""
    if power is None:
        return 0
    return int(power) if float(power).is_integer() else float(power)


class KernelError(RuntimeError):
    """A kernel cannot be compiled or launched for a device; the message names an alternative."""


@contextlib.contextmanager
def device_of(tensor: Tensor) -> Iterator[None]:
    """Launch on the tensor's device, which need not be the current one.

    Raises:
        KernelError: a kernel needs more than the device has, or cannot be compiled for it.
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
    """Return Triton's exceptions for a kernel that needs too much or does not compile; none is a RuntimeError."""
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError, CompilationError


def unfused_if_refused(work: Callable[[], T], device: torch.device) -> T:
    """Run ``work``; if a kernel does not run on ``device``, run it again with PyTorch's operators.

    From then on PyTorch's operators replace Triton's kernels on that device, with a warning.

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
    """Return Triton's float64 for float64, and its float32 for every other dtype."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def is_traced() -> bool:
    """Return True if the call must go through the dispatcher.

    That is under torch.compile, tracing, a dispatch mode, and the transforms of torch.func.
    """
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
    )
