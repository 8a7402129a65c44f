"""Bilevel problems: the teacher's signal, and the losses that both networks learn from.

base            BilevelProblem, its base class Problem, and Signal
pseudo_labels   Meta Pseudo Labels
reduced         Reduced Meta Pseudo Labels: stored labels, adjusted by a small network
doubtful        weights and labels of examples that are learned, and teachers for them
losses          the teacher's own losses: CrossEntropy, UDA
"""

from metapl.problems.base import BilevelProblem, Problem, Signal
from metapl.problems.doubtful import (
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)
from metapl.problems.pseudo_labels import PseudoLabels
from metapl.problems.reduced import ReducedLabels, StoredCrossEntropy

__all__ = [
    "BilevelProblem",
    "ExampleLabels",
    "ExampleWeights",
    "LabelCorrection",
    "LearningToReweight",
    "MetaWeightNet",
    "NoiseTransition",
    "Problem",
    "PseudoLabels",
    "ReducedLabels",
    "Signal",
    "StoredCrossEntropy",
    "Table",
    "WeightNet",
]
