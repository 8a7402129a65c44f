"""The exact hypergradient by double backward: the reference."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metapl.execution.kernels import explained
from metapl.feedback.base import Feedback, Kind, State, only
from metapl.inner import InnerStep


@dataclass(frozen=True)
class Unrolled:
    r"""Differentiate the labelled loss through the student's step, and the step through its gradient.

    .. math:: h = -\frac{d}{d\,\mathrm{signal}} L\big(U(\theta, g(\mathrm{signal}))\big)

    Takes: soft (differentiable) signals, also ones that enter the student's input or the inner loss anywhere else.
    Cost: 13 student passes a step with the teacher's 3; the inner graph and its derivative stay in memory (about twice
    the peak of ``forward``, benchmarks/modes.py).
    Bias: none; the one mode that does not use the pullback written in :mod:`metapl.optimizers`.
    Raises: :class:`metapl.MetaplError` for operations without a second derivative, by name.
    Source: Meta Pseudo Labels, eq. (3); DARTS and MAML's one-step gradient.
    """

    name: ClassVar[str] = "unrolled"
    labels: ClassVar[tuple[Kind, ...]] = ("soft",)
    keep_graph: ClassVar[bool] = True

    def init(self) -> State:
        return {}

    def feedback(self, steps: Sequence[InnerStep], state: State) -> tuple[list[Feedback], State]:
        step = only(steps, self.name)
        with explained(self.name):
            gradient = step.outer_gradient_of_signal()
        return [Feedback(-gradient, "value")], state
