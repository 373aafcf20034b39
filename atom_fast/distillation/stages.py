"""The stages of a step, by the names under which profilers see them."""

from __future__ import annotations

import contextlib

import torch

STAGES = ("network", "sample", "augment", "real", "synthetic", "loss", "backward", "update")
PREFIX = "stage: "  # in a trace, where plain words are common


def stage(name: str) -> contextlib.AbstractContextManager:
    """Name the enclosed work in the trace of any `torch.profiler` that is running; otherwise nothing is done.

    Args:
        name: one of ``STAGES``.
    """
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(PREFIX + name)
    return contextlib.nullcontext()
