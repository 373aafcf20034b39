"""Which implementation a public function runs: equations, lean PyTorch, or Triton kernels."""

from __future__ import annotations

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKENDS = ("auto", "triton", "torch", "compile", "reference")

_selected = "auto"  # a plain global: torch.compile guards it, and not every release can trace a ContextVar


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the enclosed calls, of every thread, with one backend; the results mean the same with each.

    Args:
        name: ``"auto"`` (Triton on CUDA tensors where Triton can be imported, otherwise lean PyTorch),
            ``"triton"`` (the fused kernels), ``"torch"`` (lean PyTorch with analytic gradients), ``"compile"`` (the
            same, its fused blocks compiled for a CPU by ``torch.compile``: some ten seconds at first, then faster;
            needs a C++ compiler), or ``"reference"`` (equations 1 to 4 of the ATOM paper as they are written).

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
        RuntimeError: ``"triton"`` was asked for where its kernels cannot run, or ``"compile"`` for a GPU.
    """
    name = _selected
    if name == "auto":
        return "triton" if tensor.is_cuda and HAS_TRITON else "torch"
    if name == "triton":
        if not HAS_TRITON:
            raise RuntimeError("backend 'triton' needs the triton package, which cannot be imported; use 'torch'")
        if not tensor.is_cuda and not interpreting():
            raise RuntimeError(
                f"backend 'triton' needs CUDA tensors, got one on {tensor.device}; "
                "use backend 'torch', or set TRITON_INTERPRET=1 before starting Python to interpret the kernels"
            )
    if name == "compile" and tensor.device.type != "cpu":
        raise RuntimeError(
            f"backend 'compile' is for CPU tensors, got one on {tensor.device}; use backend 'auto', whose kernels "
            "for a GPU are compiled already"
        )
    return name


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"
