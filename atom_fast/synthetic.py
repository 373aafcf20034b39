"""The synthetic set: one file that describes itself, and its export to formats of other programs."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from atom_fast._files import write_atomically
from atom_fast._hashing import add_tensors
from atom_fast.data.partition import check_partition, decode, sheet_pixels
from atom_fast.data.whitening import Preprocessing
from atom_fast.foreign.files import check_stored, is_foreign, load_tensors
from atom_fast.foreign.recognised import Recognised, open_foreign
from atom_fast.names import EXPORT_FORMATS, SYNTHETIC_FILE

if TYPE_CHECKING:
    from atom_fast.data.dataset import ImageData

FORMAT = "atom_fast.synthetic_set"
FORMAT_VERSION = 3
# Sets are written in the first version that can hold them, so that earlier programs read what they understand.
_BEFORE_PARTITIONS, _BEFORE_SOFT_LABELS = 1, 2


class SyntheticSet(torch.utils.data.Dataset):
    """Distilled images with their labels, class names, preprocessing and origin.

    As a ``torch.utils.data.Dataset`` it yields ``(image, label)``: float32 ``[C, H, W]`` in model space and an int.

    Attributes:
        images: float32 ``[N, C, H, W]`` in model space: normalised, and whitened if the preprocessing whitens. With a
            partition they are cut out of the sheets and enlarged at every use: keep them in a variable, and change
            ``sheets`` to change them.
        labels: int64 ``[N]``, each in ``[0, len(class_names))``; with a partition, of the images on the sheets.
        sheets: float32 ``[N / partition^2, C, H, W]``, the stored images; without a partition the images themselves.
        sheet_labels: int64 ``[N / partition^2]``, one per sheet.
        partition: rows and columns of images on a sheet (`atom_fast.data.partition`); 1: none.
        soft_labels: float32 ``[N / partition^2, K]``, the probabilities of the classes, one row per sheet, for networks
            to be trained on in place of ``sheet_labels``, which are the largest; None where labels are hard.
        class_names: one name per class.
        preprocessing: :class:`~atom_fast.data.whitening.Preprocessing` between pixels and model space.
        metadata: the set's origin, as JSON values. ``distill`` writes ``config``, ``config_hash``, ``seed``,
            ``dataset``, ``dataset_fingerprint`` and ``versions``.
    """

    def __init__(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        class_names: Sequence[str],
        preprocessing: Preprocessing,
        metadata: dict | None = None,
        partition: int = 1,
        soft_labels: torch.Tensor | None = None,
    ):
        """Check and keep the parts; nothing is copied.

        Args:
            images: float32 ``[N, C, H, W]`` in model space; with a partition above 1 the sheets.
            labels: int64 ``[N]``, one per image; with a partition above 1 one per sheet.
            class_names, preprocessing, metadata, partition, soft_labels: the attributes.

        Raises:
            ValueError: as `check`.
        """
        self.sheets = images.detach()
        self.sheet_labels = labels
        self.soft_labels = soft_labels
        self.partition = partition
        self.class_names = tuple(class_names)
        self.preprocessing = preprocessing
        self.metadata = dict(metadata or {})
        self.check()

    def check(self) -> None:
        """Check that the set is valid, for example after its attributes were changed.

        Raises:
            ValueError: a wrong shape or dtype, a value that is not finite, a label without a class name, soft labels
                that are no probabilities, a partition
                that does not divide the images' sides, images that the preprocessing does not fit, or an entry of the
                metadata of another type than ``distill`` writes.
        """
        _check_parts(self.sheets, self.sheet_labels, self.class_names, "image" if self.partition == 1 else "sheet")
        _check_soft_labels(self.soft_labels, (len(self.sheets), len(self.class_names)))
        check_partition(self.partition, *self.sheets.shape[2:])
        if not all(tensor.isfinite().all() for tensor in self.preprocessing.tensors().values()):
            raise ValueError("the preprocessing must be finite; got NaN or infinity")
        self.preprocessing.to(self.sheets.device).to_pixels(self.sheets[:1])
        _check_metadata(self.metadata)

    def __repr__(self) -> str:
        of = f" of {self.metadata['dataset']!r}" if self.metadata.get("dataset") else ""
        on = "" if self.partition == 1 else f" on {len(self.sheets)} sheets"
        return (
            f"SyntheticSet({len(self)} images {list(self.sheets.shape[1:])}{on}{of}, {len(self.class_names)} classes, "
            f"{self.preprocessing})"
        )

    @property
    def images(self) -> torch.Tensor:
        """The images that networks train on."""
        return decode(self.sheets, self.partition)

    @images.setter
    def images(self, images: torch.Tensor) -> None:
        if self.partition > 1:
            raise AttributeError(f"images come from the sheets of partition {self.partition}: change sheets")
        self.sheets = images

    @property
    def labels(self) -> torch.Tensor:
        """The class of each image."""
        return self.sheet_labels if self.partition == 1 else self.sheet_labels.repeat_interleave(self.partition**2)

    @labels.setter
    def labels(self, labels: torch.Tensor) -> None:
        if self.partition > 1:
            raise AttributeError(f"labels come from the sheets of partition {self.partition}: change sheet_labels")
        self.sheet_labels = labels

    @property
    def targets(self) -> torch.Tensor:
        """What networks learn of each image: its label, int64 ``[N]``, or float32 ``[N, K]`` where labels are soft."""
        if self.soft_labels is None:
            return self.labels
        return self.soft_labels.repeat_interleave(self.partition**2, dim=0)

    def __len__(self) -> int:
        return len(self.sheets) * self.partition**2

    def __getitem__(self, index: int | slice | Sequence[int]) -> tuple[torch.Tensor, int | torch.Tensor]:
        """Return an image and its label, or several of each, indexed like the tensors."""
        label = self.labels[index]
        if label.dim() or self.partition == 1:
            return self.images[index], label if label.dim() else int(label)
        number: Any = index
        sheet, place = divmod(range(len(self))[number], self.partition**2)
        return decode(self.sheets[sheet : sheet + 1], self.partition)[place], int(label)

    @property
    def class_sizes(self) -> tuple[int, ...]:
        """Number of images in each class."""
        sheets = torch.bincount(self.sheet_labels, minlength=len(self.class_names))
        return tuple((sheets * self.partition**2).tolist())

    @property
    def ipc(self) -> int | None:
        """Stored images (sheets) per class, or None where the classes differ in size."""
        sizes = set(self.class_sizes)
        return sizes.pop() // self.partition**2 if len(sizes) == 1 else None

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of what networks are trained on: everything but the metadata."""
        digest = hashlib.sha256(_to_json({"class_names": self.class_names, "partition": self.partition}).encode())
        add_tensors(digest, self._tensors())
        return digest.hexdigest()

    def pixels(self) -> torch.Tensor:
        """Return the images as pixels: float32 ``[N, C, H, W]`` in [0, 1], clamped."""
        return self.preprocessing.to_pixels(self.images)

    def sheet_pixels(self) -> torch.Tensor:
        """Return the stored images as pixels, to look at: float32 ``[N / partition^2, C, H, W]`` in [0, 1], clamped.

        With a partition they are a little blurred (`atom_fast.data.partition.sheet_pixels`).
        """
        return sheet_pixels(self.sheets, self.partition, self.preprocessing)

    def to(self, device: torch.device | str) -> SyntheticSet:
        """Return the set with its tensors on ``device``."""
        return SyntheticSet(
            self.sheets.to(device),
            self.sheet_labels.to(device),
            self.class_names,
            self.preprocessing.to(device),
            self.metadata,
            self.partition,
            None if self.soft_labels is None else self.soft_labels.to(device),
        )

    def save(self, path: str | os.PathLike) -> Path:
        """Write the set to one ``.safetensors`` file, completely or not at all.

        The tensors are ``images`` and ``labels``, which hold the sheets and their labels, ``soft_labels`` if there are
        some, and ``preprocessing.*``; the header holds the class names, the partition where it is not 1 and the
        metadata as JSON, and a SHA-256 of everything, so that `load` notices damage.

        Returns:
            The path written.

        Raises:
            OSError: the file could not be written (a full disk); an earlier file at the path is unchanged.
            ValueError: the set is not valid (`check`), or its metadata cannot be written as JSON; nothing is written.
        """
        from safetensors.torch import save

        self.check()
        tensors = self._tensors()
        description = {"format_version": _BEFORE_PARTITIONS, "class_names": self.class_names, "metadata": self.metadata}
        if self.partition > 1:
            description |= {"format_version": _BEFORE_SOFT_LABELS, "partition": self.partition}
        if self.soft_labels is not None:
            description |= {"format_version": FORMAT_VERSION, "partition": self.partition}
        description = json.loads(_to_json(description))  # keys that are numbers become text before they are sorted
        description["sha256"] = _digest(tensors, description)
        # One entry: safetensors writes several in an order that changes from run to run.
        return write_atomically(path, save(tensors, metadata={FORMAT: _to_json(description)}))

    def _tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the set's file."""
        tensors = {"images": self.sheets, "labels": self.sheet_labels}
        tensors |= {f"preprocessing.{name}": tensor for name, tensor in self.preprocessing.tensors().items()}
        if self.soft_labels is not None:
            tensors["soft_labels"] = self.soft_labels
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        data: ImageData | None = None,
        *,
        labels: str | os.PathLike | None = None,
        preprocessing: str | None = None,
        partition: int | None = None,
        experiment: int | None = None,
    ) -> SyntheticSet:
        """Read a set that :meth:`save` wrote, the one in a run's folder, or another project's, to the CPU.

        Nothing in it is executed. What was recognised of another project's file (`atom_fast.foreign`), and why, is in
        ``metadata["recognised"]``. Where several spaces stay possible the likeliest is taken;
        :func:`atom_fast.evaluation.sets.read_set` trains networks to choose one.

        Args:
            path: the file or folder.
            data, labels, preprocessing, partition, experiment: of another project's file, as in
                :func:`~atom_fast.foreign.recognised.open_foreign`.

        Raises:
            FileNotFoundError: there is no such file, or no set in the folder.
            ValueError: the file is no synthetic set, was written by a newer version, or is damaged; or another
                project's file is whitened and there are no ``data`` to fit the whitening on.
        """
        path = Path(path)
        given = {"labels": labels, "preprocessing": preprocessing, "partition": partition, "experiment": experiment}
        if path.is_file() and is_foreign(path):
            return next(recognised_sets(open_foreign(path, data, **given)))
        if named := [name for name, value in given.items() if value is not None]:
            raise ValueError(f"{path} says itself what it holds; {', '.join(named)} is for files of other projects")
        description, tensors = _read_file(path)
        try:
            parts = {
                name.removeprefix("preprocessing."): tensor
                for name, tensor in tensors.items()
                if name.startswith("preprocessing.")
            }
            space = Preprocessing.from_tensors(parts)
            if not isinstance(description["class_names"], list):
                raise ValueError(f"class_names must be a list; got a {type(description['class_names']).__name__}")
            synthetic = cls(
                tensors["images"],
                tensors["labels"],
                description["class_names"],
                space,
                description["metadata"],
                1 if description["format_version"] == _BEFORE_PARTITIONS else description["partition"],
                tensors["soft_labels"] if description["format_version"] > _BEFORE_SOFT_LABELS else None,
            )
        except (ValueError, KeyError, RuntimeError, TypeError, AttributeError, IndexError) as error:
            raise ValueError(f"{path} does not hold a usable synthetic set: {error}") from error
        return synthetic

    def export(self, path: str | os.PathLike, format: str | None = None) -> Path:
        """Write the set in a format that other programs read.

        Other programs know no partition: they get the images that are on the sheets, cut out and enlarged, and most
        formats the entries ``"partition"`` and ``"decoded": true``, which say so. A set without a partition has
        neither entry.

        Args:
            path: the folder or file to write. A folder must be empty or not exist; a file is replaced.
            format: None: ``"pt"`` if the path ends in ``.pt``, otherwise ``"folder"``.
                ``"folder"`` writes ``train/<class>/0000.png`` for torchvision's ``ImageFolder``, in 8-bit pixels
                (values outside [0, 1] are clamped), and ``metadata.json`` with the class names, the metadata, and the
                preprocessing's kind, mean and standard deviation; soft labels are there by file. Folders have the class
                names if these are safe as file names and sort in the order of the labels; otherwise the label is put in
                front, so that ``ImageFolder`` always numbers the classes as this set does.
                ``"pt"`` writes the format of the public DC, DM and DataDAM programs, ``{"data": [[images, labels]],
                "accs_all_exps": {}}``, float32 on the CPU, and an entry that these programs ignore,
                ``"preprocessing"``: kind, mean and standard deviation of the saved images' space. Images are normalised
                as these programs do it (CIFAR-10, CIFAR-100 and Tiny ImageNet with the constants in their code, other
                data sets with this set's mean and standard deviation); a whitened set stays whitened. Soft labels,
                float32 ``[N, K]``, are another such entry, ``"soft_labels"``.
                ``"ddranking"`` writes what DD-Ranking 0.2.0 tests:
                :func:`atom_fast.exports.ddranking.export_ddranking`. ``"eccv24"`` writes the tensor of the contest at
                ECCV 2024: :func:`atom_fast.exports.eccv24.eccv24_tensor`.

        Returns:
            The path written.

        Raises:
            ValueError: an unknown format, a set that is not valid (`check`), or one that the format cannot hold, such
                as images that are neither grey nor RGB in PNG files.
            FileExistsError: the folder exists and is not empty.
            OSError: the files could not be written.
        """
        from atom_fast.exports.formats import WRITERS

        self.check()
        path = Path(path)
        if format is None:
            format = "pt" if path.suffix == ".pt" else "folder"
        if format not in WRITERS:
            raise ValueError(f"export format must be one of {', '.join(EXPORT_FORMATS)}; got {format!r}")
        return WRITERS[format](self, path)


