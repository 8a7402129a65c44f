r"""The exact hypergradient in mixed mode: reverse for v, forward for ż.

The derivation that every mode of this folder but ``unrolled`` rests on. The outer loss depends on the signal s through
θ′ = U(θ, g(s)) alone, with g(s) = ∇_θ ℓ(S(x_u; θ), s). So, with v = ∇L(θ′) and w = (∂U/∂g)ᵀ v,

.. math:: dL = \langle v, \tfrac{\partial U}{\partial g} dg \rangle = \langle w, dg \rangle
             = d\,\langle w, \nabla_\theta \ell(S(x_u;\theta), s) \rangle
             = d\,\tfrac{d}{d\varepsilon} \ell(S(x_u; \theta + \varepsilon w), s)
             = d\,\langle \tfrac{\partial \ell}{\partial z}(z, s), \dot z \rangle .

The mixed second derivative ∂²ℓ/∂θ∂s, contracted with w, is thus a derivative of the *outputs* along w, followed by one
in the head, where the signal enters: no second derivative of the network is ever formed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.feedback.base import Feedback, Kind, Normalization, State, check_choice, divisor, only
from metapl.inner import InnerStep
from metapl.numerics import Tree


@dataclass(frozen=True)
class Forward:
    r"""The whole gradient, exactly, at about the price of Algorithm 1's scalar.

    .. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}}
                  \Big\langle \frac{\partial\ell}{\partial z}(z, \mathrm{signal}),\ \dot z \Big\rangle, \quad
              \dot z = \frac{d}{d\varepsilon} S(x_u; \theta + \varepsilon w)\Big|_0

    For cross-entropy: h_ik = (1/B) d/dε log S_ik(θ + εw), shape (B, C), in units of the labelled loss per unit of
    probability. On sampled labels the expectation over them is taken: the student learns ŷ, the teacher gets
    −Σ_ik q_ik h_ik, whose noise is that of θ′ alone.

    Args:
        normalization: ``"gradient"`` (default: the true gradient, of the order of η), ``"learning_rate"`` (divided by
            η), ``"cosine"`` (divided by ‖w‖‖g‖); see :func:`metapl.feedback.base.divisor`.

    Takes: soft signals; hard labels by the expectation.
    Cost: 12 student passes a step with the teacher's 3; no graph beyond that of a plain step.
    Bias: none for soft signals. For hard labels θ′ of the sampled labels stands in for that of their mean: O(η²) for
    updates affine in g (the SGD family), where θ′ is right in the mean; for others it stays as η falls (B = 2, relative
    norm: 0.26 under a warmed Adam, 0.82 under an active clip).
    Raises: :class:`metapl.MetaplError` for operations without forward-mode AD, by name; attention runs on its math
    kernel.
    Source: derived at the head of this file, from eq. (3); the mixed-mode products of the AD literature.
    """

    normalization: Normalization = "gradient"

    name: ClassVar[str] = "forward"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    keep_graph: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice(self, "normalization", ("gradient", "learning_rate", "cosine"))

    def init(self) -> State:
        return {}

    def feedback(self, steps: Sequence[InnerStep], state: State) -> tuple[list[Feedback], State]:
        step = only(steps, self.name)
        v = step.outer_gradient()
        w = step.pullback(v)
        z_dot = step.directional_derivative(w)
        return [from_tangent(step, z_dot, w, divisor(self.normalization, step, w))], state


def from_tangent(
    step: InnerStep, z_dot: Tensor, w: Tree, scale: Tensor | float, *, rounding: Tensor | None = None
) -> Feedback:
    """h from ż: the derivative in the signal itself, or in the law of sampled labels."""
    if not step.signal.sampled:
        return Feedback(step.signal_feedback(z_dot, w, rounding=rounding) / scale, "value")
    if step.signal.probs is None:
        raise MetaplError(
            "the problem's signal is sampled and carries no probs, over which this mode would take the expectation; "
            'give Signal(value, log_prob, probs=...) or use mode="reinforce_per_example".'
        )
    # ℓ is linear in its target (checked below), so h_ik = −d/dε ℓ(z_i, class k)/B is the derivative at the rows drawn.
    one_hot = torch.nn.functional.one_hot(step.signal.value, step.signal.probs.shape[-1]).to(step.signal.probs.dtype)
    h = step.signal_feedback(z_dot, w, one_hot, rounding=rounding)
    step.check_linear(z_dot, w, h)
    return Feedback(h / scale, "probs")
