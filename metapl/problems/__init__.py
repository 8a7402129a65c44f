"""Bilevel problems: the teacher's signal, and the losses that both networks learn from."""

from typing import TYPE_CHECKING, Any

from metapl.problems.base import BilevelProblem, Signal
from metapl.problems.pseudo_labels import PseudoLabels, ReducedLabels, StoredCrossEntropy

if TYPE_CHECKING:
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

# A type checker would take it for a module that has every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load the other problems where one of them is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from metapl.problems import doubtful, model_noise, sequences

        modules = (doubtful, model_noise, sequences)
        return next(getattr(module, name) for module in modules if hasattr(module, name))
