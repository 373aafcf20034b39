"""Accuracy of networks trained on a synthetic set, and the baselines it is compared with."""

import typing as _typing

from atom_fast._lazy import lazy_names as _lazy_names

if _typing.TYPE_CHECKING:
    from atom_fast.evaluation.accuracy import evaluate
    from atom_fast.evaluation.coresets import (
        ForgettingCounter,
        forgetting_selection,
        herding_selection,
        k_center_selection,
        random_selection,
        watch_training,
    )
    from atom_fast.evaluation.results import EvaluationResult

__all__ = [
    "EvaluationResult",
    "ForgettingCounter",
    "evaluate",
    "forgetting_selection",
    "herding_selection",
    "k_center_selection",
    "random_selection",
    "watch_training",
]

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "EvaluationResult": "results",
        "ForgettingCounter": "coresets",
        "evaluate": "accuracy",
        "forgetting_selection": "coresets",
        "herding_selection": "coresets",
        "k_center_selection": "coresets",
        "random_selection": "coresets",
        "watch_training": "coresets",
    },
)
