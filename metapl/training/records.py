"""What a step's feedback and labels were like, in a few numbers of the rows that a fit records."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.execution.numerics import wide
from metapl.execution.ranks import Ranks
from metapl.problems.base import Problem, field_name, has_rows


@torch.no_grad()
def figures(report: Any, problem: Problem, labeled: Any, ranks: Ranks) -> Mapping[str, Tensor]:
    r"""Scalars of a :class:`metapl.StepReport`, means over the ranks.

    ``feedback_mean``, ``feedback_std`` and ``feedback_rms`` (the root mean square) of h over its
    entries; where the signal has a row for each example, ``feedback_snr``, the signal to noise of
    the gradient :math:`\sum_i g_i` in the teacher's outputs:

    .. math:: \frac{\lVert E \sum_i g_i \rVert^2}{\mathrm{tr}\,\mathrm{Var} \sum_i g_i} \approx
              \frac{B \lVert m \rVert^2 - s}{s - \lVert m \rVert^2}, \quad
              m = \frac1B \sum_i g_i, \quad s = \frac1B \sum_i \lVert g_i \rVert^2

    For labels of classes, ``pseudo_label_confidence``, ``pseudo_label_entropy`` (nats),
    ``agreement`` (of the student's first class with the teacher's) and ``class_shares_vs_labeled``
    (half the L1 distance of the mean class probabilities from the shares of the classes among the
    labels of this batch).

    Entropies of the mean over a batch, in nats, which fall to 0 where all is taken for one class:
    of the classes, ``pseudo_label_class_entropy`` of the labels, ``student_class_entropy`` of the
    student's probabilities, and ``labeled_class_entropy`` of the labels of this batch.
    """
    signal, outputs = report.signal, report.student_outputs
    steps = report.feedback if isinstance(report.feedback, tuple) else (report.feedback,)
    rows, entries = has_rows(problem, signal, len(outputs)), []
    for found in steps:
        named = (
            {field_name(key): h for key, h in found.items()}
            if isinstance(found, dict)
            else {"value": found}
        )
        # Of the feedback on a field without rows, such as a matrix, each rank has a share.
        entries += [
            (h if rows.get(name, True) else ranks.sum(h)).double().flatten()
            for name, h in named.items()
        ]
    h = torch.cat(entries)
    mean = ranks.mean(h.mean())
    found = {"feedback_mean": mean, "feedback_std": ranks.mean((h - mean).square().mean()).sqrt()}
    found["feedback_rms"] = ranks.mean(h.square().mean()).sqrt()
    h, q = steps[-1], signal.probs if signal.sampled else signal.value
    if isinstance(h, Tensor) and h.shape[:1] == outputs.shape[:1] and rows.get("value", True):
        g = h[
            :, None
        ]  # of each example, in the teacher's logits; in the signal itself where it has none
        if (
            problem.teacher_classifies
            and isinstance(q, Tensor)
            and q.ndim == 2
            and q.is_floating_point()
        ):
            p = wide(q)  # (B, C)
            if signal.sampled:  # h_i ∇ log q_i(y_i)
                g = h[:, None] * (F.one_hot(signal.value, p.shape[1]) - p)
            elif h.shape == p.shape:
                g = p * (h - (p * h).sum(1, keepdim=True))
        g = g.flatten(1)
        count = len(g) * ranks.size
        m, s = ranks.mean(g.mean(0)).square().sum(), ranks.mean(g.square().sum(1).mean())
        found["feedback_snr"] = (count * m - s) / (s - m).clamp_min(torch.finfo(s.dtype).tiny)
    labels: Any = labeled[1] if isinstance(labeled, tuple | list) and len(labeled) > 1 else None
    class_indices = None
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        class_indices = labels
    if problem.classifies and outputs.ndim == 2:
        probabilities = wide(outputs).softmax(-1)
        found["student_class_entropy"] = entropy_of_mean(probabilities, ranks)
        if class_indices is not None:
            found["labeled_class_entropy"] = entropy_of_mean(
                is_class(class_indices, probabilities), ranks
            )
    if signal.outputs is None or signal.outputs.shape != outputs.shape:
        return found
    q = wide(q if isinstance(q, Tensor) and q.is_floating_point() else signal.outputs.softmax(-1))
    of_labels = {
        "pseudo_label_confidence": q.amax(-1).mean(),
        "pseudo_label_entropy": torch.special.entr(q).sum(-1).mean(),
        "agreement": (signal.outputs.argmax(-1) == outputs.argmax(-1)).double().mean(),
    }
    if problem.teacher_classifies and q.ndim == 2:
        found["pseudo_label_class_entropy"] = entropy_of_mean(q, ranks)
        if class_indices is not None:
            shares = ranks.mean(torch.stack([q.mean(0), is_class(class_indices, q).mean(0)]))
            found["class_shares_vs_labeled"] = (
                shares[0] - shares[1] / shares[1].sum()
            ).abs().sum() / 2
    return found | (of_labels if ranks.alone else ranks.mean_tree(of_labels, of_labels))


def is_class(labels: Tensor, like: Tensor) -> Tensor:
    """Whether each of B labels is each of C classes, (B, C) as numbers.

    Ignored labels, such as −100, are none.
    """
    classes = torch.arange(like.shape[1], device=like.device)
    return (labels[:, None] == classes).to(like)


def entropy_of_mean(probabilities: Tensor, ranks: Ranks) -> Tensor:
    """The entropy of the mean of distributions (B, C) over the rows of all ranks, in nats; of 0/1
    rows too, some of which may be empty."""
    mean = ranks.mean(probabilities.mean(0))
    shares = mean / mean.sum().clamp_min(torch.finfo(mean.dtype).tiny)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy
