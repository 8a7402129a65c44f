"""Meta Pseudo Labels, and Reduced Meta Pseudo Labels, whose teacher is no longer there."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import views
from metapl.execution.numerics import in_type_of, wide
from metapl.problems.base import Kind, Params, Problem, Random, Signal, draw_classes, mean_over_rows
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import Range, check_fields


@dataclass(frozen=True)
class PseudoLabels(Problem):
    r"""The teacher labels the unlabeled batch; the student learns the labels and is judged on the labeled batch.

    .. math:: q = \mathrm{softmax}(T(x_u)/\tau), \quad
              \ell_i = \mathrm{CE}\big((1-\alpha)\,t_i + \alpha/C,\ S(x_u)_i\big), \quad
              L = \tfrac1{B_l}\sum_j \mathrm{CE}(y_j, S(x_l)_j)

    with t = q (soft) or t = ŷ ~ q (hard). A batch of unlabeled inputs is one tensor, or a pair
    (weak, strong): the teacher labels the weak view and is fed back through that pass, the student
    learns the label on the strong view. Inputs may also be a dict of tensors, or a tuple of
    tensors, written ``(inputs,)``, since a pair is two views.

    Args:
        kind: ``"soft"``, ``"hard"``, or None for the kind that the mode takes.
        temperature: τ; below 1 it sharpens q. Hard labels are drawn from the same q.
        label_smoothing: α of the student's loss. The teacher's score term is not smoothed, which
            would bias it.

    Raises: :class:`metapl.MetaplError` for labels, views, lengths or class counts that do not fit.

    >>> PseudoLabels(temperature=0.8).for_modes(("hard",)).kind
    'hard'

    Source: Meta Pseudo Labels, eqs. (1)-(3), Algorithm 1 lines 2-4.
    """

    kind: Literal["soft", "hard"] | None = None
    temperature: Annotated[float, Range(above=0)] = 1.0
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0

    classifies: ClassVar[bool] = True
    teacher_classifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> PseudoLabels:
        """The problem with a kind of labels that a mode takes.

        ``kind``, or the mode's first choice.
        """
        if self.kind is None:
            return self._of(labels[0])
        if self.kind not in labels:
            given = (
                f"PseudoLabels(kind={self.kind!r}) was given, and mode '{mode}' takes "
                f"{' or '.join(labels)} labels"
            )
            raise MetaplError(
                f"{given}; expected kind=None, or another mode (metapl.feedback.modes_for)."
            )
        return self

    def exact(self) -> PseudoLabels:
        return self._of("soft")

    def _of(self, kind: Kind) -> PseudoLabels:
        """A copy with this kind of labels, and with what a subclass, or a caller, has put on this instance."""
        other = copy.copy(self)
        object.__setattr__(other, "kind", kind)
        return other

    def teacher_input(self, batch: Any) -> Any:
        return views(batch)[0]

    def student_input(self, batch: Any) -> Any:
        return views(batch)[-1]

    def default_teacher_losses(self, batch: Any) -> tuple[TeacherLoss, ...]:
        """Cross-entropy, and UDA where the inner batch has two views: Algorithm 1, lines 6-7."""
        return LOSSES if len(views(batch)) == 2 else LOSSES[:1]

    def check(self, outputs: Tensor, labeled: Any, unlabeled: Any) -> None:
        checks.class_outputs(outputs, "student")
        checks.class_labels(labeled[1], outputs.shape[1])

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """q, or ŷ ~ q with its log-probability: Algorithm 1, line 2."""
        logits = checks.logits(teacher(self.teacher_input(batch)), "teacher")
        if (
            student_outputs is not None and logits.shape != student_outputs.shape
        ):  # None where it enters the input
            shape, own = tuple(logits.shape), tuple(student_outputs.shape)
            raise MetaplError(
                f"the teacher's outputs have shape {shape}; expected that of the student's, {own}."
            )
        z = wide(logits) if self.temperature == 1.0 else wide(logits) / self.temperature
        log_q = F.log_softmax(z, -1)
        q = log_q.exp()
        if self.kind != "hard":
            return Signal(q, outputs=logits)
        drawn = draw_classes(q.detach(), generator)
        return Signal(drawn.squeeze(-1), log_q.gather(-1, drawn).squeeze(-1), q, logits)

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None
    ) -> Tensor:
        """CE of the student's outputs against the (smoothed) label, (B,)."""
        return F.cross_entropy(
            outputs, signal.value, reduction="none", label_smoothing=self.label_smoothing
        )

    @mean_over_rows
    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, checks.safe_labels(batch[1], outputs.shape[1]))


