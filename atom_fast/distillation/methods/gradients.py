"""Gradient matching: DC, DSA, DCC and DSAC.

The gradient that a network's weights get from the synthetic images is to be that from real ones, class by class (DC,
Zhao et al. 2021; DSA under siamese augmentation, Zhao and Bilen 2021), while the network learns from the synthetic
images. DCC and DSAC (Lee et al. 2022) compare the sum over the classes instead, which lets the images of one class
answer those of the others.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.methods.images import ImageRun
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops.norm_block import norm_block
from atom_fast.training.protocols import Protocol
from atom_fast.training.trainer import Trainer, empty_network

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
        protocol = Protocol(
            name="network", epochs=self._epochs, batch_size=NETWORK_BATCH, learning_rate=NETWORK_RATE,
            momentum=0.0, weight_decay=0.0, decay_factor=1.0, decay_every=None, augmentation=config.augmentation,
        )  # fmt: skip
        network: Any = empty_network("convnet", config.convnet_settings(), data, self.images.device)
        self.network: ConvNet = network.to(memory_format=torch.channels_last)
        self.trainer = Trainer(self.network, self.images, self.labels, protocol)

    def _step(self) -> None:
        config, network = self.config, self.network
        self.trainer.restart(derive_seed(config.seed, int(self._iteration)))
        for number in range(self._rounds):
            together = self._is_contrastive(number)
            with convolution_precision(config.precision, self.images.device, config.deterministic):
                images = self.images.detach().requires_grad_()
                real, synthetic = self._siamese(self._real_images(), images)
                of_real = class_gradients(network, real, self._real_labels, self.data.num_classes)
                if together:
                    of_real = [gradient.mean(0, keepdim=True) for gradient in of_real]
                groups = 1 if together else self.data.num_classes
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
        return contrastive and (int(self._iteration) > WARM_UP_ITERATIONS or number >= WARM_UP_ROUNDS)


def class_gradients(
    network: ConvNet, images: Tensor, labels: Tensor, groups: int, *, create_graph: bool = False
) -> list[Tensor]:
    """Compute the gradient of the mean cross-entropy of each group of images, for every weight with rows.

    All groups go through the network at once. Biases and the scales of norms are left out: gradient matching ignores
    them.

    Args:
        network: in training mode, with a norm of each sample.
        images: [G*B, C, H, W], group by group.
        labels: int64 [G*B].
        groups: G.
        create_graph: True if the gradients are to be differentiable in the images.

    Returns:
        [G, rows, columns] for each convolution and the classifier.
    """
    weights, x = [], images
    for block in network.blocks:
        filters = block.convolution.weight.detach().expand(groups, *block.convolution.weight.shape).requires_grad_()
        weights.append(filters)
        x = _GroupedWeightConvolution.apply(x, filters)
        if not create_graph and block.attention_refusal() is None:  # fused blocks are differentiable once
            x, _ = norm_block(x, block.norm.weight.detach(), block.norm.bias.detach(), eps=block.norm.eps)
        else:
            x = x + block.convolution.bias.detach()[:, None, None]
            x = block.pool(block.activation(_apply_constant(block.norm, x)))
    classifier = network.classifier.weight.detach().expand(groups, *network.classifier.weight.shape).requires_grad_()
    weights.append(classifier)
    embedding = x.flatten(1).unflatten(0, (groups, -1))
    logits = torch.baddbmm(network.classifier.bias.detach(), embedding, classifier.mT)
    loss = F.cross_entropy(logits.flatten(0, 1), labels, reduction="sum") * (groups / len(images))
    gradients = torch.autograd.grad(loss, weights, create_graph=create_graph)
    return [gradient.flatten(2) for gradient in gradients]


def _apply_constant(norm: torch.nn.Module, x: Tensor) -> Tensor:
    """Apply a norm whose scale and shift are constants."""
    constants = {name: parameter.detach() for name, parameter in norm.named_parameters()}
    return torch.func.functional_call(norm, constants, (x,))


class _GroupedWeightConvolution(torch.autograd.Function):
    """3x3 convolution whose filters, the same for all groups of images, get a gradient from each; differentiable twice.

    Images [G*B, C, H, W], filters [G, O, C, 3, 3] that are one tensor expanded.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, filters: Tensor) -> Tensor:
        ctx.save_for_backward(x, filters)
        return F.conv2d(x, filters[0], padding=1)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor]:  # pyrefly: ignore[bad-override]
        x, filters = ctx.saved_tensors
        of_x = None
        if ctx.needs_input_grad[0]:
            of_x = F.conv_transpose2d(gradient, filters[0], padding=1)
        shape, groups = filters.shape[1:], len(filters)
        parts = zip(x.chunk(groups), gradient.chunk(groups), strict=True)
        return of_x, torch.stack([torch.nn.grad.conv2d_weight(a, shape, b, padding=1) for a, b in parts])


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
