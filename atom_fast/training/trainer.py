"""Training and testing of one network."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.data.augmentation import augment_stages, draw_stages
from atom_fast.data.dataset import ImageData
from atom_fast.data.placement import keeps_on_device
from atom_fast.data.whitening import Preprocessing, real_image_gatherer
from atom_fast.networks import make_network
from atom_fast.training.cutmix import CutMix, draw_cutmix, mix_images, mixed_cross_entropy
from atom_fast.training.protocols import Protocol

# Pixels tested at once: on a CPU 256 images of 32x32, whose first feature map takes 128 MiB at width 128; eight times
# as many elsewhere.
TEST_PIXELS = {"cpu": 2**18}
_TEST_PIXELS_ELSEWHERE = 2**21
_PREPROCESSED_AT_ONCE = 2**22  # pixels: 4096 images of CIFAR, 50 MB in float32


def network_seed(seed: int, index: int) -> int:
    """Return the seed of network ``index``; neighbouring seeds and networks give unrelated ones."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


@contextlib.contextmanager
def repeatable_convolutions() -> Iterator[None]:
    """Restrict cuDNN to algorithms that give the same bits in every run, within this context; TF32 is allowed."""
    cudnn: Any = torch.backends.cudnn  # its stubs lack conv
    before = cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision
    cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision = True, False, "tf32"
    try:
        yield
    finally:
        cudnn.deterministic, cudnn.benchmark, cudnn.conv.fp32_precision = before


