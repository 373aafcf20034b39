"""A foreign set with everything that was recognised of it, and its images in each space that stays possible."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from atom_fast.data.dataset import ImageData
from atom_fast.data.partition import check_partition
from atom_fast.data.whitening import Preprocessing
from atom_fast.foreign.files import ForeignSet, read_foreign
from atom_fast.foreign.spaces import Candidate, Fits, recognise, recognise_partition, settle
from atom_fast.names import PREPROCESSINGS, SPACES


@dataclasses.dataclass(frozen=True, eq=False)
class Recognised:
    """A foreign set, and what its images are.

    Attributes:
        foreign: the set.
        dataset: name of its data set; None if nothing names it.
        class_names: of the real images, or the numbers of the classes.
        candidates: the spaces that stay possible, likelier ones first.
        partition: rows and columns of images on each stored one; 1: whole images.
        partition_reason: why, in words.
        fits: maps from pixels to the spaces.
    """

    foreign: ForeignSet
    dataset: str | None
    class_names: tuple[str, ...]
    candidates: list[Candidate]
    partition: int
    partition_reason: str
    fits: Fits

    def found(self, candidate: Candidate) -> dict[str, str]:
        """Return what was found, in words: format, labels, space and partition, each with its reasons."""
        sheets = f"{self.partition} x {self.partition} images on each" if self.partition > 1 else "whole images"
        others = [f"{other.space}, {other.text}" for other in self.candidates if other is not candidate]
        return {
            **self.foreign.found,
            "space": str(candidate),
            **({"also possible": "; ".join(others) + " (choose by --preprocessing)"} if others else {}),
            "partition": f"{sheets}, because {self.partition_reason}",
        }

    def about(self, candidate: Candidate) -> dict[str, Any]:
        """Return the metadata of a set of these images."""
        return {
            "dataset": self.dataset,
            "method": (self.foreign.method or "public").lower(),
            "source": str(self.foreign.path),
            "recognised": self.found(candidate),
        }

    def facts(self) -> dict[str, Any]:
        """Return what can be said of the likeliest candidate without the real images, as JSON values."""
        foreign, candidate = self.foreign, self.candidates[0]
        each = self.partition**2
        sizes = torch.bincount(foreign.labels, minlength=len(self.class_names)) * each
        return {
            "images": [len(foreign.images) * each, *foreign.images.shape[1:]],
            "partition": self.partition,
            "class_sizes": sizes.tolist(),
            "preprocessing": candidate.space,
            **self.about(candidate),
        }

    def in_model_space(self) -> Iterator[tuple[Candidate, Tensor, Preprocessing]]:
        """Yield each candidate with the images [N, C, H, W] in the space of networks, and its map from pixels.

        Only pixels are changed: networks are trained on standardised ones.

        Raises:
            ValueError: a space is fitted on the real images, and there are none.
        """
        for candidate in self.candidates:
            images = self.foreign.images
            if candidate.space == "pixels":
                space = self.fits.of_pixels(candidate, images.shape[1], listed=self.foreign.form == "list")
                assert space.mean is not None and space.std is not None
                images = (images - space.mean[:, None, None]) / space.std[:, None, None]
            else:
                space = self.fits.preprocessing(candidate)
            yield candidate, images, space


def open_foreign(
    path: Path,
    data: ImageData | None = None,
    *,
    dataset: str | None = None,
    labels: str | os.PathLike | None = None,
    preprocessing: str | None = None,
    partition: int | None = None,
    experiment: int | None = None,
    progress: bool = True,
) -> Recognised:
    """Read a file of another project and recognise its space and its partition.

    Args:
        path: the file.
        data: the real images. Without them no space can be told by fitting it.
        dataset: name of the data set; None: of ``data``, or the one that the path names.
        labels, experiment: as in `read_foreign`.
        preprocessing: the space; None recognises it.
        partition: the partition; None recognises it.
        progress: report fits on standard error.

    Raises:
        FileNotFoundError, ValueError: as `read_foreign`, and for an unknown space or a partition that does not fit.
    """
    if preprocessing is not None and preprocessing not in (*PREPROCESSINGS, *SPACES):
        accepted = ", ".join((*PREPROCESSINGS, *SPACES))
        raise ValueError(f"preprocessing must be one of {accepted}; got {preprocessing!r}")
    named = data.name if data else dataset
    classes = data.num_classes if data else None
    beside = None if labels is None else Path(labels)
    foreign = read_foreign(path, labels=beside, experiment=experiment, classes=classes, dataset=named)
    dataset = named or foreign.dataset
    if data is not None and foreign.images.shape[1:] != data.train_images.shape[1:]:
        raise ValueError(
            f"{path} holds images {list(foreign.images.shape[1:])}; those of {data.name} are {list(data.image_shape)}"
        )
    fits = Fits(data, dataset, progress=progress)
    if preprocessing is not None:
        candidates = [Candidate(preprocessing, ("it was given",), certain=True)]
    else:
        candidates = recognise(foreign, dataset)
        if data is not None:
            candidates = settle(foreign.images, candidates, fits)
    if partition is not None:
        check_partition(partition, *foreign.images.shape[2:])
        reason = "it was given"
    elif foreign.space is not None:
        partition, reason = 1, "the file's own entry says that its images are cut out"
    else:
        partition, reason = recognise_partition(foreign.images)
    names = data.class_names if data else tuple(str(number) for number in range(foreign.classes))
    return Recognised(foreign, dataset, names, candidates, partition, reason, fits)
