"""The paper's tables and figures by name: what to run for them, how it is run, and the results beside the paper's."""

from benchmarks.accuracy.run import reproduce
from benchmarks.accuracy.targets import TARGETS, plan

__all__ = ["TARGETS", "plan", "reproduce"]
