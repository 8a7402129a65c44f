r"""Training a language model on sequences that a teacher rates, or whose weights are 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import inputs_of, plain
from metapl.execution.numerics import wide
from metapl.execution.ranks import rows_of_all
from metapl.problems.base import Params, Problem, Random, Signal
from metapl.problems.doubtful import EqualWeights
from metapl.runs.fields import check_fields

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class DataRater(Problem):
    r"""The weight of a training sequence is a softmax, over the batch, of the teacher's scores.

    .. math:: a_i = B\, \mathrm{softmax}(s)_i, \qquad s_i = T(x_i), \qquad
              \ell_i = \frac{a_i}{n_i} \sum_t -\log S(x_{i, \le t}; \theta)_{x_{i,t+1}}, \qquad
              \theta' = U\Big(\theta, \nabla_\theta \frac1B \sum_i \ell_i\Big)

    The student is a causal language model, which maps token ids (B, T) to logits (B, T, words); the
    teacher, the rater, maps the same to scores (B,), or (B, 1). The outer loss is the mean over all
    tokens of the outer batch, clean text.

    A batch, the inner or the outer, is a tensor of token ids (B, T), int64, or a dict as Hugging
    Face has it: with ``input_ids``, and perhaps an ``attention_mask``, whose zeros are padding, and
    ``labels``, the ids themselves with -100 where none is to be predicted (default: at padding, and
    at the first token after it). Both networks get the tensor, or the dict without labels. A
    sequence with nothing to predict has the loss 0; an inner batch of such sequences alone is
    refused.

    The softmax is over the whole inner batch, and the outer mean over all tokens, whatever the
    number of micro-batches (``accumulate``) and processes. The ``signal`` of a report is a, and the
    feedback is that on a.

    Give a :class:`metapl.Lookahead` of a few batches (``lookahead=``) and Adam, as the paper has
    it; its students of different age are a loop over trainers that share the teacher: see
    ``examples/data_rater.py``.

    Cost: the passes of the mode, and one forward and backward pass of the teacher on each inner
    batch. Bias: that of the mode; ``forward`` and ``unrolled`` have none. Modes for sampled
    signals, such as ``reinforce``, are refused.

    >>> import metapl
    >>> class Rater(torch.nn.Embedding):
    ...     def forward(self, ids):
    ...         return super().forward(ids).mean((1, 2))
    >>> student = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
    >>> trainer = metapl.BilevelTrainer(Rater(20, 1), student, "forward", problem=DataRater())
    >>> report = trainer.step(outer=torch.randint(20, (4, 9)), inner=torch.randint(20, (6, 9)))
    >>> report.feedback.shape, round(report.signal.value.sum().item(), 4)
    (torch.Size([6]), 6.0)

    Raises: :class:`metapl.MetaplError` for batches, students and teachers of other shapes.
    Source: Calian et al., "DataRater: meta-learned dataset curation" (2025).
    """

    signal_has_rows: ClassVar[bool] = True
    signal_of_batch: ClassVar[bool] = True

    def default_outer_optimizer(self, teacher: nn.Module) -> torch.optim.Optimizer:
        """Adam at 1e-3."""
        return torch.optim.Adam(teacher.parameters(), lr=1e-3)

    def student_input(self, batch: Any) -> Any:
        return _read(batch)[0]

    def outer_batch(self, batch: Any) -> Any:
        _read(batch)
        return plain(batch)

    def outer_input(self, batch: Any) -> Any:
        return _read(batch)[0]

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse outputs that are not logits of each token, other labels, and nothing to predict."""
        _check_words(outputs, _read(unlabeled)[1], _read(labeled)[1])
        checks.refuse(
            (_read(unlabeled)[1][:, 1:] == IGNORED).all(),
            f"the inner batch of DataRater has no token to predict: all are {IGNORED}, or "
            "padding; expected one.",
        )

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """a, (B,), over the sequences of all processes."""
        inputs, labels = _read(batch)
        scores = teacher(inputs)
        if not isinstance(scores, Tensor) or scores.shape not in ((len(labels),), (len(labels), 1)):
            raise MetaplError(
                f"the rater returned {checks.described(scores)}; expected scores (B,)."
            )
        every, own = rows_of_all(wide(scores).reshape(len(labels)))
        if len(every) < 2:
            raise MetaplError(
                "the inner batch of DataRater has one sequence, whose weight is 1; expected two "
                "or more."
            )
        return Signal(len(every) * every.softmax(0)[own])

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None
    ) -> Tensor:
        losses, counts = _losses(outputs, _read(batch)[1])
        return signal.value * losses.sum(1) / counts.sum(1).clamp_min(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        losses, counts = _losses(outputs, _read(batch)[1])
        return losses.sum(), counts.sum()


@dataclass(frozen=True)
class NextToken(EqualWeights):
    r"""Training sequences, or their tokens, whose weights are 1: for :func:`metapl.attribute`.

    .. math:: \ell_i = \frac1{n_i} \sum_t w_{it} \big(-\log S(x_{i,<t}; \theta)_{y_{it}}\big)

    A batch is (ids, labels): ids (B, T), int64, or the dict of them that the network takes, and
    labels (B, T), the ids themselves with -100 where none is to be predicted; n_i is the number of
    the others after the first. The student is a causal language model, with logits (B, T, words).
    The outer loss is the mean over all tokens of the outer batch.

    Args:
        per: ``"sequence"``: w_it = w_i, (B,), and scores (N,). ``"token"``: (B, T), and scores (N,
            T), at the place of the token that is predicted, so that the first column is 0; by the
            chain rule their sums over T are the scores of the sequences.

    >>> import metapl
    >>> student = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
    >>> train, outer = torch.randint(20, (12, 7)), torch.randint(20, (4, 7))
    >>> how = {"optimizer": torch.optim.SGD(student.parameters(), lr=0.1), "steps": 5, "batch_size": 6}
    >>> metapl.attribute(student, (train, train), (outer, outer), problem=NextToken(per="token"), **how).scores.shape
    torch.Size([12, 7])
    """

    per: Literal["sequence", "token"] = "sequence"
    classifies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_fields(self)

    def weight_shape(self, outputs: Tensor) -> tuple[int, ...]:
        return tuple(outputs.shape[: 1 if self.per == "sequence" else 2])

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        _check_words(outputs, unlabeled[1], labeled[1])

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None
    ) -> Tensor:
        losses, counts = _losses(outputs, batch[1])
        of_token = F.pad(losses[:, :-1], (1, 0))  # at the token, not where it is predicted from
        weights = signal.value.reshape(len(losses), -1)  # (B, 1), or (B, T)
        return (weights * of_token).sum(1) / counts.sum(1).clamp_min(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor]:
        losses, counts = _losses(outputs, batch[1])
        return losses.sum(), counts.sum()


