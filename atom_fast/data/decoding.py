"""Decode image files to one uint8 tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL import Image

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Only these formats are decoded, independent of the suffix: Pillow passes PostScript, for example, to an interpreter.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GRAYSCALE_MODES = ("1", "L", "LA")
_DEEP_MODES = ("F", "I")  # more than 8 bits per channel; converting to RGB would clip
_FILES_PER_TASK = 64


def decode_images(files: Sequence[Path], resolution: int | None = None, *, progress: bool = True) -> Tensor:
    """Decode image files in several threads.

    Args:
        files: at least one image file.
        resolution: side of the returned square images in pixels: each image is cropped to a square around its centre
            and resized (bilinear, antialiased). None keeps the size, which all files must share.
        progress: show a progress bar with the remaining time on standard error.

    Returns:
        uint8 [N, C, H, W] in the order of ``files``; C is 1 if every file is grayscale, otherwise 3. Transparent
        pixels are composed onto white.

    Raises:
        ValueError: no files are given, memory does not suffice, or a file cannot be decoded, has a format without a
            suffix in ``IMAGE_SUFFIXES``, more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, more than 8 bits per
            channel, or (without ``resolution``) another size than the first file. The message names the file.
        ImportError: Pillow or tqdm cannot be imported.
    """
    from tqdm import tqdm

    if not files:
        raise ValueError("files must name at least one image file; got none")
    height, width = _read_rgb(files[0], resolution)[0].shape[:2]
    images = empty_images(len(files), height, width)
    grayscale = np.empty(len(files), dtype=bool)

    def decode(positions: range) -> int:
        for position in positions:
            pixels, grayscale[position] = _read_rgb(files[position], resolution)
            if pixels.shape[:2] != (height, width):
                raise ValueError(
                    f"{files[position]} is {pixels.shape[1]}x{pixels.shape[0]} pixels but {files[0]} is "
                    f"{width}x{height}: all images must have the same size; pass a resolution (--resolution) to resize "
                    "them"
                )
            images[position] = pixels.transpose(2, 0, 1)
        return len(positions)

    starts = range(0, len(files), _FILES_PER_TASK)
    tasks = [range(start, min(start + _FILES_PER_TASK, len(files))) for start in starts]
    with (
        ThreadPoolExecutor(_available_cores()) as pool,
        tqdm(total=len(files), desc="decoding images", unit="image", disable=not progress) as bar,
    ):
        for decoded in pool.map(decode, tasks):
            bar.update(decoded)
    return torch.from_numpy(images[:, :1].copy() if grayscale.all() else images)


def _read_rgb(file: Path, resolution: int | None) -> tuple[np.ndarray, bool]:
    """Decode one file: pixels as uint8 [H, W, 3], and True if the image is grayscale."""
    from PIL import Image

    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")  # opening a pipe would block
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width}x{image.height} pixels are more than the {Image.MAX_IMAGE_PIXELS} accepted "
                    "(PIL.Image.MAX_IMAGE_PIXELS)"
                )
            return rgb_pixels(image, resolution)
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError and others for a broken file
        raise ValueError(f"cannot read the image {file}: {error}") from error


def rgb_pixels(image: Image.Image, resolution: int | None) -> tuple[np.ndarray, bool]:
    """Return an image of Pillow's, cropped and resized: uint8 [H, W, 3], and True if it is grayscale.

    Raises:
        ValueError: it has more than 8 bits per channel.
    """
    from PIL import Image, ImageOps

    if image.mode.startswith(_DEEP_MODES):
        raise ValueError(f"more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
    grayscale = image.mode in _GRAYSCALE_MODES
    if image.has_transparency_data:  # dropping it would reveal the colours of transparent pixels
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    rgb = image.convert("RGB")
    if resolution is not None and rgb.size != (resolution, resolution):
        rgb = ImageOps.fit(rgb, (resolution, resolution), method=Image.Resampling.BILINEAR)
    return np.asarray(rgb), grayscale


def empty_images(count: int, height: int, width: int) -> np.ndarray:
    """Allocate ``count`` images, uint8 [N, 3, H, W].

    Raises:
        ValueError: memory does not suffice.
    """
    try:
        return np.empty((count, 3, height, width), dtype=np.uint8)
    except MemoryError as error:
        raise ValueError(
            f"{count} images of {width}x{height} pixels need {count * 3 * height * width / 1e9:.0f} GB of "
            "memory; pass a smaller resolution (--resolution)"
        ) from error


def check_resolution(resolution: object) -> None:
    """Raise ValueError for a side of images that is no number of pixels; None keeps the size."""
    if resolution is not None and (isinstance(resolution, bool) or not isinstance(resolution, int) or resolution < 1):
        raise ValueError(f"resolution must be a whole number of pixels of at least 1, or None; got {resolution!r}")


def resize_images(images: Tensor, resolution: int | None) -> Tensor:
    """Resize square uint8 images [N, C, H, H] to ``resolution`` (bilinear, antialiased); None keeps their size."""
    if resolution is None or images.shape[-2:] == (resolution, resolution):
        return images
    return torch.nn.functional.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
