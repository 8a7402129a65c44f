"""The rows that a fit records, and what they say of a step's feedback and labels."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.errors import MetaplError, reason_of
from metapl.execution.numerics import wide
from metapl.execution.ranks import Ranks
from metapl.feedback.report import Say
from metapl.problems.base import Problem, field_of, has_rows
from metapl.runs.folder import Folder
from metapl.runs.rows import Metrics


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetaplError(f"the rows of the fit could not be written: {reason_of(error)}") from error


class Records:
    """The rows of one phase, in ``metrics.jsonl`` and a copy for TensorBoard where there is a folder ``out``.

    Rows and events after step ``start`` belong to work that was lost, and are removed. A copy that fails is said once
    and ends. ``history`` has the rows so far.
    """

    @_writing()
    def __init__(self, out: Folder | None, phase: str, start: int, say: Say) -> None:
        self.phase, self.start, self.say = phase, start, say
        self.history: list[dict[str, float]] = []
        self.metrics = None if out is None else Metrics(out.path / "metrics.jsonl")
        self.curves = None if out is None else str(out.path / "tensorboard" / phase)
        self.events: Any = None
        if self.metrics is None:
            return
        if start and not self.metrics.file.exists():
            say(f"{self.metrics.file} is missing: it begins again after step {start:,}, without earlier rows")
        self.metrics.cut(phase, start)
        for row in self.metrics.rows(phase):
            del row["phase"]
            # JSON knows no NaN, which is null there.
            self.history.append({name: math.nan if value is None else value for name, value in row.items()})

    @_writing()
    def add(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.metrics is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.metrics.add({"phase": self.phase, **plain})
        try:
            if self.curves is not None and self.events is None:
                from torch.utils.tensorboard import SummaryWriter  # takes a second

                self.events = SummaryWriter(self.curves, purge_step=self.start + 1 if self.start else None)
            for name in row.keys() - {"step"} if self.events is not None else ():
                self.events.add_scalar(name, row[name], int(row["step"]))
        except Exception as error:
            self.curves = self.events = None
            self.say(f"note: no more curves for TensorBoard ({type(error).__name__}: {error}); metrics.jsonl goes on")

    @_writing()
    def flush(self) -> None:
        """Bring the rows to the disk: those before a checkpoint are not written again."""
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        with suppress(Exception):  # of a full disk
            if self.events is not None:
                self.events.close()


@torch.no_grad()
def figures(report: Any, problem: Problem, labeled: Any, ranks: Ranks) -> Mapping[str, Tensor]:
    r"""Scalars of a :class:`metapl.StepReport`, means over the ranks.

    ``feedback_mean`` and ``feedback_std`` of h over its entries; where the signal has a row for each example,
    ``feedback_snr``, the signal to noise of the gradient :math:`\sum_i g_i` in the teacher's outputs:

    .. math:: \frac{\lVert E \sum_i g_i \rVert^2}{\mathrm{tr}\,\mathrm{Var} \sum_i g_i} \approx
              \frac{B \lVert m \rVert^2 - s}{s - \lVert m \rVert^2}, \quad
              m = \frac1B \sum_i g_i, \quad s = \frac1B \sum_i \lVert g_i \rVert^2

    For labels of classes, ``pseudo_label_confidence``, ``pseudo_label_entropy`` (nats), ``agreement`` (of the student's
    first class with the teacher's) and ``class_shares_vs_labeled`` (half the L1 distance of the mean class
    probabilities from the shares of the classes among the labels of this batch).
    """
    signal, outputs = report.signal, report.student_outputs
    steps = report.feedback if isinstance(report.feedback, tuple) else (report.feedback,)
    rows, entries = has_rows(problem, signal, len(outputs)), []
    for found in steps:
        named = {field_of(key): h for key, h in found.items()} if isinstance(found, dict) else {"value": found}
        # Of the feedback on a field without rows, such as a matrix, each rank has a share.
        entries += [(h if rows.get(name, True) else ranks.sum(h)).double().flatten() for name, h in named.items()]
    h = torch.cat(entries)
    mean = ranks.mean(h.mean())
    found = {"feedback_mean": mean, "feedback_std": ranks.mean((h - mean).square().mean()).sqrt()}
    h, q = steps[-1], signal.probs if signal.sampled else signal.value
    if isinstance(h, Tensor) and h.shape[:1] == outputs.shape[:1] and rows.get("value", True):
        g = h[:, None]  # of each example, in the teacher's logits; in the signal itself where it has none
        if problem.teacher_classifies and isinstance(q, Tensor) and q.ndim == 2 and q.is_floating_point():
            p = wide(q)  # (B, C)
            if signal.sampled:  # h_i ∇ log q_i(y_i)
                g = h[:, None] * (F.one_hot(signal.value, p.shape[1]) - p)
            elif h.shape == p.shape:
                g = p * (h - (p * h).sum(1, keepdim=True))
        g = g.flatten(1)
        count = len(g) * ranks.size
        m, s = ranks.mean(g.mean(0)).square().sum(), ranks.mean(g.square().sum(1).mean())
        found["feedback_snr"] = (count * m - s) / (s - m).clamp_min(torch.finfo(s.dtype).tiny)
    if signal.outputs is None or signal.outputs.shape != outputs.shape:
        return found
    q = wide(q if isinstance(q, Tensor) and q.is_floating_point() else signal.outputs.softmax(-1))
    of_labels = {
        "pseudo_label_confidence": q.amax(-1).mean(),
        "pseudo_label_entropy": torch.special.entr(q).sum(-1).mean(),
        "agreement": (signal.outputs.argmax(-1) == outputs.argmax(-1)).double().mean(),
    }
    labels: Any = labeled[1] if isinstance(labeled, tuple | list) and len(labeled) > 1 else None
    indices = isinstance(labels, Tensor) and labels.ndim == 1 and not labels.is_floating_point()
    if problem.teacher_classifies and q.ndim == 2 and indices:
        is_class = labels[:, None] == torch.arange(q.shape[1], device=q.device)  # of ignored ones, none
        shares = ranks.mean(torch.stack([q.mean(0), is_class.to(q).mean(0)]))
        found["class_shares_vs_labeled"] = (shares[0] - shares[1] / shares[1].sum()).abs().sum() / 2
    return found | (of_labels if ranks.alone else ranks.mean_tree(of_labels, of_labels))
