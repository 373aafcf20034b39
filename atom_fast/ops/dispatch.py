"""Choose the implementation of an operation: one table of implementations, and the context `backend`.

Every operation of this package is a row of ``TABLE``. Its module adds the row with `register`, and its public function
calls `dispatch`:

=========== ============================================================================================================
"triton"    kernels for a GPU, ``kernels/*.py``
"c"         kernels for a CPU, ``kernels/*.c``: float32, and half precision computed in float32; attention maps and
            class means also in float64
"eager"     PyTorch's operators: `atom_fast.reference` under autograd
"reference" `atom_fast.reference` under autograd, for attention maps, whose "eager" also keeps within the dtype's range
=========== ============================================================================================================
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import os
import warnings
from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._pytree import tree_iter

from .._device import HAS_TRITON, triton_refusal

BACKENDS = ("auto", "triton", "torch", "reference")
TABLE: dict[str, dict[str, Callable]] = {}
_PLAIN: dict[str, tuple[str, ...]] = {}  # columns of a row that consist of PyTorch's operators
_ORDER = {"triton": ("triton", "eager"), "torch": ("c", "eager"), "reference": ("reference", "eager")}


class _Choice:
    """An entered ``with backend(name)``; inactive after exit."""

    def __init__(self, name: str):
        self.name = name
        self.active = True


# Per thread and asyncio task. Contexts may exit in any order (a suspended generator may hold one), so an exit marks its
# choice inactive, and the latest active choice counts.
_choices: contextvars.ContextVar[tuple[_Choice, ...]] = contextvars.ContextVar("atom_fast_backend", default=())


@contextlib.contextmanager
def backend(name: str) -> Iterator[None]:
    """Run the enclosed calls of this thread (or asyncio task) with one backend.

    Backends compute the same functions; they differ in speed, memory and rounding. Contexts nest; the innermost active
    one counts. A generator suspended inside the context keeps it active for its thread until the generator leaves it or
    is closed.

    Args:
        name: one of

            - ``"auto"``: Triton on CUDA tensors if its kernels run there, otherwise as ``"torch"``.
            - ``"triton"``: the fused kernels for a GPU. An operation that they do not compute runs in PyTorch, with a
              warning.
            - ``"torch"``: on a CPU, kernels in C for the operations and dtypes that they compute (float32; half
              precision, computed in float32; the loss also in float64); for everything else PyTorch's operators,
              without a warning.
            - ``"reference"``: the equations of the paper (`atom_fast.reference`) under autograd.

    Raises:
        ValueError: ``name`` is none of these.
    """
    if name not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}; got {name!r}")
    choice = _Choice(name)
    _choices.set((*(other for other in _choices.get() if other.active), choice))
    try:
        yield
    finally:
        choice.active = False


@contextlib.contextmanager
def twice_differentiable(device: torch.device) -> Iterator[None]:
    """Run the enclosed calls by operations that can be differentiated twice: a network's in C, PyTorch's elsewhere."""
    with contextlib.nullcontext() if device.type == "cpu" else backend("reference"):
        yield


def resolve_backend(x: Tensor) -> str:
    """Return the backend for work on ``x``: ``"triton"``, ``"torch"`` or ``"reference"``.

    Raises:
        RuntimeError: ``"triton"`` was asked for, and its kernels cannot run on the device of ``x``.
    """
    name = _asked_for()
    if name == "auto":
        return _fastest(x)
    if name == "triton":
        _check_triton(x)
    return name


def _asked_for() -> str:
    for choice in reversed(_choices.get()):
        if choice.active:
            return choice.name
    return "auto"


def _fastest(x: Tensor) -> str:
    return "triton" if x.is_cuda and HAS_TRITON and not triton_refusal(x.device) else "torch"


def _check_triton(x: Tensor) -> None:
    if not HAS_TRITON:
        raise RuntimeError("backend 'triton' needs the triton package, which cannot be imported; use 'torch'")
    if not x.is_cuda and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise RuntimeError(
            f"backend 'triton' needs CUDA tensors, got one on {x.device}; "
            "use backend 'torch', or set TRITON_INTERPRET=1 before starting Python to interpret the kernels"
        )
    refusal = triton_refusal(x.device) if x.is_cuda else None
    if refusal:
        raise RuntimeError(f"backend 'triton' does not run on {x.device}: {refusal}; use backend 'torch'")


def register(operation: str, *, plain: tuple[str, ...] = ("eager",), **implementations: Callable) -> None:
    """Add a row to ``TABLE``.

    Args:
        operation: the stem of the operation's files.
        plain: the columns that consist of PyTorch's operators, which have forward-mode derivatives.
        **implementations: functions by column, all with the same arguments, "eager" among them. A function returns
            NotImplemented for arguments that it does not compute.
    """
    TABLE[operation] = implementations
    _PLAIN[operation] = plain


def dispatch(operation: str, x: Tensor | list[Tensor], *arguments):
    """Run an operation of ``TABLE`` on ``x``, or several on one device, with what the backend asks for.

    Raises:
        RuntimeError: the backend cannot run on the device of ``x``.
        NotImplementedError: ``x`` carries a forward-mode tangent, and the implementation has no rule for it.
    """
    row = TABLE[operation]
    resolved = resolve_backend(x if isinstance(x, Tensor) else x[0])
    for column in _ORDER[resolved]:
        if column not in row:
            continue
        if forward_ad._current_level >= 0 and column not in _PLAIN[operation]:
            _refuse_tangents(operation, x, *arguments)
        result = row[column](x, *arguments)
        if result is not NotImplemented:
            if column == "eager" and _asked_for() == "triton" and not torch.compiler.is_compiling():
                _warn_of_eager(operation)
            return result
    raise AssertionError(f"{operation} has no implementation")


def _refuse_tangents(operation: str, *arguments) -> None:
    for argument in tree_iter(arguments):
        if isinstance(argument, Tensor) and forward_ad.unpack_dual(argument).tangent is not None:
            raise NotImplementedError(
                f"{operation} has no forward-mode derivative (torch.func.jvp, torch.func.jacfwd, "
                "torch.autograd.forward_ad); use reverse mode, or run the call under atom_fast.backend('reference')"
            )


@functools.cache
def _warn_of_eager(operation: str) -> None:
    warnings.warn(
        f"backend 'triton' has no kernel for this call of {operation} (its dtype, mode or layout), so "
        "PyTorch's operators run it. Later calls of this operation do not warn",
        stacklevel=4,
    )
