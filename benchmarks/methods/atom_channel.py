"""ATOM†: ATOM with channel attention alone; the step is described in ``attention.py``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import attention
from .setting import Setting


def build(setting: Setting) -> Callable[[], Tensor]:
    """A function that runs one step and returns its loss."""
    return attention.build(setting, spatial=False, channel=True)
