"""Training a language model on sequences that a teacher rates, or whose weights are 1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import LABEL_KEYS, Batch, Inputs, inputs_of, plain
from metapl.execution.numerics import wide
from metapl.execution.ranks import rows_of_all
from metapl.problems.base import BilevelProblem, Params, Random, Signal
from metapl.problems.doubtful import EqualWeights
from metapl.runs.fields import check_fields

IGNORED = -100
"""The label of a token that is not to be predicted."""


@dataclass(frozen=True)
class DataRater(BilevelProblem):
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
        """Return Adam at 1e-3."""
        return torch.optim.Adam(teacher.parameters(), lr=1e-3)

    def student_input(self, batch: Batch) -> Inputs:
        inputs, _ = inputs_and_labels(batch)
        return inputs

    def outer_batch(self, batch: Batch) -> Batch:
        """Return the batch with dicts in the place of its dict-like parts, or refuse it."""
        inputs_and_labels(batch)
        return plain(batch)

    def outer_input(self, batch: Batch) -> Inputs:
        inputs, _ = inputs_and_labels(batch)
        return inputs

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        """Refuse outputs that are no logits of each token, and wrong labels."""
        _, inner_labels = inputs_and_labels(inner)
        _, outer_labels = inputs_and_labels(outer)
        check_words(outputs, inner_labels=inner_labels, outer_labels=outer_labels)

    def signal(
        self,
        teacher: nn.Module,
        batch: Batch,
        student_outputs: Tensor | None,
        *,
        generator: Random,
    ) -> Signal:
        """Return a, (B,), by a softmax over the sequences of all processes."""
        inputs, labels = inputs_and_labels(batch)
        rows = len(labels)
        scores = teacher(inputs)
        if not isinstance(scores, Tensor) or scores.shape not in ((rows,), (rows, 1)):
            raise checks.unexpected("the rater returned", scores, "scores (B,)")
        scores_of_all_ranks, rows_of_this_rank = rows_of_all(wide(scores).reshape(rows))
        if len(scores_of_all_ranks) < 2:
            raise MetaplError("the inner batch of DataRater has one sequence; expected more.")
        counts, _ = rows_of_all((labels[:, 1:] != IGNORED).sum(1).to(scores_of_all_ranks))
        text = f"the inner batch of DataRater has no token to predict but {IGNORED}; expected one."
        checks.refuse((counts == 0).all(), text)
        softmax = scores_of_all_ranks.softmax(0)
        return Signal(len(scores_of_all_ranks) * softmax[rows_of_this_rank])

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return a_i times the mean cross-entropy of the sequence's tokens, (B,)."""
        _, labels = inputs_and_labels(batch)
        losses_BT, is_predicted_BT = next_token_losses(outputs, labels)
        return signal.value * losses_BT.sum(1) / is_predicted_BT.sum(1).clamp_min(1)

    def outer_loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropy over all tokens, and their number."""
        _, labels = inputs_and_labels(batch)
        losses_BT, is_predicted_BT = next_token_losses(outputs, labels)
        return losses_BT.sum(), is_predicted_BT.sum()


@dataclass(frozen=True)
class NextToken(EqualWeights):
    r"""Training sequences, or their tokens, whose weights are 1: for :func:`metapl.attribute`.

    .. math:: \ell_i = \frac1{n_i} \sum_t w_{it} \big(-\log S(x_{i,<t}; \theta)_{y_{it}}\big)
              \ \text{ or }\ \frac{B}{\sum_j n_j} \sum_t w_{it}
              \big(-\log S(x_{i,<t}; \theta)_{y_{it}}\big)

    A batch is (ids, labels): ids (B, T), int64, or the dict of them that the network takes, and
    labels (B, T), the ids themselves with -100 where none is to be predicted; n_i is the number of
    the others after the first. A data set of ids alone has them for labels, without what an
    ``attention_mask`` masks. The student is a causal language model, with logits (B, T, words).
    The outer loss is the mean over all tokens of the outer batch.

    Args:
        per: ``"sequence"``: w_it = w_i, (B,), and scores (N,). ``"token"``: (B, T), and scores (N,
            T), at the place of the token that is predicted, so that the first column is 0; by the
            chain rule their sums over T are the scores of the sequences.
        mean: ``"sequence"``: each sequence counts alike in the loss of a batch. ``"token"``: each
            predicted token does, by the second formula, as in transformers.

    >>> import metapl
    >>> student = torch.nn.Sequential(torch.nn.Embedding(20, 8), torch.nn.Linear(8, 20))
    >>> train, outer = torch.randint(20, (12, 7)), torch.randint(20, (4, 7))
    >>> attribution = metapl.attribute(
    ...     student,
    ...     train,
    ...     outer,
    ...     problem=NextToken(per="token"),
    ...     optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
    ...     steps=5,
    ...     batch_size=6,
    ... )
    >>> attribution.scores.shape
    torch.Size([12, 7])
    """

    per: Literal["sequence", "token"] = "sequence"
    mean: Literal["sequence", "token"] = "sequence"
    classifies: ClassVar[bool] = False
    inputs_have_labels: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def labeled_batch(self, batch: Batch, name: str) -> Batch:
        """Return a batch of a data set as (ids, labels); of ids alone these are the labels too."""
        return super().labeled_batch(with_labels(batch, name), name)

    def outer_batch(self, batch: Batch) -> Batch:
        """Return the outer batch as (ids, labels); of ids alone these are the labels too."""
        return super().outer_batch(with_labels(batch, "outer"))

    def weight_shape(self, outputs: Tensor) -> tuple[int, ...]:
        dimensions = 1 if self.per == "sequence" else 2
        return tuple(outputs.shape[:dimensions])

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        check_words(outputs, inner_labels=inner[1], outer_labels=outer[1])

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return the weighted mean cross-entropy of each sequence's tokens, (B,)."""
        losses_BT, is_predicted_BT = next_token_losses(outputs, batch[1])
        # A loss stands where its token is predicted from, and its weight stands at the token.
        losses_at_tokens_BT = F.pad(losses_BT[:, :-1], (1, 0))
        # (B, 1) by sequence, and (B, T) by token.
        weights = signal.value.reshape(len(losses_BT), -1)
        sums_B = (weights * losses_at_tokens_BT).sum(1)
        if self.mean == "token":
            return len(sums_B) * sums_B / is_predicted_BT.sum().clamp_min(1)
        return sums_B / is_predicted_BT.sum(1).clamp_min(1)

    def batch_weight(self, batch: Batch) -> float:
        """Return the number of sequences, or, where each token counts alike, of predictions."""
        if self.mean == "token":
            return float((batch[1][:, 1:] != IGNORED).sum())
        return super().batch_weight(batch)

    def outer_loss(self, outputs: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """Return the sum of the cross-entropy over all tokens, and their number."""
        losses_BT, is_predicted_BT = next_token_losses(outputs, batch[1])
        return losses_BT.sum(), is_predicted_BT.sum()


def check_words(outputs: Tensor, *, inner_labels: Tensor, outer_labels: Tensor) -> None:
    """Refuse outputs that are no logits of each token of the inner batch, and labels beyond them.

    The labels of either batch have to be words of the student, or ignored.
    """
    if outputs.ndim != 3 or outputs.shape[:2] != inner_labels.shape:
        raise checks.unexpected("the student's outputs are", outputs, "logits (B, T, words)")
    words = outputs.shape[2]
    for labels in (outer_labels, inner_labels):
        ids = labels.masked_fill(labels == IGNORED, 0).flatten()
        reason = f"the student has {words:,} words"
        checks.class_labels(ids, words, subject="the token ids", reason=reason)


def with_labels(batch: Batch, name: str) -> Batch:
    """Return a batch of ids alone as (ids, labels), and any other as it is.

    Args:
        name: of the data set, for errors.
    """
    contents = plain(batch)
    if isinstance(contents, tuple | list) and len(contents) > 1:
        return batch
    if isinstance(contents, dict) and any(key in contents for key in LABEL_KEYS):
        return batch
    return inputs_and_labels(contents, name)


def inputs_and_labels(batch: Batch, name: str = "the batch of DataRater") -> tuple[Any, Tensor]:
    """Return the networks' input and the labels (B, T) of a batch, or refuse the batch."""
    contents = plain(batch)
    # A DataLoader of a TensorDataset has lists of one tensor.
    if isinstance(contents, tuple | list) and len(contents) == 1:
        contents = contents[0]
    entries = contents
    if not isinstance(contents, dict):
        entries = {"input_ids": contents}
    ids = entries.get("input_ids")
    mask = entries.get("attention_mask")
    labels: Any = entries.get("labels", ids)
    if not are_tokens(ids, labels, mask):
        expected = "token ids (B, T), int64, or a dict of input_ids, attention_mask and labels"
        raise checks.unexpected(f"{name} is", batch, expected)
    if mask is not None and "labels" not in entries:
        is_token = mask != 0
        # Padded on the left, the first token has nothing before it to be predicted from, as at a
        # row's beginning.
        follows_token = F.pad(is_token[:, :-1], (1, 0), value=True)
        labels = labels.masked_fill(~is_token | ~follows_token, IGNORED)
    return inputs_of(contents), labels


def are_tokens(ids: Any, labels: Any, mask: Any) -> bool:
    """Return whether ids, labels and mask (or None) are tensors of one shape (B, T), T ≥ 2.

    The labels have to be int64.
    """
    tensors = [ids, labels]
    if mask is not None:
        tensors.append(mask)
    if not all(isinstance(t, Tensor) for t in tensors):
        return False
    have_one_shape = all(t.shape == labels.shape for t in tensors)
    return (
        have_one_shape and labels.ndim == 2 and labels.shape[1] >= 2 and labels.dtype == torch.int64
    )


def next_token_losses(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the cross-entropy of the following token at each place, and whether there is one.

    Both are (B, T). The loss is 0 where no token is to be predicted.
    """
    # The labels move, not the outputs, of which a part would be a copy.
    following_BT = F.pad(labels[:, 1:], (0, 1), value=IGNORED)
    is_predicted_BT = following_BT != IGNORED
    words = outputs.shape[2]
    targets_BT = torch.where(is_predicted_BT, checks.safe_labels(following_BT, words), IGNORED)
    losses = F.cross_entropy(
        outputs.flatten(0, 1), targets_BT.flatten(), ignore_index=IGNORED, reduction="none"
    )
    return losses.view_as(following_BT), is_predicted_BT
