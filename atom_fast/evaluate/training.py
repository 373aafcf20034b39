"""Fresh networks trained on a distilled set and tested on real images."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from atom_fast.data.augmentation import augment, draw_augmentation
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.evaluate.protocols import Protocol, get_protocol
from atom_fast.networks.convnet import ConvNet, default_depth

_TEST_PIXELS = 2**18  # tested at once: 256 images of 32x32, whose first feature map takes 128 MiB at width 128


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Test accuracies of networks trained on one set, in percent.

    Attributes:
        curves: for every network its accuracy after each tested epoch, ``{epoch: percent}`` with epochs counted from 1
            and the last epoch always among them; None where a logit was not finite, so the network had diverged.
        protocol: how they were trained.
        architecture: settings of :class:`~atom_fast.networks.ConvNet`.
        seed: of the evaluation; network i depends on it and on i alone.
        seconds: wall-clock time of training and testing all of them.
        device: where they were trained.
    """

    curves: tuple[dict[int, float | None], ...]
    protocol: Protocol
    architecture: dict[str, Any]
    seed: int
    seconds: float
    device: str

    @property
    def accuracies(self) -> tuple[float | None, ...]:
        """Accuracy of every network after the last epoch: the result. None for one that diverged."""
        return tuple(curve[self.protocol.epochs] for curve in self.curves)

    @property
    def best_accuracies(self) -> tuple[float | None, ...] | None:
        """Highest accuracy of every network over the tested epochs; None where only the last one was tested.

        It is chosen on the test set, so it is not a result to report as the accuracy of a set.
        """
        if all(len(curve) == 1 for curve in self.curves):
            return None
        return tuple(
            max((value for value in curve.values() if value is not None), default=None) for curve in self.curves
        )

    @property
    def diverged(self) -> tuple[int, ...]:
        """Networks, counted from 0, that had diverged by the last epoch."""
        return tuple(index for index, accuracy in enumerate(self.accuracies) if accuracy is None)

    @property
    def mean(self) -> float:
        """Mean last-epoch accuracy of the networks that did not diverge; NaN where all did."""
        return statistics.fmean(self._finished) if self._finished else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation of the same (divided by N, as in the public code); NaN likewise."""
        return statistics.pstdev(self._finished) if self._finished else math.nan

    @property
    def _finished(self) -> list[float]:
        return [accuracy for accuracy in self.accuracies if accuracy is not None]

    def __str__(self) -> str:
        noun = "network" if len(self.curves) == 1 else "networks"
        text = f"{self.mean:.1f} ± {self.std:.1f} % ({len(self.curves)} {noun}, last epoch)"
        return text + (f", diverged: {', '.join(map(str, self.diverged))}" if self.diverged else "")

    def to_dict(self) -> dict[str, Any]:
        """Everything above as what JSON can hold; a mean or deviation of no network is None."""
        return {
            "accuracy_mean": None if math.isnan(self.mean) else self.mean,
            "accuracy_std": None if math.isnan(self.std) else self.std,
            "accuracies": list(self.accuracies),
            "best_accuracies": None if self.best_accuracies is None else list(self.best_accuracies),
            "diverged": list(self.diverged),
            "networks": len(self.curves),
            "curves": [{str(epoch): accuracy for epoch, accuracy in curve.items()} for curve in self.curves],
            "protocol": dataclasses.asdict(self.protocol),
            "architecture": dict(self.architecture),
            "seed": self.seed,
            "seconds": self.seconds,
            "device": self.device,
        }


def evaluate(
    images: Tensor,
    labels: Tensor,
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    protocol: Protocol | str = "paper",
    networks: int = 5,
    seed: int = 0,
    architecture: Mapping[str, Any] | None = None,
    evaluate_every: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> EvaluationResult:
    """Train fresh networks on a (distilled) set and test them on the whole test set after the last epoch.

    The networks are trained one after the other. Network i has its own generator, seeded from ``seed`` and i, for its
    initial weights, batch order and augmentation, so it is the same network however many others there are. On CUDA a
    training step is one graph, captured once for all of them.

    Args:
        images: floating point [N, C, H, W] in model space, as ``preprocessing`` makes them.
        labels: integer [N], classes of ``data``.
        data: where the test set is taken from.
        preprocessing: between the pixels of ``data`` and the model space of ``images``; applied to the test images.
        protocol: how to train, or the name of a preset in ``PROTOCOLS``.
        networks: how many.
        seed: of the evaluation.
        architecture: settings of :class:`~atom_fast.networks.ConvNet` beyond the image's; the depth, where it is not
            given, is the usual one for the image size.
        evaluate_every: test also after every so many epochs; 0 tests after the last one only.
        device: where to train; None means where ``images`` is.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: the set does not fit the data, an unknown protocol, or a setting that is not accepted.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if networks < 1:
        raise ValueError(f"networks must be at least 1; got {networks}")
    if evaluate_every < 0:
        raise ValueError(f"evaluate_every must be a number of epochs, or 0 for the last only; got {evaluate_every}")
    _check_set(images, labels, data)
    device = images.device if device is None else torch.device(device)
    images = images.detach().to(device, torch.float32).contiguous()
    labels = labels.to(device, torch.int64)
    test_images, test_labels = data.test_images.to(device), data.test_labels.to(device)
    preprocessing = preprocessing.to(device)

    channels, height, width = data.image_shape
    architecture = {"depth": default_depth(height, width), **(architecture or {})}
    with torch.device("meta"):  # the trainer draws the weights; PyTorch's default generator is left alone
        network = ConvNet(channels, data.num_classes, (height, width), **architecture)
    network.to_empty(device=device)

    def test() -> float | None:
        return accuracy(network, test_images, test_labels, preprocessing)

    from tqdm import tqdm

    started = time.perf_counter()
    curves = []
    with (
        torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=True),
        tqdm(total=networks * protocol.epochs, desc="evaluate", unit="epoch", disable=not progress) as bar,
    ):
        trainer = Trainer(network, images, labels, protocol)
        for index in range(networks):
            trainer.restart(network_seed(seed, index))
            curves.append(_train_and_test(trainer, test, evaluate_every, bar))
            finished = [curve[protocol.epochs] for curve in curves if curve[protocol.epochs] is not None]
            if finished:
                bar.set_postfix_str(f"{len(curves)} of {networks} networks: {statistics.fmean(finished):.1f} %")
    return EvaluationResult(
        curves=tuple(curves),
        protocol=protocol,
        architecture=architecture,
        seed=seed,
        seconds=time.perf_counter() - started,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else str(device),
    )


