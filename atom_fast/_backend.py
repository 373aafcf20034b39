"""Which implementation a public function runs: equations, lean PyTorch, or kernels in Triton or C."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch

from . import _native
from ._device import HAS_TRITON, triton_refusal

BACKENDS = ("auto", "triton", "native", "torch", "reference")

_selected = "auto"  # a plain global: torch.compile guards it, and not every release can trace a ContextVar


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the enclosed calls, of every thread, with one backend; the results mean the same with each.

    Args:
        name: ``"auto"`` (Triton on CUDA tensors where its kernels run, the kernels in C on CPU tensors where a C
            compiler can be found, otherwise lean PyTorch), ``"triton"`` (the fused kernels for a GPU), ``"native"``
            (those for a CPU: float32, and blocks of narrower types, computed in it; other types, and what has no such
            kernel, run in lean PyTorch), ``"torch"`` (lean PyTorch with analytic gradients), or ``"reference"``
            (equations 1 to 4 of the ATOM paper as they are written).

    Raises:
        ValueError: the name is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    global _selected
    before, _selected = _selected, name
    try:
        yield
    finally:
        _selected = before


def resolve_backend(tensor: torch.Tensor) -> str:
    """The backend for work on ``tensor``: any of `BACKENDS` but ``"auto"``.

    Raises:
        RuntimeError: ``"triton"`` or ``"native"`` was asked for where its kernels cannot run.
    """
    name = _selected
    if name == "auto":
        return _fastest(tensor)
    if name == "triton":
        if not HAS_TRITON:
            raise RuntimeError("backend 'triton' needs the triton package, which cannot be imported; use 'torch'")
        if not tensor.is_cuda and not interpreting():
            raise RuntimeError(
                f"backend 'triton' needs CUDA tensors, got one on {tensor.device}; "
                "use backend 'torch', or set TRITON_INTERPRET=1 before starting Python to interpret the kernels"
            )
        refusal = triton_refusal(tensor.device) if tensor.is_cuda else None
        if refusal:
            raise RuntimeError(f"backend 'triton' does not run on {tensor.device}: {refusal}; use backend 'torch'")
    if name == "native":
        if tensor.device.type != "cpu":
            raise RuntimeError(f"backend 'native' is for CPU tensors, got one on {tensor.device}; use backend 'auto'")
        if not _native.is_built():
            raise RuntimeError("backend 'native' could not be built, see the warning; use backend 'torch'")
    return name


def _fastest(tensor: torch.Tensor) -> str:
    if tensor.device.type == "cpu":
        return "torch" if tensor.dtype == torch.float64 else "native"
    return "triton" if tensor.is_cuda and HAS_TRITON and not triton_refusal(tensor.device) else "torch"


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
