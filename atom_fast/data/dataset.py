"""A labelled image data set as uint8 tensors, with the class index that class-wise sampling reads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from atom_fast.data.placement import describe_place, keeps_on_device, readable_by
from atom_fast.data.torch_datasets import read_datasets
from atom_fast.names import first_few


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Training and test images of one data set, with their class index; made by `from_tensors` and `from_datasets`.

    N is the number of training images, M of test images, K of classes.

    Attributes:
        name: name of the data set.
        class_names: K names; label ``k`` means ``class_names[k]``.
        train_images: uint8 [N, C, H, W], 0 to 255.
        train_labels: int64 [N], 0 to K - 1.
        test_images: uint8 [M, C, H, W].
        test_labels: int64 [M].
        class_index: int64 [N], indices of the training images sorted by class, in their original order within a class.
        class_counts: int64 [K], training images per class.
        class_offsets: int64 [K + 1]; class k is ``class_index[class_offsets[k]:class_offsets[k + 1]]``.
        class_sizes: ``class_counts`` on the host, so that checking a batch size does not read from the device.
        source: where the images came from: a folder, a package, or the type of a Dataset; empty if that is not known.
        host_images: the training images in host memory, where the GPU reads them: ``train_images`` is the GPU's tensor
            on that memory (:meth:`to`). None: they are where ``train_images`` says.
    """

    name: str
    class_names: tuple[str, ...]
    train_images: Tensor
    train_labels: Tensor
    test_images: Tensor
    test_labels: Tensor
    class_index: Tensor
    class_counts: Tensor
    class_offsets: Tensor
    class_sizes: tuple[int, ...]
    source: str = ""
    host_images: Tensor | None = None

    @classmethod
    def from_tensors(
        cls,
        name: str,
        class_names: Sequence[str],
        train_images: Tensor,
        train_labels: Tensor,
        test_images: Tensor,
        test_labels: Tensor,
    ) -> ImageData:
        """Check the tensors and build the class index on their device.

        Args:
            name: name of the data set.
            class_names: K names, in the order of the labels.
            train_images: uint8 [N, C, H, W].
            train_labels: int64 [N], 0 to K - 1.
            test_images: uint8 [M, C, H, W].
            test_labels: int64 [M], 0 to K - 1; the test set need not contain every class.

        Raises:
            ValueError: images are not uint8 [N, C, H, W] of one shape, labels are not int64 [N] in 0 to K - 1, the
                test set is empty, or a class has no training images.
        """
        class_names = tuple(class_names)
        _check_split("training", train_images, train_labels, class_names)
        _check_split("test", test_images, test_labels, class_names)
        if train_images.shape[1:] != test_images.shape[1:]:
            raise ValueError(
                f"training and test images must have the same shape; "
                f"got {list(train_images.shape[1:])} and {list(test_images.shape[1:])}"
            )
        counts = torch.bincount(train_labels, minlength=len(class_names))
        sizes = tuple(counts.tolist())
        if 0 in sizes:
            raise ValueError(f"class {class_names[sizes.index(0)]!r} of {name} has no training images")
        return cls(
            name=name,
            class_names=class_names,
            train_images=train_images,
            train_labels=train_labels,
            test_images=test_images,
            test_labels=test_labels,
            class_index=torch.argsort(train_labels, stable=True),
            class_counts=counts,
            class_offsets=_offsets(counts),
            class_sizes=sizes,
        )

    @classmethod
    def from_datasets(
        cls,
        train: Any,
        test: Any,
        *,
        name: str,
        class_names: Sequence[str] | None = None,
        resolution: int | None = None,
        columns: tuple[str, str] | None = None,
        progress: bool = True,
    ) -> ImageData:
        """Read two map-style Datasets, such as torchvision's, `torch.utils.data.Dataset` or Hugging Face `datasets`.

        Each item is read once. What a transform draws at random is drawn once, and cannot be seen here: leave random
        augmentation out, as well as normalisation. Distillation and evaluation do both themselves.

        Args:
            train: Dataset with a length and items by number: pairs (image, label), or mappings with columns. An image
                is Pillow's, or a tensor or array [C, H, W], [H, W, C] or [H, W] of 1 or 3 channels, uint8 or floating
                point in [0, 1], which is rounded to uint8. A label is a whole number.
            test: the same for the test set.
            name: of the data set, for results. "cifar10", "cifar100" or "digits" chooses the settings of these.
            class_names: K names in the order of the labels; None takes ``classes`` of a Dataset, or the names of a
                label column, or else the numbers as text.
            resolution: crop and resize to square images of this side in pixels, as for image files; None keeps the
                size, which all images must share.
            columns: names of the columns of image and label; None takes "image" or "img", and "label", "labels" or
                "fine_label".
            progress: show a progress bar with the remaining time on standard error.

        Returns:
            The data on the CPU. C is 1 if every image is grayscale, otherwise 3; transparent pixels are put on white.

        Raises:
            TypeError: a Dataset is not map-style, or ``name`` is not text.
            ValueError: an item is none of these, a label is not in 0 to K - 1, sizes differ without ``resolution``, the
                Datasets have different classes, memory does not suffice, or as :meth:`from_tensors`.
        """
        if not isinstance(name, str) or not name:
            raise TypeError(f"name must be the data set's name, for results; got {name!r}")
        options = {"class_names": class_names, "resolution": resolution, "columns": columns, "progress": progress}
        data = cls.from_tensors(name, *read_datasets(train, test, **options))
        return dataclasses.replace(data, source=f"{type(train).__module__}.{type(train).__qualname__}")

    def __repr__(self) -> str:
        names = first_few(self.class_names)
        return (
            f"ImageData({self.name!r}, {len(self.train_images)} training and {len(self.test_images)} test images "
            f"{list(self.image_shape)}, {self.num_classes} classes: {names})"
        )

    @property
    def num_classes(self) -> int:
        """Number of classes, K."""
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Shape (C, H, W) of every image."""
        channels, height, width = self.train_images.shape[1:]
        return channels, height, width

    @functools.cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hexadecimal) of class names, shapes and bytes. It does not depend on the device."""
        digest = hashlib.sha256(repr(self.class_names).encode())
        for tensor in (self.stored_images, self.train_labels, self.test_images, self.test_labels):
            digest.update(repr((str(tensor.dtype), tuple(tensor.shape))).encode())
            digest.update(tensor.cpu().contiguous().numpy().data)
        return digest.hexdigest()

    def of_images(self, kept: Sequence[Tensor]) -> ImageData:
        """Return the data with only some images of each class in its class index; the images themselves stay.

        Args:
            kept: for each class, the indices of its training images that stay, int64, at least one.
        """
        sizes = tuple(len(indices) for indices in kept)
        counts = torch.tensor(sizes, device=self.class_index.device)
        index = torch.cat([indices.to(counts.device) for indices in kept])
        return dataclasses.replace(
            self, class_index=index, class_counts=counts, class_offsets=_offsets(counts), class_sizes=sizes
        )

    @property
    def stored_images(self) -> Tensor:
        """The training images, uint8 [N, C, H, W], on the device whose memory they take."""
        return self.train_images if self.host_images is None else self.host_images

    def to(self, device: torch.device | str) -> ImageData:
        """Return the same data for work on ``device``, with every tensor there.

        Training images that would take more than half of its free memory stay in host memory, pinned, and test images,
        which no step of a distillation reads, on the CPU. ``train_images`` is a tensor of the device all the same: its
        kernels read host memory over the bus. Data larger than the host's memory are not supported.

        Raises:
            RuntimeError: the host memory cannot be pinned.
        """
        device = torch.empty(0, device=device).device  # with its number
        if self.host_images is not None and self.train_images.device == device:
            return self
        images, parts = self.stored_images, {name: getattr(self, name).to(device) for name in _INDEX}
        if self._stays_on_host(device):
            images = images.contiguous()
            moved = dataclasses.replace(self, train_images=readable_by(images, device), host_images=images, **parts)
        else:
            tested = {"test_images": self.test_images.to(device), "test_labels": self.test_labels.to(device)}
            moved = dataclasses.replace(self, train_images=images.to(device), host_images=None, **tested, **parts)
        if "fingerprint" in self.__dict__:
            moved.__dict__["fingerprint"] = self.fingerprint
        return moved

    def _stays_on_host(self, device: torch.device) -> bool:
        """Return True if work on ``device``, given with its number, reads the training images from host memory."""
        images, stays = self.stored_images, self.host_images is not None and self.train_images.device == device
        return images.device.type == "cpu" and (stays or not keeps_on_device(images.nbytes, device))

    def describe(self, device: torch.device | str = "cpu") -> dict[str, object]:
        """Return what there is to say of the data as plain Python values, among them where work on a device keeps it.

        Args:
            device: where to compute; a GPU's free memory decides.
        """
        fewest, most = min(self.class_sizes), max(self.class_sizes)
        images, device = self.stored_images, torch.empty(0, device=device).device
        return {
            "dataset": self.name,
            "source": self.source or "tensors",
            "classes": self.num_classes,
            "class_names": list(self.class_names),
            "training_images": len(images),
            "test_images": len(self.test_images),
            "images_per_class": fewest if fewest == most else f"{fewest} to {most}",
            "shape": list(self.image_shape),
            "bytes": images.nbytes + self.test_images.nbytes,
            "fingerprint": self.fingerprint,
            "training_images_are": describe_place(images.nbytes, device, on_host=self._stays_on_host(device)),
        }


_INDEX = ("train_labels", "class_index", "class_counts", "class_offsets")


def _offsets(counts: Tensor) -> Tensor:
    """Return where each class starts in a class index, and where the last one ends."""
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0))


def _check_split(split: str, images: Tensor, labels: Tensor, class_names: tuple[str, ...]) -> None:
    if images.dtype != torch.uint8 or images.dim() != 4 or images.numel() == 0:
        raise ValueError(
            f"{split} images must be uint8 [N, C, H, W] and not empty; got {images.dtype} {list(images.shape)}"
        )
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"{split} labels must be int64 [{len(images)}], one per image; got {labels.dtype} {list(labels.shape)}"
        )
    low, high = labels.min().item(), labels.max().item()
    if low < 0 or high >= len(class_names):
        raise ValueError(
            f"{split} labels must be 0 to {len(class_names) - 1} ({len(class_names)} class names); got {low} to {high}"
        )
