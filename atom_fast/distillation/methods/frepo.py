"""FRePo (Zhou et al. 2022): images and labels from which ridge regression on a network's embeddings predicts real ones.

The networks are a pool. Each learns from the synthetic set while the set is learnt, and is drawn anew after
``NETWORK_STEPS`` steps, so that the embeddings are those of networks at all ages.

This project's ConvNet, 128 channels wide with InstanceNorm, stands in for FRePo's own, whose width doubles from block
to block (128, 256, 512) and which has BatchNorm: figures are not comparable with those published.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from atom_fast._device import convolution_precision
from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import sample_class_indices
from atom_fast.data.whitening import Preprocessing, real_image_gatherer
from atom_fast.distillation.config import DistillConfig
from atom_fast.distillation.logs import log
from atom_fast.distillation.methods.networks import make_network
from atom_fast.distillation.run import Run
from atom_fast.networks.convnet import ConvNet
from atom_fast.training.trainer import in_batches

# From FRePo's code.
RIDGE = 1e-6  # regularisation, as a part of the mean of the kernel's diagonal
NETWORKS, NETWORK_STEPS, NETWORK_RATE = 10, 100, 3e-4
LAST_RATE = 0.1  # of images and labels, as a part of the first
_FLIPPED = {"cifar10": math.inf, "cifar100": 1, "tiny": 1}  # flipped copies join the set up to this many per class
# Adam's defaults; FRePo's library has another eps for LAMB.
_DECAYS, _ADAM_EPS, _LAMB_EPS = (0.9, 0.999), 1e-8, 1e-6


class Terms(NamedTuple):
    """Mean loss and its terms over the steps since the last reading.

    Attributes:
        loss: their sum.
        regression_loss: half the squared error of the predicted labels, summed over the classes, mean over real images.
        label_loss: minus the margin of each label's largest value over the next, up to 1 / K; mean over the labels.
    """

    loss: float
    regression_loss: float
    label_loss: float


class Learner(Run):
    """Images and labels learnt by LAMB on networks of a pool.

    Attributes:
        labels: float32 [K*ipc, K], the exact learnt labels: centred, a one-hot row being (one-hot - 1/K) / sqrt(K/10)
            at the start.
        image_moments, label_moments: [2, ...] of these shapes, LAMB's moving averages of the gradient and its square.
        pool: the networks.
    """

    Terms = Terms

    def __init__(
        self, config: DistillConfig, data: ImageData, preprocessing: Preprocessing, images: Tensor, *, progress: bool
    ):
        """Prepare the steps; see `atom_fast.distillation.methods.make_run` for the arguments.

        Raises:
            ValueError: the data have one class only.
        """
        classes = data.num_classes
        if classes < 2:
            raise ValueError(f"method 'frepo' needs at least 2 classes; {data.name} has {classes}")
        super().__init__(config, data, images, range(classes), ("regression_loss", "label_loss"), (1.0, 1.0))
        device = self.images.device
        centred = torch.eye(classes, device=device) - 1 / classes
        self.labels = (centred / math.sqrt(classes / 10)).repeat_interleave(config.ipc, dim=0)
        self.image_moments = torch.zeros(2, *self.images.shape, device=device)
        self.label_moments = torch.zeros(2, *self.labels.shape, device=device)
        self.pool = OnlinePool(config, data, device)
        if self.pool.embedding_size < len(self.images):
            log(
                f"method 'frepo' wants embeddings of more values than there are images: {self.pool.embedding_size} are "
                f"fewer than {len(self.images)}, and the learnt labels may be bad to train on; use a larger width or a "
                "smaller depth"
            )
        self._targets = centred.repeat_interleave(config.real_batch, dim=0)
        self._flips = config.ipc <= _FLIPPED.get(data.name, 0)
        self._gather_real = real_image_gatherer(
            data, preprocessing, memory_format=torch.channels_last, precision=config.precision, progress=progress
        )

    def _step(self) -> None:
        """Update images and labels on a network of the pool, and this network on them as they were before."""
        config, network = self.config, self.pool.draw(self.generator)
        indices = sample_class_indices(self.data, config.real_batch, self.generator)
        with convolution_precision(config.precision, self.images.device, config.deterministic):
            with torch.no_grad():  # fused from end to end: no feature map is kept
                real = self._gather_real(indices)
                embedded = in_batches(lambda batch: network.attention(batch, None, None)[0], real, self._targets)
                of_real = torch.cat([embedding for embedding, _ in embedded])
            images, labels = self.images.detach().requires_grad_(), self.labels
            embedding = network.embed(torch.cat([images, images.flip(3)]) if self._flips else images)
            expected = labels.repeat(len(embedding) // len(labels), 1)
            fit = ridge_regression(embedding.detach(), expected, of_real, self._targets)
            # One graph serves both: the images' gradient with the network fixed, and the network's.
            (of_images,) = torch.autograd.grad(
                embedding, images, fit.of_embedding.to(embedding.dtype), retain_graph=True
            )
            error = network.classifier(embedding) - expected
            of_network = torch.autograd.grad(
                error.square().sum() / (2 * len(error)), list(network.parameters()), materialize_grads=True
            )
        margin, of_margin = label_margin(labels)
        self._record(torch.stack([fit.loss, -margin]))
        of_labels = fit.of_labels.view(-1, *labels.shape).sum(0).float() - of_margin
        rate = self._rate()
        lamb_step(self.images, of_images, self.image_moments, self._iteration, rate)
        lamb_step(self.labels, of_labels, self.label_moments, self._iteration, rate)
        self.pool.train(of_network, self.generator)
        self._count()

    def _rate(self) -> Tensor:
        """Return the learning rate of this step: half a cosine from ``image_lr`` to a tenth over all iterations."""
        assert self.config.image_lr is not None  # a number in resolved settings
        progress = (self._iteration - 1).double() / self.config.iterations
        cosine = (1 + torch.cos(math.pi * progress)) / 2
        return self.config.image_lr * (LAST_RATE + (1 - LAST_RATE) * cosine)

    @property
    def soft_labels(self) -> Tensor:
        """The learnt labels as probabilities: scaled and shifted back to where they began as one-hot rows.

        They are multiplied by sqrt(K/10), 1/K is added, negative values become (nearly) 0, and rows are divided by
        their sum. The exact labels are in ``labels`` and in checkpoints.
        """
        classes = self.labels.shape[1]
        positive = (self.labels * math.sqrt(classes / 10) + 1 / classes).clamp(min=1e-8)  # a row never sums to 0
        return positive / positive.sum(1, keepdim=True)

    def state(self) -> dict[str, Tensor]:
        """Return images, labels, their moments, and the networks."""
        return {
            "images": self.images,
            "labels": self.labels,
            "image_moments": self.image_moments,
            "label_moments": self.label_moments,
            "network_weights": self.pool.weights,
            "network_moments": self.pool.moments,
            "network_ages": self.pool.ages,
        }


class OnlinePool:
    """``NETWORKS`` networks that Adam trains. Nothing of it is read back from the device.

    Attributes:
        weights: float32 [networks, P], the parameters of each, one after the other.
        moments: [2, networks, P], Adam's moving averages of the gradient and its square.
        ages: int64 [networks], steps since each was drawn.
        embedding_size: values of an embedding.
    """

    def __init__(self, config: DistillConfig, data: ImageData, device: torch.device):
        """Draw all networks from the seed."""
        self._network = make_network(config, data, device)
        self.embedding_size = self._network.embedding_size
        generator = torch.Generator(device).manual_seed(derive_seed(config.seed, 0))  # steps count from 1
        self.weights = torch.stack([self._fresh(generator) for _ in range(NETWORKS)])
        self.moments = torch.zeros(2, *self.weights.shape, device=device)
        self.ages = torch.zeros(NETWORKS, dtype=torch.int64, device=device)
        self._drawn = torch.zeros(1, dtype=torch.int64, device=device)

    def _fresh(self, generator: torch.Generator) -> Tensor:
        """Draw the weights [P] of a new network."""
        self._network.reset_parameters(generator)
        return _flat(self._network.parameters())

    def draw(self, generator: torch.Generator) -> ConvNet:
        """Return a network drawn at random, each being as likely, until the next draw."""
        torch.randint(NETWORKS, (1,), generator=generator, device=self.ages.device, out=self._drawn)
        parameters = list(self._network.parameters())
        (weights,) = self.weights.index_select(0, self._drawn)
        parts = weights.split([parameter.numel() for parameter in parameters])
        with torch.no_grad():
            for parameter, part in zip(parameters, parts, strict=True):
                parameter.copy_(part.view_as(parameter))
        return self._network

    def train(self, gradients: tuple[Tensor, ...], generator: torch.Generator) -> None:
        """Take a step of Adam on the network drawn last, and put a new one in its place when it is old enough."""
        drawn = self._drawn
        (weights,), moments = self.weights.index_select(0, drawn), self.moments.index_select(1, drawn)[:, 0]
        age = self.ages.index_select(0, drawn) + 1
        weights = weights - NETWORK_RATE * adam_direction(_flat(gradients), moments, age[0], _ADAM_EPS)
        fresh, is_old = self._fresh(generator), age >= NETWORK_STEPS
        self.weights.index_copy_(0, drawn, torch.where(is_old, fresh, weights)[None])
        self.moments.index_copy_(1, drawn, moments.masked_fill(is_old, 0.0)[:, None])
        self.ages.index_copy_(0, drawn, age.masked_fill(is_old, 0))


def _flat(tensors) -> Tensor:
    return torch.cat([tensor.detach().flatten() for tensor in tensors])


class Regression(NamedTuple):
    """The loss of `ridge_regression` and its gradients, float64.

    Attributes:
        loss: half the squared error, summed over the classes, mean over the real images.
        of_embedding: [n, D], its gradient in the synthetic embeddings.
        of_labels: [n, K], its gradient in the synthetic labels.
    """

    loss: Tensor
    of_embedding: Tensor
    of_labels: Tensor


@torch.no_grad()
def ridge_regression(embedding: Tensor, labels: Tensor, of_real: Tensor, targets: Tensor) -> Regression:
    """Predict real labels from the synthetic set by kernel ridge regression with a linear kernel of embeddings.

    The prediction is K_ts (K_ss + r I)^-1 y with r = ``RIDGE`` · tr(K_ss) / n. It is computed in float64: in float32
    the kernel's error, its largest eigenvalue times 1e-7, exceeds r from some tens of images on. The kernel between
    real and synthetic images is never formed, nor is any gradient of a kernel: these are products with K columns.

    Args:
        embedding: [n, D] of the synthetic images.
        labels: [n, K] of the synthetic images.
        of_real: [t, D], embeddings of real images.
        targets: [t, K], their labels.

    Returns:
        The loss and its gradients; NaN where the kernel is not positive definite, as it is for embeddings that are NaN
        or all 0.
    """
    s, y, t = embedding.double(), labels.double(), of_real.double()
    kernel = s @ s.mT
    part = RIDGE / len(s)
    kernel.diagonal().add_(part * kernel.trace())
    factor, failed = torch.linalg.cholesky_ex(kernel)
    factor = factor.masked_fill(failed != 0, math.nan)  # reported where loss terms are read
    dual = torch.cholesky_solve(y, factor)
    weights = s.mT @ dual  # [D, K]
    error = t @ weights - targets.double()
    # With w = sᵀ a and a = A⁻¹ y: dL/dy = A⁻¹ s dL/dw, and A's part in dL/ds is that of -<dL/dy aᵀ, dA>.
    of_weights = t.mT @ error / len(t)
    of_labels = torch.cholesky_solve(s @ of_weights, factor)
    of_embedding = dual @ (of_weights - s.mT @ of_labels).mT - of_labels @ weights.mT
    of_embedding -= 2 * part * (of_labels * dual).sum() * s
    return Regression(error.square().sum() / (2 * len(t)), of_embedding, of_labels)


def label_margin(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean of min(largest - second largest, 1/K) over labels [n, K], and its gradient [n, K]."""
    labels = labels.detach().requires_grad_()
    largest, second = labels.topk(2, dim=1).values.unbind(1)
    margin = (largest - second).clamp(max=1 / labels.shape[1]).mean()
    (gradient,) = torch.autograd.grad(margin, labels)
    return margin.detach(), gradient


