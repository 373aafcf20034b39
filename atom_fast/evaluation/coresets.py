"""Selection of real images per class, as a baseline for distilled ones: the coresets of the literature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import check_class_sizes
from atom_fast.data.whitening import Preprocessing
from atom_fast.names import WATCHED_EPOCHS
from atom_fast.networks.layers import memory_format
from atom_fast.training.protocols import Protocol, get_protocol
from atom_fast.training.trainer import (
    Trainer,
    empty_network,
    network_seed,
    repeatable_convolutions,
    training_images,
)


def random_selection(data: ImageData, ipc: int, seed: int) -> Tensor:
    """Draw ``ipc`` training images per class, uniformly and without replacement: the row "Random" of the tables.

    The indices are drawn on the CPU, so that they do not depend on the device of the data.

    Args:
        data: the real images, K classes.
        ipc: images per class.
        seed: of the generator.

    Returns:
        int64 [K * ipc], indices into ``data.train_images`` ordered by class, on the device of ``data``.

    Raises:
        ValueError: ``ipc`` is below 1, or a class has fewer images.
    """
    generator = torch.Generator().manual_seed(seed)
    return _by_class(data, ipc, lambda indices: torch.randperm(len(indices), generator=generator)[:ipc])


def herding_selection(features: Tensor, data: ImageData, ipc: int) -> Tensor:
    """Choose images whose mean feature follows the mean of their class, one after the other (Welling 2009).

    Each next image is the one that brings the mean of the chosen images closest to the mean of the class.

    Args:
        features: floating point [N, D], one row per training image.
        data, ipc: as in :func:`random_selection`, with the same result and errors.
    """
    features = _checked(features, data)

    def choose(indices: Tensor) -> Tensor:
        rows = features[indices]
        mean, total = rows.mean(0), torch.zeros_like(rows[0])
        taken = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
        chosen = []
        for count in range(1, ipc + 1):
            distances = ((total + rows) / count - mean).square().sum(1)
            chosen.append(distances.masked_fill(taken, torch.inf).argmin())
            taken[chosen[-1]] = True
            total += rows[chosen[-1]]
        return torch.stack(chosen)

    return _by_class(data, ipc, choose)


def k_center_selection(features: Tensor, data: ImageData, ipc: int) -> Tensor:
    """Choose images such that no image of their class is far from all of them, greedily (Sener and Savarese 2018).

    The first image is the one nearest to the mean of the class, each next one the farthest from the chosen images.

    Args:
        features: floating point [N, D], one row per training image.
        data, ipc: as in :func:`random_selection`, with the same result and errors.
    """
    features = _checked(features, data)

    def choose(indices: Tensor) -> Tensor:
        rows = features[indices]
        chosen = [(rows - rows.mean(0)).square().sum(1).argmin()]
        nearest = torch.full_like(rows[:, 0], torch.inf)
        for _ in range(ipc - 1):
            nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
            nearest[chosen[-1]] = -1  # below every distance, also for duplicate images
            chosen.append(nearest.argmax())
        return torch.stack(chosen)

    return _by_class(data, ipc, choose)


def forgetting_selection(events: Tensor, data: ImageData, ipc: int, *, least: bool = False) -> Tensor:
    """Choose the images that a network forgot most often while it learned (Toneva et al. 2019), or least often.

    Ties go to the image that comes first in the training set.

    Args:
        events: [N], forgetting events per training image, see :class:`ForgettingCounter`.
        data, ipc: as in :func:`random_selection`, with the same result and errors.
        least: choose the images with the fewest events.
    """
    _check_rows(events, data)
    return _by_class(data, ipc, lambda indices: torch.argsort(events[indices], descending=not least, stable=True)[:ipc])


class ForgettingCounter:
    """Count how often each image is misclassified right after it was classified correctly.

    Args:
        count: N, the number of images.
        device: of the counters.
    """

    def __init__(self, count: int, device: torch.device | str):
        self._correct = torch.zeros(count, dtype=torch.bool, device=device)
        self._learned = torch.zeros(count, dtype=torch.bool, device=device)
        self._events = torch.zeros(count, dtype=torch.int64, device=device)
        self._shown = torch.zeros(count, dtype=torch.int64, device=device)

    def update(self, indices: Tensor, correct: Tensor) -> None:
        """Record whether the images at ``indices``, int64 [B] without repetition, are classified correctly now."""
        self._events[indices] += self._correct[indices] & ~correct
        self._correct[indices] = correct
        self._learned[indices] |= correct
        self._shown[indices] += 1

    @property
    def events(self) -> Tensor:
        """Events per image, int64 [N]; one never classified correctly counts as forgotten each time it was shown."""
        return torch.where(self._learned, self._events, self._shown)


@repeatable_convolutions()
def watch_training(
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    protocol: Protocol | str = "paper",
    epochs: int = WATCHED_EPOCHS,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Train a ConvNet on the whole training set; return the features and the forgetting events of every image.

    Args:
        data: the real images.
        preprocessing: to the model space the network is trained in.
        protocol: how to train, or its name; its epochs are not used.
        epochs: passes over the training set.
        seed: of weights, order and augmentation.
        device: where to train; None means where the images are.
        progress: show a progress bar on standard error.

    Returns:
        The input of the classifier after the last epoch, float32 [N, D], and the events, int64 [N], counted on the
        augmented images of the mini-batches; both on the device of ``data``.

    Raises:
        ValueError: ``epochs`` is below 1, or an unknown protocol.
    """
    from tqdm import tqdm

    protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol
    protocol = dataclasses.replace(protocol, epochs=epochs)
    trainer = _whole_set_trainer(data, preprocessing, protocol, device)
    trainer.restart(network_seed(seed, 0))
    counter = ForgettingCounter(len(trainer.images), trainer.images.device)
    steps = -(-len(trainer.images) // protocol.batch_size)
    with tqdm(total=epochs * steps, desc="watch training", unit="step", disable=not progress) as bar:
        for epoch in range(epochs):
            for indices in trainer.begin_epoch(epoch).split(protocol.batch_size):
                predicted = trainer.step(indices)
                counter.update(indices, predicted.argmax(1) == trainer.labels[indices])
                bar.update()
    network: Any = trainer.network.eval()
    with torch.no_grad():
        features = torch.cat([some for some, _ in trainer.in_batches(lambda images: network.embed(images).float())])
    home = data.train_images.device
    return features.to(home), counter.events.to(home)


def _whole_set_trainer(data: ImageData, preprocessing: Preprocessing, protocol: Protocol, device) -> Trainer:
    device = data.train_images.device if device is None else torch.device(device)
    network = empty_network("convnet", {}, data, device)
    layout = memory_format(network, device)
    images, gather = training_images(data, preprocessing, device, layout)
    return Trainer(network.to(memory_format=layout), images, data.train_labels.to(device), protocol, gather=gather)


def _checked(features: Tensor, data: ImageData) -> Tensor:
    """Features with one row per image, in float32 or wider."""
    if features.dim() != 2 or not features.is_floating_point():
        raise ValueError(f"features must be floating point [N, D]; got {features.dtype} of {list(features.shape)}")
    _check_rows(features, data)
    if not features.isfinite().all():
        raise ValueError("features must be finite; some values are NaN or infinite")
    return features if features.dtype == torch.float64 else features.float()


def _check_rows(values: Tensor, data: ImageData) -> None:
    if len(values) != len(data.train_images):
        raise ValueError(
            f"there must be a row for each of the {len(data.train_images)} training images of {data.name}; "
            f"got {len(values)}"
        )


def _by_class(data: ImageData, ipc: int, choose: Callable[[Tensor], Tensor]) -> Tensor:
    """Indices of the images that ``choose`` picks, by position, from each class."""
    check_class_sizes(data, ipc)
    chosen = []
    for indices in data.class_index.split(data.class_sizes):
        chosen.append(indices[choose(indices).to(indices.device)])
    return torch.cat(chosen)
