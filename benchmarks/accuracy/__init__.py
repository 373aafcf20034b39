"""Tables 1, 2, 4 and 5 and the figures of the paper: what to run for them, and the results beside the paper's."""

from benchmarks.accuracy.run import reproduce
from benchmarks.accuracy.tables import TARGETS, plan

__all__ = ["TARGETS", "plan", "reproduce"]
