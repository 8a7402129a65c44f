"""Meta Pseudo Labels: the teacher's signal is its class probabilities, or labels drawn from them."""

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
from metapl.execution.numerics import wide
from metapl.problems.base import Kind, Params, Problem, Random, Signal, draw_classes
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.runs.fields import Range, check_fields


@dataclass(frozen=True)
class PseudoLabels(Problem):
    r"""The teacher labels the unlabeled batch; the student learns the labels and is judged on the labeled batch.

    .. math:: q = \mathrm{softmax}(T(x_u)/\tau), \quad
              \ell_i = \mathrm{CE}\big((1-\alpha)\,t_i + \alpha/C,\ S(x_u)_i\big), \quad
              L = \tfrac1{B_l}\sum_j \mathrm{CE}(y_j, S(x_l)_j)

    with t = q (soft) or t = ŷ ~ q (hard). A batch of unlabeled inputs is one tensor, or a pair (weak, strong): the
    teacher labels the weak view and is fed back through that pass, the student learns the label on the strong view.
    Inputs may also be a dict of tensors, or a tuple of tensors, written ``(inputs,)``, since a pair is two views.

    Args:
        kind: ``"soft"``, ``"hard"``, or None for the kind that the mode takes.
        temperature: τ; below 1 it sharpens q. Hard labels are drawn from the same q.
        label_smoothing: α of the student's loss. The teacher's score term is not smoothed, which would bias it.

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
        """The problem with a kind of labels that a mode takes: ``kind``, or the mode's first choice."""
        if self.kind is None:
            return self._of(labels[0])
        if self.kind not in labels:
            given = f"PseudoLabels(kind={self.kind!r}) was given, and mode '{mode}' takes {' or '.join(labels)} labels"
            raise MetaplError(f"{given}; expected kind=None, or another mode (metapl.feedback.modes_for).")
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

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Random) -> Signal:
        """q, or ŷ ~ q with its log-probability: Algorithm 1, line 2."""
        logits = checks.logits(teacher(self.teacher_input(batch)), "teacher")
        if student_outputs is not None and logits.shape != student_outputs.shape:  # None where it enters the input
            shape, own = tuple(logits.shape), tuple(student_outputs.shape)
            raise MetaplError(f"the teacher's outputs have shape {shape}; expected that of the student's, {own}.")
        z = wide(logits) if self.temperature == 1.0 else wide(logits) / self.temperature
        log_q = F.log_softmax(z, -1)
        q = log_q.exp()
        if self.kind != "hard":
            return Signal(q, outputs=logits)
        drawn = draw_classes(q.detach(), generator)
        return Signal(drawn.squeeze(-1), log_q.gather(-1, drawn).squeeze(-1), q, logits)

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Params | None = None) -> Tensor:
        """CE of the student's outputs against the (smoothed) label, (B,)."""
        return F.cross_entropy(outputs, signal.value, reduction="none", label_smoothing=self.label_smoothing)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Mean CE on the labeled batch."""
        return F.cross_entropy(outputs, checks.safe_labels(batch[1], outputs.shape[1]))


LOSSES: tuple[TeacherLoss, ...] = (CrossEntropy(label_smoothing=0.1), UDA())
"""The teacher's own losses where the inner batch has two views."""
