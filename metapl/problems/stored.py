"""Stored labels of a teacher that is no longer there: Reduced Meta Pseudo Labels, and the losses of Noisy Student.

In Reduced Meta Pseudo Labels a large teacher is trained first, and its class distributions q on the unlabeled examples
are stored. Then a small network T adjusts each of them, and plays the teacher's part in Algorithm 1: the student learns
the adjusted label, and T learns from the labeled loss of the student afterwards. Only the student and T are in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import in_type_of, wide
from metapl.problems.base import Random, Signal
from metapl.problems.losses import CrossEntropy, TeacherLoss
from metapl.problems.pseudo_labels import PseudoLabels
from metapl.runs.fields import Range, check_fields


@dataclass(frozen=True)
class ReducedLabels(PseudoLabels):
    r"""The student learns stored labels as a small network adjusts them.

    .. math:: \tilde q = \mathrm{softmax}(T(q)/\tau), \quad \ell_i = \mathrm{CE}(\tilde q_i, S(x_i; \theta)), \quad
              h_{ik} = -\frac{\partial L(\theta')}{\partial \tilde q_{ik}}
              = \frac1B \frac{d}{d\varepsilon} \log S_{ik}(\theta + \varepsilon w)

    An inner batch is (x, stored), the outer one (x, y, stored), with the stored distributions (B, C) of the same
    examples; without the teacher's supervised loss the outer one may be (x, y). The teacher maps stored distributions
    to logits (B, C): :func:`metapl.models.label_adjuster`, which begins as the identity, so that the first steps are
    those of plain pseudo-labels. Its own loss is by default :class:`StoredCrossEntropy`.

    >>> import metapl, torch
    >>> teacher, student = metapl.models.label_adjuster(3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=ReducedLabels())
    >>> stored = torch.rand(6, 3).softmax(-1)
    >>> labeled = torch.randn(6, 4), torch.arange(6) % 3, stored
    >>> trainer.step(labeled, (torch.randn(6, 4), stored)).feedback.shape
    torch.Size([6, 3])

    Args:
        kind, temperature, label_smoothing: as for :class:`metapl.PseudoLabels`.

    Cost: a step of plain training of the student on stored labels, the student's labeled pass, and what the mode adds.
    Bias: that of the mode.
    Raises: :class:`metapl.MetaplError` for batches without stored distributions, or with other classes.
    Source: Meta Pseudo Labels, section 4, "Reduced Meta Pseudo Labels"; the network and its supervised term are known
    from accounts of it, its identity at the start is ours.
    """

    teacher_classifies: ClassVar[bool] = False
    teacher_reads_inputs: ClassVar[bool] = False

    def teacher_input(self, batch: Any) -> Tensor:
        return stored_pair(batch)[1]

    def student_input(self, batch: Any) -> Any:
        return stored_pair(batch)[0]

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random) -> Signal:
        """As of :class:`metapl.PseudoLabels`, of the stored distributions in the type of the teacher's weights."""
        inputs, stored = stored_pair(batch)
        return super().signal(teacher, (inputs, in_type_of(teacher, stored)), student_outputs, generator=generator)

    def default_teacher_losses(self, batch: Any) -> tuple[TeacherLoss, ...]:
        return (StoredCrossEntropy(label_smoothing=0.1),)

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels that are not classes of the student's outputs, and stored values that are not distributions."""
        super().check(outputs, labeled, unlabeled)
        check_stored(stored_pair(unlabeled)[1], outputs, "unlabeled")
        if len(labeled) > 2:
            check_stored(labeled[2], labeled[1][:, None].expand(-1, outputs.shape[1]), "labeled")


@dataclass(frozen=True)
class StoredCrossEntropy(CrossEntropy):
    """:class:`metapl.CrossEntropy` of T(stored_j), of labeled batches (x, y, stored)."""

    def outputs(self, teacher: nn.Module, labeled: Any) -> Any:
        if len(labeled) < 3:
            given = f"labeled is {checks.described(labeled)}"
            raise MetaplError(f"{given}; expected (inputs, labels, stored), or teacher_losses=().")
        return teacher(in_type_of(teacher, labeled[2]))


@dataclass(frozen=True)
class NoisyStudentLoss:
    r"""The student's loss in Noisy Student: labels of people on some examples, stored ones of a teacher on the others.

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
    Source: Noisy Student, Algorithm 1, line 3 (``"two_means"``), and its section on training (``"mean"``).
    """

    form: Literal["mean", "two_means"] = "mean"
    hard: bool = False
    model_noise: bool = True
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0

    name: ClassVar[str] = "noisy_student"
    of_classes: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def __call__(self, teacher: nn.Module, *, labeled: Any, unlabeled: Any, signal: Signal, step: int) -> Tensor:
        (x_l, y), (x_u, stored) = labeled[:2], stored_pair(unlabeled)
        n_l, n_u = len(x_l), len(x_u)
        if self.model_noise:
            logits = checks.logits(teacher(torch.cat([x_l, x_u])), "network")
        else:
            logits = checks.logits(teacher(x_l), "network")
            with with_model_noise(teacher, on=False):
                logits = torch.cat([logits, teacher(x_u)])
        logits_l, logits_u = wide(logits).split([n_l, n_u])
        check_stored(stored, logits_u, "unlabeled")
        y = checks.class_labels(y, logits_l.shape[1])
        on_labeled = F.cross_entropy(logits_l, y, label_smoothing=self.label_smoothing)
        on_unlabeled = F.cross_entropy(logits_u, stored.argmax(1) if self.hard else wide(stored))
        if self.form == "two_means":
            return on_labeled + on_unlabeled
        return (n_l * on_labeled + n_u * on_unlabeled) / (n_l + n_u)


def check_stored(stored: Tensor, outputs: Tensor, name: str) -> None:
    """Refuse stored values that are not one class distribution for each of the student's outputs (B, C)."""
    text = (
        f"the stored labels of the {name} batch are {checks.described(stored)}; expected class distributions "
        f"{tuple(outputs.shape)}, which sum to 1 in every row: the softmax of logits."
    )
    if stored.shape != outputs.shape or not stored.is_floating_point():
        raise MetaplError(text)
    checks.refuse(((wide(stored).sum(1) - 1).abs().amax() > 0.02) | (stored.amin() < 0), text)


def stored_pair(batch: Any) -> tuple[Any, Tensor]:
    """The inputs and the stored distributions of a batch; one that is not a pair of these is refused."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise MetaplError(f"unlabeled is {checks.described(batch)}; expected (inputs, stored class distributions).")
    return batch[0], batch[1]


def model_noise(network: nn.Module) -> list[nn.Module]:
    """The modules of a network that draw at random while it is trained: dropout and stochastic depth, and modules of
    timm's with a ``drop_rate``, which call dropout as a function.

    >>> [type(part).__name__ for part in model_noise(nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.5)))]
    ['Dropout']
    """

    def draws(part: Any) -> bool:
        # Dropout and stochastic depth of torch, torchvision and timm by the names of their classes, and attention.
        kinds = " ".join(kind.__name__.lower() for kind in type(part).__mro__)
        named = "drop" in kinds or "stochasticdepth" in kinds
        rate = getattr(part, "p", getattr(part, "drop_prob", 0.0)) if named else 0.0
        own = part.dropout if isinstance(part, nn.MultiheadAttention) else getattr(part, "drop_rate", 0.0)
        return bool(rate or own)

    return [part for part in network.modules() if draws(part)]


@contextmanager
def with_model_noise(network: nn.Module, on: bool) -> Iterator[None]:
    """In this block dropout and stochastic depth are on, or off; all else is in the mode that it was in.

    >>> network = nn.Sequential(nn.Dropout(0.5), nn.BatchNorm1d(2))
    >>> with with_model_noise(network, on=False):
    ...     [part.training for part in network]
    [False, True]
    """
    before = {part: part.training for part in model_noise(network)}
    try:
        for part in before:
            part.training = on
        yield
    finally:
        for part, mode in before.items():
            part.training = mode
