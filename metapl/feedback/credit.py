r"""The feedback h along a direction w: on the signal, on its distribution, or on each example.

It is computed in the head, from z = S(x; θ) and ż = d/dε S(x; θ + εw), without running the network (unless the signal
enters x, see :func:`exact_feedback`). If the inner loss also reads the weights,

.. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(z + \varepsilon\dot z, \mathrm{signal}, \theta + \varepsilon w)

d/dε ℓ is compared with ⟨w, g⟩. By the chain rule they are equal; a student for which they are not is refused, because
its forward and backward passes are not of one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import BY_DIFFERENCE, BY_FORWARD_MODE, check_linear, check_loss, check_slopes
from metapl.execution.buffers import own_code
from metapl.execution.local import as_leaves, mean_of
from metapl.execution.numerics import Tree
from metapl.feedback.base import Feedback
from metapl.feedback.inner_step import InnerStep
from metapl.problems.base import Signal

PROJECTIONS = 8
"""So many random projections leave a chance of about one in a hundred to a ż that is 5 % off in float32."""

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
    """The feedback along w by exact derivatives: ż in forward mode; or by double backward where the signal enters the
    student's input, for ⟨∂ℓ/∂z, ż⟩ then depends on it through the whole network, or where the graph was kept."""
    if step.entries or step.passes[0].kept:
        _, in_signal = step.second_derivatives(w, step.signal.differentiable(), curved=False)
        return feedback_from_gradients(step.signal, in_signal)
    return signal_feedback(step, w, forward_tangent(step, w))


def forward_tangent(step: InnerStep, w: Tree) -> Tangent:
    """ż in forward mode; where an ``autograd.Function`` of the student may have another jvp than backward, compared."""
    tangent = Tangent(step.tangent(w))
    if step.student.first and not checks.waits(tangent.z_dot):
        check_projections(step, w, tangent)
    return tangent


def signal_feedback(step: InnerStep, w: Tree, tangent: Tangent) -> Feedback:
    """The feedback on a differentiable signal, or on the distribution that labels were sampled from.

    For sampled labels ℓ is linear in its target (checked), so h_ik = −(1/B) d/dε ℓ(z_i, class k) is the derivative at
    the one-hot rows of the labels.
    """
    signal = step.signal
    if tangent.in_signal is not None:
        _slope(step, signal, w, tangent)  # for its check
        return feedback_from_gradients(signal, tangent.in_signal)
    h = feedback_from_gradients(signal, _mixed_derivative(step, credited_fields(signal), w, tangent, check=True))
    if signal.probs is not None and signal.sampled:
        at_probs = _mixed_derivative(step, {"value": signal.probs}, w, tangent, check=False)
        check_linear(h.h, feedback_from_gradients(signal, at_probs).h, step.student.ranks)
    return h


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
    slope = _slope(step, step.signal, w, tangent, factors=u)
    return Feedback(-torch.autograd.grad(slope, u, materialize_grads=True)[0], "log_prob")


def _mixed_derivative(
    step: InnerStep, fields: Mapping[str, Tensor], w: Tree, tangent: Tangent, *, check: bool
) -> dict[str, Tensor | None]:
    """∂/∂(field) d/dε ℓ of each field, at the given values; None for a field that the inner loss does not depend on."""
    leaves = {name: t.detach().requires_grad_() for name, t in fields.items()}
    slope = _slope(step, step.signal.having(leaves), w, tangent, check=check)
    if not slope.requires_grad:
        return dict.fromkeys(leaves)
    grads = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
    return dict(zip(leaves, grads, strict=True))


