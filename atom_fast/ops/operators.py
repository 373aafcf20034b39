"""Define operators of PyTorch, as `torch.library.custom_op` does, without the seconds that its first call takes."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable

import torch
from torch._ops import OpOverload

_LIBRARY = torch.library.Library("atom_fast", "FRAGMENT")


def operator(
    name: str, schema: str | None = None, mutates: Iterable[str] = (), differentiable: bool = False
) -> Callable[[Callable], OpOverload]:
    """Return a decorator that makes a function the operator ``atom_fast::name``, on every device.

    Args:
        name: the operator's name.
        schema: arguments and results; None: those of the function's annotations.
        mutates: names of the arguments that the function writes to.
        differentiable: `differentiate` follows; otherwise a derivative raises RuntimeError.
    """

    mutates = tuple(mutates)

    def define(function: Callable) -> OpOverload:
        arguments = torch.library.infer_schema(function, mutates_args=mutates) if schema is None else schema
        _LIBRARY.define(name + arguments, tags=(torch.Tag.pt2_compliant_tag,))
        _LIBRARY.impl(name, _not_traced(function), "CompositeExplicitAutograd")
        defined = getattr(torch.ops.atom_fast, name).default
        if not differentiable and not mutates:  # PyTorch accepts no derivative for one that writes
            differentiate(defined, _refuse_derivative, lambda ctx, inputs, output: setattr(ctx, "name", name))
        return defined

    return define


def _refuse_derivative(ctx, *_):
    raise RuntimeError(f"atom_fast::{ctx.name} has no autograd formula: it is differentiable no further")


def fake(of: OpOverload) -> Callable[[Callable], Callable]:
    """Return a decorator for the function that returns empty results of an operator, as tracing needs them."""
    return torch.library.register_fake(of, lib=_LIBRARY)


def differentiate(of: OpOverload, backward: Callable, setup_context: Callable) -> None:
    """Give an operator its derivative; the functions are those of `torch.library.register_autograd`."""
    torch.library.register_autograd(of, backward, setup_context=setup_context, lib=_LIBRARY)


def _not_traced(function: Callable) -> Callable:
    """Keep torch.compile from tracing into an operator that a compiled function calls.

    `torch.library.custom_op` imports the compiler for that at an operator's first call. Unless something else has
    imported it, nothing is being compiled.
    """

    @functools.wraps(function)
    def run(*arguments, **keywords):
        disable = getattr(sys.modules.get("torch._dynamo"), "disable", None)
        return (_disabled(disable, function) if disable else function)(*arguments, **keywords)

    return run


@functools.cache
def _disabled(disable: Callable, function: Callable) -> Callable:
    return disable(function, wrapping=False)
