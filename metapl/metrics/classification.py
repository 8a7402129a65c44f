"""What a classifier's logits say about it."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution.checks import described, finite
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
        names = "n", "accuracy", "top5", "negative_log_likelihood", "expected_calibration_error"
        return summary(
            "Evaluation",
            **{name: getattr(self, name) for name in names},
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
        """The same figures as dicts, lists and numbers, ready for `json.dumps`."""
        return dict(json.loads(json.dumps(vars(self))))


def evaluate_logits(
    logits_NC: Tensor, labels_N: Tensor, classes: Sequence[str] | None = None
) -> Evaluation:
    """Measures accuracy, calibration and likelihood of logits against the true labels.

        p = softmax(logits),   ŷ_i = argmax_k p_ik,   accuracy = (1/N) Σ_i [ŷ_i = y_i],   NLL = −(1/N) Σ_i log p_i,y_i
        ECE = Σ_b (n_b / N) |acc_b − conf_b|

    over 15 bins of equal width, the b-th with (b−1)/15 < max_k p_ik ≤ b/15, where n_b counts its
    examples, acc_b is their accuracy and conf_b their mean max_k p_ik. Computed in float64; between
    equal logits the first class wins.

    Args:
        logits_NC: (N, C), any floating dtype, finite.
        labels_N: (N,) integers from 0 to C−1.
        classes: C names.

    Raises: :class:`metapl.MetaplError` where shapes, dtypes or values are not as above.

    >>> evaluation = evaluate_logits(torch.tensor([[2.0, 0.0], [1.0, 0.0], [0.0, 3.0]]), torch.tensor([0, 1, 1]))
    >>> round(evaluation.accuracy, 4), evaluation.per_class, evaluation.confusion
    (0.6667, (1.0, 0.5), ((1, 0), (1, 1)))

    Guo et al. 2017, "On Calibration of Modern Neural Networks", equation 3.
    """
    whole = not (
        labels_N.is_floating_point() or labels_N.is_complex() or labels_N.dtype == torch.bool
    )
    fits = (
        logits_NC.ndim == 2
        and logits_NC.is_floating_point()
        and labels_N.shape == logits_NC.shape[:1]
    )
    count, width = logits_NC.shape if fits else (0, 0)
    if not count * width or not whole or int(labels_N.min()) < 0 or int(labels_N.max()) >= width:
        given = f"the logits are {described(logits_NC)}, the labels {described(labels_N)}"
        raise MetaplError(
            f"{given}; expected floating-point (N, C), and (N,) integers from 0 to C - 1."
        )
    if classes is not None and len(classes) != width:
        raise MetaplError(f"{len(classes)} names of classes were given for {width} logits.")
    finite(logits_NC)
    labels_N = labels_N.to("cpu", torch.int64)
    log_p_NC = torch.log_softmax(logits_NC.detach().to("cpu", torch.float64), dim=1)
    # From the logits, for softmax can make a tie of two logits; `max` takes the first of equals on
    # the CPU.
    predicted_N = logits_NC.detach().cpu().max(dim=1).indices
    confusion_CC = torch.bincount(labels_N * width + predicted_N, minlength=width * width).reshape(
        width, width
    )
    correct_N = predicted_N == labels_N
    confidence_N = log_p_NC.amax(dim=1).exp()
    bin_N = (confidence_N * CALIBRATION_BINS).ceil().long().clamp(1, CALIBRATION_BINS) - 1
    # n_b / N · |acc_b − conf_b| = |Σ of the gaps in bin b| / N, so no bin is divided by its count.
    gap_N = correct_N.to(torch.float64) - confidence_N
    gaps = torch.zeros(CALIBRATION_BINS, dtype=torch.float64).index_add(0, bin_N, gap_N)
    first_five_N = (
        (log_p_NC.topk(5, dim=1).indices == labels_N[:, None]).any(dim=1) if width > 5 else None
    )
    return Evaluation(
        n=count,
        accuracy=int(correct_N.sum()) / count,
        top5=None if first_five_N is None else int(first_five_N.sum()) / count,
        negative_log_likelihood=float(-log_p_NC.gather(1, labels_N[:, None]).mean()),
        expected_calibration_error=float(gaps.abs().sum() / count),
        per_class=tuple(
            row[index] / sum(row) if sum(row) else None
            for index, row in enumerate(confusion_CC.tolist())
        ),
        confusion=tuple(tuple(row) for row in confusion_CC.tolist()),
        classes=None if classes is None else tuple(classes),
    )
