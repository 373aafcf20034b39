"""CAFE: alignment of class means layer by layer, and a term that keeps the classes apart (Wang et al. 2022).

For every class the mean feature map of the synthetic images is to be that of real ones, in all blocks of a network that
learns from the synthetic images; and the synthetic class means, taken as a linear classifier, are to classify the real
embeddings. How long a network learns follows from its accuracy on real images. CAFE+DSA augments both sides alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.methods.images import ImageRun
from atom_fast.distillation.methods.networks import make_network, plain_sgd
from atom_fast.networks.blocks import ConvBlock
from atom_fast.networks.convnet import ConvNet
from atom_fast.ops.instance_norm import instance_norm
from atom_fast.training.trainer import Trainer, in_batches

# Weights of the squared distances: feature maps of all blocks but the last, of the last, and its pooled features, which
# CAFE's code compares twice, before and after flattening them. Weight of the cross-entropy.
EARLY, LAST, POOLED, DISCRIMINATION = 0.1, 1.0, 2.0, 0.01
NETWORK_RATE, NETWORK_BATCH = 0.01, 256  # of the network's SGD
HALVED_AFTER = (1200, 1600, 1800)  # iterations after which the images' learning rate is halved
PROBED = 128  # real images per class that accuracies are measured on
WINDOW = 10  # accuracies that are compared
CHANGED, SETTLED = 0.03, 0.04  # their range: above it the images learn again, below it a new network is drawn
ROUNDS = 30  # at most: a step must end. CAFE names no limit
# Pixels of real images that go through the network at once. On a CPU their largest feature map, 8 MiB at width 128,
# stays in the cache: 256 images of 32x32 in one call take 1.5 times as long.
_PIXELS, _PIXELS_ELSEWHERE = 2**14, 2**21


class Terms(NamedTuple):
    """Mean loss over the steps since the last reading; in a step, over its rounds.

    Attributes:
        loss: ``feature_loss`` + 0.01 · ``discrimination_loss``.
        feature_loss: weighted squared distances of the class means, summed over classes and elements.
        discrimination_loss: cross-entropy of the real embeddings' products with the synthetic class means, summed.
        rounds: updates of the images in a step.
    """

    loss: float
    feature_loss: float
    discrimination_loss: float
    rounds: float


class Learner(ImageRun):
    """Images learnt by aligning features. A step is a new network, which learns until its accuracy settles.

    After every update of the images the network learns from them, an epoch at a time, until its accuracy has changed,
    or for as many epochs as a window has accuracies. The step ends when those of the last window of updates are alike.
    """

    Terms = Terms

    def __init__(
        self, config: DistillConfig, data: ImageData, preprocessing: Preprocessing, images: Tensor, *, progress: bool
    ):
        """Prepare the steps; see `atom_fast.distillation.methods.make_run` for the arguments."""
        weights = {"feature_loss": 1.0, "discrimination_loss": DISCRIMINATION, "rounds": 0.0}
        names, weights = tuple(weights), tuple(weights.values())
        super().__init__(config, data, preprocessing, images, names=names, weights=weights, progress=progress)
        protocol = plain_sgd("network", WINDOW, NETWORK_BATCH, NETWORK_RATE, config.augmentation)
        self.network = make_network(config, data, self.images.device)
        self.trainer = Trainer(self.network, self.images, self.labels, protocol)
        self._probed_labels = torch.arange(data.num_classes, device=self.images.device).repeat_interleave(PROBED)

    def _step(self) -> None:
        config, iteration = self.config, self.iteration
        decay = 0.5 ** sum(iteration > last for last in HALVED_AFTER)
        self.trainer.restart(derive_seed(config.seed, iteration))
        with convolution_precision(config.precision, self.images.device, config.deterministic):
            probed = self._gather_real(sample_class_indices(self.data, PROBED, self.generator))
            terms, accuracy, settled = [], self._accuracy(probed), []
            while len(terms) < ROUNDS:
                terms.append(self._align(decay))
                settled.append(accuracy)
                if len(settled) >= WINDOW and _range(settled) < SETTLED:
                    break
                learning = [accuracy]
                for epoch in range(WINDOW):
                    self.trainer.train_epoch(epoch)
                    learning.append(self._accuracy(probed))
                    if _range(learning) > CHANGED:
                        break
                accuracy = learning[-1]
        rounds = terms[0].new_tensor([len(terms)])
        self._record(torch.cat([torch.stack(terms).mean(0), rounds]))
        self._count()

    def _align(self, decay: float) -> Tensor:
        """Update the images once; return the terms before it, float32 [2]."""
        images = self.images.detach().requires_grad_()
        real, synthetic = self._siamese(self._real_images(), images)
        maps, embeddings = class_means(self.network, real, self.data.num_classes)
        own_maps, own = class_sums(self.network, synthetic, self.data.num_classes)
        own_maps = [total / self.config.ipc for total in own_maps]
        own = own.unflatten(0, (-1, self.config.ipc)).mean(1)
        features = feature_distance(maps, embeddings, own_maps, own)
        discrimination = F.cross_entropy(embeddings @ own.T, self._real_labels, reduction="sum")
        (gradient,) = torch.autograd.grad(features + DISCRIMINATION * discrimination, images)
        self._update(gradient, decay)
        return torch.stack([features, discrimination]).detach()

    @torch.no_grad()
    def _accuracy(self, images: Tensor) -> float:
        """Return the network's accuracy on real images, between 0 and 1: one number is read from the device."""
        pairs = in_batches(self.network, images, self._probed_labels)
        correct = sum((predicted.argmax(1) == labels).sum() for predicted, labels in pairs)
        return int(correct) / len(images)