def _check_words(outputs: Tensor, inner: Tensor, outer: Tensor) -> None:
    """Refuse outputs that are not logits of each token of the inner labels, and labels that are none of its words."""
    if outputs.ndim != 3 or outputs.shape[:2] != inner.shape:
        raise MetaplError(
            f"the student's outputs are {checks.described(outputs)}; expected logits (B, T, words)."
        )
    for labels in (outer, inner):
        ids, words = labels.masked_fill(labels == IGNORED, 0).flatten(), outputs.shape[2]
        checks.class_labels(ids, words, "the token ids", f"the student has {words:,} words")


def _read(batch: Any) -> tuple[Any, Tensor]:
    """The networks' input, and the labels (B, T)."""
    given = plain(batch)
    if (
        isinstance(given, tuple | list) and len(given) == 1
    ):  # as a DataLoader has it of a TensorDataset
        (given,) = given
    parts = given if isinstance(given, dict) else {"input_ids": given}
    ids, mask = parts.get("input_ids"), parts.get("attention_mask")
    labels: Any = parts.get("labels", ids)
    tensors = [ids, labels] + [mask] * (mask is not None)
    shapes = {t.shape if isinstance(t, Tensor) else None for t in tensors}
    if (
        len(shapes) > 1
        or None in shapes
        or labels.ndim != 2
        or labels.shape[1] < 2
        or labels.dtype != torch.int64
    ):
        raise MetaplError(
            f"the batch of DataRater is {checks.described(batch)}; expected token ids (B, T), "
            "int64, two or more, or a dict of input_ids, attention_mask and labels."
        )
    if mask is not None and "labels" not in parts:
        is_token = mask != 0
        # Padded on the left, the first token has nothing before it to be predicted from, as at a
        # row's beginning.
        labels = labels.masked_fill(
            ~is_token | ~F.pad(is_token[:, :-1], (1, 0), value=True), IGNORED
        )
    return inputs_of(given), labels


def _losses(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The cross-entropy of the following token at each place, (B, T), 0 where none is to be
    predicted, and 1 where one is."""
    # The labels move, not the outputs, of which a part would be a copy.
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    counts = following != IGNORED
    safe = torch.where(counts, checks.safe_labels(following, outputs.shape[2]), IGNORED)
    losses = F.cross_entropy(
        outputs.flatten(0, 1), safe.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(following), counts
