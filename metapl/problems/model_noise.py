"""The student's loss in Noisy Student, and the noise that a network itself adds."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.execution import checks
from metapl.execution.batch import Batch
from metapl.execution.numerics import wide
from metapl.problems.base import Signal
from metapl.problems.pseudo_labels import stored_pair
from metapl.runs.fields import Range, check_fields


@dataclass(frozen=True)
class NoisyStudentLoss:
    r"""The student's loss in Noisy Student.

    Some examples have labels of people, the others stored ones of a teacher.

    .. math:: \frac{1}{B_l + B_u} \Big( \sum_j \mathrm{CE}(y_j, S(x_j))
              + \sum_i \mathrm{CE}(\tilde q_i, S(x_i)) \Big)
              = \frac{1}{1+r} \ell_l + \frac{r}{1+r} \ell_u, \qquad r = B_u / B_l

    The two parts of the batch run in one pass, so that batch statistics are of both. Noise is what
    the views and the network in training mode add.

    Args:
        form: ``"mean"`` is the mean over the concatenated batch; ``"two_means"`` adds the means of
            the two parts with the same weight, as Algorithm 1 has it.
        hard: learn the most probable class of a stored distribution, not the distribution.
        model_noise: whether dropout and stochastic depth act on pseudo-labeled examples too.
            Without, the two parts run in passes of their own, whose batch statistics are their own.
        label_smoothing: of the labels of labeled examples, α in [0, 1).

    Needs: inner batches that are pairs (x, stored), with the stored distributions (B, C). Where
    such pairs stand in the place of outer batches, and there are no inner ones, the loss is
    that of the pairs alone. Source: Noisy Student, Algorithm 1, line 3 (``"two_means"``), and what
    it says of training (``"mean"``).
    """

    form: Literal["mean", "two_means"] = "mean"
    hard: bool = False
    model_noise: bool = True
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0

    name: ClassVar[str] = "noisy_student"
    of_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(
        self, teacher: nn.Module, *, outer: Batch, inner: Batch, signal: Signal, step: int
    ) -> Tensor:
        if inner is None:
            return self._of_pairs(teacher, outer)
        x_l, y = outer[:2]
        x_u, stored = stored_pair(inner)
        if self.model_noise:
            logits = checks.logits(teacher(torch.cat([x_l, x_u])), "network")
        else:
            logits_with_noise = checks.logits(teacher(x_l), "network")
            with with_model_noise(teacher, on=False):
                logits = torch.cat([logits_with_noise, teacher(x_u)])
        logits_l, logits_u = wide(logits).split([len(x_l), len(x_u)])
        checks.class_distributions(stored, logits_u.shape, "the stored labels of the inner batch")
        y = checks.class_labels(y, logits_l.shape[1])
        on_labeled = F.cross_entropy(logits_l, y, label_smoothing=self.label_smoothing)
        on_unlabeled = self._on_stored(logits_u, stored)
        if self.form == "two_means":
            return on_labeled + on_unlabeled
        return (len(x_l) * on_labeled + len(x_u) * on_unlabeled) / (len(x_l) + len(x_u))

    def _of_pairs(self, network: nn.Module, pairs: Any) -> Tensor:
        """Return the loss of pseudo-labeled examples alone."""
        x, stored = stored_pair(pairs)
        with nullcontext() if self.model_noise else with_model_noise(network, on=False):
            logits = wide(network(x))
        checks.class_distributions(stored, logits.shape, "the stored labels of the outer batch")
        return self._on_stored(logits, stored)

    def _on_stored(self, logits: Tensor, stored: Tensor) -> Tensor:
        return F.cross_entropy(logits, stored.argmax(1) if self.hard else wide(stored))


def model_noise(network: nn.Module) -> list[nn.Module]:
    """Return the modules of a network that draw at random while it is trained.

    They are dropout and stochastic depth, and modules of timm's with a ``drop_rate``, which call
    dropout as a function.

    >>> network = nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5))
    >>> [type(part).__name__ for part in model_noise(network)]
    ['Dropout']
    """
    return [part for part in network.modules() if _draws(part)]


def _draws(part: Any) -> bool:
    """Return whether a module draws at random while it is trained."""
    # Dropout and stochastic depth of torch, torchvision and timm are known by the names of their
    # classes.
    kinds = " ".join(kind.__name__.lower() for kind in type(part).__mro__)
    if "drop" in kinds or "stochasticdepth" in kinds:
        rate: Any = getattr(part, "p", None)
        if rate is None:
            rate = getattr(part, "drop_prob", 0.0)
        if rate:
            return True
    if isinstance(part, nn.MultiheadAttention):
        return bool(part.dropout > 0)
    return bool(getattr(part, "drop_rate", 0.0))


@contextmanager
def with_model_noise(network: nn.Module, on: bool) -> Iterator[None]:
    """Turn dropout and stochastic depth on, or off, in this block; all else stays as it is.

    >>> network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    >>> with with_model_noise(network, on=False):
    ...     [part.training for part in network]
    [False, True]
    """
    training_flags = {part: part.training for part in model_noise(network)}
    try:
        for part in training_flags:
            part.training = on
        yield
    finally:
        for part, training in training_flags.items():
            part.training = training
