"""Networks that a report needs and that are not on record: they are trained, and their record is kept."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from atom_fast.data.dataset import ImageData
from atom_fast.evaluation.accuracy import architecture_of, evaluate
from atom_fast.evaluation.sets import random_sets, select
from atom_fast.synthetic import SyntheticSet
from atom_fast.training.protocols import Protocol, default_protocol, get_protocol


@dataclasses.dataclass(frozen=True)
class Measures:
    """How sets are tested.

    Attributes:
        networks: to train on the set, on random real images and on the coreset, each.
        protocol: name of how to train them; None: the data set's (`default_protocol`).
        epochs: passes over the set; None: the protocol's.
        train: False: nothing is trained.
        device: where; None: the GPU, if there is one.
        progress: show progress bars on standard error.
        where: options of the command that say where the real images are.
    """

    networks: int
    protocol: str | None
    epochs: int | None
    train: bool
    device: torch.device | str | None
    progress: bool
    where: tuple[str, ...] = ()

    def protocol_for(self, dataset: str) -> Protocol:
        """Return how networks are trained for a data set.

        Raises:
            ValueError: an unknown protocol, or a number of epochs that is not accepted.
        """
        changed = {} if self.epochs is None else {"epochs": self.epochs}
        return get_protocol(self.protocol or default_protocol(dataset), **changed)


def train_missing(
    synthetic: SyntheticSet, data: ImageData, record: Path, coreset_file: Path, measures: Measures
) -> list[str]:
    """Train the networks that a record lacks, on the set, on random real images and on a coreset.

    The coreset is chosen by herding in the embedding of a network trained on all real images, as ``atom-fast select
    --method herding`` does it, unless its file is there.

    Args:
        synthetic: the set.
        data: real images.
        record: JSON file of the evaluations.
        coreset_file: where the coreset is kept.
        measures: how.

    Returns:
        What could not be measured, each with the reason.
    """
    settings: dict[str, Any] = {
        "networks": measures.networks,
        "protocol": measures.protocol_for(data.name),
        "device": measures.device,
        "progress": measures.progress,
        "record": record,
    }
    parts: dict[str, Callable[[], Any]] = {
        "accuracy of the set": lambda: synthetic,
        "accuracy of random real images": lambda: random_sets(data, synthetic),
    }
    if synthetic.metadata.get("method") != "herding":
        parts["accuracy of a coreset"] = lambda: _coreset(synthetic, data, coreset_file, measures)
    problems = []
    for name, make in parts.items():
        try:
            evaluate(make(), data, architecture=architecture_of(synthetic, data.name), **settings)
        except (ValueError, OSError, RuntimeError) as error:
            problems.append(f"{name}: {error}")
    return problems


def read_coreset(path: Path, synthetic: SyntheticSet) -> SyntheticSet | None:
    """Read a coreset that is to be compared with a set; None where there is none of its size.

    Raises:
        ValueError: the file is damaged.
    """
    if not path.is_file():
        return None
    chosen = SyntheticSet.load(path)
    sizes = [(one.ipc, one.partition, one.class_names, one.sheets.shape[1:]) for one in (chosen, synthetic)]
    return chosen if sizes[0] == sizes[1] else None


def coreset_name(coreset: SyntheticSet) -> str:
    """Name a coreset by its method and the space in which it was chosen: "herding (embedding)"."""
    selection = coreset.metadata.get("selection")
    features = selection.get("features") if isinstance(selection, dict) else None
    return str(coreset.metadata.get("method", "coreset")) + (f" ({features})" if features else "")


def _coreset(synthetic: SyntheticSet, data: ImageData, path: Path, measures: Measures) -> SyntheticSet:
    found = read_coreset(path, synthetic)
    if found is not None:
        return found
    if synthetic.ipc is None:
        raise ValueError("a coreset needs a set with as many images in every class")
    chosen = select(
        data,
        "herding",
        synthetic.ipc,
        partition=synthetic.partition,
        preprocessing=synthetic.preprocessing,
        protocol=measures.protocol_for(data.name),
        device=measures.device,
        progress=measures.progress,
    )
    chosen.save(path)
    return chosen
