"""Backends that tests run an operation with: PyTorch or C, Triton's kernels, and the successors of these."""

import contextlib
from collections.abc import Iterator

import atom_fast as af
from atom_fast.ops.launching import chosen_kernels


@contextlib.contextmanager
def entered(backend: str) -> Iterator[None]:
    """Enter `atom_fast.backend`, or for ``"successor"`` backend ``"triton"`` with the successors of its kernels."""
    with contextlib.ExitStack() as stack:
        if backend == "successor":
            stack.enter_context(chosen_kernels("successor"))
        stack.enter_context(af.backend("triton" if backend == "successor" else backend))
        yield
