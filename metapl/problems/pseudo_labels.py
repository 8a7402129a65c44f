"""Meta Pseudo Labels, and Reduced Meta Pseudo Labels.

In the reduced form the large teacher is gone after its distributions were stored, and a small
network that adjusts them is the teacher of the step.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from torch import Tensor, nn
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, Inputs, returned_by, views
from metapl.execution.numerics import in_type_of, wide
from metapl.problems.base import (
    BilevelProblem,
    Kind,
    Params,
    Random,
    Signal,
    draw_classes,
)
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import Range, check_fields

# What errors call the network in its pass on the inner batch.
ON_INNER = "teacher, on the inner batch"

# The teacher's own losses unless others are given: on inner batches with one view, and with two.
_LOSSES_OF_ONE_VIEW: tuple[TeacherLoss, ...] = (CrossEntropy(),)
_LOSSES_OF_TWO_VIEWS: tuple[TeacherLoss, ...] = (*_LOSSES_OF_ONE_VIEW, UDA())


@dataclass(frozen=True)
class PseudoLabels(BilevelProblem):
    r"""The teacher labels the unlabeled batch, and the student learns these labels.

    The student is then judged on the labeled batch.

    .. math:: q = \mathrm{softmax}(T(x_u)/\tau), \quad
              \ell_i = \mathrm{CE}\big((1-\alpha)\,t_i + \alpha/C,\ S(x_u)_i\big), \quad
              L = \tfrac1{B_l}\sum_j \mathrm{CE}(y_j, S(x_l)_j)

    with t = q (soft) or t = ŷ ~ q (hard). A batch of unlabeled inputs is one tensor, or a pair
    (weak, strong): the teacher labels the weak view and is fed back through that pass, the student
    learns the label on the strong view, or on the teacher's. Inputs may also be a dict of tensors,
    or a tuple of tensors, written ``(inputs,)``, since a pair is two views.

    Args:
        kind: ``"soft"``, ``"hard"``, or None for the kind that the mode takes.
        temperature: τ; below 1 it sharpens q. Hard labels are drawn from the same q.
        label_smoothing: α of the student's loss. The teacher's score term is not smoothed, which
            would bias it.
        student_view: of two views, the one that the student learns: ``"strong"``, as the authors'
            code has it, or ``"weak"``, that of the teacher, as Algorithm 1 is written, whose one
            x_u stands in lines 2, 3 and 5.

    Raises: :class:`metapl.MetaplError` for labels, views, lengths or class counts that do not fit.

    >>> PseudoLabels(temperature=0.8).for_modes(("hard",)).kind
    'hard'

    Source: Meta Pseudo Labels, eqs. (1)-(3), Algorithm 1 lines 2-4.
    """

    kind: Literal["soft", "hard"] | None = None
    temperature: Annotated[float, Range(above=0)] = 1.0
    label_smoothing: Annotated[float, Range(0, 1)] = 0.0
    student_view: Literal["strong", "weak"] = "strong"

    classifies: ClassVar[bool] = True
    teacher_classifies: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)

    def for_modes(self, labels: Sequence[Kind], mode: str = "") -> PseudoLabels:
        """Return the problem with a kind of labels that a mode takes.

        That is ``kind``, or the mode's first choice where ``kind`` is None.

        Args:
            labels: the kinds that the mode takes, by preference.
            mode: its name.
        """
        if self.kind is None:
            return self._with_kind(labels[0])
        if self.kind not in labels:
            given = f"PseudoLabels(kind={self.kind!r}) was given with mode {mode!r}"
            raise MetaplError(f"{given}; expected kind=None, or {' or '.join(labels)}.")
        return self

    def exact(self) -> PseudoLabels:
        return self._with_kind("soft")

    def _with_kind(self, kind: Kind) -> PseudoLabels:
        """Return a copy with this kind of labels.

        It has every attribute that a subclass, or a caller, has put on this instance, which
        ``dataclasses.replace`` would lose.
        """
        problem = copy.copy(self)
        object.__setattr__(problem, "kind", kind)
        return problem

    def teacher_input(self, batch: Batch) -> Any:
        return views(batch)[0]

    def student_input(self, batch: Batch) -> Inputs:
        both = views(batch)
        return both[0] if self.student_view == "weak" else both[-1]

    def default_teacher_losses(self, batch: Batch) -> tuple[TeacherLoss, ...]:
        """Return cross-entropy, and UDA where the inner batch has two views.

        Source: Algorithm 1, lines 6-7.
        """
        if len(views(batch)) == 2:
            return _LOSSES_OF_TWO_VIEWS
        return _LOSSES_OF_ONE_VIEW

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        checks.class_outputs(outputs, "student")
        checks.class_labels(outer[1], outputs.shape[1])

    def signal(
        self,
        teacher: nn.Module,
        batch: Batch,
        student_outputs: Tensor | None,
        *,
        generator: Random,
    ) -> Signal:
        """Return q, or ŷ ~ q with its log-probability: Algorithm 1, line 2."""
        logits = checks.logits(returned_by(teacher, self.teacher_input(batch), ON_INNER), "teacher")
        # There are no outputs yet where a subclass lets the signal enter the student's input.
        if student_outputs is not None and logits.shape != student_outputs.shape:
            expected = f"the student's shape, {tuple(student_outputs.shape)}"
            raise checks.unexpected("the teacher's outputs are", logits, expected)
        # The softmax is taken in float32 or wider.
        z = wide(logits)
        if self.temperature != 1.0:
            z = z / self.temperature
        log_q = F.log_softmax(z, -1)
        q = log_q.exp()
        # A problem whose kind was left open, None, has soft labels, unless for_modes has chosen.
        if self.kind != "hard":
            return Signal(q, outputs=logits)
        labels_B1 = draw_classes(q.detach(), generator)
        return Signal(
            labels_B1.squeeze(-1),
            log_prob=log_q.gather(-1, labels_B1).squeeze(-1),
            probs=q,
            outputs=logits,
        )

    def inner_loss(
        self, outputs: Tensor, signal: Signal, batch: Batch, params: Params | None = None
    ) -> Tensor:
        """Return CE of the student's outputs against the (smoothed) label, (B,)."""
        return F.cross_entropy(
            outputs, signal.value, reduction="none", label_smoothing=self.label_smoothing
        )

    def outer_loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        return F.cross_entropy(outputs, checks.safe_labels(batch[1], outputs.shape[1]))


