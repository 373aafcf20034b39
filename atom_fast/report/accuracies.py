"""Accuracies, accuracies by class and confusions, as a page shows them."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from atom_fast.evaluation.results import Confusion, networks_of
from atom_fast.report.gallery import png_uri


@dataclasses.dataclass(frozen=True)
class Accuracy:
    """Last-epoch accuracies in percent of networks trained on one set, or on several of one kind.

    Attributes:
        kind: "set", "random", "coreset" or "milestone".
        name: of the set, in words.
        network: their architecture's name.
        protocol: name of how they were trained.
        epochs: passes over the set.
        sets: number of sets.
        known: accuracy of each network that finished and did not diverge.
        diverged: number of networks that did.
        seconds: of their training and test.
        device: where they were trained.
        confusions: of the networks that have one.
        file: name of the record's file, for a benchmark's cell.
    """

    kind: str
    name: str
    network: str
    protocol: str
    epochs: int
    sets: int
    known: tuple[float, ...]
    diverged: int
    seconds: float
    device: str
    confusions: tuple[Confusion, ...]
    file: str = ""

    @property
    def networks(self) -> int:
        """Number of networks that finished."""
        return len(self.known) + self.diverged

    @property
    def text(self) -> str:
        """Mean ± population deviation."""
        if not self.known:
            return "diverged" if self.diverged else "none finished"
        return f"{statistics.fmean(self.known):.1f} ± {statistics.pstdev(self.known):.1f}"


@dataclasses.dataclass(frozen=True)
class Classes:
    """Accuracy by class of networks trained on a set, and their confusions.

    Attributes:
        networks: how many there are.
        names: of the classes.
        percents: per class (mean, deviation over networks); None for a class without test images.
        beside: the same of networks trained on random real images; empty without them.
        counts: int [K, K], test images by true class (row) and predicted class, summed over the networks.
        shares: the same, divided by the sum of its row.
        largest: the most frequent confusions: (true class, predicted class, count, percent of the true class).
        picture: data URI of a PNG of the square roots of ``shares``, above ``LARGEST_TABLE`` classes; else empty.
    """

    networks: int
    names: tuple[str, ...]
    percents: tuple[tuple[float, float] | None, ...]
    beside: tuple[tuple[float, float] | None, ...]
    counts: Confusion
    shares: list[list[float]]
    largest: tuple[tuple[str, str, int, float], ...]
    picture: str


LARGEST_TABLE = 20  # classes whose confusions are a table of numbers
_LARGEST = 20  # confusions that are listed


def measured(kind: str, name: str, records: Sequence[Mapping[str, Any]], file: str = "") -> Accuracy:
    """Read one or more records of equal evaluations, see `atom_fast.evaluation.results.read_records`."""
    first = records[0]
    epochs = int(first["protocol"]["epochs"])
    networks = [network for record in records for network in networks_of(record) if network[0]]
    finished = [curve[epochs] for curve, _ in networks]
    known = tuple(percent for percent in finished if percent is not None)
    return Accuracy(
        kind=kind,
        name=name,
        network=str(first.get("network", "")),
        protocol=str(first["protocol"].get("name", "")),
        epochs=epochs,
        sets=len(records),
        known=known,
        diverged=len(finished) - len(known),
        seconds=sum(record["seconds"] for record in records),
        device=str(first.get("device", "")),
        confusions=tuple(matrix for _, matrix in networks if matrix),
        file=file,
    )


def class_accuracies(accuracy: Accuracy, random: Accuracy | None, names: Sequence[str]) -> Classes | None:
    """Return the accuracy by class of the networks that have a confusion matrix; None if none has.

    Args:
        accuracy: of the set.
        random: of random real images; None without them.
        names: of the classes.
    """
    own, beside = (
        [matrix for matrix in one.confusions if len(matrix) == len(names)] if one else [] for one in (accuracy, random)
    )
    if not own:
        return None
    counts = [[sum(column) for column in zip(*rows, strict=True)] for rows in zip(*own, strict=True)]
    wrong = [
        (count, true, taken)
        for true, row in enumerate(counts)
        for taken, count in enumerate(row)
        if count and true != taken
    ]
    wrong.sort(key=lambda one: (-one[0], one[1:]))
    shares = [[count / max(1, sum(row)) for count in row] for row in counts]
    return Classes(
        networks=len(own),
        names=tuple(names),
        percents=_percents(own),
        beside=_percents(beside) if beside else (),
        counts=counts,
        shares=shares,
        largest=tuple((names[true], names[taken], n, 100 * shares[true][taken]) for n, true, taken in wrong[:_LARGEST]),
        picture=_picture(shares) if len(names) > LARGEST_TABLE else "",
    )


def _picture(shares: Sequence[Sequence[float]]) -> str:
    """Draw a matrix with a pixel for each entry, transparent where it is 0, so that it suits light and dark pages."""
    from PIL import Image

    image = Image.new("RGBA", (len(shares), len(shares)))
    image.putdata([(46, 125, 200, round(255 * share**0.5)) for row in shares for share in row])
    return png_uri(image)


def _percents(matrices: Sequence[Confusion]) -> tuple[tuple[float, float] | None, ...]:
    found = []
    for label, total in enumerate(map(sum, matrices[0])):
        percents = [100 * matrix[label][label] / total for matrix in matrices] if total else []
        found.append((statistics.fmean(percents), statistics.pstdev(percents)) if percents else None)
    return tuple(found)