class Trainer:
    """Train networks of one architecture, one after the other, in the same buffers.

    Args:
        network: a module with ``reset_parameters(generator)``, on the device of the images.
        images: floating point [N, C, H, W] in model space; or of any kind with ``gather``.
        labels: int64 [N], or probabilities, floating point [N, K].
        protocol: how to train.
        precision: "float32", or "bfloat16" to train under autocast; parameters keep their type.
        gather: from indices, int64 [B], to these of the images in model space; None takes them from ``images``.

    Attributes:
        network: the network in training.
        images, labels: as given; their content may be changed between epochs.
        epoch: the epoch that the network is in or has finished last, counted from 1; 0 before the first.
        generator: source of the network's initial weights, batch orders, augmentation, CutMix and dropout.
        protocol: as given.
    """

    def __init__(
        self,
        network: nn.Module,
        images: Tensor,
        labels: Tensor,
        protocol: Protocol,
        *,
        precision: str = "float32",
        gather: Callable[[Tensor], Tensor] | None = None,
    ):
        self.network = network.train()
        self._gather = gather
        self.images = images
        self.labels = labels
        self.protocol = protocol
        self.generator = torch.Generator(images.device)
        self.epoch = 0
        self._autocast = {
            "device_type": images.device.type,
            "dtype": torch.bfloat16,
            "enabled": precision == "bfloat16",
            "cache_enabled": False,  # a captured step would reuse the first step's copies of the weights
        }
        self._parameters = list(network.parameters())
        # A tensor, so that a captured step sees the learning rate change.
        self._learning_rate = torch.tensor(protocol.learning_rate, device=images.device)
        self._optimizer = torch.optim.SGD(
            self._parameters,
            lr=self._learning_rate,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            fused=True,
        )
        self.restart(0)  # a step captured before the first network must already draw from this generator

    def restart(self, seed: int) -> None:
        """Draw a new network from ``seed`` and reset the momentum."""
        self.generator.manual_seed(seed)
        self.epoch = 0
        network: Any = self.network
        network.reset_parameters(self.generator)
        self._reset_momentum()

    def _reset_momentum(self) -> None:
        for state in self._optimizer.state.values():
            if state["momentum_buffer"] is not None:  # with a momentum of 0 there is none
                state["momentum_buffer"].zero_()

    def begin_epoch(self, epoch: int) -> Tensor:
        """Set the learning rate of an epoch, counted from 0, and return its order, int64 [N]; no host sync.

        The order is random except for a set's own steps. Epochs come in order: a protocol may reset the momentum at a
        decay.
        """
        if not self.network.training:  # after a test; train() visits every module, as slow as some steps on a GPU
            self.network.train()
        self.epoch = epoch + 1
        rate = self.protocol.learning_rate_at(epoch)
        self._learning_rate.fill_(rate)
        if self.protocol.restart_momentum and epoch > 0 and rate != self.protocol.learning_rate_at(epoch - 1):
            self._reset_momentum()
        if self.protocol.step_sizes:  # one image of each class, in turn
            ipc = len(self.images) // self.protocol.batch_size
            return torch.arange(epoch % ipc, len(self.images), ipc, device=self.images.device)
        return torch.randperm(len(self.images), generator=self.generator, device=self.images.device)

    def train_epoch(self, epoch: int) -> None:
        """Pass once over the set in random order."""
        for indices in self.begin_epoch(epoch).split(self.protocol.batch_size):
            self.step(indices)

    def step(self, indices: Tensor) -> Tensor:
        """Train on the images at ``indices``, int64 [B]; return their logits [B, K] before the update.

        The logits are of the images that it trains on, augmented and mixed.
        """
        return self.update(*self.batch(indices))

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor, CutMix | None]:
        """Return the images at ``indices``, int64 [B], augmented and mixed, their labels, and how they were mixed."""
        if self._gather is not None:
            images = self._gather(indices)
        else:  # index_select by itself returns NCHW
            images = torch.index_select(self.images, 0, indices, out=torch.empty_like(self.images[: len(indices)]))
        labels = self.labels.index_select(0, indices)
        if self.protocol.augmentation != "none":
            strategy = self.protocol.augmentation
            drawn = draw_stages(len(indices), self.generator, strategy=strategy, shared_operation=True)
            images = augment_stages(images, drawn)
        mixture = None
        if self.protocol.cutmix:
            mixture = draw_cutmix(images.shape, self.generator, self.protocol.cutmix)
            images = mix_images(images, mixture)
        return images, labels, mixture

    def update(self, images: Tensor, labels: Tensor, mixture: CutMix | None = None) -> Tensor:
        """Take a step on a batch as `batch` returns it; return its logits [B, K] before the update."""
        with torch.autocast(**self._autocast):
            predicted = self.network(images)
            if mixture is None:
                loss = F.cross_entropy(predicted, labels)
            else:
                loss = mixed_cross_entropy(predicted, labels, mixture)
        # Not backward(): it ties .grad to the stream of its first call. A bias that a norm cancels has no gradient.
        gradients = torch.autograd.grad(loss, self._parameters, allow_unused=True)
        for parameter, gradient in zip(self._parameters, gradients, strict=True):
            parameter.grad = _in_layout_of(parameter, gradient)
        self._optimizer.step()
        return predicted.detach()

    def in_batches(self, function: Callable[[Tensor], Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield ``(function(images), labels)`` for large batches of the set in its order, unaugmented."""
        if self._gather is None:
            yield from in_batches(function, self.images, self.labels)
            return
        order = torch.arange(len(self.images), device=self.images.device).split(_batch_size(self.images))
        for indices in order:
            yield function(self._gather(indices)), self.labels[indices]


def empty_network(name: str, architecture: Mapping, data: ImageData, device: torch.device) -> nn.Module:
    """Build a network for the images of ``data`` without drawing its weights; no generator is used.

    Raises:
        ValueError: as :func:`~atom_fast.networks.make_network`.
    """
    channels, height, width = data.image_shape
    with torch.device("meta"):
        network = make_network(name, channels, data.num_classes, (height, width), **architecture)
    return network.to_empty(device=device)


def in_model_space(
    pixels: Tensor, preprocessing: Preprocessing, device: torch.device, layout: torch.memory_format
) -> Tensor:
    """Bring images uint8 [N, C, H, W] to model space: float32, on a device, in a memory layout."""
    preprocessing = preprocessing.to(device)
    images = torch.empty(pixels.shape, device=device, memory_format=layout)
    at_once = max(1, _PREPROCESSED_AT_ONCE // (pixels.shape[2] * pixels.shape[3]))
    for some, space in zip(pixels.split(at_once), images.split(at_once), strict=True):
        space.copy_(preprocessing.to_model(some.to(device)))
    return images


def training_images(
    data: ImageData, preprocessing: Preprocessing, device: torch.device, layout: torch.memory_format
) -> tuple[Tensor, Callable[[Tensor], Tensor] | None]:
    """Return the training images and ``gather`` for a `Trainer` on a device.

    They are in model space, or, where float32 would take more than half of the device's free memory, uint8 with a
    function that maps each batch. On a GPU the last bits of whitened images depend on which of the two it is.
    """
    if keeps_on_device(4 * data.train_images.numel(), device):
        return in_model_space(data.train_images, preprocessing, device, layout), None
    data, preprocessing = data.to(device), preprocessing.to(device)
    return data.train_images, real_image_gatherer(data, preprocessing, memory_format=layout, progress=False)


def _in_layout_of(parameter: Tensor, gradient: Tensor | None) -> Tensor | None:
    """The gradient with the parameter's strides, which the fused optimizer assumes."""
    if gradient is None or gradient.stride() == parameter.stride():
        return gradient
    return torch.empty_like(parameter).copy_(gradient)


def accuracy(network: nn.Module, images: Tensor, labels: Tensor) -> float | None:
    """Compute the accuracy of a network, in evaluation mode, over a whole test set.

    Args:
        network: from images [B, C, H, W] in model space to logits [B, K].
        images: floating point [N, C, H, W] in model space.
        labels: int64 [N].

    Returns:
        100 · correct / N in percent, or None if a logit is not finite: its argmax means nothing.
    """
    correct = _count(network, images, labels, (), lambda taken, expected: (taken == expected).sum())
    return None if correct is None else 100 * correct.item() / len(images)


def confusion(network: nn.Module, images: Tensor, labels: Tensor, classes: int) -> Tensor | None:
    """Count what a network, in evaluation mode, takes the images of each class for.

    Args:
        network, images, labels: as in :func:`accuracy`.
        classes: their number K.

    Returns:
        int64 [K, K] on the CPU: entry (i, j) counts images of class i taken for class j. None if a logit is not finite.
    """
    pairs = classes * classes

    def count(taken: Tensor, expected: Tensor) -> Tensor:
        return torch.bincount(expected * classes + taken, minlength=pairs)

    counts = _count(network, images, labels, (pairs,), count)
    return None if counts is None else counts.view(classes, classes).cpu()


@torch.no_grad()
def _count(
    network: nn.Module,
    images: Tensor,
    labels: Tensor,
    size: tuple[int, ...],
    count: Callable[[Tensor, Tensor], Tensor],
) -> Tensor | None:
    """Sum ``count`` of the classes that a network takes images for and of theirs, int64; None if a logit is not finite.

    Nothing is read from the device before the end.
    """
    network.eval()
    total = torch.zeros(size, dtype=torch.int64, device=images.device)
    finite = torch.ones((), dtype=torch.bool, device=images.device)
    for predicted, expected in in_batches(network, images, labels):
        total += count(predicted.argmax(1), expected)
        finite &= predicted.isfinite().all()
    return total if finite.item() else None


def in_batches(function: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor):
    """Yield ``(function(images), labels)`` for large batches of a set [N, C, H, W] and its labels [N]."""
    batch = _batch_size(images)
    for some_images, some_labels in zip(images.split(batch), labels.split(batch), strict=True):
        yield function(some_images), some_labels


def _batch_size(images: Tensor) -> int:
    """Return how many images [N, C, H, W] are tested at once."""
    pixels = TEST_PIXELS.get(images.device.type, _TEST_PIXELS_ELSEWHERE)
    return max(1, pixels // (images.shape[2] * images.shape[3]))
