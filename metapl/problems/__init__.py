"""Bilevel problems: what the teacher says, and by which losses both networks learn.

base            what a problem is, and the signal
pseudo_labels   Meta Pseudo Labels
reweighting     weights of examples: MetaWeightNet, ExampleWeights
relabeling      labels of examples: ExampleLabels, LabelCorrection, NoiseTransition
classification  what the last two share
teachers        teachers for them: Table, WeightNet
losses          the teacher's own losses
"""

from metapl.problems.base import BilevelProblem, Problem, Signal
from metapl.problems.pseudo_labels import PseudoLabels
from metapl.problems.relabeling import ExampleLabels, LabelCorrection, NoiseTransition
from metapl.problems.reweighting import ExampleWeights, MetaWeightNet
from metapl.problems.teachers import Table, WeightNet

__all__ = [
    "BilevelProblem",
    "ExampleLabels",
    "ExampleWeights",
    "LabelCorrection",
    "MetaWeightNet",
    "NoiseTransition",
    "Problem",
    "PseudoLabels",
    "Signal",
    "Table",
    "WeightNet",
]
