"""Read CIFAR's published pickle files without executing anything in them."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torchvision.datasets import CIFAR10

# Names that a pickled numeric array uses; numpy before 2 called its module numpy.core.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Unpickle lists, dictionaries, strings, numbers and numeric arrays; refuse every other name."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        if name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        return super().find_class(module, name)


def read_arrays(path: Path, md5: str) -> dict:
    """Check the MD5 sum of one of CIFAR's files and unpickle it.

    Args:
        path: the file.
        md5: expected MD5 sum, hexadecimal.

    Returns:
        The dictionary in the file, with string keys; its values are arrays, lists, strings and numbers.

    Raises:
        FileNotFoundError: the file does not exist, or its MD5 sum differs.
        ValueError: the file is not a pickled dictionary of arrays, or refers to other objects.
    """
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise FileNotFoundError(f"{path} holds other bytes than published")
    try:
        return dict(_ArraysOnly(io.BytesIO(content), encoding="latin1").load())
    except Exception as error:  # unpickling a foreign file can raise nearly any exception
        raise ValueError(f"{path} is not one of CIFAR's files: {error}") from error


def read_cifar(dataset: type[CIFAR10], root: Path) -> tuple[list[str], list[tuple[np.ndarray, list[int]]]]:
    """Read CIFAR-10 or CIFAR-100 from the folder that its archive unpacks to.

    Args:
        dataset: torchvision's class, which lists file names and MD5 sums.
        root: parent of the unpacked folder.

    Returns:
        The class names, and (images uint8 [N, 3, 32, 32], labels [N]) of the training and of the test set. CIFAR-100
        has its 100 fine labels.

    Raises:
        FileNotFoundError, ValueError: see `read_arrays`.
    """
    folder, meta = Path(root) / dataset.base_folder, dataset.meta
    splits = []
    for listed in (dataset.train_list, dataset.test_list):
        entries = [read_arrays(folder / name, md5) for name, md5 in listed]
        images = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        labels = [label for entry in entries for label in entry["labels" if "labels" in entry else "fine_labels"]]
        splits.append((images, labels))
    return read_arrays(folder / meta["filename"], meta["md5"])[meta["key"]], splits