def _slope(
    step: InnerStep, signal: Signal, w: Tree, tangent: Tangent, *, factors: Tensor | None = None, check: bool = True
) -> Tensor:
    """d/dε (1/B) Σ_i factor_i ℓ_i(z + εż, signal, θ + εw), this rank's share, with a graph to the factors and signal.

    ``check``: refuse ż if the derivative is not ⟨w, g⟩, and a loss with another value than in the student's step.
    """
    ranks = step.student.ranks
    z = step.outputs.detach().requires_grad_()
    theta = {} if own_code(step.problem.inner_loss) else as_leaves(step.params)  # which reads no weights
    with torch.enable_grad():
        losses = step.inner_losses(z, signal, theta)
        mean = (losses if factors is None else factors * losses).mean()
        mean = mean if ranks.alone else mean / ranks.size  # the shares of the ranks add up to the mean
    if check:
        check_loss(losses.detach(), mean_of([part.loss for part in step.passes]), ranks)
    grads = torch.autograd.grad(mean, [z, *theta.values()], create_graph=True, allow_unused=True)
    directions = [tangent.z_dot, *(w[name] if name in w else torch.zeros_like(p) for name, p in theta.items())]
    terms = [g * t for g, t in zip(grads, directions, strict=True) if g is not None]
    slope = terms[0].sum() if len(terms) == 1 else torch.stack([term.sum() for term in terms]).sum()
    if check:
        _check_slope(step, slope, terms, grads[0], w, tangent)
    return slope


def check_projections(step: InnerStep, w: Tree, tangent: Tangent) -> None:
    """Refuse the ż of passes that round, detach, or have an ``autograd.Function``, if it differs from the gradients of
    the outputs' projections.

    The inner loss is one projection of the outputs, in which a ż that is wrong may be right by chance.
    """
    parts, ranks = step.passes, step.student.ranks
    if tangent.rounding is None:
        tolerance, rounding = BY_FORWARD_MODE[parts[0].rounded_to].slope, step.inner_loss.new_zeros(())
    else:  # these terms do not cancel as those of a loss do
        tolerance, rounding = BY_DIFFERENCE[parts[0].rounded_to].slope / 5, tangent.rounding
    draw = torch.Generator().manual_seed(0)
    for part, z_dot in zip(parts, tangent.z_dot.chunk(len(parts)), strict=True):
        suspect = part.own_functions or (part.cut and tangent.rounding is not None)  # forward mode knows of detach
        if not ranks.pooled(step.inner_loss.new_tensor(float(suspect))) > 0:
            continue
        directions = [torch.randn(z_dot.shape, generator=draw).to(z_dot) for _ in range(PROJECTIONS)]
        for u, backward in zip(directions, part.slopes(w, directions), strict=True):
            forward, size = ranks.sum((u * z_dot).sum()), ranks.norm(z_dot)
            what = "a projection of the outputs"
            check_slopes(forward, ranks.sum(backward), size, tolerance, ranks.sum(rounding), what)


def _check_slope(
    step: InnerStep, slope: Tensor, terms: list[Tensor], in_outputs: Tensor | None, w: Tree, tangent: Tangent
) -> None:
    """Refuse ż if the derivative of the inner loss along w differs between the outputs and the gradient."""
    student, dtype = step.student, step.passes[0].rounded_to
    ranks, space = student.ranks, student.space
    by_gradient, of_gradient = space.slope(step.gradient, w)
    forward, spread = ranks.sum(slope.detach()), of_gradient
    for term in terms:
        spread = spread + ranks.norm(term.detach())
    waits = checks.waits(slope)
    tolerance, rounding = BY_FORWARD_MODE[dtype].slope, slope.new_zeros(())
    if tangent.rounding is not None:
        # No second try at a smaller step where reading waits: units that switch may spoil a difference by all of it.
        tolerance = 1.0 if waits else BY_DIFFERENCE[dtype].slope
        if in_outputs is not None:
            rounding = torch.linalg.vector_norm(in_outputs.detach()) * tangent.rounding
    if not waits and ranks.alone and float((forward - by_gradient).abs()) <= tolerance * float(spread):
        return
    # Both sums may cancel to rounding: of a bias before batch normalization, whose gradient is zero but for rounding, a
    # first step of Adam makes the whole direction.
    cancelled = ROUNDINGS * torch.finfo(step.shifted_dtype).eps * space.norm(step.gradient) * space.norm(w)
    check_slopes(forward, by_gradient, spread, tolerance, ranks.sum(rounding) + cancelled)
