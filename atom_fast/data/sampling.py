"""Class-wise sampling of real images, entirely on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData


def sample_class_indices(data: ImageData, batch: int, generator: torch.Generator) -> Tensor:
    """Draw ``batch`` training images of every class, uniformly and without replacement within a class.

    Every image of a class gets a random key and the ``batch`` largest keys win: the same few operators whatever the
    number of classes, and nothing is read back to the host. No image is drawn twice in a call; two of a class are
    equally likely but for ties of their float32 keys, one pair in 2^24.

    Args:
        data: the real images; the indices are drawn on its device.
        batch: images a class, at most the size of the smallest class.
        generator: source of randomness, on the device of ``data``.

    Returns:
        int64 [K, batch], indices into ``data.train_images``; row k holds images of class k.

    Raises:
        ValueError: ``batch`` is below 1, or a class has fewer images.
    """
    check_class_sizes(data, batch)
    device = data.class_index.device
    largest = max(data.class_sizes)
    keys = torch.rand(data.num_classes, largest, device=device, generator=generator)
    if min(data.class_sizes) < largest:
        beyond_class = torch.arange(largest, device=device) >= data.class_counts[:, None]
        keys = keys.masked_fill(beyond_class, -1.0)
    positions = keys.topk(batch, dim=1, sorted=False).indices + data.class_offsets[:-1, None]
    return data.class_index.take(positions)


def check_class_sizes(data: ImageData, batch: int, asked_by: str = "") -> None:
    """Make sure that every class has ``batch`` training images; ``asked_by`` says in the message what asks for them.

    Raises:
        ValueError: ``batch`` is below 1, or a class has fewer images; the class and both numbers are named.
    """
    smallest = min(data.class_sizes)
    if batch < 1:
        raise ValueError(f"images a class must be 1 to {smallest} for {data.name}; got {batch}")
    if batch > smallest:
        name = data.class_names[data.class_sizes.index(smallest)]
        raise ValueError(
            f"class {name!r} of {data.name} has {smallest} training images, but {batch} a class were asked for"
            f"{asked_by}; at most {smallest} can be drawn"
        )
