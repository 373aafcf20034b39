"""MTT: dataset distillation by matching training trajectories (Cazenavette et al., CVPR 2022).

One step takes a segment of an expert's trajectory, trains a student from the segment's start for 20 steps on all
synthetic images, and differentiates the distance to the segment's end through all 20 steps: into the images and into
the learned step size. Settings: 3 expert epochs, start epoch at most 25, image learning rate 1000, step size 0.01 with
learning rate 1e-5, DSA on. The expert is synthetic: a random network and 28 random updates of it, kept on
the host like the experts of the public code. Training real experts, 100 x 50 epochs, is not part of the step, here as
in the paper's table. The step uses no real images.

``fused`` is this project's step with the same expert: the same gradient, of which it keeps one step's graph at a time.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from atom_fast.distillation.config import preset
from atom_fast.distillation.methods.trajectories import Learner

from . import fused, published
from .workload import Workload

STUDENT_STEPS, EXPERT_EPOCHS, LAST_START = 20, 3, 25
IMAGE_RATE, STEP_SIZE, STEP_SIZE_RATE = 1000.0, 0.01, 1e-5


def build(workload: Workload) -> Callable[[], object]:
    """Return a function that runs one step and returns its loss."""
    return _build_fused(workload) if workload.implementation == "fused" else _build_published(workload)


def _build_published(workload: Workload) -> Callable[[], Tensor]:
    random = np.random.RandomState(workload.seed)
    network = published.fresh_network(workload)
    expert = synthesised_expert(network, workload.seed)
    labels = published.synthetic_labels(workload)
    pixels = published.random_pixels(workload)[: workload.classes * workload.ipc]
    images = published.normalize(pixels).requires_grad_(True)
    step_size = torch.tensor(STEP_SIZE, device=workload.device, requires_grad=True)
    optimizer = published.image_optimizer(images, IMAGE_RATE)
    step_size_optimizer = torch.optim.SGD([step_size], lr=STEP_SIZE_RATE, momentum=0.5)

    def step() -> Tensor:
        epoch = random.randint(LAST_START + 1)
        start, target = (expert[at].to(workload.device) for at in (epoch, epoch + EXPERT_EPOCHS))
        seeds = random.randint(100_000, size=STUDENT_STEPS).tolist()
        student = unroll(network, start, images, labels, step_size, seeds)
        loss = trajectory_distance(student, start, target)
        optimizer.zero_grad()
        step_size_optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        step_size_optimizer.step()
        return loss.detach()

    return step


def _build_fused(workload: Workload) -> Callable[[], Callable[[], float]]:
    data = fused.image_data(workload)
    config = preset(
        method="mtt", ipc=workload.ipc, width=workload.width, depth=workload.depth, preprocessing="standard",
        precision=workload.precision, seed=workload.seed, student_steps=STUDENT_STEPS, image_lr=IMAGE_RATE,
        step_size=STEP_SIZE, step_size_lr=STEP_SIZE_RATE,
    ).resolve(data.image_shape, data.name, data.train_images.device)  # fmt: skip
    expert = synthesised_expert(published.fresh_network(workload), workload.seed)

    def draw(generator: torch.Generator) -> tuple[Tensor, Tensor]:
        epoch = int(torch.randint(LAST_START + 1, (), generator=generator))
        return expert[epoch], expert[epoch + EXPERT_EPOCHS]

    images = published.normalize(data.train_images[: workload.classes * workload.ipc])
    run = Learner(config, data, fused.standardization(data), images, progress=False, draw_expert=draw)
    iterations = itertools.count(1)

    def step() -> Callable[[], float]:
        run.step(next(iterations))
        return lambda: run.read_terms().loss

    return step


def synthesised_expert(network: nn.Module, seed: int) -> list[Tensor]:
    """Return the flat weights after each epoch, start included, on the host."""
    generator = torch.Generator().manual_seed(seed)
    weights = [torch.cat([p.detach().flatten() for p in network.parameters()]).cpu()]
    for _ in range(LAST_START + EXPERT_EPOCHS):
        weights.append(weights[-1] + 1e-2 * torch.randn(weights[0].shape, generator=generator))
    return weights


def unroll(
    network: nn.Module, start: Tensor, images: Tensor, labels: Tensor, step_size: Tensor, seeds: list[int | None]
) -> Tensor:
    """Return the student's flat weights after ``len(seeds)`` steps, differentiable in the images and in the step size.

    Args:
        network: source of the shapes; its weights are not used.
        start: flat weights [P].
        images: synthetic images [N, C, H, W].
        labels: int64 [N].
        step_size: scalar.
        seeds: seed of each step's augmentation; None for a step without augmentation.
    """
    weights = start.clone().requires_grad_(True)
    for seed in seeds:
        order = torch.randperm(len(images), device=images.device)
        batch, batch_labels = images[order], labels[order]
        if seed is not None:
            batch = published.augment(batch, seed, siamese=False)
        loss = F.cross_entropy(functional_call(network, _unflatten(network, weights), (batch,)), batch_labels)
        (gradient,) = torch.autograd.grad(loss, weights, create_graph=True)
        weights = weights - step_size * gradient
    return weights


def trajectory_distance(student: Tensor, start: Tensor, target: Tensor) -> Tensor:
    """Return the squared distance from student to target, divided by the squared distance from start to target."""
    return (student - target).square().sum() / (start - target).square().sum()


def _unflatten(network: nn.Module, weights: Tensor) -> dict[str, Tensor]:
    named = dict(network.named_parameters())
    parts = weights.split([p.numel() for p in named.values()])
    return {name: part.view_as(p) for (name, p), part in zip(named.items(), parts, strict=True)}
