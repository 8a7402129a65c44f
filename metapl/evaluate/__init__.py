"""How good a model is, and whether one method beats another: pure functions on logits, labels and scores."""

from metapl.evaluate.chance import chance_level, with_chance
from metapl.evaluate.intervals import interval, spoken
from metapl.evaluate.metrics import Evaluation, evaluate_logits
from metapl.evaluate.multi_label import MultiLabelAccuracy, multi_label_accuracy, read_label_sets
from metapl.evaluate.predictions import predict_logits
from metapl.evaluate.statistics import PairedTest, paired_test

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
