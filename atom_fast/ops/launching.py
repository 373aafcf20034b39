"""What every operator needs to launch its Triton kernels: the device, and values as the kernels take them."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


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


def device_of(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launch on the tensor's device, which need not be the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def triton_dtype(dtype: torch.dtype):
    """Triton's float64 for float64, its float32 for every other dtype."""
    import triton.language as tl

    return tl.float64 if dtype == torch.float64 else tl.float32


def is_traced() -> bool:
    """Whether something wants to see the operator: a compiler, a tracer, or a mode such as that of fake tensors."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
