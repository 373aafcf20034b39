"""DM, DAM, ATOM† and ATOM as this project runs them: its own step, plain or captured as a CUDA graph.

The same step as ``eager``: a new network, real images of all classes, augmentation, loss, update. The data set is held
as uint8; on a GPU every batch of it is whitened as it is fetched, work that the public code does once for all images
and holds in float32. The whitening here gives the baselines' images: its cost does not depend on its values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation

from . import published
from .setting import Setting

PROVIDERS = ("fused", "fused-graph")


def build(setting: Setting, *, spatial: bool, channel: bool, mmd_weight: float) -> Callable[[], Callable[[], float]]:
    """A function that runs one step and returns a function that reads the mean loss of the steps so far."""
    data = image_data(setting)
    device = data.train_images.device
    config = DistillConfig(
        ipc=setting.ipc,
        real_batch=setting.real_batch,
        spatial_power=published.POWER if spatial else None,
        channel_power=published.POWER if channel else None,
        mmd_weight=mmd_weight,
        loss_scale=1.0,
        norm="instance",
        width=setting.width,
        depth=setting.depth,
        network_init="default",
        precision=setting.precision,
        seed=setting.seed,
        class_chunk=setting.class_chunk,
    ).resolve(data.image_shape, data.name, device)
    # As the field does: whitening at 32x32; from 64x64 its matrix outgrows its use, and mean and deviation do.
    preprocessing = whitening(data) if setting.resolution <= 32 else standardization(data)
    images = initial_images(config, data, preprocessing)
    run = Distillation(config, data, preprocessing, images)
    if setting.provider == "fused-graph":
        run.capture()
    iterations = itertools.count(1)

    def step() -> Callable[[], float]:
        run.step(next(iterations))
        return lambda: run.read_terms().loss

    return step


def image_data(setting: Setting) -> ImageData:
    """The random data set, with one test image, which nothing uses."""
    pixels = published.random_pixels(setting)
    labels = torch.arange(setting.classes, device=pixels.device).repeat_interleave(setting.class_images)
    names = [str(label) for label in range(setting.classes)]
    return ImageData.from_tensors("random", names, pixels, labels, pixels[:1], labels[:1])


def whitening(data: ImageData) -> Preprocessing:
    """Whitening of uncorrelated uniform pixels: :func:`published.normalize`, done as any other whitening is."""
    matrix = torch.eye(math.prod(data.image_shape), device=data.train_images.device) * math.sqrt(12)
    mean = torch.full(data.image_shape, 0.5, device=matrix.device)
    return Preprocessing.from_tensors({"zca_mean": mean, "zca_matrix": matrix, "zca_inverse": matrix / 12})


def standardization(data: ImageData) -> Preprocessing:
    """:func:`published.normalize` by mean and deviation."""
    channels, device = data.image_shape[0], data.train_images.device
    statistics = torch.full((channels,), 0.5, device=device), torch.full((channels,), 1 / math.sqrt(12), device=device)
    return Preprocessing.from_tensors(dict(zip(("mean", "std"), statistics, strict=True)))
