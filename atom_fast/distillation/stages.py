"""The stages of a step, by the names under which profilers see them."""

from __future__ import annotations

import torch

STAGES = ("network", "sample", "augment", "real", "synthetic", "loss", "backward", "update")
PREFIX = "stage: "  # in a trace, where plain words are common


def stage(name: str) -> torch.profiler.record_function:
    """Name the enclosed work, one of ``STAGES``, in the trace of any `torch.profiler` that is running."""
    return torch.profiler.record_function(PREFIX + name)
