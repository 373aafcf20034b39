"""Triton's interpreter without the work it repeats: the same results in half the time.

For every call of a device function the interpreter replaces the members of ``triton.language`` again, which takes
longer than most of these functions. Here they are looked up once per process and replaced once per launch.
"""

import functools
import types

import triton.language as tl
from triton.runtime import interpreter


def hasten() -> None:
    """Replace the parts of the interpreter that repeat work, in versions of Triton that have them."""
    if hasattr(interpreter, "_LangPatchScope") and hasattr(interpreter, "_patch_lang"):
        interpreter._patch_lang = _Language(interpreter._patch_lang)
    if hasattr(interpreter, "_get_np_dtype"):
        interpreter._get_np_dtype = functools.partial(_numpy_dtype, functools.cache(interpreter._get_np_dtype))


class _Language:
    """``triton.language`` as the interpreter defines it, from the call for a kernel to `restore`."""

    def __init__(self, patch):
        self.patch, self.changes, self.replaced = patch, None, False

    def __call__(self, function):
        if not self.replaced:  # else a device function is called by a kernel
            if self.changes is None:
                self.changes = self._look_up()
            for owner, name, _, new in self.changes:
                setattr(owner, name, new)
            self.replaced = True
        return self

    def _look_up(self):
        """What is replaced for kernels and for the standard library: owner, name, value before and after."""
        scope = self.patch(types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
        changes = [(owner, name, old, getattr(owner, name)) for owner, name, old in scope._changes]
        scope.restore()
        return changes

    def restore(self):
        for owner, name, old, _ in reversed(self.changes):
            if old is interpreter._MISSING:
                delattr(owner, name)
            else:
                setattr(owner, name, old)
        self.replaced = False


def _numpy_dtype(of_scalars, dtype):
    return of_scalars(tl.uint64 if dtype.scalar.is_ptr() else dtype.scalar)
