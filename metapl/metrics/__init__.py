"""How good a model is, and whether one method beats another.

Pure functions on logits, labels and scores.
"""

from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.metric import Measured, Metric
from metapl.metrics.predictions import predict_logits
from metapl.metrics.statistics import PairedTest, chance_level, interval, paired_test

__all__ = [
    "Evaluation",
    "Measured",
    "Metric",
    "PairedTest",
    "chance_level",
    "evaluate_logits",
    "interval",
    "paired_test",
    "predict_logits",
]
__dir__ = __all__.copy