def network_seed(seed: int, index: int) -> int:
    """Seed of network ``index`` in an evaluation with ``seed``; well apart for neighbouring seeds and networks."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1, np.uint64)[0])


class Trainer:
    """Trains networks of one architecture, one after the other, with the same buffers and the same CUDA graphs.

    Args:
        network: a module with ``reset_parameters(generator)``, on the device of the images.
        images: float32 [N, C, H, W] in model space.
        labels: int64 [N].
        protocol: how to train.

    Attributes:
        network: the network in training.
        generator: source of its initial weights, batch orders and augmentation, in this order.
        protocol: as given.
    """

    def __init__(self, network: nn.Module, images: Tensor, labels: Tensor, protocol: Protocol):
        self.network = network.train()
        self.protocol = protocol
        self.generator = torch.Generator(images.device)
        self._images = images
        self._labels = labels
        # A tensor, so that a captured step sees the learning rate change.
        self._learning_rate = torch.tensor(protocol.learning_rate, device=images.device)
        self._optimizer = torch.optim.SGD(
            network.parameters(),
            lr=self._learning_rate,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
            fused=True,
        )
        batch = min(protocol.batch_size, len(images))
        self._steps = {size: self._make_step(size) for size in (batch, len(images) % batch) if size}

    def restart(self, seed: int) -> None:
        """Draw a new network from ``seed`` and forget the momentum of the one before."""
        self.generator.manual_seed(seed)
        self.network.reset_parameters(self.generator)
        for state in self._optimizer.state.values():
            state["momentum_buffer"].zero_()

    def train_epoch(self, epoch: int) -> None:
        """One pass over the set in random order; epochs count from 0. Nothing is read back from the device."""
        self.network.train()
        self._learning_rate.fill_(self.protocol.learning_rate_at(epoch))
        order = torch.randperm(len(self._images), generator=self.generator, device=self._images.device)
        for indices in order.split(self.protocol.batch_size):
            self._steps[len(indices)](indices)

    def _make_step(self, batch: int) -> Callable[[Tensor], None]:
        """A training step on ``batch`` images, given their indices, int64 [batch]."""

        def step(indices: Tensor) -> None:
            images = self._images.index_select(0, indices)
            if self.protocol.augmentation != "none":
                strategy = self.protocol.augmentation
                images = augment(
                    images, draw_augmentation(batch, self.generator, strategy=strategy, shared_operation=True)
                )
            self._optimizer.zero_grad(set_to_none=True)
            F.cross_entropy(self.network(images), self._labels.index_select(0, indices)).backward()
            self._optimizer.step()

        if self._images.device.type != "cuda":
            return step
        return _capture(step, torch.arange(batch, device=self._images.device), self.generator)


def _capture(step: Callable[[Tensor], None], indices: Tensor, generator: torch.Generator) -> Callable[[Tensor], None]:
    """The same step as one CUDA graph, a launch instead of some fifty, with its draws from ``generator``."""
    device = indices.device
    indices = indices.clone()
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):  # lets cuDNN and the optimizer allocate what a capture may not
            step(indices)
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(generator)
    with torch.cuda.device(device), torch.cuda.graph(graph):
        step(indices)

    def replay(new_indices: Tensor) -> None:
        indices.copy_(new_indices)
        graph.replay()

    return replay


def _train_and_test(
    trainer: Trainer, test: Callable[[], float | None], evaluate_every: int, bar
) -> dict[int, float | None]:
    """Train the trainer's new network to the end; its accuracy after each tested epoch."""
    curve = {}
    for epoch in range(1, trainer.protocol.epochs + 1):
        trainer.train_epoch(epoch - 1)
        if epoch == trainer.protocol.epochs or (evaluate_every and epoch % evaluate_every == 0):
            curve[epoch] = test()
        bar.update()
    return curve


