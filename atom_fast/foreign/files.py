"""What is in a file that another project saved: images, labels and their kind. Nothing in it is executed.

Only tensors are unpickled (``torch.load(weights_only=True)``) and only arrays are read (``allow_pickle=False``).
"""

from __future__ import annotations

import dataclasses
import io
import re
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ACCEPTED = (
    "accepted are {'data': [[images, labels], ...]} or {'data': [images, labels]} (DC, DSA, DM, IDM, DataDAM), a "
    "tensor of images with a file of labels beside it or in class order (MTT, TESLA, FTD, DATM, PAD), [images, labels] "
    "(IDC, DREAM, DANCE, NCFM), and an .npz of image and label (FRePo, RCIG, KIP)"
)
SUFFIXES = (".pt", ".pth", ".npz", ".npy", ".pkl", ".pickle", ".msgpack")
DATASET_CLASSES = {"cifar10": 10, "cifar100": 100, "tiny": 200}

_LARGEST_INFLATION = 20  # images hardly compress: what grows more than this is made to fill the memory
_SNAPSHOTS = 0.5  # correlation above which two sets of a file are snapshots of one run
_IMAGE_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.uint8)
_LABEL_TYPES = (*_IMAGE_TYPES, torch.int8, torch.int16, torch.int32, torch.int64)
_ARRAY_NAMES = (("image", "label"), ("images", "labels"), ("x_proto", "y_proto"))
# The order matters: the first name that a path holds is its method.
_METHODS = (
    "DataDAM", "DATM", "TESLA", "MTT", "FTD", "PAD", "IDM", "DSDM", "DSA", "DCC", "DC", "DM", "CAFE", "IDC", "DREAM",
    "DANCE", "NCFM", "FRePo", "RCIG", "KIP", "GLaD",
)  # fmt: skip
_DATASETS = (("cifar100", "cifar-?_?100"), ("cifar10", "cifar-?_?10(?!0)"), ("tiny", "tiny(-?_?imagenet)?"))


@dataclasses.dataclass(frozen=True, eq=False)
class ForeignSet:
    """A set as another project saved it, in a space that the file does not name.

    Attributes:
        path: the file.
        form: ``"dict"``, ``"snapshots"`` (DataDAM), ``"tensor"``, ``"list"`` or ``"npz"``.
        images: float32 [N, C, H, W], as stored.
        labels: int64 [N]; of soft labels the largest.
        soft_labels: float32 [N, K], probabilities; None where the labels are hard.
        classes: K, or where the labels are hard one more than the largest.
        dataset: the data set that the path or the file names; None if none.
        method: the method that the file's name, or the folder's, names; None if none.
        space: the entry ``"preprocessing"`` with which `SyntheticSet.export` describes its files.
        found: what was found, in words: ``format`` and ``labels``.
    """

    path: Path
    form: str
    images: Tensor
    labels: Tensor
    soft_labels: Tensor | None
    classes: int
    dataset: str | None
    method: str | None
    space: Mapping[str, Any] | None
    found: dict[str, str]


def is_foreign(path: Path) -> bool:
    """True for a file of another project, by its suffix or its first bytes, and not a ``.safetensors`` file."""
    if path.suffix.lower() in SUFFIXES:
        return True
    with path.open("rb") as file:
        start = file.read(64)
    if path.suffix.lower() == ".safetensors" or start[4:9] == b"\0\0\0\0{":  # eight bytes of length, then JSON
        return False
    return start[:4] == b"PK\x03\x04" or start[:2] in (b"\x80\x02", b"\x80\x03", b"\x80\x04") or _is_msgpack(start)


def named_dataset(path: Path) -> str | None:
    """The data set that a file's name, or else one of its folders, names; None if none."""
    for part in (path.name, *reversed(path.absolute().parts[-5:-1])):
        for name, pattern in _DATASETS:
            if re.search(rf"(?<![a-z0-9]){pattern}(?![a-z0-9])", part.lower()):
                return name
    return None


