"""A whole distillation of digits beside the plain loop it replaces.

300 steps at 10 images per class and 64 real ones, as in ``atom-fast demo``, on a CPU: this project's step, and
Algorithm 1 in plain PyTorch (``examples/plain_atom.py``). Both draw the same networks, images and augmentations, so
that they distil the same set; the distance of the two results is recorded. They take turns in one process, some steps
each, so that whatever else the machine does meets both.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import torch

from atom_fast._seeds import derive_seed
from atom_fast.data.augmentation import AugmentationParameters, augment, draw_augmentation
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.sources import load_data
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.demo import OVERRIDES
from atom_fast.distillation import preset
from atom_fast.distillation.start import initial_images
from atom_fast.distillation.step import Distillation, make_convnet
from examples import plain_atom

from .harness import environment, save_results

TURN = 10  # steps
WARM_UP = 3


def run(steps: int = 300, out: Path | None = None) -> dict:
    """Run both, print the ratio, and return the figures.

    Args:
        steps: of each run, a multiple of ``TURN``.
        out: JSON file of the figures.

    Raises:
        ValueError: ``steps`` is no such multiple.
    """
    if steps < TURN or steps % TURN:
        raise ValueError(f"steps must be a multiple of {TURN}; got {steps}")
    record = measure(steps)
    seconds = {name: record[name]["seconds"] for name in ("plain", "fused")}
    print(
        f"{steps} steps: plain loop {seconds['plain']:.1f} s, this project {seconds['fused']:.1f} s, "
        f"{record['ratio']:.2f} times faster; images {record['distance']:.1e} of their norm apart"
    )
    if out:
        save_results(out, record)
    return record


def measure(steps: int) -> dict:
    """Time both runs by turns.

    Returns:
        ``plain`` and ``fused``: ``seconds`` of the whole run and of every turn; ``ratio`` of the whole runs;
        ``distance`` of the images at the end, as a share of their norm.
    """
    run, start, preprocessing = _prepare()
    for iteration in range(1, WARM_UP + 1):
        run.step(iteration)
    _finish(plain_loop(run, preprocessing, start.clone()), WARM_UP)
    run.restore({"images": start, "momentum": torch.zeros_like(start)})
    images = start.clone()
    loop = plain_loop(run, preprocessing, images)
    turns = {"plain": [], "fused": []}
    for first in range(1, steps + 1, TURN):
        started = time.perf_counter()
        for iteration in range(first, first + TURN):
            run.step(iteration)
        between = time.perf_counter()
        _finish(loop, TURN)
        turns["fused"].append(between - started)
        turns["plain"].append(time.perf_counter() - between)
    runs = {name: {"seconds": sum(seconds), "turns": seconds} for name, seconds in turns.items()}
    return {
        "environment": environment("cpu"),
        "config": run.config.to_dict(),
        "steps": steps,
        **runs,
        "ratio": runs["plain"]["seconds"] / runs["fused"]["seconds"],
        "distance": ((run.images - images.detach()).norm() / images.detach().norm()).item(),
    }


def _prepare() -> tuple[Distillation, torch.Tensor, Preprocessing]:
    data = load_data("digits", progress=False)
    config = preset("paper", ipc=10, **OVERRIDES).resolve(data.image_shape, data.name, torch.device("cpu"))
    preprocessing = fit_preprocessing(data.train_images, config.preprocessing, progress=False)
    start = initial_images(config, data, preprocessing)
    return Distillation(config, data, preprocessing, start), start, preprocessing


def _finish(loop: Iterator[torch.Tensor], steps: int) -> None:
    for _ in range(steps):
        next(loop)


def plain_loop(run: Distillation, preprocessing: Preprocessing, images: torch.Tensor) -> Iterator[torch.Tensor]:
    """Algorithm 1 as `examples.plain_atom` writes it, with the settings, data and random draws of a distillation.

    Args:
        run: all of its classes; it is not changed.
        preprocessing: of the real images.
        images: float32 [K*ipc, C, H, W], changed in place.

    Yields:
        The loss after each iteration.
    """
    config, data, device = run.config, run.data, images.device

    def draw(iteration: int):
        generator = torch.Generator(device).manual_seed(derive_seed(config.seed, iteration))
        network = make_convnet(config, data).to(device)
        network.reset_parameters(generator)
        indices = sample_class_indices(data, config.real_batch, generator)
        drawn = draw_augmentation(data.num_classes, generator, strategy=config.augmentation)

        def augment_class(images: torch.Tensor, k: int) -> torch.Tensor:
            own = AugmentationParameters(*(parameter[k : k + 1] for parameter in drawn))
            return augment(images, own, torch.zeros(len(images), dtype=torch.int64, device=device))

        return network, [preprocessing.to_model(data.train_images[own]) for own in indices], augment_class

    names = ("image_lr", "momentum", "loss_scale", "spatial_power", "channel_power", "mmd_weight")
    return plain_atom.distill(images, draw, **{name: getattr(config, name) for name in names})
