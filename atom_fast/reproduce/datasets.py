"""The paper's data sets by name, from the published archives or from folders of images, and what to call them."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

from atom_fast.data.dataset import ImageData
from atom_fast.data.decoding import IMAGE_FORMATS, IMAGE_SUFFIXES
from atom_fast.data.sources import DEFAULT_DATA_DIR, load_data

# Name, number of classes and image shape.
DATASETS = {
    "digits": ("digits", 10, (1, 8, 8)),
    "digits32": ("digits, enlarged to 32×32", 10, (1, 32, 32)),  # for networks that 8×8 images are too small for
    "cifar10": ("CIFAR-10", 10, (3, 32, 32)),
    "cifar100": ("CIFAR-100", 100, (3, 32, 32)),
    "tiny": ("Tiny ImageNet", 200, (3, 64, 64)),
}


def load_named(
    name: str, data_dir: str | os.PathLike | None = None, *, download: bool = False, progress: bool = True
) -> tuple[ImageData, str]:
    """One of the paper's data sets and what it is called in results.

    Where ``data_dir/NAME`` or ``data_dir`` holds ``train/`` and ``test/`` (or ``val/``) folders of images, these are
    the data, and results say in which format they are: "CIFAR-10 (JPEG q75)". Otherwise `load_data` finds the archive.

    Raises:
        FileNotFoundError: the data is not there; names the folder and how to get it.
        ValueError: an unknown name, or images that are not that data set's.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}; got {name!r}")
    title, classes, shape = DATASETS[name]
    root = Path(DEFAULT_DATA_DIR if data_dir is None else data_dir).expanduser()
    if name in ("digits", "digits32"):
        return dataclasses.replace(load_data("digits", resolution=shape[-1]), name=name), title
    folder = _image_folder(root, name)
    if folder is None:
        try:
            return load_data(name, data_dir, download=download, progress=progress), title
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{error}; image files are looked for in {root.absolute() / name}/train/<class>/ and test/<class>/, too"
            ) from error
    data = load_data("folder", folder, progress=progress)
    if data.num_classes != classes or data.image_shape != shape:
        raise ValueError(
            f"{folder} is not {title}: expected {classes} classes of images {list(shape)}, "
            f"got {data.num_classes} of {list(data.image_shape)}"
        )
    return dataclasses.replace(data, name=name), f"{title} ({_format(folder)})"


def _image_folder(root: Path, name: str) -> Path | None:
    for folder in (root / name, root):
        splits = (folder / "train").is_dir() and any((folder / split).is_dir() for split in ("test", "val"))
        if splits and not (folder / "wnids.txt").is_file():  # that is Tiny ImageNet as published
            return folder
    return None


def _format(folder: Path) -> str:
    """What a folder's first image is: "PNG", or "JPEG q75" where its quality can be told."""
    from PIL import Image

    path = min(path for path in (folder / "train").rglob("*") if path.suffix.lower() in IMAGE_SUFFIXES)
    with Image.open(path, formats=IMAGE_FORMATS) as image:
        tables = getattr(image, "quantization", None)
        if image.format != "JPEG" or not tables:
            return str(image.format)
    for quality in range(1, 101):
        encoded = io.BytesIO()
        Image.new("RGB", (8, 8)).save(encoded, "JPEG", quality=quality)
        with Image.open(encoded, formats=("JPEG",)) as image:
            if image.quantization[0] == tables[0]:
                return f"JPEG q{quality}"
    return "JPEG"
