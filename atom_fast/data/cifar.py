"""CIFAR's files as they are published, pickles, read without running anything that is in them."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path

import numpy as np

# All that a pickled array of numbers needs; numpy before 2 called its module numpy.core.
_ALLOWED = {
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
}


class _ArraysOnly(pickle.Unpickler):
    """Lists, dictionaries, text, numbers and arrays of them; every other name in the file is refused."""

    def find_class(self, module: str, name: str):
        if (module, name) not in _ALLOWED:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which no array needs")
        if name == "_reconstruct":
            return np.zeros(0).__reduce__()[0]
        return super().find_class(module, name)


def read_arrays(path: Path, md5: str) -> dict:
    """Unpickle one of CIFAR's files, once its MD5 sum is right.

    Returns:
        The dictionary in it, with text keys: arrays, lists, text and numbers.

    Raises:
        FileNotFoundError: there is no such file, or it holds other bytes than published.
        ValueError: it holds something else than a dictionary of arrays, or asks for code to be run.
    """
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
        raise FileNotFoundError(f"{path} holds other bytes than published")
    try:
        return dict(_ArraysOnly(io.BytesIO(content), encoding="latin1").load())
    except Exception as error:  # a foreign file can fail in as many ways as unpickling knows
        raise ValueError(f"{path} is not one of CIFAR's files: {error}") from error


def read_cifar(dataset: type, root: Path) -> tuple[list[str], list[tuple[np.ndarray, list[int]]]]:
    """Read CIFAR-10 or CIFAR-100 from the folder that its archive unpacks to.

    Args:
        dataset: torchvision's class, which knows the files' names and MD5 sums.
        root: what holds the folder.

    Returns:
        The class names, and for the training and the test set images uint8 [N, 3, 32, 32] and labels (of CIFAR-100 the
        100 fine ones).

    Raises:
        FileNotFoundError, ValueError: as `read_arrays`.
    """
    folder, meta = Path(root) / dataset.base_folder, dataset.meta
    splits = []
    for listed in (dataset.train_list, dataset.test_list):
        entries = [read_arrays(folder / name, md5) for name, md5 in listed]
        images = np.concatenate([entry["data"] for entry in entries]).reshape(-1, 3, 32, 32)
        labels = [label for entry in entries for label in entry["labels" if "labels" in entry else "fine_labels"]]
        splits.append((images, labels))
    return read_arrays(folder / meta["filename"], meta["md5"])[meta["key"]], splits
