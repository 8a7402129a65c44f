"""Reduced Meta Pseudo Labels: the labels of a teacher that is no longer there, adjusted by a small network.

A large teacher is trained first, and its class distributions q on the unlabeled examples are stored. Then a small
network T adjusts each of them, and plays the teacher's part in Algorithm 1: the student learns the adjusted label, and
T learns from the labeled loss of the student afterwards. Only the student and T are in memory.
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
    those of plain pseudo-labels.

    Its own loss is by default :class:`StoredCrossEntropy`, on the stored distributions of the labeled examples.

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
        """The stored distributions."""
        return self._pair(batch)[1]

    def student_input(self, batch: Any) -> Any:
        """x."""
        return self._pair(batch)[0]

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random) -> Signal:
        """As of :class:`metapl.PseudoLabels`, of the stored distributions in the type of the teacher's weights."""
        inputs, stored = self._pair(batch)
        return super().signal(teacher, (inputs, in_type_of(teacher, stored)), student_outputs, generator=generator)

    def default_teacher_losses(self, batch: Any) -> tuple[TeacherLoss, ...]:
        """Cross-entropy on the stored distributions of the labeled batch."""
        return (StoredCrossEntropy(label_smoothing=0.1),)

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        """Refuse labels that are not classes of the student's outputs, and stored values that are not distributions."""
        super().check(outputs, labeled, unlabeled)
        check_stored(self._pair(unlabeled)[1], outputs, "unlabeled")
        if len(labeled) > 2:
            check_stored(labeled[2], labeled[1][:, None].expand(-1, outputs.shape[1]), "labeled")

    @staticmethod
    def _pair(batch: Any) -> tuple[Any, Tensor]:
        return stored_pair(batch, "the inner batch of ReducedLabels, unlabeled=,")


@dataclass(frozen=True)
class StoredCrossEntropy(CrossEntropy):
    r"""Supervised: (1/B_l) Σ_j CE((1−α) y_j + α/C, T(stored_j)), of labeled batches (x, y, stored).

    Args:
        label_smoothing: α in [0, 1).
        weight: the factor of this term.

    Raises: :class:`metapl.MetaplError` for batches without stored distributions, and labels that are no classes.
    """

    def outputs(self, teacher: nn.Module, labeled: Any) -> Any:
        """T on the stored distributions of the labeled batch."""
        if len(labeled) < 3:
            raise MetaplError(
                f"labeled is {checks.described(labeled)}; expected (inputs, labels, stored), with the stored class "
                "distributions of the labeled examples, for the teacher's supervised loss; or teacher_losses=()."
            )
        return teacher(in_type_of(teacher, labeled[2]))


def check_stored(stored: Tensor, outputs: Tensor, name: str) -> None:
    """Refuse stored values that are not one class distribution for each of the student's outputs (B, C)."""
    if stored.shape != outputs.shape or not stored.is_floating_point():
        raise MetaplError(
            f"the stored labels of the {name} batch are {checks.described(stored)}; expected class distributions of "
            f"shape {tuple(outputs.shape)}."
        )
    sums = wide(stored).sum(1)
    checks.refuse(
        ((sums - 1).abs().amax() > 0.02) | (stored.amin() < 0),
        f"the stored labels of the {name} batch are not distributions: expected numbers of 0 or more that sum to 1 in "
        "every row (logits are stored after a softmax).",
    )


def stored_pair(batch: Any, what: str) -> tuple[Any, Tensor]:
    """The inputs and the stored distributions of a batch; refuse one that is not a pair of these."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise MetaplError(
            f"{what} is {checks.described(batch)}; expected (inputs, stored), with the stored class distributions of "
            "the inputs."
        )
    return batch[0], batch[1]
