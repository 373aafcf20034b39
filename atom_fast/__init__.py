"""Fast dataset distillation by attention matching (ATOM)."""

import importlib as _importlib
import typing as _typing
from pathlib import Path as _Path

_parent = _Path(__file__).resolve().parent.parent
if (_parent / "setup.py").is_file() and (_parent / "kernels").is_dir():
    # In a checkout `kernels/` lies beside this package; installed, it lies inside it.
    __path__.append(str(_parent))

__version__ = "0.1.0"

if _typing.TYPE_CHECKING:
    from ._backend import backend
    from .functional import (
        attention_matching_from_maps,
        attention_matching_loss,
        channel_attention,
        class_groups,
        mean_matching_loss,
        spatial_attention,
    )
    from .losses import ATOMLoss
    from .synthetic import SyntheticSet

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


def __getattr__(name: str):
    """Import a public name when it is first used.

    PyTorch takes seconds to import. The command line must run code of its own before, or Ctrl-C would meet nothing that
    handles it.
    """
    if name in __all__:
        for home in ("_backend", "functional", "losses", "synthetic"):
            module = _importlib.import_module(f".{home}", __name__)
            if hasattr(module, name):
                globals()[name] = getattr(module, name)
                return globals()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
