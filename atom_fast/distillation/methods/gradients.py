"""Gradient matching: DC, DSA, DCC and DSAC.

The gradient that a network's weights get from the synthetic images is to be that from real ones, class by class (DC,
Zhao et al. 2021; DSA under siamese augmentation, Zhao and Bilen 2021), while the network learns from the synthetic
images. DCC and DSAC (Lee et al. 2022) compare the sum over the classes instead, which lets the images of one class
answer those of the others.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.methods.images import ImageRun
from atom_fast.distillation.methods.networks import make_network, plain_sgd
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops.dispatch import twice_differentiable
from atom_fast.training.trainer import Trainer

NETWORK_RATE, NETWORK_BATCH = 0.01, 256  # of the network's SGD, from DC's code
# DCC's code compares class by class in early rounds of early iterations, whose networks know little.
WARM_UP_ITERATIONS, WARM_UP_ROUNDS = 250, 10


class Terms(NamedTuple):
    """Mean loss over the steps since the last reading.

    Attributes:
        loss: distance of the gradients, summed over the weights' rows and over the classes that are told apart; the
            mean over the rounds of a step.
    """

    loss: float


class Learner(ImageRun):
    """Images learnt by matching gradients. A step is a new network and ``rounds`` updates of the images."""

    Terms = Terms

    def __init__(
        self, config: DistillConfig, data: ImageData, preprocessing: Preprocessing, images: Tensor, *, progress: bool
    ):
        """Prepare the steps; see `atom_fast.distillation.methods.make_run` for the arguments."""
        assert config.rounds is not None and config.network_epochs is not None  # numbers in resolved settings
        self._rounds, self._epochs = config.rounds, config.network_epochs
        super().__init__(config, data, preprocessing, images, weights=(1 / self._rounds,), progress=progress)
        protocol = plain_sgd("network", self._epochs, NETWORK_BATCH, NETWORK_RATE, config.augmentation)
        self.network = make_network(config, data, self.images.device)
        self.trainer = Trainer(self.network, self.images, self.labels, protocol)

    def _step(self) -> None:
        config, network = self.config, self.network
        self.trainer.restart(derive_seed(config.seed, self.iteration))
        for number in range(self._rounds):
            together = self._is_contrastive(number)
            with convolution_precision(config.precision, self.images.device, config.deterministic):
                images = self.images.detach().requires_grad_()
                real, synthetic = self._siamese(self._real_images(), images)
                of_real = class_gradients(network, real, self._real_labels, self.data.num_classes)
                if together:
                    of_real = [gradient.mean(0, keepdim=True) for gradient in of_real]
                groups = 1 if together else self.data.num_classes
                with twice_differentiable(self.images.device):
                    of_synthetic = class_gradients(network, synthetic, self.labels, groups, create_graph=True)
                    loss = gradient_distance(of_real, of_synthetic)
                    (gradient,) = torch.autograd.grad(loss, images)
            self._update(gradient)
            self._record(loss.detach().view(1))
            if number < self._rounds - 1:
                for epoch in range(self._epochs):
                    self.trainer.train_epoch(epoch)
        self._count()

    def _is_contrastive(self, number: int) -> bool:
        """Return True if the classes are compared together in a round, counted from 0."""
        contrastive = self.config.method in ("dcc", "dsac")
        return contrastive and (self.iteration > WARM_UP_ITERATIONS or number >= WARM_UP_ROUNDS)


def class_gradients(
    network: ConvNet, images: Tensor, labels: Tensor, groups: int, *, create_graph: bool = False
) -> list[Tensor]:
    """Compute the gradient of the mean cross-entropy of each group of images, for every weight with rows.

    All groups go through the network at once: the weights' gradients follow from what enters each layer and from the
    gradient of what leaves it. Biases and the scales of norms are left out: gradient matching ignores them.

    Args:
        network: in training mode, with a norm of each sample.
        images: [G*B, C, H, W], group by group.
        labels: int64 [G*B].
        groups: G.
        create_graph: True if the gradients are to be differentiable in the images.

    Returns:
        [G, rows, columns] for each convolution and the classifier.
    """
    entering, leaving, x = [], [], images
    for block in network.blocks:
        entering.append(x)
        x = F.conv2d(x, block.convolution.weight.detach(), padding=1)
        leaving.append(x if x.requires_grad else x.requires_grad_())
        x = block.after_convolution(x)
    embedding = x.flatten(1)
    logits = F.linear(embedding, network.classifier.weight.detach(), network.classifier.bias.detach())
    loss = F.cross_entropy(logits, labels, reduction="sum") * (groups / len(images))
    *gradients, of_logits = torch.autograd.grad(loss, (*leaving, logits), create_graph=create_graph)
    found = []
    for block, inputs, gradient in zip(network.blocks, entering, gradients, strict=True):
        shape = block.convolution.weight.shape
        inputs = inputs if create_graph else inputs.detach()
        parts = zip(inputs.chunk(groups), gradient.chunk(groups), strict=True)
        own = [torch.nn.grad.conv2d_weight(a, shape, b, padding=1) for a, b in parts]
        found.append(torch.stack(own).flatten(2))
    embedding = embedding if create_graph else embedding.detach()
    return [*found, of_logits.unflatten(0, (groups, -1)).mT @ embedding.unflatten(0, (groups, -1))]


def gradient_distance(real: list[Tensor], synthetic: list[Tensor]) -> Tensor:
    """Sum 1 - cosine over the rows of all weights and over the groups (equation 6 of DC).

    Args:
        real, synthetic: as `class_gradients` returns them.
    """
    distances = []
    for a, b in zip(real, synthetic, strict=True):
        cosine = (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1) + 1e-6)
        distances.append((1 - cosine).sum())
    return torch.stack(distances).sum()
