"""A labelled image data set as uint8 tensors, with the class index that class-wise sampling reads."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class ImageData:
    """Training and test images of one data set. Build it with :meth:`from_tensors`, which fills in the class index.

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

    def __repr__(self) -> str:
        names = ", ".join(self.class_names[:3]) + (", ..." if self.num_classes > 3 else "")
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
        for tensor in (self.train_images, self.train_labels, self.test_images, self.test_labels):
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

    def to(self, device: torch.device | str) -> ImageData:
        """Return the same data with every tensor on ``device``."""
        tensors = {
            field.name: getattr(self, field.name).to(device)
            for field in dataclasses.fields(self)
            if isinstance(getattr(self, field.name), Tensor)
        }
        moved = dataclasses.replace(self, **tensors)
        if "fingerprint" in self.__dict__:
            moved.__dict__["fingerprint"] = self.fingerprint
        return moved


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
