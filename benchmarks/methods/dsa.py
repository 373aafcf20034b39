"""DSA: gradient matching under differentiable siamese augmentation (Zhao and Bilen, ICML 2021).

One step is one outer iteration of ``dc.py``, with the same settings, synthetic images started from real ones, each
class's real and synthetic images augmented alike before they are matched, and the network trained on augmented images.
"""

from __future__ import annotations

from collections.abc import Callable

from . import dc, published
from .workload import Workload


def build(workload: Workload) -> Callable[[], object]:
    """Return a function that runs one step and returns its last matching loss."""
    if workload.implementation == "fused":
        return dc.build(workload)
    data = published.RealData(workload)
    return dc.outer_iteration(workload, data, published.synthetic_from_real(workload, data), augmented=True)
