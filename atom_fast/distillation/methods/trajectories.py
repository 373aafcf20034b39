"""Trajectory matching: MTT and TESLA.

A network that trains for some steps on the synthetic images is to end where an expert, which began at the same
weights, is after some epochs on the real ones (MTT, Cazenavette et al. 2022). The network's step size is learnt too.
TESLA (Cui et al. 2023) cuts the gradient short; see `atom_fast.distillation.methods.unrolled`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.augmentation import augment_stages, draw_stages
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.methods.experts import trained_experts
from atom_fast.distillation.methods.images import descend
from atom_fast.distillation.methods.networks import make_network
from atom_fast.distillation.methods.unrolled import Batch, differentiate, train
from atom_fast.distillation.run import Run
from atom_fast.networks.convnet import ConvNet


class Terms(NamedTuple):
    """Mean loss over the steps since the last reading.

    Attributes:
        loss: squared distance of the trained network from the expert, divided by the squared distance that the expert
            went; below 1 the network comes closer than it was.
    """

    loss: float


class Learner(Run):
    """Images and a step size, learnt by SGD with momentum through a network's training.

    Attributes:
        momentum: of the images' shape, the buffer of SGD.
        step_size, step_size_momentum: [1], the network's learning rate and its buffer.
        labels: int64 [K*ipc], the class of each image.
    """

    Terms = Terms

    def __init__(
        self,
        config: DistillConfig,
        data: ImageData,
        preprocessing: Preprocessing,
        images: Tensor,
        *,
        progress: bool,
        draw_expert: Callable[[torch.Generator], tuple[Tensor, Tensor]] | None = None,
    ):
        """Prepare the steps.

        Args:
            config, data, preprocessing, images, progress: see `atom_fast.distillation.methods.make_run`.
            draw_expert: instead of `Experts.draw` of trained experts.
        """
        super().__init__(config, data, images, range(data.num_classes), ("loss",), (1.0,))
        assert config.student_steps is not None and config.step_size is not None  # numbers in resolved settings
        self._student_steps = config.student_steps
        device = self.images.device
        self.momentum = torch.zeros_like(self.images)
        self.step_size = torch.full((1,), config.step_size, device=device)
        self.step_size_momentum = torch.zeros_like(self.step_size)
        self.labels = torch.arange(data.num_classes, device=device).repeat_interleave(config.ipc)
        self.network = make_network(config, data, device)
        self._draw_expert = draw_expert or trained_experts(data, preprocessing, config, progress=progress).draw

    def _step(self) -> None:
        config, device = self.config, self.images.device
        seed = derive_seed(derive_seed(config.seed, self.iteration), 1)
        drawn = self._draw_expert(torch.Generator().manual_seed(seed))
        start, target = (weights.to(device) for weights in drawn)
        with convolution_precision(config.precision, device, config.deterministic):
            rates = self.step_size.expand(self._student_steps)
            batch = draw_batches(
                self.labels, self._student_steps, config.student_batch, config.augmentation, self.generator
            )
            loss, of_images, of_rates = trajectory_gradients(
                self.network, start, target, self.images, batch, rates, truncated=config.method == "tesla"
            )
        assert config.image_lr is not None and config.step_size_lr is not None  # numbers in resolved settings
        descend(self.images, self.momentum, of_images, config.image_lr, config.momentum)
        descend(self.step_size, self.step_size_momentum, of_rates.sum(), config.step_size_lr, config.momentum)
        self._record(loss.view(1))
        self._count()

    @property
    def learnt(self) -> dict[str, Any]:
        """Return the step size."""
        return {"learnt": {"step_size": float(self.step_size)}}

    def state(self) -> dict[str, Tensor]:
        """Return images, step size, and the momentum of both."""
        return {
            "images": self.images, "momentum": self.momentum, "step_size": self.step_size,
            "step_size_momentum": self.step_size_momentum,
        }  # fmt: skip

    def _step_sizes(self) -> Tensor:
        return self.step_size


def draw_batches(labels: Tensor, steps: int, size: int | None, augmentation: str, generator: torch.Generator) -> Batch:
    """Draw the images of each step and their augmentation: every image once before any comes again.

    Args:
        labels: int64 [N], of all images.
        steps: number of steps.
        size: images in a step; None, or more than there are, for all.
        augmentation: DSA operations, one drawn per step, with parameters of its own for each image.
        generator: on the device of the labels.
    """
    count = len(labels)
    size = count if size is None else min(size, count)
    chosen = None
    if size < count:
        passes = -(-steps * size // count)
        orders = [torch.randperm(count, generator=generator, device=labels.device) for _ in range(passes)]
        chosen = torch.cat(orders)[: steps * size].view(steps, size)
    stages = [draw_stages(size, generator, strategy=augmentation, shared_operation=True) for _ in range(steps)]

    def batch(number: int, images: Tensor) -> tuple[Tensor, Tensor]:
        own = labels
        if chosen is not None:
            images, own = images[chosen[number]], labels[chosen[number]]
        return augment_stages(images.contiguous(memory_format=torch.channels_last), stages[number]), own

    return batch


def trajectory_gradients(
    network: ConvNet,
    start: Tensor,
    target: Tensor,
    images: Tensor,
    batch: Batch,
    rates: Tensor,
    *,
    truncated: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``|w_N - target|^2 / |start - target|^2`` of a network trained from ``start``, and its gradients.

    Args:
        network: in training mode; its weights are overwritten.
        start, target: the expert's flat weights [P].
        images, batch, rates, truncated: see `atom_fast.distillation.methods.unrolled.differentiate`.

    Returns:
        The loss, a scalar; its gradients in the images and in the rates [N].
    """
    weights = train(network, start, images, batch, rates)
    difference = weights[-1] - target
    travelled = (start - target).square().sum()
    loss = difference.square().sum() / travelled
    adjoint = difference.mul_(2 / travelled)
    return loss, *differentiate(network, weights, adjoint, images, batch, rates, truncated=truncated)
