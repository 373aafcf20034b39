"""What the tests of every method ask of its runs."""

import dataclasses
import math

import torch

from atom_fast.data.sources import load_data
from atom_fast.data.whitening import fit_preprocessing
from atom_fast.distillation.config import preset
from atom_fast.distillation.loop import distill
from atom_fast.distillation.methods import is_used, make_run
from atom_fast.distillation.start import initial_images

TINY = {"ipc": 1, "width": 8, "depth": 2, "real_batch": 8}


def tiny(method):
    """Return those of the small settings that a method uses."""
    return {name: value for name, value in TINY.items() if is_used(method, name)}


def digits():
    """Return the handwritten digits, 8x8."""
    return load_data("digits", progress=False)


def run_of(method, data, **settings):
    """Return a run of a method with small settings on a CPU."""
    config = preset(method=method, **{**tiny(method), **settings})
    config = config.resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    images = initial_images(config, data, preprocessing)
    return make_run(config, data, preprocessing, images, progress=False)


def losses(run, steps):
    """Return the loss of each of the first steps."""
    found = []
    for iteration in range(1, steps + 1):
        run.step(iteration)
        found.append(run.read_terms().loss)
    assert all(map(math.isfinite, found))
    return found


def assert_resumes(method, folder, data, **settings):
    """Check that 2 iterations and then 2 more give the bits of 4; return the set."""
    config = preset(method=method, iterations=4, **{**tiny(method), "log_every": 1, "checkpoint_every": 2, **settings})
    options = {"progress": False, "device": "cpu"}
    whole = distill(data, config, folder / "whole", **options)
    distill(data, dataclasses.replace(config, iterations=2), folder / "parts", **options)
    resumed = distill(data, config, folder / "parts", resume=True, **options)
    assert whole.fingerprint == resumed.fingerprint
    return whole
