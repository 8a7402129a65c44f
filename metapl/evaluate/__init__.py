"""How good a model is, and whether one method beats another: pure functions on logits, labels and scores."""

from metapl.evaluate.metrics import Evaluation, evaluate_logits, predict_logits
from metapl.evaluate.statistics import PairedTest, paired_test

__all__ = ["Evaluation", "PairedTest", "evaluate_logits", "paired_test", "predict_logits"]
