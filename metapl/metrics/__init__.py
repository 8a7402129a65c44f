"""How good a model is, and whether one method beats another: pure functions on logits, labels and scores."""

from metapl.metrics.chance import chance_level, with_chance
from metapl.metrics.classification import Evaluation, evaluate_logits
from metapl.metrics.intervals import interval, spoken
from metapl.metrics.multi_label import MultiLabelAccuracy, multi_label_accuracy, read_label_sets
from metapl.metrics.predictions import predict_logits
from metapl.metrics.statistics import PairedTest, paired_test

__all__ = [
    "Evaluation",
    "MultiLabelAccuracy",
    "PairedTest",
    "chance_level",
    "evaluate_logits",
    "interval",
    "multi_label_accuracy",
    "paired_test",
    "predict_logits",
    "read_label_sets",
    "spoken",
    "with_chance",
]
