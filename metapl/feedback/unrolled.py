"""The exact hypergradient by double backward: the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from metapl.core.feedback import Feedback
from metapl.core.order import Order
from metapl.feedback.base import Estimator, State, Truncation, feedback_from, padded
from metapl.problems.base import BilevelProblem, Kind

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.core.terms import StudentPath


@dataclass(frozen=True)
class Unrolled(Estimator):
    r"""Differentiate the outer loss through the student's step, and that through its gradient.

    .. math:: h = -\frac{d}{d\,\mathrm{signal}} L\big(U(\theta, g(\mathrm{signal}))\big)

    Args:
        truncate: differentiate only this many of the last student steps; None: all. 0: none, for
            ``wrt="start"`` alone (:func:`metapl.hypergradient`), which is first-order MAML.

    Takes: soft (differentiable) signals. Cost: 13 student passes a step with the teacher's 3; the
    inner graph and its derivative stay in memory (about twice the peak of ``forward``,
    benchmarks/modes.py). Bias: none. It does not use the adjoints of :mod:`metapl.updates`, so
    other modes are tested against it. Raises: :class:`metapl.MetaplError` for operations without a
    second derivative, by name. Source: Meta Pseudo Labels, eq. (3); DARTS and MAML's one-step
    gradient.
    """

    truncate: Truncation | None = None

    name: ClassVar[str] = "unrolled"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)
    is_derivative: ClassVar[bool] = True
    keep_graph: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    is_pure: ClassVar[bool] = True

    def orders(
        self, steps: int, problem: BilevelProblem, student: Engine, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        return ("double_backward",)

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        feedback = []
        for step, gradients in path.gradients_in_signals(self.truncate):
            feedback.append(feedback_from(step, gradients))
        return padded(feedback, path), state
