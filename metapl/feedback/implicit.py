r"""The gradient through an optimum of the inner loss, by the implicit function theorem.

Where θ* minimizes the mean inner loss for a signal s, ∇_θ ℓ(θ*(s), s) = 0 for all s, and so

.. math:: d\theta^* = -H^{-1} \frac{\partial^2 \ell}{\partial\theta\,\partial s} ds, \qquad
          dL = \langle v, d\theta^* \rangle = \langle w, dg \rangle, \qquad w = -H^{-1} v

with v = ∇L(θ*), H = ∂²ℓ/∂θ² and g = ∇_θ ℓ: the same form as for a step, with another w (see
:mod:`metapl.feedback.forward`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

from metapl.errors import MetaplError
from metapl.execution.capabilities import FORWARD_AD, ONE_PROCESS, Capability
from metapl.execution.numerics import Tree, scaled
from metapl.feedback.base import Estimator, Feedback, State
from metapl.feedback.credit import exact_feedback
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.feedback.solvers import Product, conjugate_gradient, neumann
from metapl.problems.base import Kind
from metapl.runs.fields import Range, check_fields


@dataclass(frozen=True)
class Implicit(Estimator):
    r"""The gradient of the labeled loss at the inner optimum, for a student that is near it.

    .. math:: w = -(H + \mathrm{damping})^{-1} v, \quad v = \nabla L(\theta), \quad
              H = \frac{\partial^2}{\partial\theta^2} \tfrac1B \sum_i \ell_i, \qquad
              h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(S(x_u; \theta + \varepsilon w), \mathrm{signal}, \theta + \varepsilon w)

    Everything is evaluated at the student's weights before its step, on the inner batch. The student then takes its
    ordinary step; neither the step nor the optimizer enters h.

    Args:
        solver: ``"cg"``, conjugate gradients; ``"neumann"``, the series step_size·Σ_i (1 − step_size·(H + damping))ⁱ v;
            ``"identity"``, w = −step_size·v.
        iterations: of the solver, a product with H each. Conjugate gradients end before, where the residual is within
            rounding. Too few leave errors in the directions of the least eigenvalues, which count the most in
            w = −(H + damping)⁻¹ v: h then lies between that of the identity and the right one, up to its whole length
            away. Compare with a run of twice as many.
        step_size: of the series and of the identity; None: the student's learning rate, and 1 for the identity.
        damping: a number added to the eigenvalues of H, in their unit (the inner loss over weights squared).

    Takes: soft signals; hard labels by the expectation.
    Cost: 12 student passes a step with the teacher's 3, and for a solver 3 more once and 6 an iteration; the graph of a
    backward pass stays in memory meanwhile.
    Bias: none at an optimum with a solver that has converged; else of the order of the gradient that is left, of
    damping over the eigenvalues, and of what the solver leaves: n iterations of the series leave
    (1 − step_size·λ)ⁿ⁺¹ of eigenvalue λ.
    Raises: :class:`metapl.MetaplError` for operations without a second derivative or without forward-mode AD, by name;
    for negative curvature under ``"cg"`` and for a series that diverges.
    Source: the implicit function theorem; the series by Lorraine, Vicol and Duvenaud (AISTATS 2020).
    """

    solver: Literal["cg", "neumann", "identity"] = "cg"
    iterations: Annotated[int, Range(1)] = 10
    step_size: Annotated[float, Range(above=0)] | None = None
    damping: Annotated[float, Range(0)] = 0.0

    name: ClassVar[str] = "implicit"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    requires: ClassVar[frozenset[Capability]] = frozenset({ONE_PROCESS, FORWARD_AD})

    def __post_init__(self) -> None:
        check_fields(self)

    def feedback(self, path: Path, state: State) -> tuple[list[Feedback], State]:
        (step,) = path.steps
        v = path.outer_gradient_before()
        if self.solver == "identity":
            w = scaled(v, -1.0 if self.step_size is None else -float(self.step_size))
        else:
            with step.hessian() as product:
                w = scaled(self._solved(product, v, step), -1.0)
        return [exact_feedback(step, w)], state

    def _solved(self, product: Product, v: Tree, step: InnerStep) -> Tree:
        if self.solver == "cg":
            return conjugate_gradient(product, v, self.iterations, float(self.damping))
        step_size = step.learning_rate if self.step_size is None else self.step_size
        if not step_size:
            raise MetaplError(
                'Implicit(solver="neumann") takes the student\'s learning rate for its step_size, and this optimizer '
                "has none above 0; give step_size=..., below 2 over the greatest eigenvalue of the inner loss."
            )
        return neumann(product, v, self.iterations, float(step_size), float(self.damping))
