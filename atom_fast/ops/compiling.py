"""Pieces of lean PyTorch compiled for a CPU by torch.compile, for the backend "compile"."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Hashable

import torch
from torch import Tensor


def piece_function(function: Callable, backend: str, case: Hashable) -> Callable:
    """``function``, which computes a piece of samples; for the backend ``"compile"`` the same, compiled.

    Args:
        function: takes tensors, those of two dimensions and more with the samples first, and constants.
        backend: as :func:`atom_fast._backend.resolve_backend` returns it.
        case: what the code depends on, but for the number of samples: shapes, dtypes, constants. Each case is compiled
            once, the first time it runs, in about a second; PyTorch keeps the result on disk for later processes.

    Raises:
        RuntimeError: from the function returned, when there is no C++ compiler.
    """
    return _compiled(function, case, torch.get_num_threads()) if backend == "compile" else function


@functools.cache
def _compiled(function: Callable, case: Hashable, threads: int) -> Callable:
    # A code object of its own: PyTorch counts the versions of a code object, and past a few compiles no more.
    own = types.FunctionType(
        function.__code__.replace(co_name=f"{function.__name__}_{abs(hash(case))}"),
        function.__globals__,
        function.__name__,
        function.__defaults__,
    )
    # What a few reads give is computed again where it is needed, and not written: passes take the time.
    compiled = torch.compile(own, fullgraph=True, options={"realize_reads_threshold": 8})
    started = False

    def run(*arguments):
        nonlocal started
        if started:
            with torch.no_grad():
                return compiled(*arguments)
        for argument in arguments:
            if isinstance(argument, Tensor) and argument.dim() > 1:
                torch._dynamo.maybe_mark_dynamic(argument, 0)  # the last piece has fewer samples
        try:
            with torch.no_grad():
                result = compiled(*arguments)
        except Exception as error:
            if "InvalidCxxCompiler" in str(type(error)) or "InvalidCxxCompiler" in str(error):
                raise RuntimeError(
                    "backend 'compile' needs a C++ compiler, and none was found (g++ or clang++, or the one named by "
                    "the environment variable CXX); install one, or use backend 'torch'"
                ) from error
            raise
        started = True
        return result

    return run
