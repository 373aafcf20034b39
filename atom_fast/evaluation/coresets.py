"""Real images chosen as a baseline for distilled ones, in each class by itself: the coresets of the literature."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.sampling import check_class_sizes
from atom_fast.data.whitening import Preprocessing
from atom_fast.evaluation.protocols import Protocol, get_protocol
from atom_fast.evaluation.training import (
    Trainer,
    empty_network,
    in_batches,
    in_model_space,
    network_seed,
    repeatable_convolutions,
)
from atom_fast.networks.layers import memory_format

METHODS = ("random", "herding", "k-center", "forgetting", "least-forgetting", "full")
EPOCHS = 20  # of the network that is watched: what separates the images shows long before it has learned them all


def random_selection(data: ImageData, ipc: int, seed: int) -> Tensor:
    """``ipc`` training images of every class, uniformly and without replacement: the row "Random" of the tables.

    The choice is drawn on the CPU, so that it is the same whatever device the data are on.

    Args:
        data: the real images, K classes.
        ipc: images a class.
        seed: of the choice.

    Returns:
        int64 [K * ipc], indices into ``data.train_images`` ordered by class, on the device of ``data``.

    Raises:
        ValueError: ``ipc`` is below 1, or a class has fewer images.
    """
    generator = torch.Generator().manual_seed(seed)
    return _by_class(data, ipc, lambda indices: torch.randperm(len(indices), generator=generator)[:ipc])


def herding_selection(features: Tensor, data: ImageData, ipc: int) -> Tensor:
    """Images whose mean feature follows that of their class, chosen one after the other (Welling 2009).

    The image taken next is the one that brings the mean of those taken closest to the mean of the class.

    Args:
        features: floating point [N, D] of the training images.
        data, ipc: as in :func:`random_selection`, which says what is returned and raised, too.
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
    """Images that leave no image of their class far from all of them, greedily (Sener and Savarese 2018).

    The first is the one nearest to the mean of the class; then always the one farthest from those taken so far.

    Args:
        features: floating point [N, D] of the training images.
        data, ipc: as in :func:`random_selection`, which says what is returned and raised, too.
    """
    features = _checked(features, data)

    def choose(indices: Tensor) -> Tensor:
        rows = features[indices]
        chosen = [(rows - rows.mean(0)).square().sum(1).argmin()]
        nearest = torch.full_like(rows[:, 0], torch.inf)
        for _ in range(ipc - 1):
            nearest = torch.minimum(nearest, (rows - rows[chosen[-1]]).square().sum(1))
            nearest[chosen[-1]] = -1  # below every distance, also where an image is there twice
            chosen.append(nearest.argmax())
        return torch.stack(chosen)

    return _by_class(data, ipc, choose)


def forgetting_selection(events: Tensor, data: ImageData, ipc: int, *, least: bool = False) -> Tensor:
    """Images that a network forgot most often while it learned (Toneva et al. 2019), or least often.

    Of images with as many events, the earlier ones in the training set are taken.

    Args:
        events: [N], forgetting events of every training image, see :class:`ForgettingCounter`.
        data, ipc: as in :func:`random_selection`, which says what is returned and raised, too.
        least: take those with the fewest events.
    """
    _check_rows(events, data)
    return _by_class(data, ipc, lambda indices: torch.argsort(events[indices], descending=not least, stable=True)[:ipc])


class ForgettingCounter:
    """Counts how often each image is misclassified right after it was classified correctly.

    Args:
        count: N, the number of images.
        device: of what is counted.
    """

    def __init__(self, count: int, device: torch.device | str):
        self._correct = torch.zeros(count, dtype=torch.bool, device=device)
        self._learned = torch.zeros(count, dtype=torch.bool, device=device)
        self._events = torch.zeros(count, dtype=torch.int64, device=device)
        self._shown = torch.zeros(count, dtype=torch.int64, device=device)

    def update(self, indices: Tensor, correct: Tensor) -> None:
        """Take in whether the images at ``indices``, int64 [B] without repetition, are classified correctly now."""
        self._events[indices] += self._correct[indices] & ~correct
        self._correct[indices] = correct
        self._learned[indices] |= correct
        self._shown[indices] += 1

    @property
    def events(self) -> Tensor:
        """int64 [N]. An image that was never classified correctly counts as forgotten each time it was shown."""
        return torch.where(self._learned, self._events, self._shown)


@repeatable_convolutions()
def watch_training(
    data: ImageData,
    preprocessing: Preprocessing,
    *,
    protocol: Protocol | str = "paper",
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Train a ConvNet on the whole training set: the features and the forgetting events of every image.

    Args:
        data: the real images.
        preprocessing: to the model space the network is trained in.
        protocol: how to train, or the name of a preset, but for the epochs.
        epochs: passes over the training set.
        seed: of weights, order and augmentation.
        device: where to train; None means where the images are.
        progress: show a progress bar on standard error.

    Returns:
        The embedding that the classifier gets after the last epoch, float32 [N, D], and the events int64 [N], counted
        as each image is shown, augmented, in its mini-batch; both on the device of ``data``.

    Raises:
        ValueError: ``epochs`` is below 1, or the protocol is not known.
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
    trainer.network.eval()
    with torch.no_grad():
        features = in_batches(lambda images: trainer.network.embed(images).float(), trainer.images, trainer.labels)
        features = torch.cat([some for some, _ in features])
    home = data.train_images.device
    return features.to(home), counter.events.to(home)


def _whole_set_trainer(data: ImageData, preprocessing: Preprocessing, protocol: Protocol, device) -> Trainer:
    device = data.train_images.device if device is None else torch.device(device)
    network = empty_network("convnet", {}, data, device)
    layout = memory_format(network, device)
    images = in_model_space(data.train_images, preprocessing, device, layout)
    return Trainer(network.to(memory_format=layout), images, data.train_labels.to(device), protocol)


def _checked(features: Tensor, data: ImageData) -> Tensor:
    """Features with one row an image, in float32 or wider."""
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
    """What ``choose`` picks, as places, of each class's indices."""
    check_class_sizes(data, ipc)
    chosen = []
    for indices in data.class_index.split(data.class_sizes):
        chosen.append(indices[choose(indices).to(indices.device)])
    return torch.cat(chosen)
