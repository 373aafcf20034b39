"""DSA: gradient matching under differentiable siamese augmentation (Zhao and Bilen, ICML 2021).

One step is one outer iteration of ``dc.py``, with the same settings, synthetic images started from real ones, each
class's real and synthetic images augmented alike before they are matched, and the network trained on augmented images.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from . import published
from .dc import outer_iteration
from .setting import Setting


def build(setting: Setting) -> Callable[[], Tensor]:
    """A function that runs one step and returns its last matching loss."""
    data = published.RealData(setting)
    return outer_iteration(setting, data, published.synthetic_from_real(setting, data), augmented=True)
