"""Passes over the chunks of a step whose BatchNorm is over the classes of all chunks and processes."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from atom_fast.distillation import ranks
from atom_fast.ops.joint_batch import JointBatch, joint_batch

_Chunk = TypeVar("_Chunk")


class _Waiting(Exception):
    """A chunk needs sums of chunks that have not come as far; it holds the chunk's own."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = values


class JointPasses:
    """Lets the chunks of a step share BatchNorm's batch with each other, and with those of other processes.

    Wherever a norm joins the batch, in the forward or the backward pass, a chunk hands in its classes' sums and stops,
    unless the totals of that place are known. When all chunks have stopped there, the sums are gathered, also from
    other processes, and all chunks start again, now beyond that place. What lies before it is computed again, so that
    nothing of a chunk need be kept. With a single chunk nothing stops and nothing is computed twice.

    ::

        for chunk in passes.over(chunks):
            with passes.part(size):
                ...  # through the network; ends early where the chunk has to wait
        passes.forget()

    The totals are kept until `forget`: a step that is tried again, say in smaller chunks, does not gather them anew, so
    that processes gather the same number of times.

    Attributes:
        joined: False: every chunk is run once, by itself.
        repeats: True if the present chunks go through the network several times.
    """

    def __init__(self, classes: int, *, joined: bool = True):
        """Prepare the passes for ``classes`` classes, of all processes together."""
        self.joined, self.repeats = joined, False
        self._classes = classes
        self._known: dict[str, list[Tensor]] = {}  # of each section, in the order of its places
        self._handed_in: list[Tensor] = []
        self._section, self._place = "", 0

    def over(self, chunks: Sequence[_Chunk]) -> Iterator[_Chunk]:
        """Yield all chunks of this process, in the order of their classes, again and again until nothing stops them."""
        self.repeats = self.joined and len(chunks) > 1
        self._handed_in.clear()
        while True:
            yield from chunks
            if not self._handed_in:
                return
            self._known[self._section].append(ranks.all_gather(torch.cat(self._handed_in), self._classes))
            self._handed_in.clear()

    @contextlib.contextmanager
    def part(self, classes: int) -> Iterator[None]:
        """Run a chunk of ``classes`` classes; what the context holds ends early where the chunk has to wait."""
        gather = self._look_up if self.repeats else self._gather
        with joint_batch(JointBatch(classes, gather) if self.joined else None):
            try:
                yield
            except _Waiting as waiting:
                self._handed_in.append(waiting.values)

    def begin(self, section: str) -> None:
        """Begin a section of a chunk, whose places are counted by themselves, so that a section can be left out."""
        self._section, self._place = section, 0
        self._known.setdefault(section, [])

    def forget(self) -> None:
        """End a step."""
        self._known.clear()

    def _look_up(self, values: Tensor) -> Tensor:
        """Return all classes' values at this place if they are known; otherwise stop the chunk, to hand its own in."""
        known = self._known[self._section]
        if self._place == len(known):
            raise _Waiting(values)
        self._place += 1
        return known[self._place - 1]

    def _gather(self, values: Tensor) -> Tensor:
        """Return all classes' values at this place, with ``values`` those of this process."""
        known = self._known[self._section]
        if self._place == len(known):
            known.append(ranks.all_gather(values, self._classes))
        return self._look_up(values)
