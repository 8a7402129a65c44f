r"""The student's loss in Noisy Student: labels of people on some examples, stored labels of a teacher on the others."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.execution import checks
from metapl.execution.modules import drop_rate, may_drop_by_function
from metapl.execution.numerics import wide
from metapl.problems.base import Signal
from metapl.problems.reduced import check_stored, stored_pair
from metapl.runs.fields import Range, check_fields


def model_noise(network: nn.Module) -> list[nn.Module]:
    """The modules of a network that draw at random while it is trained: dropout and stochastic depth, and modules of
    timm's with a ``drop_rate``, which call dropout as a function.

    >>> [type(part).__name__ for part in model_noise(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))]
    ['Dropout']
    """
    return [part for part in network.modules() if drop_rate(part) or may_drop_by_function(part)]


@contextmanager
def with_model_noise(network: nn.Module, on: bool) -> Iterator[None]:
    """In this block dropout and stochastic depth are on, or off; all else is in the mode that it was in.

    >>> network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    >>> with with_model_noise(network, on=False):
    ...     [part.training for part in network]
    [False, True]
    """
    parts = model_noise(network)
    before = [part.training for part in parts]
    try:
        for part in parts:
            part.training = on
        yield
    finally:
        for part, mode in zip(parts, before, strict=True):
            part.training = mode


@dataclass(frozen=True)
class NoisyStudentLoss:
    r"""Cross-entropy on labeled and pseudo-labeled examples together.

    .. math:: \frac{1}{B_l + B_u} \Big( \sum_j \mathrm{CE}(y_j, S(x_j)) + \sum_i \mathrm{CE}(\tilde q_i, S(x_i)) \Big)
              = \frac{1}{1+r} \ell_l + \frac{r}{1+r} \ell_u, \qquad r = B_u / B_l

    The two parts of the batch run in one pass, so that batch statistics are of both. Noise is what the views and the
    network in training mode add.

    Args:
        form: ``"mean"`` is the mean over the concatenated batch; ``"two_means"`` adds the means of the two parts with
            the same weight, as Algorithm 1 has it.
        hard: learn the most probable class of a stored distribution, not the distribution.
        model_noise: whether dropout and stochastic depth act on pseudo-labeled examples too. Without, the two parts
            run in passes of their own, whose batch statistics are their own.
        label_smoothing: of the labels of labeled examples, α in [0, 1).

    Needs: unlabeled batches that are pairs (x, stored), with the stored distributions (B, C).
    Raises: :class:`metapl.MetaplError` for a smoothing out of its range, batches without stored distributions, and
        labels that are not classes.
    Source: Noisy Student, Algorithm 1, line 3 (``"two_means"``), and its section on training (``"mean"``).
    """

    form: Literal["mean", "two_means"] = "mean"
    hard: bool = False
    model_noise: bool = True
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0

    name: ClassVar[str] = "noisy_student"

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        (x_l, y), (x_u, stored) = labeled[:2], stored_pair(unlabeled, "the pseudo-labeled batch")
        if self.model_noise:
            logits_l, logits_u = _logits(teacher, torch.cat([x_l, x_u])).split([len(x_l), len(x_u)])
        else:
            logits_l, logits_u = _logits(teacher, x_l), _logits(teacher, x_u, noise=False)
        checks.class_labels(y, logits_l.shape[1])
        y = checks.safe_labels(y, logits_l.shape[1])
        on_labeled = F.cross_entropy(logits_l, y, label_smoothing=self.label_smoothing)
        on_unlabeled = _against_stored(logits_u, stored, self.hard)
        if self.form == "two_means":
            return on_labeled + on_unlabeled
        n_l, n_u = len(x_l), len(x_u)
        return (n_l * on_labeled + n_u * on_unlabeled) / (n_l + n_u)


@dataclass(frozen=True)
class StoredLabelLoss:
    r"""Cross-entropy on pseudo-labeled examples alone, (1/B) Σ_i CE(stored_i, S(x_i)).

    Args:
        hard, model_noise: as for :class:`NoisyStudentLoss`.

    Needs: labeled batches that are pairs (x, stored).
    """

    hard: bool = False
    model_noise: bool = True

    name: ClassVar[str] = "pseudo_labeled"

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        inputs, stored = stored_pair(labeled, "the pseudo-labeled batch")
        return _against_stored(_logits(teacher, inputs, self.model_noise), stored, self.hard)


def _logits(network: nn.Module, inputs: Tensor, noise: bool = True) -> Tensor:
    with nullcontext() if noise else with_model_noise(network, on=False):
        return wide(checks.logits(network(inputs), "network"))


def _against_stored(logits: Tensor, stored: Tensor, hard: bool) -> Tensor:
    check_stored(stored, logits, "unlabeled")
    return F.cross_entropy(logits, stored.argmax(1) if hard else wide(stored))
