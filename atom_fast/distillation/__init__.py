"""Distillation: settings, one step, the loop around it, and its checkpoints."""

from atom_fast.distillation.config import PRESETS, DistillConfig, preset, read_config, write_config
from atom_fast.distillation.loop import distill

__all__ = ["PRESETS", "DistillConfig", "distill", "preset", "read_config", "write_config"]
