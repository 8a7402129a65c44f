r"""The inner step: the student moves θ → θ′ = U(θ, g) on the signal, and answers what an estimator may ask of it.

.. math:: g = \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_u;\theta), \mathrm{signal}), \quad
          v = \nabla L(\theta'), \quad w = (\partial U/\partial g)^\top v, \quad
          \dot z = \tfrac{d}{d\varepsilon} S(x_u;\theta + \varepsilon w)

Estimators use this facade and nothing else. Where the student runs is the matter of :mod:`metapl.execution`; while an
estimate is under way it stays at θ.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from metapl import checks
from metapl.errors import MetaplError
from metapl.execution.agreement import (
    BY_DIFFERENCE,
    BY_FORWARD_MODE,
    Tolerance,
    check_linear,
    check_outputs,
    check_slopes,
)
from metapl.execution.local import Local, trainable
from metapl.numerics import Tree, products, reduced_float32
from metapl.optimizers import InnerOptimizer
from metapl.problem import BilevelProblem, Signal, first_input, student_input
from metapl.problems.pseudo_labels import PseudoLabels

__all__ = ["InnerStep", "trainable"]


class InnerStep:
    """One step of the student, from its forward pass to θ′.

    Building it runs S(x_u; θ), the one pass that updates running statistics and advances the random number generators;
    :meth:`learn` then takes the gradient on the signal. Nothing moves before :meth:`commit`.

    Args:
        student: in the mode (train or eval) that its owner left it in.
        optimizer: the functional view of its optimiser.
        problem: the losses.
        labeled, unlabeled: the batches of the outer and of the inner loss.
        keep_graph: keep g differentiable in the signal, for :meth:`outer_gradient_of_signal`.
    """

    def __init__(
        self,
        student: nn.Module,
        optimizer: InnerOptimizer,
        problem: BilevelProblem,
        *,
        labeled: Any,
        unlabeled: Any,
        keep_graph: bool = False,
    ) -> None:
        self.student, self.optimizer, self.problem = student, optimizer, problem
        self.labeled, self.unlabeled = labeled, unlabeled
        self.keep_graph = keep_graph
        self.execution = Local(student, student_input(problem, unlabeled), double_backward=keep_graph)
        self.parameters, self.params = self.execution.parameters, self.execution.params
        self.device, self.outputs = self.execution.device, self.execution.outputs
        checks.fits(problem, self.outputs, labeled, unlabeled)
        self._outer_losses: dict[str, Tensor] = {}

    # ------------------------------------------------------------------------------------------ the step itself

    def learn(self, signal: Signal) -> None:
        """g = ∇_θ mean_i ℓ_i(S(x_u; θ), signal); the student's graph is gone afterwards."""
        self.signal = signal.detached()
        if self.keep_graph:
            self.signal.value.requires_grad_()
        if self.execution.graph is None:
            raise RuntimeError("an inner step learns once")
        with torch.enable_grad():
            losses = self.problem.inner_loss(self.execution.graph, self.signal, self.unlabeled, self.parameters)
            if losses.shape != self.outputs.shape[:1]:
                raise MetaplError(
                    f"inner_loss returned shape {tuple(losses.shape)} for a batch of {len(self.outputs)}; expected one "
                    f"loss per example, ({len(self.outputs)},): leave the mean to metapl."
                )
            loss = losses.mean()
        if not loss.requires_grad:
            raise checks.without_gradient("student")
        self._grads = self.execution.gradient(loss)
        self.inner_loss = loss.detach()
        self.gradient: Tree = {name: g.detach() for name, g in self._grads.items()}
        self.state = self.optimizer.read_state()

    @cached_property
    def _moved(self) -> tuple[Tree, Any]:
        return self.optimizer.update(self.params, self.gradient, self.state)

    @property
    def new_params(self) -> Tree:
        """θ′ = U(θ, g)."""
        return self._moved[0]

    @property
    def new_state(self) -> Any:
        """The optimiser's state after the step."""
        return self._moved[1]

    def commit(self) -> None:
        """Move the student to θ′, by the real optimiser."""
        self.optimizer.commit(self.parameters, self.gradient, self.new_params, self.new_state)

    # ------------------------------------------------------------------------------- what estimators may ask for

    @property
    def learning_rate(self) -> float | None:
        """η, where the optimiser tells it."""
        return self.optimizer.learning_rate

    @property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph; one forward pass if no estimator asked before."""
        return self._outer_loss("after", self.new_params)

    @property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass."""
        return self._outer_loss("before", self.params)

    def known_outer_loss(self) -> dict[str, Tensor]:
        """``{"outer_loss": L(θ′)}`` where an estimator has computed it, else nothing."""
        return {"outer_loss": self._outer_losses["after"]} if "after" in self._outer_losses else {}

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labelled batch (with its own batch statistics)."""
        self._outer_losses["after"], v = self.execution.loss_and_gradient(
            self.new_params, first_input(self.labeled), self._outer_loss_of
        )
        return v

    def pullback(self, v: Tree) -> Tree:
        """w = (∂U/∂g)ᵀ v through the optimiser's update at its state before the step."""
        return self.optimizer.pullback(self.params, self.gradient, self.state, v)

    def directional_derivative(self, w: Tree) -> Tensor:
        """ż = d/dε S(x_u; θ + εw) by forward-mode AD, (B, C): exact, one pass of about three plain ones, no graph."""
        outputs, z_dot = self.execution.tangent(w)
        check_outputs(outputs, self.outputs, self._tolerance(BY_FORWARD_MODE).outputs)
        return z_dot

    def outputs_at(self, step: Tensor, direction: Tree) -> Tensor:
        """S(x_u; θ + step·direction), (B, C), in float32 or wider, without autocast and TF32; the weights stay at θ."""
        return self.execution.shifted(step, direction)

    def check_replay(self, outputs: Tensor) -> None:
        """Refuse ``outputs`` of a replay, S(x_u; θ) to O(ε²), that are not the inner pass's."""
        check_outputs(outputs, self.outputs, self._tolerance(BY_DIFFERENCE).outputs)

    def ran_in_full_precision(self) -> bool:
        """Whether the inner pass computed in float32 or wider throughout, as far as weights and settings tell."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.params.values())
        rounded = any(p.dtype == torch.float32 for p in self.params.values()) and reduced_float32(self.device)
        return not (half or rounded or torch.is_autocast_enabled(self.device.type))

    def outer_gradient_of_signal(self) -> Tensor:
        """dL(θ′)/dsignal by double backward: v through the update and through g, with the graph of the inner pass."""
        v = self.outer_gradient()
        with torch.enable_grad():
            new_params, _ = self.optimizer.update(self.params, self._grads, self.state)
        moved = {name: p for name, p in new_params.items() if p.requires_grad}
        if not moved:
            return torch.zeros_like(self.signal.value)
        return self.execution.gradient_through(list(moved.values()), [v[name] for name in moved], self.signal.value)

    def signal_feedback(
        self, z_dot: Tensor, w: Tree, value: Tensor | None = None, *, rounding: Tensor | None = None
    ) -> Tensor:
        """h = −∂/∂signal d/dε mean ℓ(z + εż, signal, θ + εw), of the shape of the signal; touches the head alone.

        ``value`` stands in for the signal's own, e.g. one-hot rows for sampled classes; ``rounding`` is the
        relative error of a ż that is a difference of outputs, and None of an exact one.
        """
        h, tangent, terms = self._feedback_at(self.signal.value if value is None else value, z_dot, w)
        self._check_slopes(tangent, terms, w, rounding)
        return h

    def check_linear(self, z_dot: Tensor, w: Tree, h: Tensor) -> None:
        """Refuse an inner loss whose feedback ``h`` at the labels drawn is not that at their probabilities."""
        if type(self.problem).inner_loss is PseudoLabels.inner_loss or self.signal.probs is None:
            return
        expected, _, _ = self._feedback_at(self.signal.probs, z_dot, w)
        check_linear(h, expected)

    def example_feedback(self, z_dot: Tensor, w: Tree, *, rounding: Tensor | None = None) -> Tensor:
        """h_i = −(1/B) d/dε ℓ_i(z + εż, signal, θ + εw), (B,); touches the head alone."""
        losses, at = self._head(self.signal)
        # ⟨u, d/dε ℓ⟩ is linear in u, so its gradient is d/dε ℓ itself: forward mode by two reverse passes.
        u = torch.ones_like(losses, requires_grad=True)
        terms = _along((u * losses).mean(), at, self._tangents(z_dot, w))
        tangent = torch.stack([term.sum() for term in terms]).sum()
        self._check_slopes(tangent, terms, w, rounding)
        return -torch.autograd.grad(tangent, u, materialize_grads=True)[0]

    # ---------------------------------------------------------------------------------------------------- plumbing

    def _feedback_at(self, value: Tensor, z_dot: Tensor, w: Tree) -> tuple[Tensor, Tensor, list[Tensor]]:
        """h at a value of the signal, d/dε mean ℓ there, and the terms of that."""
        value = value.detach().requires_grad_()
        losses, at = self._head(replace(self.signal, value=value))
        terms = _along(losses.mean(), at, self._tangents(z_dot, w))
        tangent = torch.stack([term.sum() for term in terms]).sum()
        if not tangent.requires_grad:
            return torch.zeros_like(value), tangent, terms
        return -torch.autograd.grad(tangent, value, materialize_grads=True)[0], tangent, terms

    def _tolerance(self, tolerances: dict[torch.dtype, Tolerance]) -> Tolerance:
        return tolerances[self.execution.rounded_to]

    def _check_slopes(self, tangent: Tensor, terms: list[Tensor], w: Tree, rounding: Tensor | None) -> None:
        """Refuse ż where the inner loss has another derivative along w by its outputs than by its gradient."""
        by_gradient = products(self.gradient, w)
        spread = torch.stack([torch.linalg.vector_norm(t.detach()) for t in [*terms, by_gradient]]).sum()
        if rounding is None:
            tolerance: Tensor | float = self._tolerance(BY_FORWARD_MODE).slope
        else:
            tolerance = self._tolerance(BY_DIFFERENCE).slope + rounding
        check_slopes(tangent.detach(), by_gradient.sum(), spread, tolerance)

    def _outer_loss_of(self, outputs: Tensor) -> Tensor:
        loss = self.problem.outer_loss(outputs, self.labeled)
        checks.scalar_loss(loss, "the problem's outer_loss")
        return loss

    def _outer_loss(self, when: str, params: Tree) -> Tensor:
        if when not in self._outer_losses:
            self._outer_losses[when] = self.execution.loss(params, first_input(self.labeled), self._outer_loss_of)
        return self._outer_losses[when]

    def _head(self, signal: Signal) -> tuple[Tensor, list[Tensor]]:
        """ℓ (B,) as a function of z and θ, both leaves."""
        z = self.outputs.clone().requires_grad_()
        theta = {name: p.detach().requires_grad_() for name, p in self.params.items()}
        with torch.enable_grad():
            return self.problem.inner_loss(z, signal, self.unlabeled, theta), [z, *theta.values()]

    def _tangents(self, z_dot: Tensor, w: Tree) -> list[Tensor]:
        return [z_dot, *(w[name] if name in w else torch.zeros_like(p) for name, p in self.params.items())]


def _along(scalar: Tensor, at: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
    """The terms of ⟨∂scalar/∂at, tangents⟩, differentiable."""
    grads = torch.autograd.grad(scalar, at, create_graph=True, allow_unused=True)
    return [g * t for g, t in zip(grads, tangents, strict=True) if g is not None]
