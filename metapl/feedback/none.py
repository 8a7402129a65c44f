"""No feedback: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from metapl.core.feedback import Feedback
from metapl.core.lesson import Credits
from metapl.feedback.base import Estimator, State
from metapl.problems.base import Kind

if TYPE_CHECKING:
    from metapl.core.terms import StudentPath


@dataclass(frozen=True)
class NoFeedback(Estimator):
    """Give no feedback, h = 0: the teacher learns from its own losses alone.

    With none of these it stays as it is.

    Takes: soft and hard labels, and any inner optimizer of ``torch.optim``. The control of a mode
    that draws labels draws them too: ``problem=metapl.PseudoLabels(kind="hard")``. Left to itself
    this mode takes soft labels, which train otherwise: with Adam at 1e-3 a student on digits ended
    15 points higher by them, whatever the feedback. Cost: 6 student passes a step at most, the
    teacher's included.
    """

    name: ClassVar[str] = "none"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    credits: ClassVar[Credits] = "nothing"
    gives_gradient: ClassVar[bool] = False
    looks_ahead: ClassVar[bool] = True
    is_pure: ClassVar[bool] = True

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        return [Feedback(step.inner_loss.new_zeros(()), part=None) for step in path.steps], state
