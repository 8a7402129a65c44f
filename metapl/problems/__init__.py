"""Bilevel problems: the teacher's signal, and the losses that both networks learn from.

base            BilevelProblem, its base class Problem, and Signal
pseudo_labels   Meta Pseudo Labels
reduced         Reduced Meta Pseudo Labels: stored labels, adjusted by a small network
reweighting     weights of examples: MetaWeightNet, LearningToReweight, ExampleWeights
relabeling      labels of examples: ExampleLabels, LabelCorrection, NoiseTransition
classification  the base class of reweighting and relabeling
teachers        teachers for reweighting and relabeling: Table, WeightNet
losses          the teacher's own losses: CrossEntropy, UDA
"""

from metapl.problems.base import BilevelProblem, Problem, Signal
from metapl.problems.pseudo_labels import PseudoLabels
from metapl.problems.reduced import ReducedLabels, StoredCrossEntropy
from metapl.problems.relabeling import ExampleLabels, LabelCorrection, NoiseTransition
from metapl.problems.reweighting import ExampleWeights, LearningToReweight, MetaWeightNet
from metapl.problems.teachers import Table, WeightNet

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