@dataclass(frozen=True)
class ReducedLabels(PseudoLabels):
    r"""The student learns stored labels as a small network adjusts them.

    A large teacher is trained first, and its class distributions q on the unlabeled examples are
    stored. Then a small network T plays the teacher's part in Algorithm 1, and only the student and
    T are in memory.

    .. math:: \tilde q = \mathrm{softmax}(T(q)/\tau), \quad
              \ell_i = \mathrm{CE}(\tilde q_i, S(x_i; \theta)), \quad
              h_{ik} = -\frac{\partial L(\theta')}{\partial \tilde q_{ik}}
              = \frac1B \frac{d}{d\varepsilon} \log S_{ik}(\theta + \varepsilon w)

    with w = (∂U/∂g)ᵀ ∇L(θ′), the outer gradient pulled back through the student's step.

    An inner batch is (x, stored), the outer one (x, y, stored), with the stored distributions (B,
    C) of the same examples; without the teacher's supervised loss the outer one may be (x, y). The
    teacher maps stored distributions to logits (B, C): :class:`metapl.models.LabelAdjuster`, which
    begins as the identity, so that the first steps are those of plain pseudo-labels. Its own loss
    is by default :class:`StoredCrossEntropy`.

    >>> import metapl, torch
    >>> teacher, student = metapl.models.LabelAdjuster(3), torch.nn.Linear(4, 3)
    >>> trainer = metapl.BilevelTrainer(teacher, student, "forward", problem=ReducedLabels())
    >>> stored = torch.rand(6, 3).softmax(-1)
    >>> labeled = torch.randn(6, 4), torch.arange(6) % 3, stored
    >>> trainer.step(labeled, (torch.randn(6, 4), stored)).feedback.shape
    torch.Size([6, 3])

    Args:
        kind, temperature, label_smoothing: as for :class:`metapl.PseudoLabels`.

    Cost: a step of plain training of the student on stored labels, the student's outer pass, and
    what the mode adds. Bias: that of the mode. Raises: :class:`metapl.MetaplError` for batches
    without stored distributions, or with other classes. Source: Meta Pseudo Labels, section 4,
    "Reduced Meta Pseudo Labels"; the network and its supervised term are known from accounts of it,
    its identity at the start is ours.
    """

    teacher_classifies: ClassVar[bool] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.student_view != "strong":
            raise MetaplError("student_view was given to ReducedLabels; expected it left out.")

    def teacher_input(self, batch: Batch) -> Tensor:
        return stored_pair(batch)[1]

    def student_input(self, batch: Batch) -> Inputs:
        return stored_pair(batch)[0]

    def signal(
        self,
        teacher: nn.Module,
        batch: Batch,
        student_outputs: Tensor | None,
        *,
        generator: Random,
    ) -> Signal:
        """Return the signal of :class:`metapl.PseudoLabels`, made from the stored distributions.

        These are read in the type of the teacher's weights.
        """
        inputs, stored = stored_pair(batch)
        batch_in_type = inputs, in_type_of(teacher, stored)
        return super().signal(teacher, batch_in_type, student_outputs, generator=generator)

    def default_teacher_losses(self, batch: Batch) -> tuple[TeacherLoss, ...]:
        return (StoredCrossEntropy(),)

    def check(self, outputs: Tensor, outer: Batch, inner: Batch) -> None:
        """Refuse labels that are no classes of the student's, and stored values that do not fit."""
        super().check(outputs, outer, inner)
        _, stored = stored_pair(inner)
        checks.class_distributions(stored, outputs.shape, "the stored labels of the inner batch")
        if len(outer) > 2:
            checks.class_distributions(
                outer[2],
                (len(outer[1]), outputs.shape[1]),
                "the stored labels of the outer batch",
            )


@dataclass(frozen=True)
class StoredCrossEntropy(CrossEntropy):
    """:class:`metapl.CrossEntropy` of T(stored_j), of outer batches (x, y, stored)."""

    # The loss reads no signal, so its gradient does not pass through one: a compiled step may take
    # it apart from that of the feedback (see metapl.problems.losses.TeacherLoss).
    detaches_signal: ClassVar[bool] = True

    def outputs(self, teacher: nn.Module, outer: Batch) -> Any:
        if len(outer) < 3:
            expected = "(inputs, labels, stored), or teacher_losses=()"
            raise checks.unexpected("outer is", outer, expected)
        return teacher(in_type_of(teacher, outer[2]))


def stored_pair(batch: Batch) -> tuple[Any, Tensor]:
    """Return the inputs and the stored distributions of a batch, or refuse the batch."""
    if not isinstance(batch, tuple | list) or len(batch) != 2 or not isinstance(batch[1], Tensor):
        raise checks.unexpected("inner is", batch, "(inputs, stored class distributions)")
    return batch[0], batch[1]