def read_foreign(
    path: Path,
    *,
    labels: Path | None = None,
    experiment: int | None = None,
    classes: int | None = None,
    dataset: str | None = None,
) -> ForeignSet:
    """Read a file of another project to the CPU.

    Args:
        path: the file.
        labels: file of the labels, where they are not in ``path``; None looks for ``labels_*.pt`` beside
            ``images_*.pt``, and takes the images to be in the order of the classes where there is none.
        experiment: number of the set, counted from 0, where the file holds several; None: the first, or the last
            snapshot of DataDAM's run.
        classes: number of classes, for images without labels; None: as many as the data set has.
        dataset: name of the data set; None: the one that the path names.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, holds something else, or something that only its own program can read.
    """
    for file in (path, labels):
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"{file} does not exist" if not file.exists() else f"{file} is no file")
    method, named = _method(path), named_dataset(path)
    space = None
    if path.suffix.lower() == ".npz" or _is_npz(path):
        form, (images, stored, found) = "npz", _from_arrays(path)
    else:
        content = load_tensors(path)
        if isinstance(content, dict) and isinstance(content.get("preprocessing"), dict):
            space = content["preprocessing"]
        form, images, stored, found = _from_content(path, content, method, experiment)
    images, layout = _as_images(path, images)
    if form == "tensor":
        stored, found = _labels_beside(path, labels, found)
    elif labels is not None:
        raise ValueError(f"{path} holds its labels: leave out the file of labels, {labels}")
    if stored is None:
        classes = classes or DATASET_CLASSES.get(dataset or named or "")
        hard, soft, kind = *_class_order(path, len(images), classes), "none stored: class after class"
    else:
        hard, soft, kind = _as_labels(path, stored, len(images))
    known = int(hard.max()) + 1 if soft is None else soft.shape[1]
    about = {"format": found + layout, "labels": kind}
    if rate := _rate_beside(path):
        about["learning rate"] = rate
    return ForeignSet(path, form, images, hard, soft, max(known, classes or 0), named, method, space, about)


def load_tensors(path: Path) -> Any:
    """Read a file of ``torch.save`` to the CPU: tensors, numbers and containers of them, and nothing else.

    Raises:
        ValueError: the file is none, is damaged, or holds objects of another kind.
    """
    if _is_zip(path):
        _refuse_inflation(path)
    try:
        with torch.serialization.safe_globals(_numpy_scalar_globals()), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an error says in one line what a warning says in several
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a foreign file can fail in as many ways as unpickling knows
        raise ValueError(f"{path} {_why_unreadable(path, error)}") from error


def check_stored(tensor: Tensor) -> None:
    """Refuse a tensor of more elements than its file holds: strides of 0 make terabytes of a few bytes.

    Raises:
        ValueError: it is one, or is not dense.
    """
    if tensor.layout != torch.strided:
        raise ValueError(f"a tensor is not dense but {tensor.layout}")
    claimed, stored = tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes()
    if claimed > stored:
        raise ValueError(f"a tensor {list(tensor.shape)} of {claimed} bytes is stored in {stored}")


def _numpy_scalar_globals() -> list:
    # The public programs save accuracies as numpy.float64; old files name its constructor by numpy's old module path.
    import numpy

    scalar = numpy.float64(0.0).__reduce__()[0]
    names = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    return [*((scalar, name) for name in names), numpy.dtype, type(numpy.dtype(numpy.float64))]


# ---------------------------------------------------------------- containers


