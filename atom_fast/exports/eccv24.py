"""A set as the dataset distillation contest at ECCV 2024 takes it."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from atom_fast._files import write_atomically
from atom_fast.exports.public import standardised
from atom_fast.foreign.spaces import CONSTANTS, PUBLIC

if TYPE_CHECKING:
    from atom_fast.synthetic import SyntheticSet

_ECCV24 = {"cifar100": (100, 32), "tiny": (200, 64)}  # classes, side of the images in pixels
_ECCV24_IPC = 10


def export_eccv24(synthetic: SyntheticSet, path: Path) -> Path:
    """Write `eccv24_tensor` by itself to a file."""
    buffer = io.BytesIO()
    torch.save(eccv24_tensor(synthetic), buffer)
    return write_atomically(path, buffer.getvalue())


def eccv24_tensor(synthetic: SyntheticSet) -> Tensor:
    """Return the tensor that the contest takes, saved by itself as a ``.pt`` file.

    The contest names the files ``cifar100.pt`` and ``tinyimagenet.pt``, and numbers the classes by position: images 0
    to 9 are class 0. It normalises test images by constants, and so are the images here. A whitened set is brought back
    to pixels before: networks then see it in another space than the one that it was distilled in, so distil for the
    contest with ``preprocessing="standard"``.

    Args:
        synthetic: 10 images in each class of CIFAR-100 (32x32) or of Tiny ImageNet (64x64), with hard labels, not
            partitioned.

    Returns:
        float32 [1000, 3, 32, 32] or [2000, 3, 64, 64] on the CPU, ordered by class.

    Raises:
        ValueError: the set is another kind; the message says what it is and what the contest takes.
    """
    dataset = _dataset_of(synthetic)
    if synthetic.partition > 1:
        raise ValueError(f"eccv24 takes whole images: partition must be 1; got {synthetic.partition}")
    if synthetic.soft_labels is not None:
        raise ValueError("eccv24 takes hard labels, which follow from the order of the images; the set has soft labels")
    if synthetic.ipc != _ECCV24_IPC:
        got = "classes of different sizes" if synthetic.ipc is None else f"{synthetic.ipc} per class"
        raise ValueError(f"eccv24 takes {_ECCV24_IPC} images per class; got {got}")
    synthetic = synthetic.to("cpu")
    images = standardised(synthetic, *CONSTANTS[PUBLIC[dataset]])
    return images[torch.argsort(synthetic.labels, stable=True)].contiguous()


def _dataset_of(synthetic: SyntheticSet) -> str:
    """The contest's data set that a set is for: the one that it names, or that has so many classes and pixels."""
    shape = len(synthetic.class_names), *synthetic.sheets.shape[1:]
    named = synthetic.metadata.get("dataset")
    for dataset, (classes, side) in _ECCV24.items():
        if shape == (classes, 3, side, side) and named in (None, dataset):
            return dataset
    accepted = " or ".join(
        f"{name} ({classes} classes, [3, {side}, {side}])" for name, (classes, side) in _ECCV24.items()
    )
    raise ValueError(
        f"eccv24 takes a set of {accepted}; got {named or 'a set'} ({shape[0]} classes, {list(shape[1:])})"
    )
