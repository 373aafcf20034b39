"""Load a data set: scikit-learn's digits, CIFAR, Tiny ImageNet, or a folder of images."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from atom_fast.data.archives import download_file, unpack_zip
from atom_fast.data.cifar import read_cifar
from atom_fast.data.dataset import ImageData
from atom_fast.data.decoding import IMAGE_SUFFIXES, check_resolution, decode_images, resize_images
from atom_fast.names import SOURCES, first_few

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

Split = tuple[np.ndarray, Sequence[int]]  # images uint8 [N, C, H, W], labels [N]
LabelledFiles = Sequence[tuple[Path, int]]

DEFAULT_DATA_DIR = Path("data")

_DIGITS_TRAIN = 1400  # of 1,797 images; the other 397 are the test set
_DIGITS_SEED = 0  # fixes the split, so that results of different runs compare
_CIFAR_MEGABYTES = {"cifar10": 170, "cifar100": 169}
_TINY_FOLDER = "tiny-imagenet-200"
_TINY_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"
_TINY_MD5 = "90528d7ca1a48142e341f4ef8d21d0de"
_TINY_MEGABYTES = 248
_PUBLISHED = {"cifar10": (10, 32), "cifar100": (100, 32), "tiny": (200, 64)}  # classes, side of the images in pixels
_TINY_PARTS = ("wnids.txt", "words.txt", "train", "val/images", "val/val_annotations.txt")


def load_data(
    name: str,
    data_dir: str | os.PathLike | None = None,
    *,
    download: bool = False,
    resolution: int | None = None,
    progress: bool = True,
) -> ImageData:
    """Load a data set as uint8 tensors on the CPU.

    - ``"digits"``: scikit-learn's handwritten digits, [1, 8, 8], 1,400 training and 397 test images in a fixed
      stratified split. They are part of scikit-learn; ``data_dir`` is not used.
    - ``"cifar10"``, ``"cifar100"``: torchvision's files, [3, 32, 32]. ``data_dir`` is ``cifar-10-batches-py`` or
      ``cifar-100-python``, or the folder that contains it.
    - ``"tiny"``: Tiny ImageNet, [3, 64, 64]. ``data_dir`` is ``tiny-imagenet-200``, or the folder that contains it or
      its zip file. The validation set is the test set; classes are in the order of ``wnids.txt``.
    - These three are also read from image files, in ``data_dir/NAME/train/<class>/`` and ``test/<class>/`` (or
      ``val/<class>/``), or without ``NAME/``. Image files take precedence, with a message on standard error.
    - ``"folder"``: images in ``data_dir/train/<class>/`` and ``data_dir/test/<class>/`` (or ``val/<class>/`` if there
      is no ``test``), classes in the order of their names.

    Args:
        name: one of these five names.
        data_dir: folder of the data; required by ``"folder"``, otherwise ``data`` by default.
        download: download CIFAR or Tiny ImageNet if ``data_dir`` does not contain it; reported on standard error.
        resolution: crop and resize to square images of this side in pixels; None keeps the size.
        progress: show progress bars with the remaining time on standard error.

    Returns:
        The data set; all its tensors are on the CPU.

    Raises:
        ValueError: unknown name, bad ``resolution``, a broken image or zip file, images of different sizes without a
            ``resolution``, test classes that are not training classes, or image files that do not belong to ``name``.
        FileNotFoundError: no data; the message names the expected files and folder, and how to get them.
        ImportError: the package that contains or reads the data cannot be imported.
        RuntimeError: a download failed.
    """
    if name not in SOURCES:
        raise ValueError(f"data set must be one of {', '.join(SOURCES)}; got {name!r}")
    check_resolution(resolution)
    if name == "digits":
        return dataclasses.replace(_load_digits(resolution), source="scikit-learn")
    if data_dir is None and name == "folder":
        raise ValueError("data set 'folder' needs a data_dir (--data-dir DIR) that holds train/ and test/ (or val/)")
    root = Path(DEFAULT_DATA_DIR if data_dir is None else data_dir).expanduser()
    if folder := image_folder(root, name):
        root, data = folder, _load_published(name, folder, resolution, progress)
    elif name == "tiny":
        data = _load_tiny(root, download, resolution, progress)
    elif name == "folder":
        data = _load_folder(root, resolution, progress)
    else:
        data = _load_cifar(name, root, download, resolution)
    return dataclasses.replace(data, source=str(root.absolute()))


def _load_digits(resolution: int | None) -> ImageData:
    try:
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split
    except ImportError as error:
        raise ImportError("data set 'digits' is part of scikit-learn: `pip install scikit-learn`") from error
    digits: Any = load_digits()  # scikit-learn's stubs give a tuple, which only return_X_y=True returns
    images = np.rint(digits.images * (255 / 16)).astype(np.uint8)[:, None]  # stored as 0 to 16
    train, test = train_test_split(
        np.arange(len(images)), train_size=_DIGITS_TRAIN, stratify=digits.target, random_state=_DIGITS_SEED
    )
    train_split, test_split = ((images[indices], digits.target[indices]) for indices in (train, test))
    return _from_arrays("digits", map(str, digits.target_names), train_split, test_split, resolution)


def _load_cifar(name: str, root: Path, download: bool, resolution: int | None) -> ImageData:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise ImportError(f"data set {name!r} is read with torchvision: `pip install torchvision`") from error
    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = root.parent if root.name == dataset.base_folder else root
    try:
        class_names, (train, test) = read_cifar(dataset, root)
    except FileNotFoundError as missing:
        if not download:
            raise FileNotFoundError(
                f"{name} is missing or damaged: neither an intact {dataset.base_folder} nor {name}/train/<class>/ and "
                f"{name}/test/<class>/ in {root.absolute()}; pass download=True (--download) to fetch its "
                f"{_CIFAR_MEGABYTES[name]} MB there, or name the folder that holds it"
            ) from missing
        _log(f"{name}: torchvision downloads {_CIFAR_MEGABYTES[name]} MB from {dataset.url} to {root.absolute()}")
        class_names, (train, test) = _download_cifar(datasets.cifar.download_and_extract_archive, dataset, root)
    return _from_arrays(name, class_names, train, test, resolution)


def _download_cifar(
    fetch: Callable, dataset: type[CIFAR10], root: Path
) -> tuple[list[str], list[tuple[np.ndarray, list[int]]]]:
    try:
        fetch(dataset.url, root, filename=dataset.filename, md5=dataset.tgz_md5)
        return read_cifar(dataset, root)
    except (OSError, RuntimeError) as error:
        raise RuntimeError(
            f"could not download {dataset.url} to {root.absolute()}: {error}; "
            f"try again, or fetch it by other means and unpack it there"
        ) from error


def _from_arrays(name: str, class_names: Iterable[str], train: Split, test: Split, resolution: int | None) -> ImageData:
    tensors = []
    for images, labels in (train, test):
        tensors.append(resize_images(torch.from_numpy(images), resolution))
        tensors.append(torch.as_tensor(labels, dtype=torch.int64))
    return ImageData.from_tensors(name, tuple(class_names), *tensors)


def _load_tiny(root: Path, download: bool, resolution: int | None, progress: bool) -> ImageData:
    folder = _find_tiny(root, download, progress)
    missing = [part for part in _TINY_PARTS if not (folder / part).exists()]
    if missing:
        raise FileNotFoundError(
            f"{folder} lacks {', '.join(missing)}: not the layout of {_TINY_FOLDER}.zip "
            "(for train/<class>/ and val/<class>/ use the data set 'folder')"
        )
    wnids = (folder / "wnids.txt").read_text().split()
    train = [
        (file, label) for label, wnid in enumerate(wnids) for file in _images_under(folder / "train" / wnid / "images")
    ]
    test = _tiny_validation(folder, wnids)
    return _from_files("tiny", _tiny_names(folder, wnids), train, test, resolution, progress)


def _find_tiny(root: Path, download: bool, progress: bool) -> Path:
    """Return the unpacked folder; if there is none, unpack the zip file, after a download if allowed."""
    for folder in (root, root / _TINY_FOLDER):
        if (folder / "wnids.txt").is_file():
            return folder
    archive = root / f"{_TINY_FOLDER}.zip"
    if not archive.is_file():
        if not download:
            raise FileNotFoundError(
                f"Tiny ImageNet is missing: neither {_TINY_FOLDER}/wnids.txt, nor {archive.name}, nor "
                f"tiny/train/<class>/ and tiny/test/<class>/ in {root.absolute()}; pass download=True (--download) to "
                f"fetch its {_TINY_MEGABYTES} MB there, or name the folder that holds it"
            )
        _log(f"tiny: downloading {_TINY_MEGABYTES} MB from {_TINY_URL} to {archive.absolute()}")
        download_file(_TINY_URL, archive, md5=_TINY_MD5, progress=progress)
    _log(f"tiny: unpacking {archive.absolute()} into the same folder")
    return unpack_zip(archive, _TINY_FOLDER, progress=progress)


def _tiny_validation(folder: Path, wnids: Sequence[str]) -> LabelledFiles:
    """Read the labels of the validation images: lines of file name, wnid and bounding box, separated by tabs."""
    labels = {wnid: label for label, wnid in enumerate(wnids)}
    annotations = folder / "val/val_annotations.txt"
    labelled = []
    for number, line in enumerate(annotations.read_text().splitlines(), start=1):
        name, wnid = (line.split("\t") + [""])[:2]
        if wnid not in labels:
            raise ValueError(f"{annotations}, line {number}: {wnid!r} is not a class of {folder / 'wnids.txt'}")
        labelled.append((folder / "val/images" / name, labels[wnid]))
    return labelled


def _tiny_names(folder: Path, wnids: Sequence[str]) -> list[str]:
    """Return the first name of each class in ``words.txt``, with the wnid if two classes have the same name."""
    words = dict(line.split("\t", 1) for line in (folder / "words.txt").read_text().splitlines() if "\t" in line)
    names = [words.get(wnid, wnid).split(",")[0].strip() for wnid in wnids]
    shared = Counter(names)
    return [name if shared[name] == 1 else f"{name} ({wnid})" for name, wnid in zip(names, wnids, strict=True)]


def image_folder(root: Path, name: str) -> Path | None:
    """Return the folder with image files of a published data set, ``root/name`` or ``root``, or None."""
    if name not in _PUBLISHED:
        return None
    for folder in (root / name, root):
        splits = (folder / "train").is_dir() and any((folder / split).is_dir() for split in ("test", "val"))
        if splits and not (folder / "wnids.txt").is_file():  # a wnids.txt marks Tiny ImageNet's published layout
            return folder
    return None


def _load_published(name: str, folder: Path, resolution: int | None, progress: bool) -> ImageData:
    _log(f"{name}: reading the image files in {folder.absolute()}")
    data = _load_folder(folder, resolution, progress)
    classes, side = _PUBLISHED[name]
    shape = (3, resolution or side, resolution or side)
    if data.num_classes != classes or data.image_shape != shape:
        raise ValueError(
            f"{folder} is not {name}: expected {classes} classes of images {list(shape)}, "
            f"got {data.num_classes} of {list(data.image_shape)}"
        )
    return dataclasses.replace(data, name=name)


def _load_folder(root: Path, resolution: int | None, progress: bool) -> ImageData:
    train, test = root / "train", root / "test" if (root / "test").is_dir() else root / "val"
    if not (train.is_dir() and test.is_dir()):
        missing = "train/" if not train.is_dir() else "test/ or val/"
        raise FileNotFoundError(
            f"no folder {missing} in {root.absolute()}; "
            "expected train/<class>/ and test/<class>/ (or val/<class>/), each with image files"
        )
    class_names = _class_names(train)
    tested = _class_names(test)
    unknown = sorted(set(tested) - set(class_names))
    if unknown:
        raise ValueError(f"{test} contains classes that {train} lacks: {first_few(unknown, 5)}")
    if untested := sorted(set(class_names) - set(tested)):
        _log(f"folder: {test} lacks {first_few(untested, 5)}: accuracy covers the other classes only")
    _log_skipped_files([split / name for split in (train, test) for name in class_names])
    train_files, test_files = (_labelled_files(split, class_names) for split in (train, test))
    return _from_files("folder", class_names, train_files, test_files, resolution, progress)


def _class_names(split: Path) -> list[str]:
    names = sorted(entry.name for entry in split.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not names:
        raise FileNotFoundError(f"{split} contains no class folders; expected {split.name}/<class>/ with image files")
    return names


def _labelled_files(split: Path, class_names: Sequence[str]) -> LabelledFiles:
    """List (file, label) of every image; the test set need not contain every class."""
    return [
        (file, label)
        for label, name in enumerate(class_names)
        if (split / name).is_dir()
        for file in _images_under(split / name)
    ]


def _images_under(folder: Path) -> list[Path]:
    """List the image files in a folder and its subfolders, sorted by path."""
    found = [path for path in _files_under(folder) if path.lower().endswith(IMAGE_SUFFIXES)]
    if not found:
        raise FileNotFoundError(f"{folder} contains no image files (accepted: {', '.join(IMAGE_SUFFIXES)})")
    return [Path(path) for path in sorted(found)]


def _files_under(folder: Path) -> list[str]:
    return [
        os.path.join(parent, name) for parent, _, names in os.walk(folder) for name in names if not name.startswith(".")
    ]


def _log_skipped_files(folders: Sequence[Path]) -> None:
    files = [path for folder in folders for path in _files_under(folder)]
    others = [path for path in files if not path.lower().endswith(IMAGE_SUFFIXES)]
    if others:
        suffixes = sorted({os.path.splitext(path)[1].lower() or "no suffix" for path in others})
        _log(f"folder: {len(others)} files skipped ({first_few(suffixes, 5)}); accepted: {', '.join(IMAGE_SUFFIXES)}")


def _from_files(
    name: str,
    class_names: Sequence[str],
    train: LabelledFiles,
    test: LabelledFiles,
    resolution: int | None,
    progress: bool,
) -> ImageData:
    """Decode both splits together, so that they share one image size and number of channels."""
    labelled = [*train, *test]
    images = decode_images([file for file, _ in labelled], resolution, progress=progress)
    labels = torch.tensor([label for _, label in labelled], dtype=torch.int64)
    split = len(train)
    return ImageData.from_tensors(name, class_names, images[:split], labels[:split], images[split:], labels[split:])


def _log(message: str) -> None:
    print(message, file=sys.stderr, flush=True)