def _from_content(path: Path, content: Any, method: str | None, experiment: int | None):
    """The form, the images, the stored labels or None, and what was found, of what `load_tensors` returned."""
    if isinstance(content, Tensor):
        if content.ndim != 4:
            advice = "; it may hold labels: give the file of images" if content.ndim in (1, 2) else ""
            raise ValueError(f"{path} holds {_words(content)}{advice}; {ACCEPTED}")
        return "tensor", content, None, "a tensor of images, as MTT, TESLA, FTD, DATM and PAD save them"
    if isinstance(content, (list, tuple)) and _is_pair(content):
        return "list", *content, "a list of images and labels, as IDC, DREAM, DANCE and NCFM save them"
    pairs = content.get("data") if isinstance(content, dict) else None
    if isinstance(pairs, (list, tuple)) and _is_pair(pairs):
        return "dict", *pairs, "a dict 'data' of images and labels, as DataDAM publishes them"
    if not isinstance(pairs, (list, tuple)) or not pairs or not all(map(_is_pair, pairs)):
        raise ValueError(f"{path} holds {_words(content)}; {ACCEPTED}")
    snapshots = len(pairs) > 1 and (method == "DataDAM" or _are_of_one_run(path, pairs[0][0], pairs[-1][0]))
    chosen = experiment if experiment is not None else len(pairs) - 1 if snapshots else 0
    if not 0 <= chosen < len(pairs):
        raise ValueError(f"{path} holds {len(pairs)} sets, numbered from 0; got experiment {chosen}")
    which = ""
    if len(pairs) > 1:
        noun = "snapshots of one run" if snapshots else "experiments"
        which = f", number {chosen} of {len(pairs)} {noun}, counted from 0"
    found = f"a dict 'data', as {'DataDAM saves it' if snapshots else 'DC, DSA, DM and IDM save it'}{which}"
    return ("snapshots" if snapshots else "dict"), *pairs[chosen], found


def _are_of_one_run(path: Path, first: Tensor, last: Tensor) -> bool:
    """True if images are still those of another snapshot: other experiments start from other images."""
    for images in (first, last):
        _check(path, images)
    if first.shape != last.shape or first.numel() < 2:
        return False
    together = torch.stack([first.detach().flatten(), last.detach().flatten()]).double()
    return torch.corrcoef(together)[0, 1].item() > _SNAPSHOTS  # NaN of constant images is not


def _is_pair(value: Any) -> bool:
    return (
        isinstance(value, (list, tuple))
        and len(value) == 2
        and all(isinstance(part, Tensor) for part in value)
        and value[0].ndim == 4
    )


def _from_arrays(path: Path) -> tuple[Tensor, Tensor, str]:
    """Images, labels and what was found, of an ``.npz``."""
    import numpy

    try:
        _refuse_inflation(path)
        with numpy.load(io.BytesIO(path.read_bytes()), allow_pickle=False) as file:
            names = next((pair for pair in _ARRAY_NAMES if set(pair) <= set(file.files)), None)
            if names is None:
                raise ValueError(f"holds arrays {', '.join(file.files) or 'none'}; {ACCEPTED}")
            images, labels = (torch.from_numpy(numpy.ascontiguousarray(file[name])) for name in names)
    except Exception as error:  # an array can fail in as many ways as its header
        reason = str(error) if str(error).startswith(("holds", "claims")) else f"is not a readable .npz: {error}"
        raise ValueError(f"{path} {reason}") from error
    return images, labels, f"an .npz of {' and '.join(names)}, as FRePo, RCIG and KIP save them"


def _labels_beside(path: Path, labels: Path | None, found: str) -> tuple[Tensor | None, str]:
    """The tensor in a file of labels, or None where there is no such file."""
    if labels is None:
        name = re.sub(r"images(_zca)?", "labels", path.name)
        labels = path.with_name(name) if name != path.name else path
        if labels == path or not labels.is_file():
            return None, found
    content = load_tensors(labels)
    if not isinstance(content, Tensor):
        raise ValueError(f"{labels} holds {_words(content)}; a file of labels holds one tensor")
    return content, f"{found}, with labels from {labels.name}"


