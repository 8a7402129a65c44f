"""Bilevel problems, one a file."""

from metapl.problems.base import BilevelProblem, Problem, Signal
from metapl.problems.pseudo_labels import PseudoLabels

__all__ = ["BilevelProblem", "Problem", "PseudoLabels", "Signal"]