def load_public(path: str | os.PathLike) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Read a ``.pt`` that the public DC, DSA, DM or DataDAM program saved, to the CPU. Nothing in it is executed.

    Returns:
        ``(images, labels)`` of every experiment in the file: float32 ``[N, C, H, W]`` in the model space of the program
        that wrote it, and int64 ``[N]``.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file holds something else.
    """
    path = Path(path)
    if path.is_dir():
        raise FileNotFoundError(f"{path} is a folder, not a .pt; a run's folder is read by SyntheticSet.load")
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        content = dict(load_tensors(path))
        for tensor in (tensor for pair in content["data"] for tensor in pair):
            check_stored(tensor)
        pairs = [(images.detach().float(), labels.detach()) for images, labels in content["data"]]
        for images, labels in pairs:
            _check_parts(images, labels)
    except Exception as error:  # a foreign file can fail in as many ways as unpickling knows
        accepted = "{'data': [[images, labels], ...], 'accs_all_exps': ...}"
        raise ValueError(f"{path} is not a synthetic set of the form {accepted}: {error}") from error
    return pairs


def recognised_sets(recognised: Recognised) -> Iterator[SyntheticSet]:
    """Yield a foreign set once for each space that stays possible, the likeliest first.

    Raises:
        ValueError: the set is not valid for its classes (`SyntheticSet.check`), or a space is fitted on real images
            that are not there.
    """
    foreign = recognised.foreign
    soft = foreign.soft_labels
    if soft is not None and soft.shape[1] != len(recognised.class_names):
        raise ValueError(
            f"{foreign.path} has labels of {soft.shape[1]} classes; {recognised.dataset} has "
            f"{len(recognised.class_names)}"
        )
    for candidate, images, preprocessing in recognised.in_model_space():
        about = recognised.about(candidate)
        names, partition = recognised.class_names, recognised.partition
        yield SyntheticSet(images, foreign.labels, names, preprocessing, about, partition, soft)


def _check_metadata(metadata: dict) -> None:
    """Refuse entries of another type than readers of a set rely on."""
    unknown = type(None)
    kinds = {"dataset": (str, unknown), "method": (str, unknown), "config": dict, "seconds": (int, float, unknown)}
    for name, kind in kinds.items():
        if name in metadata and not isinstance(metadata[name], kind):
            raise ValueError(f"metadata {name!r} must not be a {type(metadata[name]).__name__}")


def _check_parts(
    images: torch.Tensor, labels: torch.Tensor, class_names: tuple[str, ...] | None = None, noun: str = "image"
) -> None:
    """Refuse images, or sheets if that is the noun, and labels that are not of the shapes and types of a set."""
    if images.ndim != 4 or images.dtype != torch.float32 or 0 in images.shape:
        got = f"{images.dtype} {list(images.shape)}"
        raise ValueError(f"{noun}s must be float32 [N, C, H, W] and not empty; got {got}")
    if labels.shape != images.shape[:1] or labels.dtype != torch.int64:
        expected = f"int64 [{len(images)}], one per {noun}"
        raise ValueError(f"labels must be {expected}; got {labels.dtype} {list(labels.shape)}")
    if not images.isfinite().all():
        raise ValueError(f"{noun}s must be finite; got NaN or infinity")
    smallest, largest = labels.min().item(), labels.max().item()
    if smallest < 0:
        raise ValueError(f"labels must be at least 0; got {smallest}")
    if class_names is None:
        return
    if not all(isinstance(name, str) for name in class_names):
        raise ValueError(f"class_names must be strings; got {class_names!r}")
    if largest >= len(class_names):
        raise ValueError(f"labels must be below {len(class_names)}, the number of class names; got {largest}")


def _check_soft_labels(soft: torch.Tensor | None, shape: tuple[int, int]) -> None:
    if soft is None:
        return
    if soft.dtype != torch.float32 or tuple(soft.shape) != shape:
        raise ValueError(f"soft labels must be float32 {list(shape)}; got {soft.dtype} {list(soft.shape)}")
    if not soft.isfinite().all() or (soft < 0).any() or ((soft.sum(1) - 1).abs() > 1e-3).any():
        raise ValueError("soft labels must be probabilities: rows of at least 0 that sum to 1")


def _to_json(description: dict) -> str:
    try:
        return json.dumps(description, sort_keys=True, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the metadata of a synthetic set must be writable as JSON: {error}") from error


def _digest(tensors: dict[str, torch.Tensor], description: dict) -> str:
    digest = hashlib.sha256(_to_json({key: value for key, value in description.items() if key != "sha256"}).encode())
    add_tensors(digest, tensors)
    return digest.hexdigest()


def _read_file(path: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """The description and the tensors of a file that is intact and of this version."""
    from safetensors import safe_open

    if path.is_dir():
        if not (path / SYNTHETIC_FILE).is_file():
            raise FileNotFoundError(
                f"{path} is a folder without {SYNTHETIC_FILE}, so it is not a finished run; to evaluate a folder of "
                f"images: atom-fast evaluate {path} --dataset NAME"
            )
        path = path / SYNTHETIC_FILE
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist")
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            header = file.metadata() or {}
            # cloned: the tensors would otherwise stay mapped to a file that may change under them
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except OSError:
        raise
    except Exception as error:  # it has no word for element types of its format that PyTorch lacks
        raise ValueError(f"{path} is not a readable safetensors file: {error}") from error
    if FORMAT not in header:
        raise ValueError(f"{path} is not a synthetic set: its header lacks {FORMAT!r}; it has {sorted(header)}")
    try:
        description = dict(json.loads(header[FORMAT]))
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{path} is damaged: its header is not a JSON object: {error}") from error
    if description.get("format_version") not in range(1, FORMAT_VERSION + 1):
        raise ValueError(
            f"{path} has format version {description.get('format_version')!r}, this atom_fast reads "
            f"1 to {FORMAT_VERSION}; install the version that wrote it"
        )
    if _digest(tensors, description) != description.get("sha256"):
        raise ValueError(f"{path} is damaged: its content does not match its checksum; use another copy of it")
    return description, tensors
