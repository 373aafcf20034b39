"""Results of evaluations, and the JSON files that keep them."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import re
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from atom_fast._files import lock, write_atomically
from atom_fast.pictures import size_text
from atom_fast.training.protocols import Protocol

Curve = dict[int, float | None]  # accuracy in percent after each tested epoch; None: the network diverged
Confusion = list[list[int]]  # [K, K]: test images by true class, and by the class that a network takes them for
Network = tuple[Curve, Confusion | None]  # an empty curve: it has not finished

# Classes: a matrix of 200 takes some 100 KB per network in a record.
LARGEST_CONFUSION = 200


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Test accuracies in percent of networks trained on one set.

    Attributes:
        about: the set: ``dataset``, ``ipc`` (stored images per class), ``partition`` (each stored image trains as
            partition^2 images; 1: as itself), ``method``, ``config_hash``, ``set_seconds`` (of its distillation),
            ``same_data`` (True if it was made from the data it was tested on) and ``set_fingerprint``
            (``SyntheticSet.fingerprint``; None where each network has its own set); each None where it is not known.
        curves: per network its accuracy after each tested epoch, ``{epoch: percent}`` with epochs counted from 1; the
            last epoch is always tested. None where a logit was not finite: the network diverged. Empty for a network
            that has not finished.
        protocol: how they were trained.
        network: their architecture's name, as :func:`~atom_fast.networks.make_network` takes it.
        architecture: settings of :class:`~atom_fast.networks.ConvNet`; empty for other networks.
        precision: "float32" or "bfloat16", of the training.
        seed: of the evaluation; network i depends only on it and on i.
        seconds: wall-clock time of training and testing all of them.
        device: where they were trained.
        confusions: per network int [K, K]: how many test images of a class (row) it took for each class (column) after
            the last epoch; the diagonal counts the correct ones. None for a network that diverged or has not finished,
            above ``LARGEST_CONFUSION`` classes, and in records of versions that kept none.
    """

    about: dict[str, Any]
    curves: tuple[Curve, ...]
    protocol: Protocol
    network: str
    architecture: dict[str, Any]
    precision: str
    seed: int
    seconds: float
    device: str
    confusions: tuple[Confusion | None, ...] = ()

    @property
    def accuracies(self) -> tuple[float | None, ...]:
        """Last-epoch accuracy per network; None for one that diverged or has not finished."""
        return tuple(curve.get(self.protocol.epochs) for curve in self.curves)

    @property
    def best_accuracies(self) -> tuple[float | None, ...] | None:
        """Highest accuracy per network over the tested epochs; None where only the last epoch was tested.

        The epoch is chosen on the test set, so do not report it as the accuracy of a set.
        """
        if all(len(curve) <= 1 for curve in self.curves):
            return None
        return tuple(
            max((value for value in curve.values() if value is not None), default=None) for curve in self.curves
        )

    @property
    def diverged(self) -> tuple[int, ...]:
        """Networks, counted from 0, that had diverged by the last epoch."""
        return tuple(index for index, curve in enumerate(self.curves) if curve and curve[self.protocol.epochs] is None)

    @property
    def unfinished(self) -> tuple[int, ...]:
        """Networks, counted from 0, that have not been trained to the end."""
        return tuple(index for index, curve in enumerate(self.curves) if not curve)

    @property
    def mean(self) -> float:
        """Mean last-epoch accuracy of the networks that finished and did not diverge; NaN where none did."""
        return statistics.fmean(self._known) if self._known else math.nan

    @property
    def std(self) -> float:
        """Population standard deviation of the same (divided by N, as in the public code); NaN where there is none."""
        return statistics.pstdev(self._known) if self._known else math.nan

    @property
    def _known(self) -> list[float]:
        return [accuracy for accuracy in self.accuracies if accuracy is not None]

    def __str__(self) -> str:
        noun = "network" if len(self.curves) == 1 else "networks"
        text = f"{self.about['dataset']}{size_text(self.about)} {self.about['method']}"
        text += f": {self.mean:.1f} ± {self.std:.1f} %"
        text += f" ({len(self.curves)} {self.network} {noun}, last epoch)"
        for name, indices in (("diverged", self.diverged), ("unfinished", self.unfinished)):
            text += f", {name}: {', '.join(map(str, indices))}" if indices else ""
        return text

    def to_dict(self) -> dict[str, Any]:
        """Return everything above as JSON values; a mean or deviation of no network is None."""
        return {
            **self.about,
            "accuracy_mean": None if math.isnan(self.mean) else self.mean,
            "accuracy_std": None if math.isnan(self.std) else self.std,
            "accuracies": list(self.accuracies),
            "best_accuracies": None if self.best_accuracies is None else list(self.best_accuracies),
            "diverged": list(self.diverged),
            "unfinished": list(self.unfinished),
            "networks": len(self.curves),
            "curves": [{str(epoch): accuracy for epoch, accuracy in curve.items()} for curve in self.curves],
            **({"confusions": list(self.confusions)} if any(self.confusions) else {}),
            "protocol": self.protocol.to_dict(),
            "network": self.network,
            "architecture": dict(self.architecture),
            "precision": self.precision,
            "seed": self.seed,
            "seconds": self.seconds,
            "device": self.device,
        }


