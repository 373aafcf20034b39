"""Fresh networks trained on a distilled set and tested on real images."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from atom_fast._device import check_bfloat16
from atom_fast.data.dataset import ImageData
from atom_fast.data.whitening import Preprocessing
from atom_fast.distillation.ranks import ALONE, World
from atom_fast.evaluation.ensemble import Curve, train_networks
from atom_fast.evaluation.protocols import Protocol, get_protocol
from atom_fast.evaluation.results import EvaluationResult
from atom_fast.evaluation.training import (
    PRECISIONS,
    Trainer,
    accuracy,
    empty_network,
    in_model_space,
    network_seed,
    repeatable_convolutions,
)
from atom_fast.networks.convnet import default_depth
from atom_fast.networks.layers import memory_format


def evaluate(
    images: Tensor | Callable[[int], tuple[Tensor, Tensor]],
    labels: Tensor | None,
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    protocol: Protocol | str = "paper",
    networks: int = 5,
    seed: int = 0,
    network: str = "convnet",
    architecture: Mapping[str, Any] | None = None,
    precision: str = "float32",
    evaluate_every: int = 0,
    together: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
    earlier: Sequence[Curve] = (),
    on_network: Callable[[EvaluationResult], None] | None = None,
    world: World = ALONE,
) -> EvaluationResult:
    """Train fresh networks on a (distilled) set and test them on the whole test set after the last epoch.

    Several are trained at a time; see :mod:`atom_fast.evaluation.ensemble`. Network i has its own generator, seeded
    from ``seed`` and i, for its initial weights, batch order, augmentation and dropout, so it is the same network, to
    rounding, however many others there are.

    Args:
        images: floating point [N, C, H, W] in model space, as ``preprocessing`` makes them. Or a function of a
            network's number that returns images and labels of a set of its own, as many for every network.
        labels: integer [N], classes of ``data``; None where ``images`` is a function.
        data: where the test set is taken from.
        preprocessing: between the pixels of ``data`` and the model space of ``images``; applied to the test images, and
            says what both are divided by, with the protocol's ``unit_variance``.
        protocol: how to train, or the name of a preset in ``PROTOCOLS``.
        networks: how many.
        seed: of the evaluation.
        network: name of the architecture, a key of :data:`~atom_fast.networks.NETWORKS`.
        architecture: settings of :class:`~atom_fast.networks.ConvNet` beyond the image's; the depth, where it is not
            given, is the usual one for the image size.
        precision: "float32" (on a GPU convolutions may use TF32), or "bfloat16" for what autocast computes in it while
            training; networks are always tested in float32.
        evaluate_every: test also after every so many epochs; 0 tests after the last one only.
        together: train at most so many networks at a time; None chooses.
        device: where to train; None means where ``images`` is.
        progress: show a progress bar on standard error, with the accuracy so far.
        earlier: curves of the same evaluation that an interrupted call left, empty ones for networks that had not
            finished; only these are trained.
        on_network: called with the result so far whenever networks have finished.
        world: several processes that share the networks (`atom_fast.distillation.ranks.join`); each calls this with
            the same arguments, its own device excepted, and gets the whole result.

    Raises:
        ValueError: the set does not fit the data, an unknown protocol or network, or a setting that is not accepted.
    """
    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    _check_settings(networks, precision, evaluate_every, together, earlier)
    task = _Task.prepare(images, labels, data, preprocessing, device, protocol, network, architecture, precision, seed)
    curves = [dict(curve) for curve in earlier] or [{} for _ in range(networks)]
    jobs = [index for index, curve in enumerate(curves) if not curve]
    own = world.own_jobs(jobs)
    started = time.perf_counter()

    def result() -> EvaluationResult:
        return EvaluationResult(
            curves=tuple(curves),
            protocol=protocol,
            network=network,
            architecture=task.architecture,
            precision=precision,
            seed=seed,
            seconds=time.perf_counter() - started,
            device=torch.cuda.get_device_name(task.device) if task.device.type == "cuda" else str(task.device),
        )

    from tqdm import tqdm

    with (
        repeatable_convolutions(),
        tqdm(total=len(own) * protocol.epochs, desc=f"evaluate {network}", unit="epoch", disable=not progress) as bar,
    ):
        options = {"evaluate_every": evaluate_every, "together": together, "advance": bar.update}
        train = functools.partial(train_networks, task.make_trainer, start=task.start, test=task.test, **options)
        for index, curve in world.results(jobs, train):
            curves[index] = curve
            so_far = result()
            bar.set_postfix_str(f"{networks - len(so_far.unfinished)} networks: {so_far.mean:.1f} ± {so_far.std:.1f} %")
            if on_network is not None:
                on_network(so_far)
    return result()


@dataclasses.dataclass(frozen=True)
class _Task:
    """What every network of an evaluation shares, on its device.

    Attributes:
        images, labels: the set; of the first network, where each has its own.
        own_sets: the sets by the networks' numbers; None where they share one.
        layout: of weights and images.
        scale: what images in model space are multiplied by; those of the set and of the test here are already.
        The others as in :func:`evaluate`.
    """

    images: Tensor
    labels: Tensor
    own_sets: Callable[[int], tuple[Tensor, Tensor]] | None
    data: ImageData
    test_images: Tensor
    test_labels: Tensor
    device: torch.device
    layout: torch.memory_format
    scale: float
    protocol: Protocol
    network: str
    architecture: dict[str, Any]
    precision: str
    seed: int

    @classmethod
    def prepare(
        cls, images, labels, data, preprocessing, device, protocol, network, architecture, precision, seed
    ) -> _Task:
        """Check the set and the network, and bring set and test set to the device."""
        own_sets = images if callable(images) else None
        if own_sets is not None:
            images, labels = own_sets(0)
        _check_set(images, labels, data)
        device = images.device if device is None else torch.device(device)
        if precision == "bfloat16":
            check_bfloat16(device)
        architecture = dict(architecture or {})
        if network == "convnet":
            architecture = {"depth": default_depth(*data.image_shape[1:]), **architecture}
        layout = memory_format(empty_network(network, architecture, data, device), device)
        scale = 1 / preprocessing.deviation if protocol.unit_variance else 1.0
        # Test images are whitened once: that costs as much as a test.
        test_images = in_model_space(data.test_images, preprocessing, device, layout).mul_(scale)
        return cls(
            _in_layout(images.detach().to(device, torch.float32), layout).mul_(scale),
            labels.to(device, torch.int64),
            own_sets,
            data,
            test_images,
            data.test_labels.to(device),
            device,
            layout,
            scale,
            protocol,
            network,
            architecture,
            precision,
            seed,
        )

    def make_trainer(self) -> Trainer:
        """A trainer, with buffers of its own for the set where each network has its own."""
        network = empty_network(self.network, self.architecture, self.data, self.device)
        network.to(memory_format=self.layout)
        images, labels = self.images, self.labels
        if self.own_sets is not None:
            images, labels = images.clone(), labels.clone()
        return Trainer(network, images, labels, self.protocol, precision=self.precision)

    def start(self, trainer: Trainer, index: int) -> None:
        """Make a trainer ready for a network."""
        if self.own_sets is not None:
            images, labels = self.own_sets(index)
            _check_set(images, labels, self.data)
            if len(images) != len(trainer.images):
                raise ValueError(
                    f"the networks' sets must be of one size; got one of {len(images)} images beside "
                    f"{len(trainer.images)}"
                )
            trainer.images.copy_(images).mul_(self.scale)
            trainer.labels.copy_(labels)
        trainer.restart(network_seed(self.seed, index))

    def test(self, trainer: Trainer) -> float | None:
        """Accuracy of a trainer's network in percent; None where it diverged."""
        return accuracy(trainer.network, self.test_images, self.test_labels)


def _in_layout(images: Tensor, layout: torch.memory_format) -> Tensor:
    """A copy of images [N, C, H, W] in a layout, with its strides even where a size of one leaves them open."""
    return torch.empty(images.shape, device=images.device, memory_format=layout).copy_(images)


def _check_settings(
    networks: int, precision: str, evaluate_every: int, together: int | None, earlier: Sequence[Curve]
) -> None:
    if networks < 1:
        raise ValueError(f"networks must be at least 1; got {networks}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}; got {precision!r}")
    if evaluate_every < 0:
        raise ValueError(f"evaluate_every must be a number of epochs, or 0 for the last only; got {evaluate_every}")
    if together is not None and together < 1:
        raise ValueError(f"together must be at least 1, or None; got {together}")
    if earlier and len(earlier) != networks:
        raise ValueError(f"earlier must hold a curve for each of the {networks} networks; got {len(earlier)}")


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
            f"labels must be integers [{len(images)}], one per image; got {labels.dtype} {list(labels.shape)}"
        )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= data.num_classes:
        raise ValueError(
            f"labels must be 0 to {data.num_classes - 1}, the {data.num_classes} classes of {data.name}; "
            f"got {low} to {high}"
        )
