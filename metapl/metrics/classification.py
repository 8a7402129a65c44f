"""What a classifier's logits say about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.metrics.predictions import finite
from metapl.metrics.statistics import chance_level
from metapl.words import summary

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Evaluation:
    """The figures of one classifier on one labeled set of n examples.

    Accuracies are fractions between 0 and 1. `top5` is None for 5 classes or fewer, a class without
    examples has None in `per_class`, `confusion[t][p]` counts the examples of class t that were
    taken for class p, and `classes` are the names given, in the order of the logits.
    """

    n: int
    accuracy: float
    top5: float | None
    negative_log_likelihood: float
    expected_calibration_error: float
    per_class: tuple[float | None, ...]
    confusion: tuple[tuple[int, ...], ...]
    classes: tuple[str, ...] | None = None

    metric: ClassVar[str] = "accuracy"
    """What :attr:`value` is, as other problems have it: see :class:`metapl.metrics.Measured`."""

    def __repr__(self) -> str:
        return summary(
            "Evaluation",
            n=self.n,
            accuracy=self.accuracy,
            top5=self.top5,
            negative_log_likelihood=self.negative_log_likelihood,
            expected_calibration_error=self.expected_calibration_error,
            classes=len(self.confusion),
        )

    @property
    def chance(self) -> float:
        """The accuracy of guessing on these examples; see :func:`metapl.metrics.chance_level`."""
        return chance_level([sum(row) for row in self.confusion])

    @property
    def value(self) -> float:
        return self.accuracy

    def to_json(self) -> dict[str, Any]:
        """Return the same figures as dicts, lists and numbers, ready for `json.dumps`."""
        return dict(json.loads(json.dumps(vars(self))))


def evaluate_logits(
    logits_NC: Tensor, labels_N: Tensor, classes: Sequence[str] | None = None
) -> Evaluation:
    """Measure accuracy, calibration and likelihood of logits against the true labels.

        p = softmax(logits),   ŷ_i = argmax_k p_ik,   accuracy = (1/N) Σ_i [ŷ_i = y_i]
        NLL = −(1/N) Σ_i log p_i,y_i,   ECE = Σ_b (n_b / N) |acc_b − conf_b|

    over 15 bins of equal width, the b-th with (b−1)/15 < max_k p_ik ≤ b/15, where n_b counts its
    examples, acc_b is their accuracy and conf_b their mean max_k p_ik. Computed in float64; between
    equal logits the first class wins.

    Args:
        logits_NC: (N, C), any floating dtype, finite.
        labels_N: (N,) integers from 0 to C−1.
        classes: C names.

    Raises: :class:`metapl.MetaplError` where shapes, dtypes or values are not as above.

    >>> logits = torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]])
    >>> evaluation = evaluate_logits(logits, torch.tensor([0, 1, 1]))
    >>> round(evaluation.accuracy, 4), evaluation.per_class, evaluation.confusion
    (0.6667, (1.0, 0.5), ((1, 0), (1, 1)))

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    if not _fit(logits_NC, labels_N):
        given = f"the logits are {described(logits_NC)}, the labels {described(labels_N)}"
        if labels_N.numel() and not labels_N.is_complex():
            given += f" from {labels_N.min():g} to {labels_N.max():g}"
        raise MetaplError(f"{given}; expected floats (N, C), and (N,) integers from 0 to C - 1.")
    count, width = logits_NC.shape
    if classes is not None and len(classes) != width:
        raise MetaplError(f"{len(classes)} names of classes were given for {width} logits.")
    finite(logits_NC)
    labels_N = labels_N.to("cpu", torch.int64)
    log_p_NC = torch.log_softmax(logits_NC.detach().to("cpu", torch.float64), dim=1)
    # From the logits, for softmax can make a tie of two logits; `max` takes the first of equals on
    # the CPU.
    predicted_N = logits_NC.detach().cpu().max(dim=1).indices
    pairs_N = labels_N * width + predicted_N
    confusion_CC = torch.bincount(pairs_N, minlength=width * width).reshape(width, width)
    confusion = confusion_CC.tolist()
    per_class = []
    for class_index, row in enumerate(confusion):
        examples = sum(row)
        per_class.append(row[class_index] / examples if examples else None)
    correct_N = predicted_N == labels_N
    confidence_N = log_p_NC.amax(dim=1).exp()
    bin_N = (confidence_N * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    # n_b / N · |acc_b − conf_b| = |Σ of the gaps in bin b| / N, so no bin is divided by its count.
    gap_N = correct_N.to(torch.float64) - confidence_N
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, bin_N, gap_N)
    top5 = None
    if width > 5:
        is_in_top5_N = (log_p_NC.topk(5, dim=1).indices == labels_N[:, None]).any(dim=1)
        top5 = int(is_in_top5_N.sum()) / count
    return Evaluation(
        n=count,
        accuracy=int(correct_N.sum()) / count,
        top5=top5,
        negative_log_likelihood=float(-log_p_NC.gather(1, labels_N[:, None]).mean()),
        expected_calibration_error=float(gaps.abs().sum() / count),
        per_class=tuple(per_class),
        confusion=tuple(tuple(row) for row in confusion),
        classes=None if classes is None else tuple(classes),
    )


def _fit(logits: Tensor, labels: Tensor) -> bool:
    """Return whether logits are (N, C), not empty, and labels (N,) integers from 0 to C − 1."""
    if logits.ndim != 2 or not logits.is_floating_point() or not logits.numel():
        return False
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        return False
    if labels.shape != logits.shape[:1]:
        return False
    return int(labels.min()) >= 0 and int(labels.max()) < logits.shape[1]
