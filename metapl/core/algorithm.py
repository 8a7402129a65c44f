"""Algorithm 1 of Meta Pseudo Labels up to the teacher's gradient, whatever engine runs it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from metapl.core.lookahead import InnerBatches
from metapl.core.order import Order
from metapl.core.path import Look, Path, take_steps
from metapl.core.size import FeedbackSize
from metapl.core.teacher import Teaching
from metapl.execution.batch import Batch
from metapl.problems.losses import TeacherLoss
from metapl.updates import Update

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.feedback.base import Estimator


@dataclass(frozen=True)
class Learned:
    """What lines 2 to 7 leave: nothing has moved but buffers and generators.

    Attributes:
        path: the student's real step, to be committed.
        h: the feedback on the signal of each step, as the signal's value is.
        mode_state: the estimator's next state.
        scalars: of the report.
    """

    path: Path
    h: list[Tensor | dict[str, Tensor]]
    mode_state: dict[str, Any]
    scalars: dict[str, Tensor]


def learn(
    student: Engine,
    update: Update,
    teaching: Teaching,
    mode: Estimator,
    mode_state: dict[str, Any],
    *,
    outer_batch: Batch,
    inner_batches: InnerBatches,
    losses: Sequence[TeacherLoss],
    size: FeedbackSize,
    step: int | Tensor,
    order: Order | None = None,
    is_tried: bool = False,
    has_direct_term: bool = False,
    measure: bool = False,
    compares_parts: bool = False,
    look: Look | None = None,
    keep: Callable[..., Any] | None = None,
) -> Learned:
    """Take lines 2 to 7 of Algorithm 1, which leave the teacher's gradient in ``.grad``.

    Args:
        losses: the teacher's own.
        size: the rule that gives λ.
        step: the number of the step.
        order: of differentiation; None: there is nothing to choose.
        is_tried: whether the order is being chosen, by this step.
        has_direct_term: whether the outer loss reads the teacher, and the mode takes that.

    The others are those of :func:`metapl.core.path.take_steps` and :meth:`Teaching.backward`.
    """
    # Lines 2 and 3: ŷ_u ~ T(x_u), θ_S′ = U(θ_S, g).
    path = take_steps(
        student,
        update,
        problem=teaching.problem,
        outer_batch=outer_batch,
        inner_batches=inner_batches,
        teach=teaching,
        order=order,
        credits=mode.credits_of_steps,
        truncate=mode.truncate,
        keep=keep,
        look=look,
    )
    path.is_tried = is_tried
    if student.returns_state:
        # Of the one stream of draws the outer loss takes what comes after the teacher's.
        teaching.take_own_loss(losses, outer_batch=outer_batch, step=step)
    # Line 4: h.
    feedback, next_mode_state = mode.checked_feedback(path, mode_state)
    # Lines 5 to 7: the gradient of −Σ h·signal and of the teacher's own losses.
    teacher_scalars = teaching.backward(
        feedback,
        losses,
        outer_batch=outer_batch,
        step=step,
        size=size,
        has_feedback=mode.gives_gradient,
        measure=measure,
        compares_parts=compares_parts,
        direct_loss=path.direct_loss if has_direct_term else None,
    )
    h = [
        feedback_of_step.of_batch(step_of_path)
        for step_of_path, feedback_of_step in zip(path.steps, feedback, strict=True)
    ]
    # What the estimator says besides h.
    scalars: dict[str, Tensor] = {**feedback[-1].numbers}
    # The modes that take v have L(θ′); for others it would be one more pass.
    if path.knows_outer_loss:
        scalars["outer_loss"] = path.outer_loss
    # The student's real step is the one that was looked ahead, unless the problem makes another
    # signal of the feedback.
    real_path = path.revised(h[-1])
    scalars = {"inner_loss": real_path.inner_loss, **scalars, **teacher_scalars}
    return Learned(real_path, h, next_mode_state, scalars)