def summary(result: EvaluationResult, random: EvaluationResult | None = None) -> dict[str, Any]:
    """Put a set's accuracy beside Random's, as :func:`atom_fast.pictures.result_line` prints it.

    Returns:
        ``dataset``, ``ipc``, ``partition``, ``method``, ``accuracy_mean``, ``accuracy_std``, ``random_mean``,
        ``random_std`` (percent; None where not measured or all diverged), ``seconds`` (of the distillation), ``device``
        (of the evaluation) and ``config_hash``.
    """
    found, baseline = result.to_dict(), {} if random is None else random.to_dict()
    return {
        **{name: found[name] for name in ("dataset", "ipc", "partition", "method", "accuracy_mean", "accuracy_std")},
        "random_mean": baseline.get("accuracy_mean"),
        "random_std": baseline.get("accuracy_std"),
        "seconds": found["set_seconds"],
        "device": found["device"],
        "config_hash": found["config_hash"],
    }


def read_records(path: str | os.PathLike) -> list[dict[str, Any]]:
    """Read a file that `write_record` keeps; where there is none, there are no records.

    Raises:
        ValueError: the file holds something else.
    """
    path = Path(path)
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text("utf-8"))
        if not isinstance(records, list) or not all(map(_is_record, records)):
            raise ValueError("it holds something else")
    except (OSError, LookupError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f"{path} is not a record of evaluations by this version ({error}); move it, or name another file"
        ) from error
    return records


@contextlib.contextmanager
def locked_record(path: str | os.PathLike) -> Iterator[None]:
    """Let no other process read and write back a file of this folder meanwhile, where the file system can lock."""
    folder = Path(path).resolve().parent
    folder.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # Windows opens no folders; some network file systems have no locks
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            lock(handle, wait=True)
        yield


def write_record(path: str | os.PathLike, record: Mapping[str, Any]) -> None:
    """Put a record of one evaluation into a file, replacing an earlier one with the same ``hash``."""
    by_hash = {old["hash"]: old for old in read_records(path)} | {record["hash"]: dict(record)}
    text = json.dumps(list(by_hash.values()), indent=1)
    # A row of a matrix is one line. No text is changed by it: JSON's strings hold no line break.
    text = re.sub(r"\[\n *(\d+(?:,\n *\d+)*)\n *\]", lambda row: f"[{re.sub(chr(10) + ' *', ' ', row[1])}]", text)
    write_atomically(path, text + "\n")


def find_record(records: Sequence[Mapping[str, Any]], result: EvaluationResult) -> dict[str, Any] | None:
    """Return the record of an evaluation, which may hold more networks than the result; None where there is none."""
    found = json.loads(json.dumps(result.to_dict()))  # as it reads in a file
    names = [*result.about, "protocol", "network", "architecture", "precision", "seed"]
    for record in records:
        same = all(record.get(name) == found[name] for name in names)
        if same and record["curves"][: len(found["curves"])] == found["curves"]:
            return dict(record)
    return None


def curves_of(record: Mapping[str, Any]) -> list[Curve]:
    """Return a record's curves with their epochs as numbers."""
    return [{int(epoch): accuracy for epoch, accuracy in curve.items()} for curve in record["curves"]]


def networks_of(record: Mapping[str, Any]) -> list[Network]:
    """Return each network's curve, with its epochs as numbers, and its confusion matrix, if there is one."""
    curves = curves_of(record)
    matrices = [*(record.get("confusions") or ()), *[None] * len(curves)]
    return list(zip(curves, matrices, strict=False))


def _is_record(record: Mapping[str, Any]) -> bool:
    last = str(record["protocol"]["epochs"]) if "hash" in record else ""
    return (
        isinstance(record.get("hash"), str)
        and isinstance(record.get("seconds"), (int, float))
        and isinstance(record.get("curves"), Sequence)
        and all(is_curve(curve, last) for curve in record["curves"])
        and all(map(_is_confusion, record.get("confusions") or ()))
    )


def is_curve(curve: object, last_epoch: str) -> bool:
    """True for a network's accuracies as JSON: none yet, or one per tested epoch up to the last."""
    return isinstance(curve, dict) and (
        not curve
        or last_epoch in curve
        and all(epoch.isdecimal() and isinstance(value, (int, float, type(None))) for epoch, value in curve.items())
    )


def _is_confusion(matrix: object) -> bool:
    return matrix is None or (
        isinstance(matrix, list)
        and bool(matrix)
        and all(isinstance(row, list) and len(row) == len(matrix) for row in matrix)
        and all(type(count) is int and count >= 0 for row in matrix for count in row)
    )
