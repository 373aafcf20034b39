"""Line 1 of Algorithm 1: the images that a distillation starts from."""

from __future__ import annotations

import torch
from torch import Tensor

from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import make_sheets
from atom_fast.data.sampling import check_class_sizes, sample_class_indices
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.synthetic import SyntheticSet


def initial_images(config: DistillConfig, data: ImageData, preprocessing: Preprocessing) -> Tensor:
    """Draw the initial images from ``config.seed``: different real images of each class, or Gaussian noise.

    Args:
        config: ``image_init`` chooses.
        data: real images; the result is on their device.
        preprocessing: from pixels to model space, on the same device.

    Returns:
        float32 [K*ipc, C, H, W] in model space, class-major; with a partition, sheets of shrunk real images.

    Raises:
        ValueError: ``image_init`` is "real" and a class has fewer real images than are needed.
    """
    generator = torch.Generator(data.train_images.device).manual_seed(derive_seed(config.seed, 0))
    check_start(config, data)
    if config.image_init == "noise":
        shape = (data.num_classes * config.ipc, *data.image_shape)
        return torch.randn(shape, generator=generator, device=generator.device)
    indices = sample_class_indices(data, config.ipc * config.partition**2, generator).flatten()
    return make_sheets(preprocessing.to_model(data.train_images[indices]), config.partition)


def check_start(config: DistillConfig, data: ImageData, start: SyntheticSet | None = None) -> None:
    """Check that a given set fits, or without one that every class has enough real images to start from.

    Raises:
        ValueError: the set has another partition, other classes, another ``ipc`` or another image shape; or a class has
            fewer images than are needed. The message says what to do.
    """
    if start is not None:
        _check_given(start, config, data)
    elif config.image_init == "real":
        way_out = ", or start from noise (image_init 'noise', --image-init noise)"
        check_class_sizes(data, config.ipc, way_out, partition=config.partition)


def _check_given(start: SyntheticSet, config: DistillConfig, data: ImageData) -> None:
    if start.partition != config.partition:
        raise ValueError(
            f"the set to start from has partition {start.partition}, this run partition {config.partition}; use "
            f"partition {start.partition} (--partition {start.partition}), or start from another set"
        )
    shape = tuple(start.sheets.shape[1:])
    if start.class_names != data.class_names or start.ipc != config.ipc or shape != data.image_shape:
        noun, most = "images" if start.partition == 1 else "sheets", max(start.class_sizes) // start.partition**2
        raise ValueError(
            f"the set to start from must have {config.ipc} {noun} {list(data.image_shape)} of each of the "
            f"{data.num_classes} classes {', '.join(data.class_names[:3])} ...; got {most} {noun} "
            f"{list(shape)} of {len(start.class_names)} classes {', '.join(start.class_names[:3])} ..."
        )


def given_images(start: SyntheticSet, config: DistillConfig, data: ImageData, preprocessing: Preprocessing) -> Tensor:
    """Return a set's stored images float32 [K*ipc, C, H, W], class-major, in this run's model space.

    Sheets that come from another model space are a little blurred: their images are cut out and shrunk once more.

    Raises:
        ValueError: as `check_start`.
    """
    _check_given(start, config, data)
    start = start.to(data.train_images.device)
    order = torch.argsort(start.sheet_labels, stable=True)
    own, others = preprocessing.tensors(), start.preprocessing.tensors()
    if own.keys() == others.keys() and all(torch.equal(own[name], others[name]) for name in own):
        return start.sheets[order]  # not by way of pixels, which are clamped to [0, 1]
    return make_sheets(preprocessing.to_model(start.pixels()), start.partition)[order]
