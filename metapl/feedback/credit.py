r"""The feedback h along a direction w: on the signal, on its distribution, or on each example.

It is computed in the head, from z = S(x; θ) and ż = d/dε S(x; θ + εw), without running the network (unless the signal
enters x, see :func:`exact_feedback`). If the inner loss also reads the weights,

.. math:: h = -\frac{\partial}{\partial\,\mathrm{signal}} \frac{d}{d\varepsilon}
              \ell(z + \varepsilon\dot z, \mathrm{signal}, \theta + \varepsilon w)

d/dε ℓ is compared with ⟨w, g⟩, which it equals by the chain rule (:mod:`metapl.execution.compare`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.compare import BY_DIFFERENCE, EXACTLY, ROUNDINGS, same_slopes
from metapl.execution.local import as_leaves, mean_of
from metapl.execution.numerics import Tree
from metapl.feedback.inner_step import InnerLoss, InnerStep
from metapl.problems.base import Signal, field_of

Credited = Literal["signal", "example"]
"""What gets numbers of its own: each entry of the signal, or each example."""


@dataclass(frozen=True)
class Tangent:
    """The derivative of the outputs along w."""

    z_dot: Tensor  # ż, (B, ...)
    rounding: Tensor | None = None  # of a difference of outputs: a bound on the norm of its error


@dataclass(frozen=True)
class Feedback:
    """The feedback h on a part of the signal.

    Args:
        h: without a graph: in the shape of that part, or a scalar for the whole batch.
        part: ``"value"`` for a differentiable signal, or the first of its :meth:`~metapl.Signal.fields` where it is a
            dict; ``"log_prob"`` for sampled labels, by their score; ``"probs"`` for sampled labels whose expectation is
            taken; None: no feedback.
        others: the feedback on the other fields of a differentiable signal, by name: of its dict, and those besides
            the value that the inner loss depends on.
        used: whether the inner loss depends on the signal at all.
    """

    h: Tensor
    part: str | None
    others: Mapping[str, Tensor] = field(default_factory=dict)
    used: bool = True

    def teacher_loss(self, signal: Signal) -> Tensor:
        """−Σ stopgrad(h)·signal, a scalar with the teacher's graph; its gradient is the hypergradient dL(θ′)/dθ_T.

        It is a sum, not a mean, because h already contains the 1/B of the inner loss.
        """
        if self.part is None:
            return self.h.new_zeros(())
        parts, fields = {self.part: self.h, **self.others}, signal.fields()
        terms = [(-h * fields[name]).sum() for name, h in parts.items()]
        if torch.is_grad_enabled() and not any(term.requires_grad for term in terms):
            given = f"the teacher's signal ({self.part}) has no graph: it was detached, or computed under no_grad()"
            raise MetaplError(f"{given}; expected one with its graph, or mode='none'.")
        return terms[0] if len(terms) == 1 else torch.stack(terms).sum()

    def mapped(self, change: Callable[[str, Tensor], Tensor]) -> Feedback:
        """The same with h, and that on other fields, changed; ``change`` is also given the field's name."""
        others = {name: change(name, h) for name, h in self.others.items()}
        return replace(self, h=change(self.part or "", self.h), others=others)

    def divided_by(self, divisor: Tensor | float) -> Feedback:
        return self if isinstance(divisor, float) and divisor == 1.0 else self.mapped(lambda _, h: h / divisor)

    def chunks(self, parts: int) -> list[Feedback]:
        if self.h.ndim == 0 or parts == 1:
            return [self] * parts
        return [self.mapped(lambda _, h, i=i: h.chunk(parts)[i]) for i in range(parts)]  # type: ignore[misc]

    def of_batch(self, step: InnerStep) -> Tensor | dict[str, Tensor]:
        """h on the whole batch, as the signal's value is: a tensor, or a dict of its floating-point tensors. Of a field
        without rows it is the sum over micro-batches, each of which has a signal of its own."""
        parts, value = len(step.passes), step.signal.value
        if parts == 1 and not isinstance(value, dict):
            return self.h.detach()
        by_field = {
            name: h if parts == 1 or not h.ndim or step.has_rows(name) else h.reshape(parts, -1, *h.shape[1:]).sum(0)
            for name, h in {self.part or "": self.h.detach(), **self.others}.items()
        }
        if not isinstance(value, dict) or self.part is None:
            return by_field[self.part or ""]
        return {key: by_field[name].detach() for key in value if (name := field_of(key)) in by_field}


def exact_feedback(step: InnerStep, w: Tree, of: Credited = "signal") -> Feedback:
    """The feedback along w by exact derivatives: from the graph of g where the pass has kept it; else by ż; and by
    double backward where the signal enters the student's input, and ⟨∂ℓ/∂z, ż⟩ through the whole network."""
    by_graph = [part.in_leaves(w) for part in step.passes]
    if by_graph[0] is not None:
        return feedback_from(step, step.in_signal(credited(step.signal, of), by_graph), of)  # type: ignore[arg-type]
    if step.signal_inputs:
        _, gradients = step.second_derivatives(w, step.signal.differentiable(), curved=False)
        return feedback_from(step, gradients, of)
    return head_feedback(step, w, Tangent(step.tangent(w)), of)