@torch.no_grad()
def accuracy(
    network: nn.Module, test_images: Tensor, test_labels: Tensor, preprocessing: Preprocessing
) -> float | None:
    """Accuracy of a network, in evaluation mode, over a whole test set, in percent.

    Args:
        network: images [B, C, H, W] in model space to logits [B, K].
        test_images: uint8 [N, C, H, W]; brought to model space a batch at a time.
        test_labels: int64 [N].
        preprocessing: from pixels to model space.

    Returns:
        100 · correct / N, or None where a logit is not finite, since the largest of such logits means nothing.
    """
    network.eval()
    height, width = test_images.shape[-2:]
    batch = max(1, _TEST_PIXELS // (height * width))
    correct = torch.zeros((), dtype=torch.int64, device=test_images.device)
    finite = torch.ones((), dtype=torch.bool, device=test_images.device)
    for images, labels in zip(test_images.split(batch), test_labels.split(batch), strict=True):
        logits = network(preprocessing.to_model(images))
        correct += (logits.argmax(1) == labels).sum()
        finite &= logits.isfinite().all()
    return 100 * correct.item() / len(test_images) if finite.item() else None


def _check_set(images: Tensor, labels: Tensor, data: ImageData) -> None:
    """Make sure that the images and labels can be trained on for the test set of ``data``."""
    if not images.is_floating_point():
        raise ValueError(
            f"images must be floating point in model space; got {images.dtype}: apply the preprocessing to pixels first"
        )
    if images.dim() != 4 or not len(images) or tuple(images.shape[1:]) != data.image_shape:
        raise ValueError(
            f"images must be [N, {', '.join(map(str, data.image_shape))}] to fit the test set of {data.name}; "
            f"got {list(images.shape)}"
        )
    if not images.isfinite().all():
        raise ValueError("images must be finite; some values are NaN or infinite")
    if labels.dtype not in (torch.int64, torch.int32, torch.uint8) or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be integers [{len(images)}], one an image; got {labels.dtype} {list(labels.shape)}"
        )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= data.num_classes:
        raise ValueError(
            f"labels must be 0 to {data.num_classes - 1}, the {data.num_classes} classes of {data.name}; "
            f"got {low} to {high}"
        )
