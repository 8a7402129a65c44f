r"""The exact hypergradient in mixed mode: reverse for v, forward for ż.

This derivation is behind ``forward``, ``difference``, both ``reinforce`` modes and ``implicit``,
not behind ``unrolled``, ``loss_difference``, ``direct`` and ``none``. The outer loss depends on the
signal s only through θ′ = U(θ, g(s)), with g(s) = ∇_θ ℓ(S(x_u; θ), s). So, with v = ∇L(θ′) and
w = (∂U/∂g)ᵀ v,

.. math:: dL = \langle v, \tfrac{\partial U}{\partial g} dg \rangle = \langle w, dg \rangle
             = d\,\langle w, \nabla_\theta \ell(S(x_u;\theta), s) \rangle
             = d\,\tfrac{d}{d\varepsilon} \ell(S(x_u; \theta + \varepsilon w), s)
             = d\,\langle \tfrac{\partial \ell}{\partial z}(z, s), \dot z \rangle .

The mixed second derivative ∂²ℓ/∂θ∂s, contracted with w, is thus a derivative of the *outputs* along
w, followed by one in the head, where the signal enters: no second derivative of the network is ever
formed. A signal that enters the student's input enters at both ends of the network, and its
derivative is taken by double backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.keeping import Keeping, keeping
from metapl.core.lesson import credited
from metapl.core.order import Order
from metapl.errors import MetaplError
from metapl.execution.layout import CURVATURE, FORWARD_AD, Capability
from metapl.feedback.base import (
    Estimator,
    Normalization,
    State,
    Steps,
    Truncation,
    divisor,
    feedback_from,
    padded,
)
from metapl.problems.base import BilevelProblem, Kind, enters_input

if TYPE_CHECKING:
    from metapl.core.engine import Engine
    from metapl.core.terms import StudentPath

SMALL = 2**15
"""The number of weights, in all steps together, up to which their graphs are kept (measured in
benchmarks/step.py, and of several steps in benchmarks/something_simpler.py)."""

By = Literal["graph", "tangent", "double_backward"]


def exact_orders(
    steps: int,
    problem: BilevelProblem,
    student: Engine,
    wrt: Sequence[str] = (),
    by: By | None = None,
) -> tuple[Order, ...]:
    """Return the orders in which an exact derivative may be taken, the preferred first.

    Or ``by`` alone.

    Raises: :class:`metapl.MetaplError` for a ``by`` that a sharded student does not have.
    """
    is_small = steps * sum(map(Tensor.numel, student.params.values())) <= SMALL
    if enters_input(problem) or "start" in wrt:
        # The derivative in the input, or in the first weights, goes through the network, whatever
        # is asked.
        if not enters_input(problem) and is_small and by is None and student.has_whole_weights:
            return ("graph", "double_backward")
        return ("double_backward",)
    if not student.has_whole_weights:
        # The gradients of a sharded student come from ``.backward()``, which keeps no graph.
        orders: tuple[Order, ...] = ("tangent",)
        if CURVATURE in student.capabilities:
            orders = ("tangent", "double_backward")
        if by is not None and by not in orders:
            raise MetaplError(f"by={by!r} was given, and the student is sharded; expected by=None.")
        return orders if by is None else (by,)
    if by is not None:
        return (by,)
    # The graph of one small step is kept; where its derivatives are missing, so are those of double
    # backward.
    if steps == 1 and is_small:
        return ("graph", "tangent")
    return ("tangent", "double_backward")


@dataclass(frozen=True)
class Forward(Estimator):
    r"""Give the whole gradient, exactly, at about the price of Algorithm 1's scalar.

    .. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \Big\langle
                  \frac{\partial\ell}{\partial z}(z, \mathrm{signal}),\ \dot z \Big\rangle, \quad
              \dot z = \frac{d}{d\varepsilon} S(x_u; \theta + \varepsilon w)\Big|_0

    For cross-entropy: h_ik = (1/B) d/dε log S_ik(θ + εw), shape (B, C), in units of the outer
    loss per unit of probability. On sampled labels the expectation over them is taken: the student
    learns ŷ, the teacher gets −Σ_ik q_ik h_ik, whose noise is that of θ′ alone.

    Args:
        normalization: ``"gradient"`` (default: the true gradient, of the order of η),
            ``"learning_rate"`` (divided by η), ``"cosine"`` (divided by ‖w‖‖g‖); see
            :func:`metapl.feedback.base.divisor`.
        truncate: differentiate only this many of the last student steps; None: all. 0: none, for
            ``wrt="start"`` alone (:func:`metapl.hypergradient`), which is first-order MAML.
        keep_every: of K steps, every so many (m) keep their weights and optimizer state; the others
            are computed again, in the memory of about K/m + m steps; 1: all are kept. None: all of
            up to 50 steps; of more, as many as half of the free memory holds: all, every √K-th, or
            a tree.
        keep: ``"tree"`` in place of ``keep_every``: some 10 log₁₀ K states, and each step computed
            again once for every factor of 10 in K after the first.
        by: how one step, or the first of several, is differentiated: ``"graph"``, ⟨g, w⟩ by the
            graph of g, which each pass then keeps (less time on small networks, 1.1 to 2.4
            times the memory); ``"tangent"``, by ż in forward mode; ``"double_backward"``, ⟨g, w⟩ by
            a graph that is made for it, as always where the signal enters the student's input.
            None: the first that runs of graph and tangent (one step, up to :data:`SMALL` weights),
            of tangent and double backward, or for the gradient in the start of graph (up to
            :data:`SMALL` weights in all steps together) and double backward; chosen at a trainer's
            first step, and in the first call of :func:`metapl.hypergradient` on the same objects,
            whose result says it (``order``).
        keep_on: where kept states lie: None, with the student; ``"cpu"``, on the host.

    Takes: soft signals; hard labels by the expectation. Cost: 12 student passes a step with the
    teacher's 3; by tangent no graph beyond that of a plain step. Of K steps looked ahead, every one
    but the first costs a double backward pass instead of ż's: 1.1 to 1.4 times what ``unrolled``
    costs, in the memory of one student step, of K sets of weights, gradients and optimizer states
    (see ``keep_every``), and of the teacher's K graphs (``recompute_teacher``). A signal that
    enters the student's input costs a double backward pass in every step. Of a sharded student,
    each of these gathers one block at a time and runs it four times. Bias: none for soft signals.
    For hard labels θ′ of the sampled labels stands in for that of their mean: O(η²) for updates
    affine in g (the SGD family), where θ′ is right in the mean; for others it stays as η falls (B =
    2, relative norm: 0.26 under a warmed Adam, 0.82 under an active clip). Raises:
    :class:`metapl.MetaplError` for operations that have neither forward-mode AD nor a second
    derivative (over several steps: that have no second derivative), by name; attention runs on its
    math kernel. Source: derived at the head of this file,
    from eq. (3); the mixed-mode products of the AD literature.
    """

    normalization: Normalization = "gradient"
    truncate: Truncation | None = None
    keep_every: Steps | None = None
    keep: Literal["tree"] | None = None
    keep_on: Literal["cpu"] | None = None
    by: By | None = None

    name: ClassVar[str] = "forward"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    is_derivative: ClassVar[bool] = True
    looks_ahead: ClassVar[bool] = True
    is_pure: ClassVar[bool] = True
    requires: ClassVar[frozenset[Capability]] = frozenset({FORWARD_AD})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and self.keep_every is not None:
            raise MetaplError("keep and keep_every were given; expected one of them.")

    def orders(
        self, steps: int, problem: BilevelProblem, student: Engine, wrt: Sequence[str] = ()
    ) -> tuple[Order, ...]:
        return exact_orders(steps, problem, student, wrt, self.by)

    def keeping(self, steps: int, size: int, student: Engine) -> Keeping:
        return keeping(
            steps, size, student.device, self.keep or self.keep_every, self.keep_on, student.ranks
        )

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        # From the last step to the first.
        feedback: list[Feedback] = []
        for step, w, gradients in path.adjoints(credited, self.truncate):
            if gradients is None:
                # The earliest step has no Hessian product, with which they would have come.
                gradients = step.derivatives_along(w)
            h = feedback_from(step, gradients)
            if self.normalization != "gradient":
                h = h.divided_by(divisor(self.normalization, step, w))
            feedback.append(h)
        if len(feedback) < len(path.steps):
            return padded(feedback[::-1], path), state
        return feedback[::-1], state
