"""Real images chosen as a baseline for distilled ones."""

from __future__ import annotations

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import check_class_sizes


def random_selection(data: ImageData, ipc: int, seed: int) -> Tensor:
    """``ipc`` training images of every class, uniformly and without replacement: the row "Random" of the tables.

    The choice is drawn on the CPU, so that it is the same whatever device the data are on.

    Args:
        data: the real images, K classes.
        ipc: images a class.
        seed: of the choice.

    Returns:
        int64 [K * ipc], indices into ``data.train_images`` ordered by class, on the device of ``data``.

    Raises:
        ValueError: ``ipc`` is below 1, or a class has fewer images.
    """
    check_class_sizes(data, ipc)
    generator = torch.Generator().manual_seed(seed)
    positions, offset = [], 0
    for size in data.class_sizes:
        positions.append(offset + torch.randperm(size, generator=generator)[:ipc])
        offset += size
    return data.class_index[torch.cat(positions).to(data.class_index.device)]
