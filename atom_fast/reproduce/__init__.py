"""The paper's tables and figures by name: what to run for them, how it is run, and the results beside the paper's."""

from atom_fast.reproduce.run import reproduce
from atom_fast.reproduce.targets import TARGETS, plan

__all__ = ["TARGETS", "plan", "reproduce"]