def _rate_beside(path: Path) -> str | None:
    """The learning rate that DATM and PAD save beside their images; None where there is no such file."""
    rate = path.with_name(path.name.replace("images", "lr", 1))
    if rate == path or not rate.is_file():
        return None
    content = load_tensors(rate)
    if not isinstance(content, Tensor) or content.numel() != 1:
        raise ValueError(f"{rate} holds {_words(content)}; a file of a learning rate holds one number")
    _check(rate, content)
    return f"{content.item():g}, learnt, from {rate.name}; not used here: the protocol has its own"


# ---------------------------------------------------------------- images and labels


def _as_images(path: Path, images: Tensor) -> tuple[Tensor, str]:
    """Images as float32 [N, C, H, W], and in words what was changed."""
    _check(path, images)
    if images.ndim != 4 or 0 in images.shape:
        raise ValueError(f"{path} holds {_words(images)} as images; accepted are [N, C, H, W] or [N, H, W, C]")
    layout = ""
    if images.shape[1] not in (1, 3) and images.shape[3] in (1, 3):
        images, layout = images.permute(0, 3, 1, 2), ", with the channels last"
    if images.dtype == torch.uint8:
        images, layout = images / 255, layout + ", in 8 bits"
    images = images.detach().float().contiguous()
    if not images.isfinite().all():
        raise ValueError(f"{path} holds images that are not finite: NaN or infinity")
    return images, layout


def _as_labels(path: Path, labels: Tensor, count: int) -> tuple[Tensor, Tensor | None, str]:
    """Labels int64 [N], probabilities float32 [N, K] where they are soft, and their kind in words."""
    _check(path, labels, _LABEL_TYPES)
    labels = labels.detach()
    if labels.ndim == 2 and labels.shape[1] == 1:
        labels = labels[:, 0]
    if labels.ndim not in (1, 2) or len(labels) != count or 0 in labels.shape:
        raise ValueError(f"{path}: labels must be [{count}] or [{count}, K], one per image; got {_words(labels)}")
    if not labels.isfinite().all():
        raise ValueError(f"{path} holds labels that are not finite: NaN or infinity")
    if labels.ndim == 1:
        whole = labels.long()
        if (whole != labels).any() or whole.min() < 0 or whole.max() >= 100_000:
            raise ValueError(f"{path}: hard labels must be whole numbers of at least 0; got {labels[:3].tolist()}")
        return whole, None, "integers, hard"
    labels = labels.float()
    sums, size = labels.sum(1), labels.abs().sum(1)
    if (labels >= -1e-4).all() and ((sums - 1).abs() < 1e-3).all():
        if ((labels > 0.999) | (labels < 0.001)).all():
            return labels.argmax(1), None, "rows of one 1, hard"
        return labels.argmax(1), labels.clamp(min=0) / labels.clamp(min=0).sum(1, keepdim=True), "probabilities, soft"
    if (sums.abs() < 0.1 * size.clamp(min=1e-6)).all() and labels.abs().max() < 2:
        # Centred labels stand for labels minus 1/K, scaled: what is negative after 1/K is added back is taken for 0.
        soft = (labels + 1 / labels.shape[1]).clamp(min=0)
        soft = torch.where(soft.sum(1, keepdim=True) > 0, soft, torch.ones_like(soft))
        return labels.argmax(1), soft / soft.sum(1, keepdim=True), "centred, soft: 1/K added, taken as probabilities"
    return labels.argmax(1), labels.softmax(1), "logits, soft: their softmax is taken"


