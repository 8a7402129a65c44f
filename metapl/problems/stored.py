"""Stored labels of a teacher that is no longer there: Reduced Meta Pseudo Labels.

A large teacher is trained first, and its class distributions q on the unlabeled examples
are stored. Then a small network T adjusts each of them, and plays the teacher's part in Algorithm 1: the student learns
the adjusted label, and T learns from the labeled loss of the student afterwards. Only the student and T are in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import in_type_of, wide
from metapl.problems.base import Random, Signal
from metapl.problems.losses import CrossEntropy, TeacherLoss
from metapl.problems.pseudo_labels import PseudoLabels


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
