"""Bytes of live tensors, counted at every operation: a peak that does not depend on the machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter


class LiveBytes(TorchDispatchMode):
    """Count the bytes of the tensors that operations inside the block make, from their making to their end.

    A storage counts once, however many views it has, and until nothing refers to it, autograd included. Tensors made
    before the block do not count, except in :attr:`live` through :meth:`add`. Custom operators written in Python are
    entered, so that what they allocate inside counts too; what a compiled kernel allocates for itself does not.

    Attributes:
        live: bytes alive now.
        peak: most bytes alive at once.
    """

    def __init__(self):
        super().__init__()
        self.live = self.peak = 0
        self._storages: dict[int, tuple[weakref.ref, int]] = {}

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        if function.namespace in _BUILT_IN:
            result = function(*arguments, **(keywords or {}))
        else:
            result = redispatched(self, function, arguments, keywords)
        for tensor in tree_iter(result):
            self.add(tensor)
        return result

    def add(self, tensor: Tensor) -> None:
        """Count a tensor's storage, unless it is counted already; anything but a tensor is passed over."""
        if not isinstance(tensor, Tensor):
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            before = self._storages[key]
            self._storages[key] = before[0], size
            self.live += size - before[1]
        else:
            self._storages[key] = weakref.ref(storage, lambda _: self._end(key)), size
            self.live += size
        self.peak = max(self.peak, self.live)

    def _end(self, key: int) -> None:
        self.live -= self._storages.pop(key)[1]


def count_peak(function: Callable[[], object]) -> int:
    """Most bytes that tensors made by ``function()`` occupy at once."""
    with LiveBytes() as counter:
        function()
    return counter.peak


def redispatched(mode: TorchDispatchMode, function, arguments, keywords):
    """Enter a custom operator written in Python with the mode still on."""
    with mode:  # straight to the kernel: called as usual, the operator would come back to the mode
        return function.redispatch(_kernel_keys(arguments, keywords), *arguments, **(keywords or {}))


_BUILT_IN = ("aten", "prim", "prims", "c10d")


def _kernel_keys(arguments, keywords) -> torch._C.DispatchKeySet:
    devices = {leaf.device.type for leaf in tree_iter((arguments, keywords)) if isinstance(leaf, Tensor)}
    key = torch._C.DispatchKey.CUDA if "cuda" in devices else torch._C.DispatchKey.CPU
    return torch._C.DispatchKeySet(key)
