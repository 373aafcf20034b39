"""The grid of Table 6: its candidates, their names, and what training each of them costs."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence

from atom_fast._seeds import derive_seed
from atom_fast.networks import convnet_search_space
from atom_fast.networks.convnet import GROUPS

WIDTHS = (32, 64, 128, 256)  # the paper's
# Of a training step, in multiplications of a convolution that take as long: fitted to some 500 timed trainings on one
# core of an AMD EPYC, on images of 8x8. They order the work and scale the progress bar, and change no result.
_PER_VALUE = 50  # norm, activation and pooling, per value of a feature map
_PER_BLOCK, _PER_STEP = 80_000, 120_000  # what calls cost, spread over a batch of 100 images


@dataclasses.dataclass(frozen=True)
class Candidate:
    """One network of the grid; the fields are settings of `atom_fast.networks.ConvNet`."""

    depth: int
    width: int
    activation: str
    norm: str
    pooling: str

    @property
    def name(self) -> str:
        """The name in files and tables, such as ``"depth3-width128-relu-instance-avg2"``."""
        return f"depth{self.depth}-width{self.width}-{self.activation}-{self.norm}-{self.pooling}"

    def seed(self, seed: int) -> int:
        """Return the seed of its initial weights, of ``seed`` and the name alone."""
        return derive_seed(seed, int.from_bytes(_digest(self.name)[:8], "little"))

    def cost(self, image_shape: tuple[int, int, int]) -> float:
        """Return the relative time to train on one image [C, H, W]."""
        channels, height, width = image_shape
        total = float(_PER_STEP)
        for _ in range(self.depth):
            total += self.width * (height * width * (9 * channels + _PER_VALUE)) + _PER_BLOCK
            channels = self.width
            if self.pooling != "none":
                height, width = height // 2, width // 2
        return total


def candidates(widths: Sequence[int] = WIDTHS, sample: int | None = None) -> list[Candidate]:
    """Return the grid, or a sample of it, in the grid's order.

    Args:
        widths: channels to choose from; four of them make 720 candidates.
        sample: number of candidates; a larger sample holds every smaller one. None: all.

    Raises:
        ValueError: a width that group norm cannot divide, or that is given twice, or no such number of candidates.
    """
    if bad := [width for width in widths if width < GROUPS or width % GROUPS]:
        raise ValueError(f"widths must be multiples of {GROUPS}, for norm 'group'; got {bad[0]}")
    if not widths or len(set(widths)) < len(widths):
        raise ValueError(f"widths must be different numbers, at least one; got {list(widths)}")
    grid = [Candidate(**settings) for settings in convnet_search_space(widths)]
    if sample is None:
        return grid
    if not 2 <= sample <= len(grid):
        raise ValueError(f"sample must be a number of candidates from 2 to {len(grid)}; got {sample}")
    chosen = set(sorted(grid, key=lambda candidate: _digest(candidate.name))[:sample])
    return [candidate for candidate in grid if candidate in chosen]


def _digest(name: str) -> bytes:
    return hashlib.sha256(name.encode()).digest()