def _range(accuracies: Sequence[float]) -> float:
    """Return the difference of the largest and the smallest of the last ``WINDOW`` values."""
    return max(accuracies[-WINDOW:]) - min(accuracies[-WINDOW:])


def class_sums(network: ConvNet, images: Tensor, classes: int) -> tuple[list[Tensor], Tensor]:
    """Sum the feature maps of each class, before pooling, in every block.

    Args:
        network: a ConvNet; its parameters are constants here.
        images: [G*B, C, H, W], equally many per class, class by class.
        classes: G.

    Returns:
        [G, width, H_l, W_l] for each block, and the embeddings [G*B, D]. Differentiable once, in ``images``.
    """
    sums, x = [], images
    for block in network.blocks:
        x = _feature_map(block, x)
        sums.append(x.unflatten(0, (classes, -1)).sum(1))
        x = block.pool(x)
    return sums, x.flatten(1)


def _feature_map(block: ConvBlock, x: Tensor) -> Tensor:
    """Return the output of a block before pooling; its parameters are constants."""
    if block.attention_refusal() is None:  # 3x3 convolution, InstanceNorm, ReLU
        norm, x = block.norm, F.conv2d(x, block.convolution.weight.detach(), padding=1)
        return instance_norm(x, norm.weight.detach(), norm.bias.detach(), norm.eps, relu=True)
    return block.feature_map(x)


@torch.no_grad()
def class_means(network: ConvNet, images: Tensor, classes: int) -> tuple[list[Tensor], Tensor]:
    """Average the feature maps of each class, a few images at a time; arguments and results as `class_sums`."""
    means: list[Tensor] = []
    embeddings = []
    for rows, some in _pieces(images.unflatten(0, (classes, -1))):
        sums, embedding = class_sums(network, some.flatten(0, 1), len(some))
        means = means or [total.new_zeros(classes, *total.shape[1:]) for total in sums]
        for mean, total in zip(means, sums, strict=True):
            mean[rows] += total
        embeddings.append(embedding)
    per_class = len(images) // classes
    return [mean.div_(per_class) for mean in means], torch.cat(embeddings)


def _pieces(images: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Yield the classes, and images [G, B, C, H, W] of these, that go through the network at once, in their order."""
    classes, per_class = images.shape[:2]
    pixels = _PIXELS if images.device.type == "cpu" else _PIXELS_ELSEWHERE
    most = max(1, pixels // (images.shape[3] * images.shape[4]))
    together = max(1, most // per_class)
    for first in range(0, classes, together):
        rows = slice(first, min(first + together, classes))
        yield from zip(itertools.repeat(rows), images[rows].split(most, dim=1), strict=False)


def feature_distance(
    maps: Sequence[Tensor], embeddings: Tensor, own_maps: Sequence[Tensor], own_embeddings: Tensor
) -> Tensor:
    """Sum the weighted squared distances of class means over layers, classes and elements.

    Args:
        maps, own_maps: [K, width, H_l, W_l] for each block, means of the real and of the synthetic images.
        embeddings: [K*B, D] of the real images, class by class.
        own_embeddings: [K, D], means of the synthetic images.
    """
    weights = [*[EARLY] * (len(maps) - 1), LAST]
    distances = [w * (a - b).square().sum() for w, a, b in zip(weights, maps, own_maps, strict=True)]
    mean = embeddings.unflatten(0, (len(own_embeddings), -1)).mean(1)
    return torch.stack([*distances, POOLED * (mean - own_embeddings).square().sum()]).sum()
