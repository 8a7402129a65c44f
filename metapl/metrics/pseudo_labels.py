"""How many of a teacher's labels are right, where the truth is known."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from metapl.metrics.classification import evaluate_logits
from metapl.metrics.predictions import batches_of, predict_logits


class PseudoLabelAccuracy:
    """Measures at each validation how many of the teacher's labels are right.

    Args:
        truth: (inputs, labels) of unlabeled examples.
    """

    def __init__(self, truth: Any) -> None:
        self.truth = truth

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> dict[str, float]:
        """Return the columns of a step that is validated."""
        is_validated = any("_validation_" in column for column in row)
        if not is_validated or trainer.teacher is None or not trainer.teacher_classifies:
            return {}
        examples = batches_of(self.truth, trainer.device, "truth")
        logits, labels = predict_logits(trainer.teacher, examples)
        evaluation = evaluate_logits(logits, labels)
        confusion = torch.tensor(evaluation.confusion)
        distance = (confusion.sum(0) - confusion.sum(1)).abs().sum()
        return {
            "pseudo_label_accuracy": evaluation.accuracy,
            "class_shares_vs_truth": float(distance) / (2 * evaluation.n),
        }
