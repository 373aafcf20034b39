"""The paper's data sets by name, from the published archives or from folders of images, and their titles."""

from __future__ import annotations

import dataclasses
import io
import os
from pathlib import Path

from atom_fast.data.dataset import ImageData
from atom_fast.data.decoding import IMAGE_FORMATS, IMAGE_SUFFIXES
from atom_fast.data.sources import DEFAULT_DATA_DIR, image_folder, load_data

# Title, number of classes and image shape.
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
    """Load one of the paper's data sets with `load_data`; return it and its title in results.

    The title of image files names their format: "CIFAR-10 (JPEG q75)".

    Raises:
        FileNotFoundError: the data are missing; the message names the folder and how to get them.
        ValueError: an unknown name, or images that are not that data set's.
    """
    if name not in DATASETS:
        raise ValueError(f"data set must be one of {', '.join(DATASETS)}; got {name!r}")
    title, _, shape = DATASETS[name]
    if name in ("digits", "digits32"):
        return dataclasses.replace(load_data("digits", resolution=shape[-1]), name=name), title
    data = load_data(name, data_dir, download=download, progress=progress)
    folder = image_folder(Path(DEFAULT_DATA_DIR if data_dir is None else data_dir).expanduser(), name)
    return data, title if folder is None else f"{title} ({_format(folder)})"


def _format(folder: Path) -> str:
    """Return the format of a folder's first image: "PNG", or "JPEG q75" if its quality is a known one."""
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
