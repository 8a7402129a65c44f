r"""What a direction w credits: the value of the signal, its distribution, each example, or the batch as a whole.

All of it is found in the head alone, from z = S(x; θ) and ż = d/dε S(x; θ + εw); the network is not run. In general,
where the inner loss reads the weights too,

.. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(z + \varepsilon\dot z, \mathrm{signal}, \theta + \varepsilon w)

Every function compares d/dε ℓ with ⟨w, g⟩, which is the same number by the chain rule, and refuses a student for which
it is not: its forward and backward passes are not of one function.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl import checks
from metapl.errors import MetaplError
from metapl.execution.agreement import BY_DIFFERENCE, BY_FORWARD_MODE, check_linear, check_slopes
from metapl.feedback.base import Feedback
from metapl.feedback.lookahead import InnerStep
from metapl.numerics import Tree, products
from metapl.problems.base import Signal


@dataclass(frozen=True)
class Tangent:
    """ż, (B, ...), and where it is a difference of outputs a bound of the norm of its error by their rounding."""

    z_dot: Tensor
    rounding: Tensor | None = None


def signal_feedback(step: InnerStep, w: Tree, tangent: Tangent) -> Feedback:
    """h of the signal itself where it is differentiable, else of the distribution that labels were drawn from.

    For sampled labels ℓ is linear in its target (checked), so h_ik = −(1/B) d/dε ℓ(z_i, class k) is the derivative at
    the one-hot rows drawn.
    """
    signal = step.signal
    fields = credited(signal)
    h = of_fields(signal, _derivative(step, fields, w, tangent, check=True))
    if signal.probs is not None and signal.sampled:
        expected = of_fields(signal, _derivative(step, {"value": signal.probs}, w, tangent, check=False))
        check_linear(h.h, expected.h)
    return h


def credited(signal: Signal) -> dict[str, Tensor]:
    """The fields of a signal that feedback is found for, with the values that it is found at.

    For sampled labels it is the one-hot row of the label, in the place of the distribution.
    """
    if not signal.sampled:
        return signal.differentiable()
    if signal.probs is None:
        raise MetaplError(
            "the problem's signal is sampled and carries no probs, over which this mode would take the expectation; "
            'give Signal(value, log_prob, probs=...) or use mode="reinforce_per_example".'
        )
    return {"value": F.one_hot(signal.value, signal.probs.shape[-1]).to(signal.probs.dtype)}


def of_fields(signal: Signal, h: Mapping[str, Tensor | None]) -> Feedback:
    """The feedback on the fields of a signal; None of one that the inner loss does not read, zeros for its value.

    For sampled labels that of the value is of the distribution.
    """
    about: Literal["probs", "value"] = "probs" if signal.sampled else "value"
    value = h.get("value")
    if value is None:
        value = torch.zeros_like(getattr(signal, about))
    return Feedback(value, about, {name: t for name, t in h.items() if name != "value" and t is not None})


def example_feedback(step: InnerStep, w: Tree, tangent: Tangent) -> Feedback:
    """h_i = −(1/B) d/dε ℓ_i(z + εż, signal, θ + εw), (B,), for the score of each sampled label."""
    losses, at = _head(step, step.signal)
    # ⟨u, d/dε ℓ⟩ is linear in u, so its gradient is d/dε ℓ itself: forward mode by two reverse passes.
    u = torch.ones_like(losses, requires_grad=True)
    terms, steepness = _along((u * losses).mean(), at, _directions(step, w, tangent))
    slope = _total(terms)
    _check_slopes(step, slope, terms, steepness, w, tangent)
    return Feedback(-torch.autograd.grad(slope, u, materialize_grads=True)[0], "log_prob")


def batch_feedback(step: InnerStep, w: Tree) -> Tensor:
    """Algorithm 1's scalar, −⟨w, g⟩, for the score of all sampled labels alike."""
    return -step.along_gradient(w)


def _derivative(
    step: InnerStep, fields: Mapping[str, Tensor], w: Tree, tangent: Tangent, *, check: bool
) -> dict[str, Tensor | None]:
    """h of fields of the signal, at these values of them; None of one that the inner loss does not read."""
    leaves = {name: t.detach().requires_grad_() for name, t in fields.items()}
    losses, at = _head(step, replace(step.signal, **leaves))
    terms, steepness = _along(losses.mean(), at, _directions(step, w, tangent))
    slope = _total(terms)
    if check:
        _check_slopes(step, slope, terms, steepness, w, tangent)
    if not slope.requires_grad:
        return dict.fromkeys(leaves)
    grads = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
    return {name: None if g is None else -g for name, g in zip(leaves, grads, strict=True)}


def _head(step: InnerStep, signal: Signal) -> tuple[Tensor, list[Tensor]]:
    """ℓ (B,) as a function of z and θ, both leaves."""
    z = step.outputs.clone().requires_grad_()
    theta = {name: p.detach().requires_grad_() for name, p in step.params.items()}
    with torch.enable_grad():
        return step.inner_losses(z, signal, theta), [z, *theta.values()]


def _directions(step: InnerStep, w: Tree, tangent: Tangent) -> list[Tensor]:
    return [tangent.z_dot, *(w[name] if name in w else torch.zeros_like(p) for name, p in step.params.items())]


def _along(scalar: Tensor, at: list[Tensor], directions: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """The terms of ⟨∂scalar/∂at, directions⟩, differentiable, and the norm of the derivative in the first of ``at``."""
    grads = torch.autograd.grad(scalar, at, create_graph=True, allow_unused=True)
    steepness = scalar.new_zeros(()) if grads[0] is None else torch.linalg.vector_norm(grads[0].detach())
    return [g * t for g, t in zip(grads, directions, strict=True) if g is not None], steepness


def _total(terms: list[Tensor]) -> Tensor:
    return torch.stack([term.sum() for term in terms]).sum()


def _check_slopes(
    step: InnerStep, slope: Tensor, terms: list[Tensor], steepness: Tensor, w: Tree, tangent: Tangent
) -> None:
    """Refuse ż where the inner loss has another derivative along w by its outputs than by its gradient."""
    by_gradient = products(step.gradient, w)
    spread = torch.stack([torch.linalg.vector_norm(t.detach()) for t in [*terms, by_gradient]]).sum()
    if tangent.rounding is None:
        tolerance, rounding = BY_FORWARD_MODE[step.rounded_to].slope, slope.new_zeros(())
    elif checks.waits(slope):  # no second try at a smaller step: units that switch may spoil a difference by all of it
        tolerance, rounding = 1.0, steepness * tangent.rounding
    else:
        tolerance, rounding = BY_DIFFERENCE[step.rounded_to].slope, steepness * tangent.rounding
    check_slopes(slope.detach(), by_gradient.sum(), spread, tolerance, rounding)
