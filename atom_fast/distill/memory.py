"""How many classes may run at once within a memory budget, found by measuring, on a GPU."""

from __future__ import annotations

import torch

from atom_fast.distill.config import parse_budget
from atom_fast.distill.step import Distillation

# Of the free memory that "fit" may take: convolution workspaces and fragmentation need the rest.
_FREE_SHARE = 0.9


def fit_class_chunk(run: Distillation, budget: str) -> int:
    """Let as many classes run at once as the budget allows; images, momentum and loss terms stay as they are.

    Peak memory grows linearly with the classes of a chunk, so two measured steps give the rest.

    Args:
        run: what is to be distilled; its ``class_chunk`` is set.
        budget: bytes for everything on the device, data included, or "fit" for what is free; as in ``DistillConfig``.

    Returns:
        The number of classes.

    Raises:
        ValueError: the budget is too small for one class, or for all where the norm couples them (the smallest that
            works is named); or the run is not on a GPU.
    """
    device, classes = run.images.device, run.data.num_classes
    if device.type != "cuda":
        raise ValueError(f"memory_budget {budget!r} needs a GPU, whose memory can be measured; here use class_chunk")
    limit = parse_budget(budget)
    if limit is None:
        limit = int(_FREE_SHARE * (torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_allocated(device)))
    if run.config.norm == "batch" or classes == 1:
        smallest = run.peak_memory(classes)
        chunk = classes
    else:
        smallest = run.peak_memory(1)
        growth = max(run.peak_memory(2) - smallest, 1)
        chunk = min(classes, 1 + (limit - smallest) // growth)
    if smallest > limit:
        raise ValueError(
            f"memory_budget {budget!r} is too small: {limit} bytes; the smallest that works here is {smallest} bytes"
        )
    run.set_class_chunk(chunk)
    return chunk