def adam_direction(gradient: Tensor, moments: Tensor, step: Tensor, eps: float) -> Tensor:
    """Return Adam's step for a rate of 1, of the gradient's shape, and update its moments.

    Args:
        gradient: of any shape.
        moments: [2, ...] of this shape, changed in place.
        step: number of the step, from 1; a tensor of no dimension.
        eps: added to the root of the second moment.
    """
    first, second = moments
    first.lerp_(gradient, 1 - _DECAYS[0])
    second.lerp_(gradient.square(), 1 - _DECAYS[1])
    unbiased = [moment / (1 - decay ** step.double()) for moment, decay in zip(moments, _DECAYS, strict=True)]
    return unbiased[0] / (unbiased[1].sqrt() + eps)


def lamb_step(values: Tensor, gradient: Tensor, moments: Tensor, step: Tensor, rate: Tensor) -> None:
    """Take a step of LAMB (You et al. 2020) without weight decay: Adam's direction at ``rate`` times the values' norm.

    Args:
        values: changed in place.
        gradient, moments, step: as `adam_direction`.
        rate: a tensor of no dimension.
    """
    direction = adam_direction(gradient, moments, step, _LAMB_EPS)
    length, of_direction = values.norm(), direction.norm()
    trust = torch.where((length > 0) & (of_direction > 0), length / of_direction, 1.0)
    values.sub_(rate * trust * direction)
