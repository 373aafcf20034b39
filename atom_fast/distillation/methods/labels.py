"""LD: labels are learnt, images stay real (Bohdal et al. 2020).

A network takes one step of SGD on synthetic images, and the labels of these are changed so that the network has a
smaller loss on real images after that step. With the step θ' = θ - a ∇ℓ(θ), where ℓ is the mean of -Σ_k y_k log p_k
over B images, the loss L of the real images at θ' has the exact gradient

    ∂L/∂y_k = a / B · D_v log p_k(θ),    v = ∇L(θ'),

with D_v the derivative in the direction v: ℓ is linear in the labels. So one forward pass with tangents replaces the
second derivative, and every gradient comes from the fused network.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import atom_fast
from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.methods.images import ImageRun
from atom_fast.distillation.methods.networks import make_network, plain_sgd
from atom_fast.training.trainer import Trainer

NETWORK_RATE = 0.01  # of the network's SGD
BETAS, EPSILON = (0.9, 0.999), 1e-8  # Adam's defaults, for the labels
WINDOW = 50  # steps: a network is replaced if its mean loss over a window is not below that over the one before
# Pixels of real images that go through the network at once: on a CPU those of 32 images of 32x32.
_PIXELS, _PIXELS_ELSEWHERE = 2**15, 2**21


def batch_size(images: int, classes: int) -> int:
    """Return how many synthetic images a network's step takes: 10 of 10, 100 of more than 10 classes, or else 50."""
    return min(images, 100 if classes > 10 else 50)


class Terms(NamedTuple):
    """Means over the steps since the last reading.

    Attributes:
        loss: cross-entropy of real images after a network's step.
        entropy: mean entropy of the labels as they are kept, in nats.
    """

    loss: float
    entropy: float


class Learner(ImageRun):
    """Labels of real images that are learnt by Adam. A step is one step of a network that lives on.

    Attributes:
        soft: float32 [K*ipc, K], the labels in learning, which are not bound to be probabilities.
        moments: float32 [2, K*ipc, K], Adam's.
        losses: float64 [2], the sum of the losses of the network in this window, and that of the window before.
    """

    Terms = Terms
    _RATES = ("label_lr",)

    def __init__(
        self, config: DistillConfig, data: ImageData, preprocessing: Preprocessing, images: Tensor, *, progress: bool
    ):
        """Prepare the steps; see `atom_fast.distillation.methods.make_run` for the arguments."""
        names, weights = ("loss", "entropy"), (1.0, 0.0)
        super().__init__(config, data, preprocessing, images, names=names, weights=weights, progress=progress)
        device, classes = self.images.device, data.num_classes
        self.soft = torch.full((len(self.images), classes), 1 / classes, device=device)
        self.moments = torch.zeros(2, *self.soft.shape, device=device)
        self.losses = torch.tensor([0.0, torch.inf], dtype=torch.float64, device=device)
        self._batch = batch_size(len(self.images), classes)
        protocol = plain_sgd("network", 1, self._batch, NETWORK_RATE, "none")
        self.network = make_network(config, data, device)
        self.trainer = Trainer(self.network, self.images, self.soft, protocol)
        self.trainer.restart(derive_seed(config.seed, 1))

    def _step(self) -> None:
        config, iteration = self.config, self.iteration
        chosen = torch.randperm(len(self.images), generator=self.generator, device=self.images.device)[: self._batch]
        with convolution_precision(config.precision, self.images.device, config.deterministic):
            before = {name: parameter.detach().clone() for name, parameter in self.network.named_parameters()}
            self.trainer.step(chosen)
            loss, direction = mean_gradient(self.network, self._real_images(), self._real_labels)
            change = directional_derivative(self.network, before, direction, self.images[chosen])
        gradient = torch.zeros_like(self.soft).index_copy_(0, chosen, change * (NETWORK_RATE / len(chosen)))
        self._update_labels(gradient, iteration)
        labels = self.soft_labels
        self._record(torch.stack([loss, torch.special.entr(labels).sum(1).mean()]))
        self._count()
        self.losses[0] += loss
        if iteration % WINDOW == 0:
            self._judge(iteration)

    def _update_labels(self, gradient: Tensor, number: int) -> None:
        """Take Adam's step ``number``, counted from 1."""
        first, second = self.moments
        first.lerp_(gradient, 1 - BETAS[0])
        second.lerp_(gradient.square(), 1 - BETAS[1])
        root = (second / (1 - BETAS[1] ** number)).sqrt_().add_(EPSILON)
        assert self.config.label_lr is not None  # a number in resolved settings
        self.soft.addcdiv_(first, root, value=-self.config.label_lr / (1 - BETAS[0] ** number))

    def _judge(self, iteration: int) -> None:
        """Draw a new network if the loss does not fall any more: the one reading of a window."""
        if bool(self.losses[0] < self.losses[1]):
            self.losses[1] = self.losses[0]
        else:
            self.trainer.restart(derive_seed(self.config.seed, iteration))
            self.losses[1] = torch.inf
        self.losses[0] = 0

    @property
    def soft_labels(self) -> Tensor:
        """Learnt labels, float32 [K*ipc, K]: negative ones are set to 0, and each row is divided by its sum.

        A row without a positive value becomes uniform.
        """
        positive = self.soft.clamp(min=0)
        total = positive.sum(1, keepdim=True)
        return torch.where(total == 0, 1 / self.soft.shape[1], positive / total)  # NaN stays NaN

    def state(self) -> dict[str, Tensor]:
        """Return images, labels, Adam's moments, the network and its losses."""
        network = {f"network.{name}": value.detach() for name, value in self.network.named_parameters()}
        return {"images": self.images, "soft": self.soft, "moments": self.moments, "losses": self.losses, **network}


