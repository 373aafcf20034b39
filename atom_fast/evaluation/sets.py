"""Sets to evaluate that were not distilled here: chosen real images, files of the public code, folders of images."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.decoding import decode_images
from atom_fast.data.sampling import check_class_sizes
from atom_fast.data.sources import _class_names, _labelled_files
from atom_fast.data.whitening import KINDS, Preprocessing, fit_preprocessing
from atom_fast.distillation.config import DistillConfig
from atom_fast.evaluation.coresets import (
    EPOCHS,
    METHODS,
    forgetting_selection,
    herding_selection,
    k_center_selection,
    random_selection,
    watch_training,
)
from atom_fast.evaluation.protocols import Protocol
from atom_fast.synthetic import PUBLIC_NORMALIZATION, SyntheticSet, folder_names, load_public

FEATURES = ("embedding", "pixels")


def select(
    data: ImageData,
    method: str,
    ipc: int = 1,
    *,
    preprocessing: str | Preprocessing = "auto",
    features: str = "embedding",
    protocol: Protocol | str = "paper",
    epochs: int = EPOCHS,
    seed: int = 0,
    device: torch.device | str | None = None,
    progress: bool = True,
) -> SyntheticSet:
    """Choose real images, as a set that can be saved and evaluated like a distilled one.

    Args:
        data: the real images.
        method: "random", "herding", "k-center", "forgetting" (the most often forgotten), "least-forgetting", or "full"
            for the whole training set.
        ipc: images a class; not used by "full".
        preprocessing: kind of the map to model space, fitted on the training set; see
            :func:`~atom_fast.data.whitening.fit_preprocessing`; "auto" is that of a distillation of such data; or one
            that was fitted before.
        features: what herding and k-center measure distances in: "embedding", that of a ConvNet trained on the whole
            training set in model space, or "pixels", in model space too.
        protocol: how that network, and the one that forgets, are trained, but for the epochs; a preset or its name.
        epochs: how long.
        seed: of the random choice, or of the network.
        device: where to compute; None means where the images are.
        progress: show progress bars on standard error.

    Returns:
        The set on the CPU, ordered by class; its metadata hold the method, its settings and ``indices``, the places of
        the images in the training set.

    Raises:
        ValueError: an unknown method, kind of features or preprocessing, or a class has fewer images.
    """
    for name, value, accepted in (("method", method, METHODS), ("features", features, FEATURES)):
        if value not in accepted:
            raise ValueError(f"{name} must be one of {', '.join(accepted)}; got {value!r}")
    if method != "full":
        check_class_sizes(data, ipc)  # before a network is trained
    space = preprocessing
    if not isinstance(space, Preprocessing):
        kind = DistillConfig(preprocessing=preprocessing).for_data(data.image_shape, data.name).preprocessing
        space = fit_preprocessing(data.train_images, kind, progress=progress)
    settings = {"protocol": protocol, "epochs": epochs, "seed": seed, "device": device, "progress": progress}
    if method == "full":
        chosen = data.class_index
    elif method == "random":
        chosen = random_selection(data, ipc, seed)
    elif method in ("forgetting", "least-forgetting"):
        _, events = watch_training(data, space, **settings)
        chosen = forgetting_selection(events, data, ipc, least=method == "least-forgetting")
    else:
        if features == "embedding":
            rows, _ = watch_training(data, space, **settings)
        else:
            rows = space.to_model(data.train_images).flatten(1)
        chosen = {"herding": herding_selection, "k-center": k_center_selection}[method](rows, data, ipc)
    details = {"seed": seed}
    if method in ("herding", "k-center"):
        details["features"] = features
    if method not in ("random", "full") and details.get("features") != "pixels":
        details |= {"protocol": str(getattr(protocol, "name", protocol)), "epochs": epochs}
    return _real_set(data, chosen, space, {"method": method, "selection": {**details, "indices": chosen.tolist()}})


def _real_set(data: ImageData, chosen: Tensor, preprocessing: Preprocessing, about: dict) -> SyntheticSet:
    metadata = {"dataset": data.name, "dataset_fingerprint": data.fingerprint, **about}
    images = preprocessing.to_model(data.train_images[chosen])
    labels = data.train_labels[chosen]
    return SyntheticSet(images.cpu(), labels.cpu(), data.class_names, preprocessing.to("cpu"), metadata)


def read_set(
    path: str | os.PathLike,
    data: ImageData,
    *,
    preprocessing: str | None = None,
    experiment: int = 0,
    progress: bool = True,
) -> SyntheticSet:
    """Read what other programs wrote as a set for the classes of ``data``.

    Args:
        path: a ``.pt`` that the public DC, DSA, DM or DataDAM program saved, or a folder with image files in
            ``train/<class>/`` or ``<class>/``, named as the classes of ``data`` or as :meth:`SyntheticSet.export` does.
        data: the real images it is for.
        preprocessing: kind of the map from pixels to the model space of the set, fitted on the training images of
            ``data``; None is the normalisation in the public code's constants for a ``.pt`` of a data set that it has
            them for, otherwise "standard". A set that was whitened needs the kind that it was whitened with.
        experiment: which set of a ``.pt`` with several, counted from 0.
        progress: show progress bars on standard error.

    Raises:
        FileNotFoundError: there is no such file or folder, or no images are in it.
        ValueError: an unknown kind, no such experiment, classes that are not those of ``data``, or a file that holds
            something else.
    """
    path = Path(path)
    if preprocessing is not None and preprocessing not in KINDS:
        raise ValueError(f"preprocessing must be one of {', '.join(KINDS)}; got {preprocessing!r}")
    if path.is_dir():
        images, labels = _read_folder(path, data, progress)
        space = fit_preprocessing(data.train_images, preprocessing or "standard", progress=progress)
        images = space.to_model(images.to(data.train_images.device)).cpu()
        method = "folder"
    else:
        pairs = load_public(path)
        if not 0 <= experiment < len(pairs):
            raise ValueError(f"{path} holds {len(pairs)} sets, numbered from 0; got experiment {experiment}")
        images, labels = pairs[experiment]
        space = _public_preprocessing(data, preprocessing, progress)
        method = "public"
    about = {"dataset": data.name, "method": method, "source": str(path)}
    return SyntheticSet(images, labels, data.class_names, space.to("cpu"), about)


def _public_preprocessing(data: ImageData, kind: str | None, progress: bool) -> Preprocessing:
    constants = PUBLIC_NORMALIZATION.get(data.name)
    if kind is None and constants is not None:
        return Preprocessing(*(torch.tensor(values) for values in constants))
    return fit_preprocessing(data.train_images, kind or "standard", progress=progress)


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
