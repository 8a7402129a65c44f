"""Bilevel problems: the teacher's signal, and the losses that both networks learn from."""

from metapl.problems.base import BilevelProblem, Signal
from metapl.problems.doubtful import (
    EqualWeights,
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)
from metapl.problems.model_noise import NoisyStudentLoss
from metapl.problems.pseudo_labels import PseudoLabels, ReducedLabels, StoredCrossEntropy
from metapl.problems.sequences import DataRater, NextToken

__all__ = [
    "BilevelProblem",
    "DataRater",
    "EqualWeights",
    "ExampleLabels",
    "ExampleWeights",
    "LabelCorrection",
    "LearningToReweight",
    "MetaWeightNet",
    "NextToken",
    "NoiseTransition",
    "NoisyStudentLoss",
    "PseudoLabels",
    "ReducedLabels",
    "Signal",
    "StoredCrossEntropy",
    "Table",
    "WeightNet",
]
__dir__ = __all__.copy
