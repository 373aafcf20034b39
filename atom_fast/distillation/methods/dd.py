"""Dataset distillation (DD, Wang et al. 2018): images, and the rate of every step of the training on them.

A new network trains for some steps on the synthetic images, one image of each class a step, in turn; its loss on real
images is the loss of the images and of the rates. The set is made for these steps: training on it by other ones is
another thing.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._device import convolution_precision
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.methods.directional import flatten, loss_and_gradient
from atom_fast.distillation.methods.images import ImageRun
from atom_fast.distillation.methods.networks import make_network
from atom_fast.distillation.methods.unrolled import Batch, differentiate, train
from atom_fast.distillation.network_cache import set_parameters
from atom_fast.networks.convnet import ConvNet

BETAS = (0.5, 0.999)  # of Adam
HALVED_EVERY = 2000  # iterations: 40 epochs of 49 batches in DD's code


class Terms(NamedTuple):
    """Mean loss over the steps since the last reading.

    Attributes:
        loss: cross-entropy of real images on the trained network.
    """

    loss: float


class Learner(ImageRun):
    """Images and learning rates, learnt by Adam through a network's training.

    Attributes:
        free_rates: [N], whose softplus is the rate of each step.
    """

    Terms = Terms

    def __init__(
        self, config: DistillConfig, data: ImageData, preprocessing: Preprocessing, images: Tensor, *, progress: bool
    ):
        """Prepare the steps; see `atom_fast.distillation.methods.make_run` for the arguments."""
        super().__init__(config, data, preprocessing, images, progress=progress)
        assert config.student_steps is not None and config.step_size is not None  # numbers in resolved settings
        device = self.images.device
        first = torch.full((config.student_steps,), config.step_size, dtype=torch.float64).expm1().log()
        self.free_rates = first.float().to(device)
        learnt = {"images": (self.images, config.image_lr), "rates": (self.free_rates, config.step_size_lr)}
        self._optimizer = torch.optim.Adam(
            [{"params": [values], "lr": rate, "initial_lr": rate} for values, rate in learnt.values()], betas=BETAS
        )
        self._moments: dict[str, Tensor] = {}
        for name, (values, _) in learnt.items():
            first_moment, second_moment = torch.zeros_like(values), torch.zeros_like(values)
            self._optimizer.state[values] = {
                "step": torch.tensor(0.0), "exp_avg": first_moment, "exp_avg_sq": second_moment
            }  # fmt: skip
            self._moments |= {f"{name}_first_moment": first_moment, f"{name}_second_moment": second_moment}
        self.network = make_network(config, data, device)

    def _step(self) -> None:
        config, iteration = self.config, self.iteration
        with convolution_precision(config.precision, self.images.device, config.deterministic):
            self.network.reset_parameters(self.generator)
            start = flatten([weight.detach() for weight in self.network.parameters()], list(self.network.parameters()))
            rates = F.softplus(self.free_rates)
            loss, of_images, of_rates = training_gradients(
                self.network, start, self.images, in_turn(self.data.num_classes, config.ipc), rates,
                self._real_images(), self._real_labels,
            )  # fmt: skip
        self.images.grad = of_images
        self.free_rates.grad = of_rates * self.free_rates.sigmoid()
        for group in self._optimizer.param_groups:
            group["lr"] = group["initial_lr"] * 0.5 ** ((iteration - 1) // HALVED_EVERY)
        for state in self._optimizer.state.values():
            state["step"].fill_(iteration - 1)
        self._optimizer.step()
        self._optimizer.zero_grad()
        self._record(loss.view(1))
        self._count()

    @property
    def learnt(self) -> dict[str, Any]:
        """Return the rate of each step."""
        return {"learnt": {"step_sizes": self._step_sizes().tolist()}}

    def state(self) -> dict[str, Tensor]:
        """Return images, free rates and Adam's moments of both."""
        return {"images": self.images, "free_rates": self.free_rates, **self._moments}

    def _step_sizes(self) -> Tensor:
        return F.softplus(self.free_rates)


def in_turn(classes: int, ipc: int) -> Batch:
    """Return the images of each step: one of each class, class-major [K*ipc, C, H, W], the same after ipc steps."""

    def batch(number: int, images: Tensor) -> tuple[Tensor, Tensor]:
        chosen = images[number % ipc :: ipc].contiguous(memory_format=torch.channels_last)
        return chosen, torch.arange(classes, device=images.device)

    return batch


def training_gradients(
    network: ConvNet, start: Tensor, images: Tensor, batch: Batch, rates: Tensor, real: Tensor, real_labels: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute the mean cross-entropy of real images on a network trained from ``start``, and its gradients.

    Args:
        network: in training mode; its weights are overwritten.
        start: flat weights [P].
        images, batch, rates: see `atom_fast.distillation.methods.unrolled.differentiate`.
        real: [B, C, H, W].
        real_labels: int64 [B].

    Returns:
        The loss, a scalar; its gradients in the images and in the rates [N].
    """
    weights = train(network, start, images, batch, rates)
    set_parameters(network, weights[-1])
    loss, adjoint = loss_and_gradient(network, real, real_labels)
    return loss, *differentiate(network, weights, adjoint, images, batch, rates)
