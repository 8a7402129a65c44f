"""Algorithm 1 of Meta Pseudo Labels up to the teacher's gradient, whatever engine runs it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.order import Order
from metapl.core.path import Look, Path
from metapl.core.path import Mode as PathMode
from metapl.core.teacher import Teaching
from metapl.updates import Update

if TYPE_CHECKING:
    from metapl.core.engine import Engine


class Mode(PathMode, Protocol):
    """What the algorithm asks of an estimator besides."""

    @property
    def gives_gradient(self) -> bool:
        """Whether there is any feedback."""

    def checked_feedback(
        self, path: Path, state: dict[str, Any]
    ) -> tuple[list[Feedback], dict[str, Any]]:
        """Return h of each step, and the estimator's next state."""


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
    mode: Mode,
    mode_state: dict[str, Any],
    *,
    order: Order | None = None,
    is_tried: bool = False,
    direct_term: str = "",
    look: Look | None = None,
) -> Learned:
    """Take lines 2 to 7 of Algorithm 1, which leave the teacher's gradient in ``.grad``.

    Args:
        student, update, order, look, is_tried: as of :class:`metapl.core.path.Path`.
        teaching: the teacher's passes, with the batches and its own losses.
        mode: the estimator.
        mode_state: its state before the step.
        direct_term: ``"included"``: the teacher's gradient has that of an outer loss that reads it.
    """
    # Lines 2 and 3: ŷ_u ~ T(x_u), θ_S′ = U(θ_S, g).
    path = Path(
        student,
        update,
        problem=teaching.teacher.problem,
        outer_batch=teaching.outer_batch,
        inner_batches=teaching.inner_batches,
        teach=teaching,
        order=order,
        mode=mode,
        look=look,
        is_tried=is_tried,
    )
    path.take_steps()
    if student.returns_state:
        # Of the one stream of draws the outer loss takes what comes after the teacher's.
        teaching.take_own_loss()
    # Line 4: h.
    feedback, mode_state = mode.checked_feedback(path, mode_state)
    # Lines 5 to 7: the gradient of −Σ h·signal and of the teacher's own losses.
    teacher_scalars = teaching.backward(
        feedback,
        has_feedback=mode.gives_gradient,
        by_direct_loss=path.by_direct_loss if direct_term == "included" else None,
    )
    h = [of_step.of_batch(step) for step, of_step in zip(path.steps, feedback, strict=True)]
    # What the estimator says besides h.
    scalars: dict[str, Tensor] = {**feedback[-1].numbers}
    # The modes that take v have L(θ′); for others it would be one more pass.
    if "outer_loss" in path.known_outer_losses:
        scalars["outer_loss"] = path.outer_loss
    # The student's real step is the one that was looked ahead, unless the problem makes another
    # signal of the feedback.
    real_path = path.revised(h[-1])
    scalars = {"inner_loss": real_path.inner_loss, **scalars, **teacher_scalars}
    return Learned(real_path, h, mode_state, scalars)
