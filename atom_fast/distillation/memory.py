"""How many classes may run at once within a memory budget, found by measuring."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from atom_fast._device import is_out_of_memory
from atom_fast.distillation.config import parse_budget
from atom_fast.distillation.step import Distillation

# Of the free memory that "fit" may take: convolution workspaces and fragmentation need the rest.
_FREE_SHARE = 0.9


def fit_class_chunk(run: Distillation, budget: str) -> int:
    """Let as many classes run at once as the budget allows; images, momentum and loss terms stay as they are.

    Peak memory grows about linearly with the classes of a chunk, so two measured steps tell where to try.

    Args:
        run: what is to be distilled; its ``class_chunk`` is set.
        budget: bytes for everything that `Distillation.peak_memory` counts, or "fit" for what is free; as in
            ``DistillConfig``.

    Returns:
        The number of classes.

    Raises:
        ValueError: the budget is too small for one class, or for all where the norm couples them (the smallest that
            works is named).
    """
    classes = len(run.classes)
    limit = parse_budget(budget)
    if limit is None:
        limit = int(_FREE_SHARE * _free_memory(run.images.device))
    coupled = run.config.norm == "batch"
    if coupled or classes == 1:
        smallest = run.peak_memory(classes)
        chunk = classes
    else:
        smallest = run.peak_memory(1)
        growth = max(_peak(run, 2) - smallest, 1)
        chunk = min(classes, 1 + int((limit - smallest) // growth))
    if smallest > limit:
        hint = "; under norm 'batch' all classes run together, under 'instance' fewer can" if coupled else ""
        raise ValueError(
            f"memory_budget {budget!r} is too small: {limit} bytes; the smallest that works here is {smallest} bytes"
            + hint
        )
    while chunk > 1 and _peak(run, chunk) > limit:
        chunk -= 1
    run.set_class_chunk(chunk)
    return chunk


def _peak(run: Distillation, chunk: int) -> float:
    """Bytes at the peak of a step with ``chunk`` classes; infinite where the device has not so many."""
    try:
        return run.peak_memory(chunk)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    # Here, not in the handler: there the traceback would keep the failed step's tensors alive.
    if run.images.is_cuda:
        torch.cuda.empty_cache()
    return math.inf


def _free_memory(device: torch.device) -> int:
    """Bytes that a run may take, with what it has taken already."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].removesuffix("kB"))
    except (OSError, KeyError, ValueError) as error:
        raise ValueError("memory_budget 'fit' needs /proc/meminfo on a CPU; give bytes, or class_chunk") from error
