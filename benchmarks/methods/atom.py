"""ATOM: spatial and channel attention matching (Khaki et al., 2024); the step is described in ``attention.py``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import attention
from .workload import Workload


def build(workload: Workload) -> Callable[[], Tensor]:
    """Return a function that runs one step and returns its loss."""
    return attention.build(workload, spatial=True, channel=True)
