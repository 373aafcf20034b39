"""Image files to one uint8 tensor."""

from __future__ import annotations

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
# Those of the suffixes, whatever a file is called: Pillow would hand PostScript, for one, to an interpreter.
IMAGE_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
_GRAYSCALE_MODES = ("1", "L", "LA")
_DEEP_MODES = ("F", "I")  # more than 8 bits per channel, which a conversion to RGB would clip
_FILES_A_TASK = 64


def decode_images(files: Sequence[Path], resolution: int | None = None, *, progress: bool = True) -> Tensor:
    """Decode image files, several at once.

    Args:
        files: at least one image file.
        resolution: side, in pixels, of the square images returned: each image is cut around its centre to a square
            and resized (bilinear, antialiased). None keeps the size, which all files must share.
        progress: show a progress bar with the time left on standard error.

    Returns:
        uint8 [N, C, H, W] in the order of ``files``; C is 1 if every file is grayscale, otherwise 3. What is
        transparent is shown on white.

    Raises:
        ValueError: no files are given, there is no memory for all of them, or a file cannot be decoded, is of no format
            that ``IMAGE_SUFFIXES`` names, has more pixels than ``PIL.Image.MAX_IMAGE_PIXELS``, more than 8 bits a
            channel, or (without ``resolution``) another size than the first; the file is named.
        ImportError: Pillow or tqdm cannot be imported.
    """
    from tqdm import tqdm

    if not files:
        raise ValueError("there are no image files to decode")
    height, width = _read_rgb(files[0], resolution)[0].shape[:2]
    try:
        images = np.empty((len(files), 3, height, width), dtype=np.uint8)
    except MemoryError as error:
        raise ValueError(
            f"{len(files)} images of {width}x{height} pixels need {len(files) * 3 * height * width / 1e9:.0f} GB of "
            "memory; give a resolution to resize them to"
        ) from error
    grayscale = np.empty(len(files), dtype=bool)

    def decode(positions: range) -> int:
        for position in positions:
            pixels, grayscale[position] = _read_rgb(files[position], resolution)
            if pixels.shape[:2] != (height, width):
                raise ValueError(
                    f"{files[position]} is {pixels.shape[1]}x{pixels.shape[0]} pixels but {files[0]} is "
                    f"{width}x{height}: all images must have one size; give a resolution to resize them to"
                )
            images[position] = pixels.transpose(2, 0, 1)
        return len(positions)

    tasks = [range(start, min(start + _FILES_A_TASK, len(files))) for start in range(0, len(files), _FILES_A_TASK)]
    with (
        ThreadPoolExecutor(_available_cores()) as pool,
        tqdm(total=len(files), desc="decoding images", unit="image", disable=not progress) as bar,
    ):
        for decoded in pool.map(decode, tasks):
            bar.update(decoded)
    return torch.from_numpy(images[:, :1].copy() if grayscale.all() else images)


def _read_rgb(file: Path, resolution: int | None) -> tuple[np.ndarray, bool]:
    """Pixels of one file, uint8 [H, W, 3], and whether it is a grayscale image."""
    from PIL import Image, ImageOps

    try:
        if file.exists() and not file.is_file():
            raise ValueError("it is not a regular file")  # opening a pipe would wait for ever
        with Image.open(file, formats=IMAGE_FORMATS) as image:
            if Image.MAX_IMAGE_PIXELS is not None and image.width * image.height > Image.MAX_IMAGE_PIXELS:
                raise ValueError(
                    f"{image.width}x{image.height} pixels are more than the {Image.MAX_IMAGE_PIXELS} accepted "
                    "(PIL.Image.MAX_IMAGE_PIXELS)"
                )
            if image.mode.startswith(_DEEP_MODES):
                raise ValueError(f"more than 8 bits per channel (mode {image.mode}); convert it to 8 bits")
            grayscale = image.mode in _GRAYSCALE_MODES
            if image.has_transparency_data:  # dropped, it would leave whatever colour lies hidden under it
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
            rgb = image.convert("RGB")
    except Exception as error:  # PIL's decoders raise OSError, SyntaxError, EOFError and more for a broken file
        raise ValueError(f"cannot read the image {file}: {error}") from error
    if resolution is not None and rgb.size != (resolution, resolution):
        rgb = ImageOps.fit(rgb, (resolution, resolution), method=Image.Resampling.BILINEAR)
    return np.asarray(rgb), grayscale


def resize_images(images: Tensor, resolution: int | None) -> Tensor:
    """Resize uint8 [N, C, H, W], square, to [N, C, resolution, resolution] (bilinear, antialiased); None keeps them."""
    if resolution is None or images.shape[-2:] == (resolution, resolution):
        return images
    return torch.nn.functional.interpolate(images, size=(resolution, resolution), mode="bilinear", antialias=True)


def _available_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
