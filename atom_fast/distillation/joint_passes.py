"""Passes over the chunks of a step whose BatchNorm is over the classes of all chunks and processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

from atom_fast.distillation import ranks
from atom_fast.ops.joint_batch import JointBatch, joint_batch

_Chunk = TypeVar("_Chunk")
_Result = TypeVar("_Result")


class _Waiting(Exception):
    """A chunk needs sums of chunks that have not come as far; it holds the chunk's own."""

    def __init__(self, values: Tensor):
        super().__init__()
        self.values = values


class JointPasses:
    """Runs a step's work on chunks of classes that share BatchNorm's batch.

    Wherever a norm joins the batch, in the forward or the backward pass, a chunk hands in its classes' sums and stops,
    unless the totals of that place are known. When all chunks have stopped there, the sums are gathered, also from
    other processes, and all chunks start again, now beyond that place. What lies before it is computed again, so that
    nothing of a chunk is kept. With a single chunk nothing stops and nothing is computed twice.

    The totals are kept until `forget`: a step that is tried again, say in smaller chunks, does not gather them anew, so
    that processes gather the same number of times.
    """

    def __init__(self, classes: int):
        """Prepare for ``classes`` classes, of all processes together."""
        self._classes = classes
        self._known: list[Tensor] = []
        self._first = 0  # place at which the present `over` begins
        self._place = 0  # of the present chunk

    def begin(self) -> None:
        """Start a step, or start it again."""
        self._first = 0

    def forget(self) -> None:
        """End a step."""
        self._known.clear()

    def over(self, chunks: Sequence[_Chunk], work: Callable[[_Chunk], _Result], sizes: Sequence[int]) -> list[_Result]:
        """Return ``work`` of each chunk.

        Args:
            chunks: all of this process, in the order of their classes.
            work: runs a chunk through the network; called several times for a chunk, always with the same result.
            sizes: number of classes in each chunk.
        """
        while True:
            results, handed_in = [], []
            for chunk, size in zip(chunks, sizes, strict=True):
                self._place = self._first
                with joint_batch(JointBatch(size, self._gather if len(chunks) == 1 else self._look_up)):
                    try:
                        results.append(work(chunk))
                    except _Waiting as waiting:
                        handed_in.append(waiting.values)
            if not handed_in:
                self._first = self._place
                return results
            self._known.append(ranks.all_gather(torch.cat(handed_in), self._classes))

    def _look_up(self, values: Tensor) -> Tensor:
        """Return all classes' values at this place if they are known; otherwise stop the chunk, to hand its own in."""
        if self._place == len(self._known):
            raise _Waiting(values)
        self._place += 1
        return self._known[self._place - 1]

    def _gather(self, values: Tensor) -> Tensor:
        """Return all classes' values at this place, with ``values`` those of this process."""
        if self._place == len(self._known):
            self._known.append(ranks.all_gather(values, self._classes))
        return self._look_up(values)
