"""What a step's feedback and labels were like, in a few numbers of the rows that a fit records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.execution.batch import Batch
from metapl.execution.numerics import wide
from metapl.execution.ranks import Ranks
from metapl.problems.base import BilevelProblem, Signal, field_name, has_rows


@torch.no_grad()
def figures(
    report: Any, problem: BilevelProblem, outer: Batch, ranks: Ranks
) -> Mapping[str, Tensor]:
    r"""Return scalars of a :class:`metapl.StepReport`, means over the ranks.

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
    signal = report.signal
    outputs = report.student_outputs
    feedback_of_steps = report.feedback
    if not isinstance(feedback_of_steps, tuple):
        feedback_of_steps = (feedback_of_steps,)
    field_has_rows = has_rows(problem, signal, len(outputs))

    scalars = figures_of_feedback(feedback_of_steps, field_has_rows, ranks=ranks)
    h = feedback_of_steps[-1]
    if (
        isinstance(h, Tensor)
        and h.shape[:1] == outputs.shape[:1]
        and field_has_rows.get("value", True)
    ):
        g = in_teacher_outputs(h, signal, problem=problem).flatten(1)
        scalars["feedback_snr"] = signal_to_noise(g, ranks)

    labels = class_indices_in(outer)
    if problem.classifies and outputs.ndim == 2:
        student_probs = wide(outputs).softmax(-1)
        scalars["student_class_entropy"] = entropy_of_mean(student_probs, ranks)
        if labels is not None:
            is_label = is_class(labels, student_probs)
            scalars["labeled_class_entropy"] = entropy_of_mean(is_label, ranks)
    if signal.outputs is None or signal.outputs.shape != outputs.shape:
        return scalars
    return scalars | figures_of_labels(signal, outputs, problem=problem, labels=labels, ranks=ranks)


def figures_of_feedback(
    feedback_of_steps: Sequence[Any], field_has_rows: Mapping[str, bool], ranks: Ranks
) -> dict[str, Tensor]:
    """Return mean, standard deviation and root mean square of h over its entries.

    Args:
        feedback_of_steps: h of each step, a tensor or a dict of them.
        field_has_rows: whether each field of the signal has a row for each example.
    """
    entries: list[Tensor] = []
    for feedback in feedback_of_steps:
        named = {"value": feedback}
        if isinstance(feedback, dict):
            named = {field_name(key): h for key, h in feedback.items()}
        for name, h in named.items():
            # Of the feedback on a field without rows, such as a matrix, each rank has a share.
            shared = h if field_has_rows.get(name, True) else ranks.sum(h)
            entries.append(shared.double().flatten())
    h = torch.cat(entries)
    mean = ranks.mean(h.mean())
    return {
        "feedback_mean": mean,
        "feedback_std": ranks.mean((h - mean).square().mean()).sqrt(),
        "feedback_rms": ranks.mean(h.square().mean()).sqrt(),
    }


def in_teacher_outputs(h: Tensor, signal: Signal, problem: BilevelProblem) -> Tensor:
    """Return the gradient g_i of each example in the teacher's logits, (B, C).

    In the signal itself, (B, 1, ...), where the teacher gives no logits of classes.

    Args:
        h: (B,) of sampled labels; as the signal elsewhere.
    """
    probs: Any = signal.probs if signal.sampled else signal.value
    is_distribution = isinstance(probs, Tensor) and probs.ndim == 2 and probs.is_floating_point()
    if not problem.teacher_classifies or not is_distribution:
        return h[:, None]
    q_BC = wide(probs)
    if signal.sampled:
        # h_i ∇ log q_i(y_i)
        labels: Any = signal.value
        return h[:, None] * (F.one_hot(labels, q_BC.shape[1]) - q_BC)
    if h.shape == q_BC.shape:
        return q_BC * (h - (q_BC * h).sum(1, keepdim=True))
    return h[:, None]


def signal_to_noise(g: Tensor, ranks: Ranks) -> Tensor:
    """Return ``feedback_snr`` of :func:`figures` from the gradients of the examples, (B, n)."""
    count = len(g) * ranks.size
    m_squared = ranks.mean(g.mean(0)).square().sum()
    s = ranks.mean(g.square().sum(1).mean())
    return (count * m_squared - s) / (s - m_squared).clamp_min(torch.finfo(s.dtype).tiny)


def class_indices_in(outer: Batch) -> Tensor | None:
    """Return the labels of an outer batch, (B,), where they are whole numbers."""
    if not isinstance(outer, tuple | list) or len(outer) < 2:
        return None
    labels = outer[1]
    if isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point():
        return labels
    return None


def figures_of_labels(
    signal: Signal, outputs: Tensor, *, problem: BilevelProblem, labels: Tensor | None, ranks: Ranks
) -> dict[str, Tensor]:
    """Return what pseudo-labels are like.

    Args:
        outputs: the student's, of the shape of the teacher's.
        labels: of the outer batch, where they are classes.
    """
    teacher_outputs: Any = signal.outputs
    probs: Any = signal.probs if signal.sampled else signal.value
    if not isinstance(probs, Tensor) or not probs.is_floating_point():
        probs = teacher_outputs.softmax(-1)
    q = wide(probs)
    of_classes: dict[str, Tensor] = {}
    agrees = teacher_outputs.argmax(-1) == outputs.argmax(-1)
    of_examples = {
        "pseudo_label_confidence": q.amax(-1).mean(),
        "pseudo_label_entropy": torch.special.entr(q).sum(-1).mean(),
        "agreement": agrees.double().mean(),
    }
    if problem.teacher_classifies and q.ndim == 2:
        of_classes["pseudo_label_class_entropy"] = entropy_of_mean(q, ranks)
        if labels is not None:
            means = torch.stack([q.mean(0), is_class(labels, q).mean(0)])
            mean_probs, mean_labels = ranks.mean(means)
            # Ignored labels are of no class.
            shares = mean_labels / mean_labels.sum()
            of_classes["class_shares_vs_labeled"] = (mean_probs - shares).abs().sum() / 2
    if not ranks.alone:
        of_examples = ranks.mean_tree(of_examples, of_examples)
    return of_classes | of_examples


def is_class(labels: Tensor, like: Tensor) -> Tensor:
    """Return whether each of B labels is each of C classes, (B, C) as numbers.

    Ignored labels, such as −100, are none.
    """
    classes = torch.arange(like.shape[1], device=like.device)
    return (labels[:, None] == classes).to(like)


def entropy_of_mean(probabilities: Tensor, ranks: Ranks) -> Tensor:
    """Return the entropy of the mean of distributions (B, C) over the rows of all ranks, in nats.

    Rows may be of 0 and 1 too, and some of them empty.
    """
    mean = ranks.mean(probabilities.mean(0))
    shares = mean / mean.sum().clamp_min(torch.finfo(mean.dtype).tiny)
    entropy: Tensor = torch.special.entr(shares).sum()
    return entropy
