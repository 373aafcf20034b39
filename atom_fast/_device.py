"""What the device that computes has: its architecture, its shared memory, its number formats; asked once."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch

# Bytes of shared memory that one program may take, by compute capability (CUDA C++ programming guide, table of
# technical specifications; a KB per program is the driver's).
SHARED_MEMORY = {
    75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10,
    90: 227 << 10, 100: 227 << 10, 103: 227 << 10, 120: 99 << 10, 121: 99 << 10,
}  # fmt: skip
OLDEST = 75  # compute capability that the kernels are compiled for in the tests


class Chip(NamedTuple):
    """What launch tables need to know of a GPU."""

    capability: int  # 10 * major + minor, such as 86
    shared: int  # bytes of shared memory that one program may take

    @property
    def name(self) -> str:
        """Such as ``sm_86``."""
        return f"sm_{self.capability}"

    @property
    def has_tf32(self) -> bool:
        """Whether tensor cores multiply float32 rounded to TF32."""
        return self.capability >= 80

    @property
    def has_bfloat16(self) -> bool:
        """Whether bfloat16 is multiplied, and not emulated."""
        return self.capability >= 80


# What the kernels are launched for where Triton interprets them on a CPU.
INTERPRETED = Chip(90, SHARED_MEMORY[90])


def chip_of(device: torch.device) -> Chip:
    """The chip that kernels are launched on for tensors on ``device``."""
    return _chip(device.index if device.index is not None else torch.cuda.current_device()) if (
        device.type == "cuda"
    ) else INTERPRETED


@functools.cache
def _chip(index: int) -> Chip:
    properties = torch.cuda.get_device_properties(index)
    return Chip(10 * properties.major + properties.minor, properties.shared_memory_per_block_optin)