LOSSES: tuple[TeacherLoss, ...] = (CrossEntropy(label_smoothing=0.1), UDA())
"""The teacher's own losses where the inner batch has two views."""


@dataclass(frozen=True)
class ReducedLabels(PseudoLabels):
    r"""The student learns stored labels as a small network adjusts them.

    A large teacher is trained first, and its class distributions q on the unlabeled examples are
    stored. Then a small network T plays the teacher's part in Algorithm 1, and only the student and
    T are in memory.

    .. math:: \tilde q = \mathrm{softmax}(T(q)/\tau), \quad \ell_i = \mathrm{CE}(\tilde q_i, S(x_i; \theta)), \quad
              h_{ik} = -\frac{\partial L(\theta')}{\partial \tilde q_{ik}}
              = \frac1B \frac{d}{d\varepsilon} \log S_{ik}(\theta + \varepsilon w)

    An inner batch is (x, stored), the outer one (x, y, stored), with the stored distributions (B,
    C) of the same examples; without the teacher's supervised loss the outer one may be (x, y). The
    teacher maps stored distributions to logits (B, C): :func:`metapl.models.label_adjuster`, which
    begins as the identity, so that the first steps are those of plain pseudo-labels. Its own loss
    is by default :class:`StoredCrossEntropy`.

    >>> import metapl, torch
    >>> teacher, student = metapl.models.label_adjuster(3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=ReducedLabels())
    >>> stored = torch.rand(6, 3).softmax(-1)
    >>> labeled = torch.randn(6, 4), torch.arange(6) % 3, stored
    >>> trainer.step(labeled, (torch.randn(6, 4), stored)).feedback.shape
    torch.Size([6, 3])

    Args:
        kind, temperature, label_smoothing: as for :class:`metapl.PseudoLabels`.

    Cost: a step of plain training of the student on stored labels, the student's labeled pass, and
    what the mode adds. Bias: that of the mode. Raises: :class:`metapl.MetaplError` for batches
    without stored distributions, or with other classes. Source: Meta Pseudo Labels, section 4,
    "Reduced Meta Pseudo Labels"; the network and its supervised term are known from accounts of it,
    its identity at the start is ours.
    """

    teacher_classifies: ClassVar[bool] = False

    def teacher_input(self, batch: Any) -> Tensor:
        return stored_pair(batch)[1]

    def student_input(self, batch: Any) -> Any:
        return stored_pair(batch)[0]

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random
    ) -> Signal:
        """As of :class:`metapl.PseudoLabels`, of the stored distributions in the type of the teacher's weights."""
        inputs, stored = stored_pair(batch)
        return super().signal(
            teacher, (inputs, in_type_of(teacher, stored)), student_outputs, generator=generator
        )

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

    detaches_signal: ClassVar[bool] = True

    def outputs(self, teacher: nn.Module, labeled: Any) -> Any:
        if len(labeled) < 3:
            given = f"labeled is {checks.described(labeled)}"
            raise MetaplError(f"{given}; expected (inputs, labels, stored), or teacher_losses=().")
        return teacher(in_type_of(teacher, labeled[2]))


def check_stored(stored: Tensor, outputs: Tensor, name: str) -> None:
    """Refuse stored values that are not one class distribution for each of the student's outputs (B, C)."""
    text = (
        f"the stored labels of the {name} batch are {checks.described(stored)}; expected class "
        f"distributions {tuple(outputs.shape)}, which sum to 1 in every row: the softmax of logits."
    )
    if stored.shape != outputs.shape or not stored.is_floating_point():
        raise MetaplError(text)
    checks.refuse(((wide(stored).sum(1) - 1).abs().amax() > 0.02) | (stored.amin() < 0), text)


def stored_pair(batch: Any) -> tuple[Any, Tensor]:
    """The inputs and the stored distributions of a batch.

    One that is not a pair of these is refused.
    """
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise MetaplError(
            f"unlabeled is {checks.described(batch)}; expected (inputs, stored class "
            "distributions)."
        )
    return batch[0], batch[1]