def _class_order(path: Path, count: int, classes: int | None) -> tuple[Tensor, None]:
    """Labels of images that are stored class after class, as many of each."""
    if classes is None:
        raise ValueError(
            f"{path} holds {count} images without labels, and its path names no data set: give the data set (--dataset "
            "NAME), or a file of labels (--labels FILE)"
        )
    if count % classes:
        raise ValueError(
            f"{path} holds {count} images without labels, which are not as many of each of {classes} classes: give a "
            "file of labels (--labels FILE)"
        )
    return torch.arange(classes).repeat_interleave(count // classes), None


def _check(path: Path, tensor: Tensor, types: Sequence[torch.dtype] = _IMAGE_TYPES) -> None:
    try:
        check_stored(tensor)
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if tensor.dtype not in types:
        accepted = ", ".join(str(kind).removeprefix("torch.") for kind in types)
        raise ValueError(f"{path}: a tensor is {tensor.dtype}; accepted are {accepted}")


# ---------------------------------------------------------------- names and errors


def _method(path: Path) -> str | None:
    for name in (path.stem, path.parent.name, path.parent.parent.name):
        words = re.split(r"[^a-z0-9]+", name.lower())
        for method in _METHODS:
            if method.lower() in words:
                return method
    return None


def _words(content: Any) -> str:
    """What an object is, in a few words."""
    if isinstance(content, Tensor):
        return f"a tensor {str(content.dtype).removeprefix('torch.')} {list(content.shape)}"
    if isinstance(content, dict):
        names = [str(key)[:40] for key in list(content)[:5]]
        more = ", ..." if len(content) > 5 else ""
        network = ": a network's parameters" if "net_parameters" in content or "state_dict" in content else ""
        return f"a dict of {', '.join(names) or 'nothing'}{more}{network}"
    if isinstance(content, (list, tuple)):
        kinds = ", ".join(_words(part) if isinstance(part, Tensor) else type(part).__name__ for part in content[:3])
        return f"a {type(content).__name__} of {len(content)} ({kinds or 'empty'}{', ...' if len(content) > 3 else ''})"
    return f"an object of type {type(content).__name__}"


def _is_msgpack(start: bytes) -> bool:
    return bool(start) and (start[0] in range(0x81, 0x90) or start[0] in (0xDE, 0xDF)) and b"\0\0\0\0{" not in start


def _is_zip(path: Path) -> bool:
    try:
        return zipfile.is_zipfile(path)
    except zipfile.BadZipFile:  # one of a kind that zipfile does not read
        return True


def _is_npz(path: Path) -> bool:
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except Exception:  # no zip file, or a damaged one: torch.load says how
        return False
    return bool(names) and all(name.endswith(".npy") for name in names)


def _refuse_inflation(path: Path) -> None:
    """Refuse a zip file whose content is far larger than itself."""
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(item.file_size for item in archive.infolist())
    except Exception as error:  # zipfile fails in as many ways as a damaged directory
        raise ValueError(f"{path} is damaged: {error}") from error
    if size > 1_000_000 + _LARGEST_INFLATION * path.stat().st_size:
        raise ValueError(f"{path} claims {size} bytes of content in {path.stat().st_size}")


def _why_unreadable(path: Path, error: Exception) -> str:
    """Why a file could not be read as tensors, and what to do."""
    with path.open("rb") as file:
        start = file.read(64)
    convert = "torch.save([images, labels], 'set.pt'), with images float32 [N, C, H, W] and labels [N] or [N, K]"
    if unsupported := re.search(r"GLOBAL ([\w.]+)", str(error)):
        return (
            f"holds Python objects ({unsupported[1]}), which are not unpickled because they could run code; if you "
            f"trust it, read it with its own program and write {convert}"
        )
    if path.suffix.lower() == ".msgpack" or _is_msgpack(start):
        return (
            "is a msgpack checkpoint, as FRePo and RCIG save; write its x_proto and y_proto as an .npz that is read: "
            "numpy.savez('set.npz', image=x_proto, label=y_proto), after flax.serialization.msgpack_restore"
        )
    if start[:6] == b"\x93NUMPY":
        return "is an .npy of one array; write an .npz that is read: numpy.savez('set.npz', image=images, label=labels)"
    if start[:1] == b"\x80" or path.suffix.lower() in (".pkl", ".pickle"):
        return f"is a pickle, which is not read because it could run code; if you trust it, read it and write {convert}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    return f"is damaged, or no file of PyTorch: {lines[0]}"