def head_feedback(step: InnerStep, w: Tree, tangent: Tangent, of: Credited = "signal") -> Feedback:
    """The feedback along w from ż, in the head alone.

    For sampled labels ℓ is linear in its target, so h_ik = −(1/B) d/dε ℓ(z_i, class k) is the derivative at the one-hot
    rows of the labels. And Σ_i u_i d/dε ℓ_i is linear in u, so its gradient is d/dε ℓ itself: forward mode by two
    reverse passes.
    """
    leaves = as_leaves(credited(step.signal, of))
    slope = _slope(step, leaves, w, tangent)
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if slope.requires_grad:
        gradients = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
    return feedback_from(step, dict(zip(leaves, gradients, strict=True)), of)


def credited(signal: Signal, of: Credited = "signal") -> dict[str, Tensor]:
    """What gets the feedback, with its values: the differentiable fields of the signal, the one-hot rows of sampled
    labels in place of their distribution, or a factor of each example's loss."""
    if of == "example":
        assert signal.log_prob is not None  # the mode takes sampled labels
        return {"factors": torch.ones_like(signal.log_prob)}
    if not signal.sampled:
        return signal.differentiable()
    if signal.probs is None:
        raise MetaplError("the sampled signal has no probs; expected Signal(value, log_prob, probs=...).")
    return {"value": F.one_hot(signal.value, signal.probs.shape[-1]).to(signal.probs.dtype)}


def feedback_from(step: InnerStep, gradients: Mapping[str, Tensor | None], of: Credited = "signal") -> Feedback:
    """h = −dL(θ′)/d(field), from the gradients in what is :func:`credited`; None: no dependence."""
    signal = step.signal
    if of == "example":
        h_B = gradients["factors"]
        assert h_B is not None
        return Feedback(-h_B, "log_prob")
    part = "probs" if signal.sampled else "value"
    by_field = {part if name == "value" else name: g for name, g in gradients.items()}
    h = {name: -g for name, g in by_field.items() if g is not None}
    used = bool(h)
    of_value = [part]
    if isinstance(signal.value, dict):  # its entries are fields of their own; log_prob and others are the signal's
        of_value = [name for name in by_field if name not in vars(signal)]
    # A zero for what is not used, so that the feedback has the shape of the signal.
    h |= {name: torch.zeros_like(signal.fields()[name]) for name in of_value if name not in h}
    first = h.pop(of_value[0])
    return Feedback(first, of_value[0], h, used)


def _slope(step: InnerStep, leaves: Tree, w: Tree, tangent: Tangent) -> Tensor:
    """d/dε (1/B) Σ_i factor_i ℓ_i(z + εż, signal, θ + εw), this rank's share; flagged where it is not ⟨w, g⟩."""
    ranks, parts = step.student.ranks, len(step.passes)
    z = step.outputs.detach().requires_grad_()
    theta = as_leaves(step.params) if step.student.readable else {}
    factors = leaves.get("factors")
    with torch.enable_grad():
        # Micro-batch by micro-batch: a loss may look at the batch as a whole.
        signals, chunks = step.signal.having(leaves).chunks(parts), z.chunk(parts)
        of_part = factors.chunk(parts) if factors is not None else [None] * parts
        values = [
            InnerLoss(step.problem, signal, x, step.student.readable, factor)(z_part, theta)
            for signal, x, factor, z_part in zip(signals, step.batches, of_part, chunks, strict=True)
        ]
        mean = mean_of(values) if ranks.alone else mean_of(values) / ranks.size  # the ranks' shares add up to the mean
        grads = torch.autograd.grad(mean, [z, *theta.values()], create_graph=True, allow_unused=True)
        directions = [tangent.z_dot, *(w[name] if name in w else torch.zeros_like(p) for name, p in theta.items())]
        terms = [g * t for g, t in zip(grads, directions, strict=True) if g is not None]
        slope = terms[0].sum() if len(terms) == 1 else torch.stack([term.sum() for term in terms]).sum()

    by_gradient, spread = step.space.slope(step.gradient, w)
    forward, table = ranks.sum(slope.detach()), EXACTLY if tangent.rounding is None else BY_DIFFERENCE
    tolerance = table[step.passes[0].rounded_to].slope
    for term in terms:
        spread = spread + ranks.norm(term.detach())
    if ranks.alone and not checks.waits(slope) and bool((forward - by_gradient).abs() <= tolerance * spread):
        return slope
    # Both sums may cancel to rounding: of a bias before batch normalization, whose gradient is zero but for rounding, a
    # first step of Adam makes the whole direction.
    rounding = ROUNDINGS * torch.finfo(step.shifted_dtype).eps * step.space.norm(step.gradient) * step.space.norm(w)
    if tangent.rounding is not None and grads[0] is not None:
        rounding = rounding + ranks.norm(grads[0].detach()) * tangent.rounding
    same_slopes(forward, by_gradient, spread, tolerance, rounding)
    return slope
