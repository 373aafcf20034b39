"""Accuracy of networks trained on a distilled set, and the baselines it is compared with."""

from atom_fast.evaluate.protocols import PROTOCOLS, Protocol, get_protocol
from atom_fast.evaluate.selection import random_selection
from atom_fast.evaluate.training import EvaluationResult, evaluate

__all__ = ["PROTOCOLS", "EvaluationResult", "Protocol", "evaluate", "get_protocol", "random_selection"]
