"""Fast dataset distillation by attention matching (ATOM)."""

import importlib as _importlib
import typing as _typing

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from .data.sources import load_data
    from .distillation.config import preset
    from .distillation.loop import distill
    from .evaluation.evaluate import evaluate
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

# Where each public name is defined.
_HOMES = {
    "ATOMLoss": "losses",
    "SyntheticSet": "synthetic",
    "attention_matching_from_maps": "functional",
    "attention_matching_loss": "functional",
    "backend": "ops.dispatch",
    "channel_attention": "functional",
    "class_groups": "functional",
    "distill": "distillation.loop",
    "evaluate": "evaluation.evaluate",
    "load_data": "data.sources",
    "mean_matching_loss": "functional",
    "preset": "distillation.config",
    "select": "evaluation.sets",
    "spatial_attention": "functional",
}
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


def __getattr__(name: str):
    """Import a public name when it is first used.

    PyTorch takes seconds to import; the command line must be able to answer ``--help`` without it, and to handle Ctrl-C
    before it.
    """
    if name in _HOMES:
        globals()[name] = getattr(_importlib.import_module(f".{_HOMES[name]}", __name__), name)
        return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
