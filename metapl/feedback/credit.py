r"""The feedback h along a direction w: on the signal, on its distribution, or on each example.

It is computed in the head, from z = S(x; θ) and ż = d/dε S(x; θ + εw), without running the network (unless the signal
enters x, see :func:`exact_feedback`). If the inner loss also reads the weights,

.. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(z + \varepsilon\dot z, \mathrm{signal}, \theta + \varepsilon w)

d/dε ℓ is compared with ⟨w, g⟩, which it equals by the chain rule (:mod:`metapl.execution.compare`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.compare import BY_DIFFERENCE, EXACTLY, same_slopes
from metapl.execution.local import as_leaves
from metapl.execution.numerics import Tree
from metapl.feedback.base import Feedback
from metapl.feedback.inner_step import InnerStep
from metapl.problems.base import Signal

ROUNDINGS = 10.0
"""A bound on the rounding error of ⟨g, w⟩ relative to ‖g‖‖w‖, in units of the machine epsilon; measured: up to 0.7."""


@dataclass(frozen=True)
class Tangent:
    """ż, (B, ...), and for a difference of outputs a bound on the norm of its rounding error.

    Where the signal enters the student's input, a difference also has the derivatives of ⟨g, w⟩ in the signal's fields.
    """

    z_dot: Tensor
    rounding: Tensor | None = None
    in_signal: Mapping[str, Tensor | None] | None = None


def exact_feedback(step: InnerStep, w: Tree) -> Feedback:
    """The feedback along w by exact derivatives: by ż; or by double backward where the signal enters the student's
    input, for ⟨∂ℓ/∂z, ż⟩ then depends on it through the whole network."""
    if step.entries:
        _, in_signal = step.second_derivatives(w, step.signal.differentiable(), curved=False)
        return feedback_from_gradients(step.signal, in_signal)
    return signal_feedback(step, w, Tangent(step.tangent(w)))


def signal_feedback(step: InnerStep, w: Tree, tangent: Tangent) -> Feedback:
    """The feedback on a differentiable signal, or on the distribution that labels were sampled from.

    For sampled labels ℓ is linear in its target, so h_ik = −(1/B) d/dε ℓ(z_i, class k) is the derivative at the one-hot
    rows of the labels.
    """
    if tangent.in_signal is not None:
        return feedback_from_gradients(step.signal, tangent.in_signal)
    leaves = as_leaves(credited_fields(step.signal))
    slope = _slope(step, step.signal.having(leaves), w, tangent)
    if not slope.requires_grad:
        return feedback_from_gradients(step.signal, dict.fromkeys(leaves))
    grads = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
    return feedback_from_gradients(step.signal, dict(zip(leaves, grads, strict=True)))


def credited_fields(signal: Signal) -> dict[str, Tensor]:
    """The fields of a signal that get feedback, with the values at which it is computed.

    For sampled labels: the one-hot rows of the labels, in place of the distribution.
    """
    if not signal.sampled:
        return signal.differentiable()
    if signal.probs is None:
        raise MetaplError(
            "the problem's signal is sampled and has no probs, over which this mode takes the expectation; expected "
            'Signal(value, log_prob, probs=...), or mode="reinforce_per_example" with one student step.'
        )
    return {"value": F.one_hot(signal.value, signal.probs.shape[-1]).to(signal.probs.dtype)}


def feedback_from_gradients(signal: Signal, gradients: Mapping[str, Tensor | None]) -> Feedback:
    """h = −dL(θ′)/d(field), from dL(θ′)/d(field) for each field of a signal; None for one that the inner loss does not
    depend on. For sampled labels, ``value`` is the distribution."""
    part = "probs" if signal.sampled else "value"
    found = {part if name == "value" else name: g for name, g in gradients.items()}
    h = {name: -g for name, g in found.items() if g is not None}
    read = bool(h)
    told = [name for name in found if name not in vars(signal)] if isinstance(signal.value, dict) else [part]
    # A zero for what is not read, so that the feedback has the shape of the signal.
    h |= {name: torch.zeros_like(signal.fields()[name]) for name in told if name not in h}
    first = h.pop(told[0])
    return Feedback(first, told[0], h, read)


def example_feedback(step: InnerStep, w: Tree, tangent: Tangent) -> Feedback:
    """h_i = −(1/B) d/dε ℓ_i(z + εż, signal, θ + εw), (B,), for the score of each sampled label."""
    # Σ_i u_i d/dε ℓ_i is linear in u, so its gradient is d/dε ℓ itself: forward mode by two reverse passes.
    u = step.inner_loss.new_ones(len(step.outputs), requires_grad=True)
    slope = _slope(step, step.signal, w, tangent, u)
    return Feedback(-torch.autograd.grad(slope, u, materialize_grads=True)[0], "log_prob")


def _slope(step: InnerStep, signal: Signal, w: Tree, tangent: Tangent, factors: Tensor | None = None) -> Tensor:
    """d/dε (1/B) Σ_i factor_i ℓ_i(z + εż, signal, θ + εw), this rank's share, with a graph to the factors and signal;
    flagged where it is not ⟨w, g⟩."""
    ranks, dtype = step.student.ranks, step.passes[0].rounded_to
    z = step.outputs.detach().requires_grad_()
    theta = as_leaves(step.params) if step.student.readable else {}
    with torch.enable_grad():
        losses = step.inner_losses(z, signal, theta)
        mean = (losses if factors is None else factors * losses).mean()
        mean = mean if ranks.alone else mean / ranks.size  # the shares of the ranks add up to the mean
        found = torch.autograd.grad(mean, [z, *theta.values()], create_graph=True, allow_unused=True)
        directions = [tangent.z_dot, *(w[name] if name in w else torch.zeros_like(p) for name, p in theta.items())]
        terms = [(g * t) for g, t in zip(found, directions, strict=True) if g is not None]
        slope = terms[0].sum() if len(terms) == 1 else torch.stack([term.sum() for term in terms]).sum()

    by_gradient, spread = step.space.slope(step.gradient, w)
    forward, tolerance = (
        ranks.sum(slope.detach()),
        (EXACTLY if tangent.rounding is None else BY_DIFFERENCE)[dtype].slope,
    )
    for term in terms:
        spread = spread + ranks.norm(term.detach())
    if ranks.alone and not checks.waits(slope) and bool((forward - by_gradient).abs() <= tolerance * spread):
        return slope
    # Both sums may cancel to rounding: of a bias before batch normalization, whose gradient is zero but for rounding, a
    # first step of Adam makes the whole direction.
    rounding = ROUNDINGS * torch.finfo(step.shifted_dtype).eps * step.space.norm(step.gradient) * step.space.norm(w)
    if tangent.rounding is not None and found[0] is not None:
        rounding = rounding + ranks.norm(found[0].detach()) * tangent.rounding
    same_slopes(forward, by_gradient, spread, tolerance, rounding)
    return slope
