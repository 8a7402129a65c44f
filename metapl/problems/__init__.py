"""Bilevel problems, one a file."""

from metapl.problems.pseudo_labels import PseudoLabels

__all__ = ["PseudoLabels"]
