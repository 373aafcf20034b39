"""Read map-style Datasets of PyTorch, torchvision or Hugging Face into uint8 tensors."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import IterableDataset, Subset

from atom_fast.data.decoding import check_resolution, empty_images, rgb_pixels
from atom_fast.names import first_few

# Names that data sets on the Hugging Face hub use, the likelier first.
IMAGE_COLUMNS = ("image", "img")
LABEL_COLUMNS = ("label", "labels", "fine_label")
_GREY_OR_RGB = (1, 3)  # channels
_ACCEPTED = "an image must be uint8 or floating point in [0, 1]"


class Splits(NamedTuple):
    """Two Datasets as tensors: images uint8 [N, C, H, W] and labels int64 [N]."""

    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor


def read_datasets(
    train: Any,
    test: Any,
    *,
    class_names: Sequence[str] | None,
    resolution: int | None,
    columns: tuple[str, str] | None,
    progress: bool,
) -> Splits:
    """Read every item of two Datasets once; see `ImageData.from_datasets` for arguments and errors."""
    from tqdm import tqdm

    check_resolution(resolution)
    pair = isinstance(columns, (tuple, list)) and len(columns) == 2
    if columns is not None and not (pair and all(isinstance(name, str) for name in columns)):
        raise ValueError(f"columns must be the names of the image's and of the label's column; got {columns!r}")
    for name, dataset in (("train", train), ("test", test)):
        _check_map_style(name, dataset)
    names = _class_names(train, test, columns) if class_names is None else tuple(class_names)
    most = len(train) if names is None else len(names)  # every class needs a training image
    count = len(train) + len(test)
    first, shape = np.empty(0), ()
    images, grayscale, labels = first, np.empty(count, dtype=bool), torch.empty(count, dtype=torch.int64)
    with tqdm(total=count, desc="reading images", unit="image", disable=not progress) as bar:
        for position, (where, item) in enumerate(_items(train, test)):
            image, label = _image_and_label(item, columns, where)
            pixels, grayscale[position] = _pixels(image, resolution, where)
            if images is first:
                shape, images = pixels.shape[:2], empty_images(count, *pixels.shape[:2])
            if pixels.shape[:2] != shape:
                raise ValueError(
                    f"{where} is {pixels.shape[1]}x{pixels.shape[0]} pixels but item 0 of train is "
                    f"{shape[1]}x{shape[0]}: all images must have the same size; pass a resolution to resize them"
                )
            images[position] = pixels.transpose(2, 0, 1)
            labels[position] = _label(label, most, where)
            bar.update()
    names = tuple(map(str, range(int(labels.max()) + 1))) if names is None else names
    tensor = torch.from_numpy(images[:, :1].copy() if grayscale.all() else images)
    return Splits(names, tensor[: len(train)], labels[: len(train)], tensor[len(train) :], labels[len(train) :])


def _items(train: Any, test: Any) -> Iterator[tuple[str, Any]]:
    """Yield every item of both Datasets once, with words for its place."""
    for name, dataset in (("train", train), ("test", test)):
        for number in range(len(dataset)):  # a Dataset need not say when iteration must end
            yield f"item {number} of {name}", dataset[number]


def _check_map_style(name: str, dataset: Any) -> None:
    """Refuse what has no length or no items by number."""
    if isinstance(dataset, Mapping):
        splits = ", ".join(map(repr, dataset))
        raise TypeError(
            f"{name} must be one Dataset, but it is a mapping of {splits}; pass one of them, as in ds['train']"
        )
    map_style = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if isinstance(dataset, IterableDataset) or not map_style:
        raise TypeError(
            f"{name} must be a map-style Dataset, with a length and items by number; got {type(dataset).__name__}. "
            f"List an iterable one first: list({name})"
        )
    if isinstance(dataset, (str, bytes)):
        raise TypeError(f"{name} must be a Dataset; got {type(dataset).__name__} (load_data reads folders)")
    if len(dataset) == 0:
        raise ValueError(f"{name} must have at least one item; got an empty {type(dataset).__name__}")


def _class_names(train: Any, test: Any, columns: tuple[str, str] | None) -> tuple[str, ...] | None:
    """Return the class names that the Datasets know; None if they know none.

    Raises:
        ValueError: the Datasets have different classes.
    """
    trained, tested = (_names_of(dataset, columns) for dataset in (train, test))
    if trained is not None and tested is not None and trained != tested:
        raise ValueError(
            f"train and test have different classes, so that a label would mean two things: {first_few(trained)} and "
            f"{first_few(tested)}; map both to one list and pass class_names"
        )
    return tested if trained is None else trained


def _names_of(dataset: Any, columns: tuple[str, str] | None) -> tuple[str, ...] | None:
    while isinstance(dataset, Subset):  # random_split makes them
        dataset = dataset.dataset
    names = getattr(dataset, "classes", None)
    features = getattr(dataset, "features", None)
    if names is None and isinstance(features, Mapping):
        wanted = LABEL_COLUMNS if columns is None else columns[1:]
        found = [name for name in wanted if name in features]
        names = getattr(features[found[0]], "names", None) if found else None
    if not isinstance(names, (tuple, list)):
        return None
    # torchvision's ImageNet has a tuple of synonyms for each class.
    return tuple(", ".join(map(str, name)) if isinstance(name, (tuple, list)) else str(name) for name in names)


def _image_and_label(item: Any, columns: tuple[str, str] | None, where: str) -> tuple[Any, Any]:
    """Return the parts of a pair, or the columns of a mapping."""
    if isinstance(item, Mapping):
        wanted = (IMAGE_COLUMNS, LABEL_COLUMNS) if columns is None else ((columns[0],), (columns[1],))
        found = [next((name for name in names if name in item), None) for names in wanted]
        if None in found:
            missing = " or ".join(map(repr, wanted[found.index(None)]))
            raise ValueError(
                f"{where} has no column {missing} but {', '.join(map(repr, item))}; "
                "pass columns=(IMAGE, LABEL) with their names"
            )
        return item[found[0]], item[found[1]]
    if not isinstance(item, (tuple, list)) or len(item) != 2:
        size = f" of {len(item)}" if isinstance(item, (tuple, list)) else ""
        raise ValueError(
            f"{where} must be a pair (image, label), or a mapping of columns; got {type(item).__name__}{size}"
        )
    return item[0], item[1]


def _pixels(image: Any, resolution: int | None, where: str) -> tuple[np.ndarray, bool]:
    """Return an image as uint8 [H, W, 3], resized, and True if it is grayscale."""
    from PIL import Image

    if isinstance(image, (Tensor, np.ndarray)):
        image = Image.fromarray(_grey_or_rgb(image, where))
    elif not isinstance(image, Image.Image):
        raise ValueError(f"{where}: an image must be PIL's, a tensor or an array; got {type(image).__name__}")
    try:
        return rgb_pixels(image, resolution)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _grey_or_rgb(image: Tensor | np.ndarray, where: str) -> np.ndarray:
    """Return a tensor or an array as uint8, [H, W] or [H, W, 3]."""
    try:
        values = image.detach().cpu() if isinstance(image, Tensor) else torch.from_numpy(np.array(image))
    except TypeError as error:  # a type that PyTorch has not
        raise ValueError(f"{where}: {_ACCEPTED}; got {image.dtype}") from error
    if values.dim() == 3 and values.shape[0] in _GREY_OR_RGB:
        values = values.permute(1, 2, 0)
    if values.dim() not in (2, 3) or (values.dim() == 3 and values.shape[2] not in _GREY_OR_RGB) or values.numel() == 0:
        raise ValueError(
            f"{where}: an image must be [C, H, W], [H, W, C] or [H, W] with 1 or 3 channels; got {list(image.shape)}"
        )
    if values.is_floating_point():
        low, high = (value.item() for value in values.aminmax())
        if not (low >= 0 and high <= 1):  # NaN compares as false
            raise ValueError(
                f"{where}: a floating-point image must be in [0, 1]; got {low:g} to {high:g}: leave normalisation out "
                "of the Dataset's transform, because preprocessing is done here (or divide 0 to 255 by 255)"
            )
        values = (values.float() * 255).round().to(torch.uint8)
    if values.dtype != torch.uint8:
        raise ValueError(f"{where}: {_ACCEPTED}; got {values.dtype}")
    return (values[..., 0] if values.shape[2:] == (1,) else values).contiguous().numpy()


def _label(label: Any, classes: int, where: str) -> int:
    """Return a label as an int; raise ValueError for another kind, or one that is not in 0 to ``classes`` - 1."""
    shape, dtype = getattr(label, "shape", ()), str(getattr(label, "dtype", ""))
    try:
        if isinstance(label, bool) or "bool" in dtype or shape != ():
            raise TypeError
        number = operator.index(label)
    except (TypeError, ValueError):
        shown = repr(label) if shape == () else f"a {type(label).__name__} of shape {list(shape)}"
        raise ValueError(f"{where}: a label must be a whole number; got {shown}") from None
    if not 0 <= number < classes:
        raise ValueError(f"{where}: a label must be 0 to {classes - 1}, one for each class; got {number}")
    return number
