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

    A class of fewer images is drawn whole, then again: each of its images appears either floor(batch / size) or
    ceil(batch / size) times, at random which. Every class so has the same weight in a batch, and the shape is fixed.

    Args:
        data: the real images; the indices are drawn on its device.
        batch: images per class, at least 1.
        generator: source of randomness, on the device of ``data``.

    Returns:
        int64 [K, batch], indices into ``data.train_images``; row k holds images of class k.

    Raises:
        ValueError: ``batch`` is below 1.
    """
    if batch < 1:
        raise ValueError(f"images per class must be at least 1; got {batch}")
    device = data.class_index.device
    smallest, largest = min(data.class_sizes), max(data.class_sizes)
    keys = torch.rand(data.num_classes, largest, device=device, generator=generator)
    if smallest < largest:
        beyond_class = torch.arange(largest, device=device) >= data.class_counts[:, None]
        keys = keys.masked_fill(beyond_class, -1.0)
    positions = keys.topk(min(batch, largest), dim=1, sorted=smallest < batch).indices
    if smallest < batch:  # round and round the random order of a small class; what is beyond it was sorted to the end
        positions = positions.gather(1, torch.arange(batch, device=device) % data.class_counts[:, None])
    return data.class_index.take(positions + data.class_offsets[:-1, None])


def describe_small_classes(data: ImageData, batch: int) -> str | None:
    """Which classes `sample_class_indices` draws more than once to get ``batch`` images, in words; None for none."""
    small = sum(size < batch for size in data.class_sizes)
    if not small:
        return None
    name, smallest = _smallest_class(data)
    return (
        f"{small} of {data.num_classes} classes have fewer than {batch} training images (the smallest, {name!r}, has "
        f"{smallest})"
    )


def check_class_sizes(data: ImageData, ipc: int, way_out: str = "") -> None:
    """Make sure that every class has ``ipc`` different training images to choose.

    Args:
        data: the real images.
        ipc: images per class.
        way_out: what else could be done, for the message.

    Raises:
        ValueError: ``ipc`` is below 1, or a class has fewer images; the class and both numbers are named.
    """
    name, smallest = _smallest_class(data)
    if ipc < 1:
        raise ValueError(f"images per class must be 1 to {smallest} for {data.name}; got {ipc}")
    if ipc > smallest:
        raise ValueError(
            f"class {name!r} of {data.name} has {smallest} training images, but {ipc} different ones per class were "
            f"asked for; give an ipc of at most {smallest}{way_out}"
        )


def _smallest_class(data: ImageData) -> tuple[str, int]:
    smallest = min(data.class_sizes)
    return data.class_names[data.class_sizes.index(smallest)], smallest
