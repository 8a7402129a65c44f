"""Sampled labels, with a feedback scalar for each example."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from metapl.core.feedback import Feedback
from metapl.core.lesson import Credits
from metapl.core.order import Order
from metapl.execution.layout import FORWARD_AD, Capability
from metapl.feedback.base import Estimator, Normalization, State, divisor, exact_feedback
from metapl.feedback.difference import Difference
from metapl.feedback.forward import exact_orders
from metapl.problems.base import BilevelProblem, Kind

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.core.terms import StudentPath

# Made once, since checking its fields is nothing that a compiled step could trace.
BY_DIFFERENCE = Difference()


@dataclass(frozen=True)
class ReinforcePerExample(Estimator):
    r"""Give one number per label: the effect of its part of the step on the outer loss.

    .. math:: h_i = -\tfrac1B \Big\langle
                  \frac{\partial \ell_i}{\partial z_i}(z_i, \hat y_i), \dot z_i \Big\rangle, \quad
              \text{teacher: } \sum_i h_i \mathrm{CE}(\hat y_i, T(x_i)), \quad
              \sum_i h_i = -\langle w, g \rangle

    with g the gradient of the inner loss, w = (∂U/∂g)ᵀ ∇L(θ′), and ż the derivative of the outputs
    z along w.

    Args:
        tangent: how ż is computed: ``"forward"`` (exact) or ``"difference"`` (any operation).
        normalization: as in :class:`~metapl.feedback.Forward`.

    Takes: hard labels. Cost: that of its ż: 12 student passes a step with the teacher's 3, or 11.
    Bias: O(η) for updates affine in g (the SGD family). For Adam and clipping ∂U/∂g is taken at the
    sampled gradient, not at its mean, so a bias remains: with B = 2, the mean over all labels is
    0.33 away from the soft gradient in relative norm under a warmed Adam and 0.86 under an active
    clip, whatever η. Far less noisy than one scalar: the cross terms between examples, whose mean
    is zero, are left out. Raises: as :class:`~metapl.feedback.Forward`. Source: eq. (12) example by
    example; the terms left out have mean zero, since E ∇CE(ŷ_j, T(x_j)) = 0.
    """

    tangent: Literal["forward", "difference"] = "forward"
    normalization: Normalization = "gradient"

    name: ClassVar[str] = "reinforce_per_example"
    labels: ClassVar[tuple[Kind, ...]] = ("hard",)
    credits: ClassVar[Credits] = "example"
    by_differences: ClassVar[str] = "ReinforcePerExample(tangent='difference')"
    is_pure: ClassVar[bool] = True

    @property
    def takes_differences(self) -> bool:
        return self.tangent == "difference"

    @property
    def requires(self) -> frozenset[Capability]:
        return frozenset({FORWARD_AD} if self.tangent == "forward" else ())

    def orders(
        self, steps: int, problem: BilevelProblem, student: Engine, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        if self.tangent == "difference":
            return BY_DIFFERENCE.orders(steps, problem, student, wrt)
        return exact_orders(steps, problem, student, wrt)

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        if self.tangent == "forward":
            h = exact_feedback(step, w, of="example")
        else:
            h = BY_DIFFERENCE.along(step, w, of="example")
        return [h.divided_by(divisor(self.normalization, step, w))], state
