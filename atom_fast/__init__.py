"""Fast dataset distillation by attention matching (ATOM)."""

from pathlib import Path as _Path

_parent = _Path(__file__).resolve().parent.parent
if (_parent / "setup.py").is_file() and (_parent / "kernels").is_dir():
    # In a checkout `kernels/` lies beside this package; installed, it lies inside it.
    __path__.append(str(_parent))

__version__ = "0.1.0"

from ._backend import backend  # noqa: E402 - the path above must be set first
from .functional import (  # noqa: E402
    attention_matching_from_maps,
    attention_matching_loss,
    channel_attention,
    class_groups,
    mean_matching_loss,
    spatial_attention,
)
from .losses import ATOMLoss  # noqa: E402
from .synthetic import SyntheticSet  # noqa: E402

__all__ = [
    "ATOMLoss",
    "SyntheticSet",
    "attention_matching_from_maps",
    "attention_matching_loss",
    "backend",
    "channel_attention",
    "class_groups",
    "mean_matching_loss",
    "spatial_attention",
]
