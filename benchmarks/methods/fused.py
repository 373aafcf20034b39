"""This project's step of every method; DM's, DAM's, ATOM†'s and ATOM's plain or captured as a CUDA graph.

The same step as ``eager``: a new network, real images of all classes, augmentation, loss, update. The data set is
uint8; on a GPU each batch is whitened when it is fetched, whereas the public code whitens all images once and keeps
them in float32. The whitening matrix reproduces the baselines' images; its cost does not depend on its values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig, preset
from atom_fast.distillation.methods import make_run
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation

from . import published
from .workload import Workload

IMPLEMENTATIONS = ("fused", "fused-graph")


def build(workload: Workload, *, spatial: bool, channel: bool, mmd_weight: float) -> Callable[[], Callable[[], float]]:
    """Return a function that runs one step and returns a function that reads the mean loss of the steps so far."""
    data = image_data(workload)
    device = data.train_images.device
    config = DistillConfig(
        ipc=workload.ipc,
        real_batch=workload.real_batch,
        spatial_power=published.POWER if spatial else None,
        channel_power=published.POWER if channel else None,
        mmd_weight=mmd_weight,
        loss_scale=1.0,
        norm=workload.norm or "instance",
        width=workload.width,
        depth=workload.depth,
        network_init="default",
        precision=workload.precision,
        real_precision=workload.real_precision,
        seed=workload.seed,
        class_chunk=workload.class_chunk,
    ).resolve(data.image_shape, data.name, device)
    # As in the literature: whitening at 32x32; standardisation from 64x64, where the whitening matrix is too large.
    preprocessing = whitening(data) if workload.resolution <= 32 else standardization(data)
    images = initial_images(config, data, preprocessing)
    run = Distillation(config, data, preprocessing, images)
    if workload.implementation == "fused-graph":
        run.capture()
    iterations = itertools.count(1)

    def step() -> Callable[[], float]:
        run.step(next(iterations))
        return lambda: run.read_terms().loss

    return step


def build_method(workload: Workload, **settings) -> Callable[[], Callable[[], float]]:
    """Return one iteration of a method of `atom_fast.distillation.methods`, which reads its loss as `build`'s does.

    Args:
        workload: ``method`` names it.
        settings: of the method, beside those of the workload.
    """
    data = image_data(workload)
    sizes = {"ipc": workload.ipc, "width": workload.width, "depth": workload.depth, "seed": workload.seed}
    settings = {**sizes, "precision": workload.precision, "preprocessing": "standard", **settings}
    if workload.real_batch:
        settings["real_batch"] = workload.real_batch
    config = preset(method=workload.method, **settings)
    config = config.resolve(data.image_shape, data.name, data.train_images.device)
    space = standardization(data)
    run = make_run(config, data, space, initial_images(config, data, space), progress=False)
    iterations = itertools.count(1)

    def step() -> Callable[[], float]:
        run.step(next(iterations))
        return lambda: run.read_terms().loss

    return step


def image_data(workload: Workload) -> ImageData:
    """Return the random data set, with one unused test image."""
    pixels = published.random_pixels(workload)
    labels = torch.arange(workload.classes, device=pixels.device).repeat_interleave(workload.class_images)
    names = [str(label) for label in range(workload.classes)]
    return ImageData.from_tensors("random", names, pixels, labels, pixels[:1], labels[:1])


def whitening(data: ImageData) -> Preprocessing:
    """Return the whitening of uncorrelated uniform pixels: :func:`published.normalize` as a matrix."""
    matrix = torch.eye(math.prod(data.image_shape)) * math.sqrt(12)
    mean = torch.full(data.image_shape, 0.5)
    tensors = {"zca_mean": mean, "zca_matrix": matrix, "zca_inverse": matrix / 12}
    return Preprocessing.from_tensors(tensors).to(data.train_images.device)


def standardization(data: ImageData) -> Preprocessing:
    """Return :func:`published.normalize` as mean and standard deviation."""
    channels, device = data.image_shape[0], data.train_images.device
    statistics = torch.full((channels,), 0.5, device=device), torch.full((channels,), 1 / math.sqrt(12), device=device)
    return Preprocessing.from_tensors(dict(zip(("mean", "std"), statistics, strict=True)))
