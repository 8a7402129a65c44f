r"""The gradient through an optimum of the inner loss, by the implicit function theorem.

Where θ* minimizes the mean inner loss for a signal s, ∇_θ ℓ(θ*(s), s) = 0 for all s, and so

.. math:: d\theta^* = -H^{-1} \frac{\partial^2 \ell}{\partial\theta\,\partial s} ds, \qquad
          dL = \langle v, d\theta^* \rangle = \langle w, dg \rangle, \qquad w = -H^{-1} v

with v = ∇L(θ*), H = ∂²ℓ/∂θ² and g = ∇_θ ℓ: the same form as for a step, with another w (see
:mod:`metapl.feedback.forward`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.order import Order
from metapl.core.path import Path
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.layout import FORWARD_AD, ONE_PROCESS, Capability
from metapl.execution.numerics import WHOLE, Tree, scaled
from metapl.feedback.base import Estimator, State, exact_feedback
from metapl.problems.base import BilevelProblem, Kind, enters_input
from metapl.runs.fields import Range

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.core.terms import StudentPath

Product = Callable[[Tree], Tree]
"""Products with H, from which alone (H + damping) x = v is solved."""
dot = WHOLE.dot
norm = WHOLE.norm

# The relative residual of a system that counts as solved.
SOLVED = 0.01

# The part of ‖x‖ in the norm of H that the last third of the iterations, or the last LATE of them,
# has given to a solution that counts as solved, unless the residual is NEGLIGIBLE. A residual that
# is small beside v says little of small eigenvalues: with columns in units of 1 to 1e-4, h is wrong
# by 37 % at a residual of 0.08 %, and this part is 39 %.
SETTLED = 0.05
LATE = 3
NEGLIGIBLE = 1e-6

# ‖∇ℓ‖ over ‖v‖ of a student that counts as being at its optimum.
AT_OPTIMUM = 0.1

TINY = 1e-30


@dataclass(frozen=True)
class Implicit(Estimator):
    r"""The gradient of the outer loss at the inner optimum, for a student that is near it.

    .. math:: w = -(H + \mathrm{damping})^{-1} v, \quad v = \nabla L(\theta), \quad
              H = \frac{\partial^2}{\partial\theta^2} \tfrac1B \sum_i \ell_i, \qquad
              h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(S(x_u; \theta + \varepsilon w), \mathrm{signal}, \theta + \varepsilon w)

    Everything is evaluated at the student's weights before its step, on the inner batch; neither
    the step, which is taken then, nor the optimizer enters h.

    Args:
        solver: ``"cg"``, conjugate gradients; ``"neumann"``, the series step_size·Σ_i (1 −
            step_size·(H + damping))ⁱ v; ``"identity"``, w = −step_size·v.
        iterations: of the solver, a product with H each; conjugate gradients end where the residual
            is within rounding. Too few leave errors in the directions of the least eigenvalues,
            which count the most: verification warns of a residual above 1 % of v, and of conjugate
            gradients of which the last third still gave above 5 % of the solution.
        step_size: of the series and of the identity; None: the student's learning rate, and 1 for
            the identity.
        damping: a number added to the eigenvalues of H, in their unit (the inner loss over weights
            squared).

    Takes: soft signals; hard labels by the expectation. Cost: 12 student passes a step with the
    teacher's 3, for a solver 3 more once and 6 an iteration, and 6 more for the series; the graph
    of a backward pass stays in memory meanwhile. Bias: none at an optimum with a solver that has
    converged; else of the order of the gradient that is left, of damping over the eigenvalues, and
    of what the solver leaves: n iterations of the series leave (1 − step_size·λ)ⁿ⁺¹ of eigenvalue
    λ. Raises: :class:`metapl.MetaplError` for operations without a second derivative or without
    forward-mode AD, by name; for negative curvature under ``"cg"`` and for a series that diverges.
    Source: the implicit function theorem; the series by Lorraine, Vicol and Duvenaud (AISTATS
    2020).
    """

    solver: Literal["cg", "neumann", "identity"] = "cg"
    iterations: Annotated[int, Range(1)] = 10
    step_size: Annotated[float, Range(above=0)] | None = None
    damping: Annotated[float, Range(0)] = 0.0

    name: ClassVar[str] = "implicit"
    is_through_step: ClassVar[bool] = False
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    requires: ClassVar[frozenset[Capability]] = frozenset({ONE_PROCESS, FORWARD_AD})

    def orders(
        self, steps: int, problem: BilevelProblem, student: Engine, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        if enters_input(problem):
            return ("double_backward",)
        return ("tangent", "double_backward")

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        assert isinstance(path, Path), "the solvers read numbers on the host, which no graph does"
        (step,) = path.steps
        v = path.outer_gradient_before()
        rate = step.update.learning_rate
        if self.solver == "identity":
            solution = self.solution(None, v, rate)
        else:
            with step.descent.hessian() as product:
                solution = self.solution(product, v, rate)
        numbers = {"gradient_norm": norm(step.gradient), "outer_gradient_norm": norm(v)}
        if solution.residual is not None:
            numbers["solver_residual"] = solution.residual
        if solution.moved is not None:
            numbers["solver_moved"] = solution.moved
        feedback = exact_feedback(step, scaled(solution.x, -1.0))
        return [replace(feedback, numbers=numbers)], state

    def doubt(self, numbers: Mapping[str, Tensor]) -> str:
        residual = float(numbers.get("solver_residual", 0.0))
        if residual > SOLVED:
            return (
                f"after {self.iterations} iterations the solver has left a residual of "
                f"{residual:.1%} of v; expected more iterations, or a damping, until it is below "
                f"{SOLVED:.0%}."
            )
        moved = float(numbers.get("solver_moved", 0.0))
        if moved > SETTLED and residual > NEGLIGIBLE:
            return (
                f"the last third of {self.iterations} iterations still gave {moved:.1%} of the "
                f"solver's solution, though its residual is {residual:.2g} of v: small eigenvalues "
                "are not solved; expected more iterations, or a damping, until that is below "
                f"{SETTLED:.0%}."
            )
        gradient_norm = float(numbers["gradient_norm"])
        outer_gradient_norm = float(numbers["outer_gradient_norm"])
        # The identity is no solver, and is taken anywhere.
        # A v of 0 leaves nothing to be wrong.
        is_away = gradient_norm > AT_OPTIMUM * outer_gradient_norm > 0
        if is_away and self.solver != "identity":
            return (
                f"the inner gradient has a norm of {gradient_norm:.2g}, and v of "
                f"{outer_gradient_norm:.2g}: the student is not at the optimum that the mode is "
                "for; expected more inner steps first, or mode='forward'."
            )
        return ""

    def w_at_optimum(self, product: Product, v: Tree, rate: float | None) -> Tree:
        # The solution is about (∂²ℓ/∂θ²)⁻¹ v. At an optimum θ*, dL/d(signal) is the derivative of
        # −⟨g, (∂²ℓ/∂θ²)⁻¹ v⟩ in the signal, so that w is minus the solution.
        return scaled(self.solution(product, v, rate).x, -1.0)

    def solution(self, product: Product | None, v: Tree, rate: float | None) -> Solution:
        """Return about (H + damping)⁻¹ v.

        Args:
            product: of a tree with H; the identity needs none.
            rate: the learning rate of the inner optimizer, for the series.
        """
        if self.solver == "identity":
            return Solution(scaled(v, float(self.step_size or 1.0)))
        assert product is not None, "the other solvers read products with H"
        damping = float(self.damping)
        if self.solver == "cg":
            return conjugate_gradient(product, v, self.iterations, damping)
        step_size = float(self.step_size or rate or 0.0)
        if step_size == 0:
            raise MetaplError("the optimizer has no rate above 0; expected step_size= of Implicit.")
        is_default = self.step_size is None
        return neumann(
            product, v, self.iterations, step_size, damping=damping, is_default=is_default
        )


class Solution(NamedTuple):
    """What a solver leaves.

    Args:
        x: about (H + damping)⁻¹ v.
        residual: ‖v − (H + damping) x‖ / ‖v‖, where it is known.
        moved: the part of ‖x‖ that the last iterations gave, in the norm of H + damping, in which
            conjugate gradients add steps at right angles. It bounds from below the error that x
            had before these (Hestenes and Stiefel, 1952).
    """

    x: Tree
    residual: Tensor | None = None
    moved: Tensor | None = None


def conjugate_gradient(product: Product, v: Tree, iterations: int, damping: float) -> Solution:
    """Return (H + damping)⁻¹ v by conjugate gradients.

    Exact to rounding after as many iterations as a positive H has distinct eigenvalues.
    """
    rounding = 10 * max(torch.finfo(t.dtype).eps for t in v.values())
    x = scaled(v, 0.0)
    residual = v
    direction = v
    first = float(dot(residual, residual))
    squared = first
    # At most the greatest eigenvalue.
    largest = 0.0
    # The squared norm of each step in the norm of H + damping.
    squared_steps = []
    for number in range(iterations):
        if squared <= rounding**2 * first:
            break
        image = _plus(product(direction), direction, damping)
        numbers = torch.stack([dot(direction, image), norm(direction), norm(image)])
        curvature, direction_norm, image_norm = numbers.tolist()
        largest = max(largest, image_norm / direction_norm)
        if curvature <= rounding * direction_norm * image_norm:
            # The first direction, v itself, must be curved; a later one may be flat to rounding.
            if number == 0 or curvature < -rounding * largest * direction_norm**2:
                raise MetaplError(
                    "the inner loss curves downwards: the student is not near its optimum; "
                    "expected mode='forward', which needs no optimum, or a larger damping "
                    "(metapl.feedback.Implicit(damping=...))."
                )
            break
        alpha = squared / curvature
        x = _plus(x, direction, alpha)
        squared_steps.append(alpha * squared)
        residual = _plus(residual, image, -alpha)
        previous = squared
        squared = float(dot(residual, residual))
        direction = _plus(residual, direction, squared / previous)
    left = norm(residual) / norm(v).clamp_min(TINY)
    late = sum(squared_steps[-max(LATE, iterations // 3) :]) / max(sum(squared_steps), TINY)
    return Solution(x, left, left.new_tensor(late).sqrt())


def neumann(
    product: Product,
    v: Tree,
    iterations: int,
    step_size: float,
    damping: float,
    *,
    is_default: bool = False,
) -> Solution:
    """Return the Neumann series step_size·Σ_i (1 − step_size·(H + damping))ⁱ v, i = 0, 1, ...

    Args:
        iterations: the greatest i. One more product gives the residual.
        is_default: whether the step size is the student's learning rate, which nobody gave.
    """
    term = scaled(v, step_size)
    x = scaled(v, 0.0)
    for _ in range(iterations + 1):
        x = _plus(x, term, 1.0)
        term = _plus(term, _plus(product(term), term, damping), -step_size)
    # v − (H + damping) x is the first term that x lacks, over the step size.
    residual = norm(term) / step_size
    source = ", the student's learning rate, since step_size was not given" if is_default else ""
    # A series that overflows is NaN in the end, and NaN is refused too.
    checks.refuse(
        ~(residual <= norm(v)),
        f"the Neumann series diverges with a step size of {step_size:.3g}{source}; expected "
        f"step_size=... below 2 over the greatest eigenvalue of H + {damping:g}, or more damping.",
    )
    return Solution(x, residual / norm(v).clamp_min(TINY))


def _plus(a: Tree, b: Tree, factor: float) -> Tree:
    """Return a + factor·b."""
    return {name: t + factor * b[name] for name, t in a.items()}
