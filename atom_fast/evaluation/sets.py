"""Sets to evaluate that were not distilled here: selected real images, files of the public code, image folders."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from atom_fast._seeds import derive_seed
from atom_fast.data.dataset import ImageData
from atom_fast.data.decoding import decode_images
from atom_fast.data.partition import check_partition, make_sheets
from atom_fast.data.sampling import check_class_sizes, describe_small_classes
from atom_fast.data.sources import _class_names, _labelled_files
from atom_fast.data.whitening import Preprocessing, fit_preprocessing
from atom_fast.distillation.config import PRESETS, preset
from atom_fast.distillation.pool import easiest, trained_pool
from atom_fast.evaluation.accuracy import likeliest_space
from atom_fast.evaluation.coresets import (
    forgetting_selection,
    herding_selection,
    k_center_selection,
    random_selection,
    watch_training,
)
from atom_fast.exports.folder import folder_names
from atom_fast.foreign.recognised import open_foreign
from atom_fast.names import FEATURES, PREPROCESSINGS, SELECTIONS, WATCHED_EPOCHS
from atom_fast.synthetic import SyntheticSet, recognised_sets
from atom_fast.training.protocols import Protocol, get_protocol


def select(
    data: ImageData,
    method: str,
    ipc: int = 1,
    *,
    partition: int = 1,
    preprocessing: str | Preprocessing = "auto",
    features: str = "embedding",
    protocol: Protocol | str = "paper",
    epochs: int = WATCHED_EPOCHS,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> SyntheticSet:
    """Select real images as a set that can be saved and evaluated like a distilled one.

    Args:
        data: the real images.
        method: "random", "herding", "k-center", "forgetting" (the most often forgotten), "least-forgetting", "easy"
            (random ones of the half that the pool of the preset "best" finds easiest), or "full" for the whole training
            set.
        ipc: stored images per class; not used by "full".
        partition: choose partition^2 times as many images, and put so many on each stored one, shrunk: what to compare
            with synthetic sets of this partition. 1: whole images.
        preprocessing: kind of the map to model space, fitted on the training set
            (:func:`~atom_fast.data.whitening.fit_preprocessing`); "auto" is the kind that `distill` uses for such data;
            or a fitted map.
        features: space in which herding and k-center measure distances: "embedding" of a ConvNet trained on the whole
            training set in model space, or "pixels" in model space.
        protocol: how that network, or the one that forgets, is trained, or the protocol's name; its epochs are not
            used, and for "easy" only its augmentation is.
        epochs: of that network, or of those of the pool.
        seed: of the random choice, or of the network.
        device: where to compute; None: where the images are.
        progress: show progress bars on standard error.

    Returns:
        The set on the CPU, ordered by class; its metadata hold the method, its settings and ``indices``, positions in
        the training set.

    Raises:
        ValueError: an unknown method, kind of features or preprocessing, a partition that does not divide the images'
            sides or goes with "full", or a class has fewer images.
    """
    for name, value, accepted in (("method", method, SELECTIONS), ("features", features, FEATURES)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
    check_partition(partition, *data.image_shape[1:])
    if method == "full" and partition > 1:
        raise ValueError(f"method 'full' takes every training image as it is: its partition must be 1; got {partition}")
    if method != "full":  # before a network is trained
        check_class_sizes(_easy_half(data) if method == "easy" else data, ipc, partition=partition)
    each = ipc * partition**2
    space = preprocessing
    if not isinstance(space, Preprocessing):
        kind = preset(preprocessing=preprocessing).for_data(data.image_shape, data.name).preprocessing
        space = fit_preprocessing(data.train_images, kind, progress=progress)
    settings = {"protocol": protocol, "epochs": epochs, "seed": seed, "device": device, "progress": progress}
    if method == "full":
        chosen = data.class_index
    elif method == "random":
        chosen = random_selection(data, each, seed)
    elif method == "easy":
        place = data.train_images.device if device is None else torch.device(device)
        augmentation = (get_protocol(protocol) if isinstance(protocol, str) else protocol).augmentation
        config = preset("best", pool_epochs=epochs, augmentation=augmentation).for_data(data.image_shape, data.name)
        pool = trained_pool(data.to(place), space.to(place), config, progress=progress)
        chosen = random_selection(_easy_half(data, pool.scores), each, seed)
    elif method in ("forgetting", "least-forgetting"):
        _, events = watch_training(data, space, **settings)
        chosen = forgetting_selection(events, data, each, least=method == "least-forgetting")
    else:
        if features == "embedding":
            rows, _ = watch_training(data, space, **settings)
        else:
            rows = space.to_model(data.train_images).flatten(1)
        chosen = {"herding": herding_selection, "k-center": k_center_selection}[method](rows, data, each)
    details: dict[str, object] = {"seed": seed}
    if method in ("herding", "k-center"):
        details["features"] = features
    if method == "easy":
        details |= {"pool_networks": PRESETS["best"]["pool_networks"], "epochs": epochs}
    elif method not in ("random", "full") and details.get("features") != "pixels":
        details |= {"protocol": str(getattr(protocol, "name", protocol)), "epochs": epochs}
    about = {"method": method, "selection": {**details, "indices": chosen.tolist()}}
    return _real_set(data, chosen, space, about, partition)


def _easy_half(data: ImageData, scores: Tensor | None = None) -> ImageData:
    """Return the data with the easiest half of each class by ``scores`` [N]; None for one that is as large."""
    scores = torch.zeros(len(data.train_labels)) if scores is None else scores
    half = easiest(data, scores.to(data.train_images.device), 0.5)
    return dataclasses.replace(half, name=f"the easiest half of {data.name}")


def random_sets(data: ImageData, synthetic: SyntheticSet, *, seed: int = 0) -> Callable[[int], SyntheticSet]:
    """Return the baseline Random for a set: a function from a network's number to its own random real images.

    They are as many per class, in the set's model space and with its partition. Each network has its own selection
    because the selection moves the accuracy more than the network does (by 4 against 1 points at one digit per class):
    the deviation over networks on a single selection would claim a precision that Random does not have.

    Args:
        data: the real images.
        synthetic: the set to compare with.
        seed: of the selections.

    Raises:
        ValueError: the set's classes differ in size, or a class has fewer real images.
    """
    ipc, space, partition = synthetic.ipc, synthetic.preprocessing, synthetic.partition
    if ipc is None:
        raise ValueError("Random needs a set with as many images in every class; leave it out (--no-random)")
    if small := describe_small_classes(data, ipc * partition**2):
        raise ValueError(
            f"Random needs {ipc * partition**2} images of every class, but {small}; leave it out (--no-random)"
        )
    options = {"partition": partition, "preprocessing": space}
    return lambda index: select(data, "random", ipc, **options, seed=derive_seed(seed, index))


def _real_set(
    data: ImageData, chosen: Tensor, preprocessing: Preprocessing, about: dict, partition: int
) -> SyntheticSet:
    metadata = {"dataset": data.name, "dataset_fingerprint": data.fingerprint, **about}
    images = preprocessing.to(chosen.device).to_model(data.train_images[chosen])
    sheets, labels = make_sheets(images, partition).cpu(), data.train_labels[chosen][:: partition**2].cpu()
    return SyntheticSet(sheets, labels, data.class_names, preprocessing.to("cpu"), metadata, partition)


def read_set(
    path: str | os.PathLike,
    data: ImageData,
    *,
    labels: str | os.PathLike | None = None,
    preprocessing: str | None = None,
    partition: int | None = None,
    experiment: int | None = None,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> SyntheticSet:
    """Read a set for the classes of ``data`` that another program wrote.

    Args:
        path: a file that another project of dataset distillation saved (`atom_fast.foreign`), or a folder with image
            files in ``train/<class>/`` or ``<class>/``, named as the classes of ``data`` or as
            :meth:`SyntheticSet.export` does.
        data: the real images it is for.
        labels: file of the labels, where images and labels are apart; None finds ``labels_*.pt`` beside
            ``images_*.pt``.
        preprocessing: the space of the images: a kind of map fitted on the training images of ``data``, or one of
            :data:`~atom_fast.names.SPACES`. None recognises it, for a folder "standard"; where several stay possible
            one short network is trained on each, and the best is kept.
        partition: rows and columns of images on each stored one; None recognises it.
        experiment: number of the set in a file that holds several, counted from 0; None: the first, or DataDAM's last.
        device: where to train these networks; None: the GPU, if there is one.
        progress: show progress bars on standard error.

    Returns:
        The set; of a file ``metadata["recognised"]`` says what was found, and why.

    Raises:
        FileNotFoundError: there is no such file or folder, or no images are in it.
        ValueError: an unknown kind, no such experiment, other classes than ``data`` has, or a file that holds something
            else.
    """
    path = Path(path)
    if path.is_dir():
        if preprocessing is not None and preprocessing not in PREPROCESSINGS:
            raise ValueError(f"preprocessing must be one of {', '.join(PREPROCESSINGS)}; got {preprocessing!r}")
        images, numbers = _read_folder(path, data, progress)
        space = fit_preprocessing(data.train_images, preprocessing or "standard", progress=progress)
        images = space.to_model(images.to(data.train_images.device)).cpu()
        about = {"dataset": data.name, "method": "folder", "source": str(path)}
        return SyntheticSet(images, numbers, data.class_names, space.to("cpu"), about)
    recognised = open_foreign(
        path, data, labels=labels, preprocessing=preprocessing, partition=partition,
        experiment=experiment, progress=progress,
    )  # fmt: skip
    sets = list(recognised_sets(recognised))
    if len(sets) == 1:
        return sets[0]
    best, accuracies = likeliest_space(sets, data, device=device, progress=progress)
    found = sets[best].metadata["recognised"]
    found["chosen"] = "by one short network on each, tested on real training images: " + ", ".join(
        f"{candidate.space} {'diverged' if accuracy is None else f'{accuracy:.1f} %'}"
        for candidate, accuracy in zip(recognised.candidates, accuracies, strict=True)
    )
    return sets[best]


def _read_folder(path: Path, data: ImageData, progress: bool) -> tuple[Tensor, Tensor]:
    """uint8 [N, C, H, W] and int64 [N], in the order of the classes of ``data``."""
    split = path / "train" if (path / "train").is_dir() else path
    present = set(_class_names(split))
    for names in (data.class_names, folder_names(data.class_names)):
        if present <= set(names):
            labelled = _labelled_files(split, names)
            break
    else:
        unknown = sorted(present - set(data.class_names))
        raise ValueError(f"{split} holds folders that are not classes of {data.name}: {', '.join(unknown[:5])}")
    images = decode_images([file for file, _ in labelled], progress=progress)
    if images.shape[1] == 1:
        images = images.expand(-1, data.image_shape[0], -1, -1)  # grey files of a data set in colour
    return images, torch.tensor([label for _, label in labelled], dtype=torch.int64)
