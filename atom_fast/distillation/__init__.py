"""Distillation: settings, one step, the loop around it, and its checkpoints."""

import typing as _typing

from atom_fast._lazy import lazy_names as _lazy_names

if _typing.TYPE_CHECKING:
    from atom_fast.distillation.config import PRESETS, DistillConfig, preset, read_config, write_config
    from atom_fast.distillation.loop import distill

__all__ = ["PRESETS", "DistillConfig", "distill", "preset", "read_config", "write_config"]

__getattr__, __dir__ = _lazy_names(__name__, {name: "loop" if name == "distill" else "config" for name in __all__})
