"""The images of a set beside the real ones that are nearest to them, as PNG within the page."""

from __future__ import annotations

import base64
import dataclasses
import io

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import decode, make_sheets
from atom_fast.report.nearest import nearest_images
from atom_fast.synthetic import SyntheticSet

COLUMNS = 10  # images of a class, at most: they stay visible on a phone
_SHOWN_SIDE = 64  # pixels on the screen


@dataclasses.dataclass(frozen=True)
class Row:
    """One class of a gallery.

    Attributes:
        name: of the class.
        shown, stored: images in the picture, and in the set.
        picture: data URI of a PNG: synthetic images above real ones.
        width, height: of the picture on the screen, in pixels.
        of_other_classes: how many of the nearest real images are of another class; None without real images.
    """

    name: str
    shown: int
    stored: int
    picture: str
    width: int
    height: int
    of_other_classes: int | None


@dataclasses.dataclass(frozen=True)
class Gallery:
    """The pictures of a set, class by class.

    Attributes:
        rows: the classes that are shown.
        noun: "synthetic image", of selected images "real image", and "sheet" with a partition.
        partition: of the set.
        real: True if nearest real images are shown.
        classes: with images, shown or not.
    """

    rows: tuple[Row, ...]
    noun: str
    partition: int
    real: bool
    classes: int


def make_gallery(synthetic: SyntheticSet, data: ImageData | None, room: int, *, progress: bool = True) -> Gallery:
    """Draw the first images of each class, as many as there is room for, above their nearest real images.

    The nearest of all training images is the one with the smallest mean squared difference of pixels; with a partition
    each image on a sheet has its own.

    Args:
        synthetic: the set, of images with 1 or 3 channels.
        data: real images of the same shape and classes; None leaves them out.
        room: bytes of all pictures as text, about.
        progress: show a progress bar on standard error.

    Raises:
        ValueError: images are neither grey nor RGB.
    """
    channels, height, width = synthetic.sheets.shape[1:]
    if channels not in (1, 3):
        raise ValueError(f"pictures need images with 1 or 3 channels; got {channels}")
    labels = synthetic.sheet_labels
    present = [label for label in range(len(synthetic.class_names)) if (labels == label).any()]
    pair = (channels + 0.3) * height * width * (1 if data is None else 2) * 4 / 3  # PNG cannot shrink noise
    each = max(1, min(COLUMNS, int(room / (pair * len(present)))))
    present = present[: max(1, int(room / (pair * each)))]
    chosen = [(labels == label).nonzero().flatten()[:each] for label in present]
    indices = torch.cat(chosen)
    upper = _pixels(synthetic, indices)
    lower, other = (None, None) if data is None else _nearest(synthetic, indices, data, progress)
    rows, start = [], 0
    for label, own in zip(present, chosen, strict=True):
        part = slice(start, start + len(own))
        start += len(own)
        picture, size = _sprite([images[part] for images in (upper, lower) if images is not None])
        rows.append(
            Row(
                name=synthetic.class_names[label],
                shown=len(own),
                stored=int((labels == label).sum()),
                picture=picture,
                width=size[0],
                height=size[1],
                of_other_classes=None if other is None else int(other[part].sum()),
            )
        )
    kind = "real" if "selection" in synthetic.metadata else "synthetic"
    noun = f"{kind} {'image' if synthetic.partition == 1 else 'sheet'}"
    return Gallery(tuple(rows), noun, synthetic.partition, data is not None, len(labels.unique()))


def _pixels(synthetic: SyntheticSet, indices: Tensor) -> Tensor:
    """The stored images at ``indices`` as pixels, uint8 [N, C, H, W]."""
    pixels = synthetic.preprocessing.to_pixels(decode(synthetic.sheets[indices], synthetic.partition))
    return _bytes(make_sheets(pixels, synthetic.partition))


def _nearest(synthetic: SyntheticSet, indices: Tensor, data: ImageData, progress: bool) -> tuple[Tensor, Tensor]:
    """The nearest real images, on sheets where the set has them, and how many on each are of another class."""
    each = synthetic.partition**2
    pixels = synthetic.preprocessing.to_pixels(decode(synthetic.sheets[indices], synthetic.partition))
    found = nearest_images(pixels, data.train_images, progress=progress)
    images = data.train_images[found].cpu().float() / 255
    expected = synthetic.sheet_labels[indices].repeat_interleave(each)
    other = (data.train_labels[found].cpu() != expected).view(-1, each).sum(1)
    return _bytes(make_sheets(images, synthetic.partition)), other


def _bytes(pixels: Tensor) -> Tensor:
    return (pixels.clamp(0, 1) * 255).round().to(torch.uint8).cpu()


def _sprite(rows: list[Tensor]) -> tuple[str, tuple[int, int]]:
    """Put rows of images uint8 [N, C, H, W] into a PNG with transparent gaps; return its URI and size on the screen."""
    from PIL import Image

    count, channels, height, width = rows[0].shape
    gap = max(1, width // 16)
    zoom = max(1, _SHOWN_SIDE // width)
    size = count * (width + gap) - gap, len(rows) * (height + gap) - gap
    canvas = torch.zeros(size[1], size[0], channels + 1, dtype=torch.uint8)
    for number, row in enumerate(rows):
        for place, image in enumerate(row):
            y, x = number * (height + gap), place * (width + gap)
            canvas[y : y + height, x : x + width, :channels] = image.permute(1, 2, 0)
            canvas[y : y + height, x : x + width, channels] = 255
    return png_uri(Image.fromarray(canvas.numpy())), (size[0] * zoom, size[1] * zoom)


def png_uri(image) -> str:
    """Return a PIL image as a ``data:`` URI."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
