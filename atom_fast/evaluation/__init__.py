"""Accuracy of networks trained on a distilled set, and the baselines it is compared with."""

from atom_fast.evaluation.coresets import (
    ForgettingCounter,
    forgetting_selection,
    herding_selection,
    k_center_selection,
    random_selection,
    watch_training,
)
from atom_fast.evaluation.evaluate import evaluate
from atom_fast.evaluation.protocols import PROTOCOLS, Protocol, get_protocol
from atom_fast.evaluation.results import EvaluationResult

__all__ = [
    "PROTOCOLS",
    "EvaluationResult",
    "ForgettingCounter",
    "Protocol",
    "evaluate",
    "forgetting_selection",
    "get_protocol",
    "herding_selection",
    "k_center_selection",
    "random_selection",
    "watch_training",
]