def mean_gradient(network: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the mean cross-entropy of images, and its gradient by a network's parameters, some images at a time.

    Args:
        network: from images [B, C, H, W] to logits [B, K].
        images: [N, C, H, W].
        labels: int64 [N].

    Returns:
        The loss, a scalar, and the gradients by name; 0 for a bias that a norm cancels.
    """
    parameters = dict(network.named_parameters())
    totals = [torch.zeros_like(parameter) for parameter in parameters.values()]
    loss = images.new_zeros(())
    pixels = _PIXELS if images.device.type == "cpu" else _PIXELS_ELSEWHERE
    most = max(1, pixels // (images.shape[2] * images.shape[3]))
    for some, own in zip(images.split(most), labels.split(most), strict=True):
        part = F.cross_entropy(network(some), own, reduction="sum") / len(images)
        gradients = torch.autograd.grad(part, list(parameters.values()), allow_unused=True)
        loss += part.detach()
        for total, gradient in zip(totals, gradients, strict=True):
            if gradient is not None:
                total += gradient
    return loss, dict(zip(parameters, totals, strict=True))


@torch.no_grad()
def directional_derivative(
    network: nn.Module, parameters: Mapping[str, Tensor], direction: Mapping[str, Tensor], images: Tensor
) -> Tensor:
    """Differentiate a network's logarithmic probabilities in a direction of its parameters.

    Args:
        network: from images [B, C, H, W] to logits [B, K].
        parameters: where to differentiate, by name.
        direction: tensors of the same shapes.
        images: [B, C, H, W].

    Returns:
        [B, K], by forward-mode differentiation.
    """

    def log_probabilities(values: dict[str, Tensor]) -> Tensor:
        return F.log_softmax(torch.func.functional_call(network, values, (images,)), dim=1)

    with atom_fast.backend("reference"), warnings.catch_warnings():  # fused blocks have no forward mode
        warnings.simplefilter("ignore", FutureWarning)  # PyTorch's forward mode uses a part of PyTorch that will go
        return torch.func.jvp(log_probabilities, (dict(parameters),), (dict(direction),))[1]
