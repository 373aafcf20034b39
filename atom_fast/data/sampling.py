"""Class-wise sampling of real images on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData


def sample_class_indices(data: ImageData, batch: int, generator: torch.Generator) -> Tensor:
    """Draw ``batch`` training images of every class, uniformly and without replacement within a class.

    Every image of a class gets a random key, and the images with the ``batch`` largest keys are returned. The number of
    operators does not depend on the number of classes, and nothing is read back to the host. The images of a class are
    equally likely except for ties of their float32 keys, one pair in 2^24.

    A class with fewer than ``batch`` images is drawn repeatedly: each of its images appears floor(batch / size) or
    ceil(batch / size) times, chosen at random. Every class therefore has the same weight, and the shape is fixed.

    Args:
        data: the real images.
        batch: images per class, at least 1.
        generator: source of randomness, on the device of ``data``.

    Returns:
        int64 [K, batch] on the device of ``data``, indices into ``data.train_images``; row k indexes class k.

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
    if smallest < batch:  # repeat the random order of a small class; positions outside the class are sorted to the end
        positions = positions.gather(1, torch.arange(batch, device=device) % data.class_counts[:, None])
    if smallest == largest:
        return data.class_index.view(data.num_classes, largest).gather(1, positions)
    return data.class_index.take(positions + data.class_offsets[:-1, None])


def describe_small_classes(data: ImageData, batch: int) -> str | None:
    """Describe the classes with fewer than ``batch`` training images, for a log; return None if there are none."""
    small = sum(size < batch for size in data.class_sizes)
    if not small:
        return None
    name, smallest = _smallest_class(data)
    return (
        f"{small} of {data.num_classes} classes have fewer than {batch} training images (the smallest, {name!r}, has "
        f"{smallest})"
    )


def check_class_sizes(data: ImageData, ipc: int, way_out: str = "", *, partition: int = 1) -> None:
    """Check that every class has training images for ``ipc`` stored ones.

    Args:
        data: the real images.
        ipc: stored images per class.
        partition: rows and columns of real images on each stored image.
        way_out: an alternative to a smaller ``ipc``, appended to the message.

    Raises:
        ValueError: ``ipc`` is below 1, or a class has fewer images; the message names the class and both numbers.
    """
    name, smallest = _smallest_class(data)
    each = partition**2
    most = smallest // each
    if ipc < 1:
        raise ValueError(f"images per class must be 1 to {most} for {data.name}; got {ipc}")
    if ipc > most:
        sheets = "" if partition == 1 else f" ({each} on each of {ipc} sheets)"
        smaller = f"give an ipc of at most {most}" if most else "give a smaller partition"
        raise ValueError(
            f"class {name!r} of {data.name} has {smallest} training images, but {ipc * each} different ones per class "
            f"were asked for{sheets}; {smaller}{way_out}"
        )


def _smallest_class(data: ImageData) -> tuple[str, int]:
    smallest = min(data.class_sizes)
    return data.class_names[data.class_sizes.index(smallest)], smallest
