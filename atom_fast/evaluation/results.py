"""What an evaluation found: an accuracy for every network, and what it was trained with."""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

from atom_fast.evaluation.protocols import Protocol


@dataclasses.dataclass(frozen=True)
class EvaluationResult:
    """Test accuracies of networks trained on one set, in percent.

    Attributes:
        curves: for every network its accuracy after each tested epoch, ``{epoch: percent}`` with epochs counted from 1
            and the last epoch always among them; None where a logit was not finite, so the network had diverged. Empty
            for a network that has not finished.
        protocol: how they were trained.
        network: their name, a key of :data:`~atom_fast.networks.NETWORKS`.
        architecture: settings of :class:`~atom_fast.networks.ConvNet`; empty for other networks.
        precision: "float32" or "bfloat16", of the training.
        seed: of the evaluation; network i depends on it and on i alone.
        seconds: wall-clock time of training and testing all of them.
        device: where they were trained.
    """

    curves: tuple[dict[int, float | None], ...]
    protocol: Protocol
    network: str
    architecture: dict[str, Any]
    precision: str
    seed: int
    seconds: float
    device: str

    @property
    def accuracies(self) -> tuple[float | None, ...]:
        """Accuracy of every network after the last epoch: the result; None for one that diverged or is unfinished."""
        return tuple(curve.get(self.protocol.epochs) for curve in self.curves)

    @property
    def best_accuracies(self) -> tuple[float | None, ...] | None:
        """Highest accuracy of every network over the tested epochs; None where only the last one was tested.

        It is chosen on the test set, so it is not a result to report as the accuracy of a set.
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
        """Population standard deviation of the same (divided by N, as in the public code); NaN likewise."""
        return statistics.pstdev(self._known) if self._known else math.nan

    @property
    def _known(self) -> list[float]:
        return [accuracy for accuracy in self.accuracies if accuracy is not None]

    def __str__(self) -> str:
        noun = "network" if len(self.curves) == 1 else "networks"
        text = f"{self.mean:.1f} ± {self.std:.1f} % ({len(self.curves)} {noun}, last epoch)"
        for name, indices in (("diverged", self.diverged), ("unfinished", self.unfinished)):
            text += f", {name}: {', '.join(map(str, indices))}" if indices else ""
        return text

    def to_dict(self) -> dict[str, Any]:
        """Everything above as what JSON can hold; a mean or deviation of no network is None."""
        return {
            "accuracy_mean": None if math.isnan(self.mean) else self.mean,
            "accuracy_std": None if math.isnan(self.std) else self.std,
            "accuracies": list(self.accuracies),
            "best_accuracies": None if self.best_accuracies is None else list(self.best_accuracies),
            "diverged": list(self.diverged),
            "unfinished": list(self.unfinished),
            "networks": len(self.curves),
            "curves": [{str(epoch): accuracy for epoch, accuracy in curve.items()} for curve in self.curves],
            "protocol": dataclasses.asdict(self.protocol),
            "network": self.network,
            "architecture": dict(self.architecture),
            "precision": self.precision,
            "seed": self.seed,
            "seconds": self.seconds,
            "device": self.device,
        }
