"""Fast dataset distillation by attention matching (ATOM)."""

import typing as _typing

from ._lazy import lazy_names as _lazy_names

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from .data.sources import load_data
    from .distillation.config import preset
    from .distillation.loop import distill
    from .evaluation.accuracy import evaluate
    from .evaluation.sets import select
    from .functional import (
        attention_matching_from_maps,
        attention_matching_loss,
        channel_attention,
        class_groups,
        mean_matching_loss,
        spatial_attention,
    )
    from .losses import ATOMLoss
    from .ops.dispatch import backend
    from .synthetic import SyntheticSet

__all__ = [
    "ATOMLoss",
    "SyntheticSet",
    "attention_matching_from_maps",
    "attention_matching_loss",
    "backend",
    "channel_attention",
    "class_groups",
    "distill",
    "evaluate",
    "load_data",
    "mean_matching_loss",
    "preset",
    "select",
    "spatial_attention",
]

__getattr__, __dir__ = _lazy_names(
    __name__,
    {
        "ATOMLoss": "losses",
        "SyntheticSet": "synthetic",
        "attention_matching_from_maps": "functional",
        "attention_matching_loss": "functional",
        "backend": "ops.dispatch",
        "channel_attention": "functional",
        "class_groups": "functional",
        "distill": "distillation.loop",
        "evaluate": "evaluation.accuracy",
        "load_data": "data.sources",
        "mean_matching_loss": "functional",
        "preset": "distillation.config",
        "select": "evaluation.sets",
        "spatial_attention": "functional",
    },
)
