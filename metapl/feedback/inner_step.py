r"""A step of the student, and its adjoint.

From its current weights θ_1 the student takes K steps, each on its own batch x_k and the teacher's signal about it:

.. math:: g_k = \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_k; \theta_k), \mathrm{signal}_k), \quad
          (\theta_{k+1}, s_{k+1}) = U(\theta_k, g_k, s_k)

and is then judged by L(θ_{K+1}). The adjoint runs backwards, from v = ∇L and no cotangent of the state:

.. math:: (w_k, \bar\theta_k, \bar s_k) = \Big(\frac{\partial U}{\partial (g, \theta, s)}\Big)^{\!\top}
          (\lambda_{k+1}, \bar s_{k+1}), \qquad
          \lambda_k = \bar\theta_k + \frac{\partial^2 \ell_k}{\partial\theta^2} w_k

The feedback on signal_k needs only w_k (see :mod:`metapl.feedback.forward`). With K = 1 it is
w = (∂U/∂g)ᵀ v, and no Hessian is formed.

A signal may depend on the student's outputs at θ_k; they are detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from metapl.batch import joined, micro_batches
from metapl.errors import MetaplError
from metapl.execution.local import LocalStudent, Loss, Pass, as_leaves
from metapl.numerics import Space, Tree, mean_tree, wide
from metapl.problems.base import Problem, Signal, has_rows
from metapl.updates import Parameters, Update


@dataclass(frozen=True)
class InnerStep:
    """One step of the student, with the operations that estimators need.

    Args:
        problem, update: the losses, and U.
        passes: S(x; θ) on each micro-batch; one pass if the batch is not split.
        batch: x, or (weak, strong), ...
        signal: the teacher's signal, without its graph.
        inner_loss: the mean of ℓ_i, a scalar.
        grads: g, with a graph if the path keeps it; empty if the step was forgotten.
        state: the optimizer's state before the step.
    """

    problem: Problem
    update: Update
    passes: Sequence[Pass]
    batch: Any
    signal: Signal
    inner_loss: Tensor
    grads: Tree
    state: Any

    @property
    def kept(self) -> bool:
        """Whether θ, g and the state are there; :meth:`again` computes them again."""
        return bool(self.grads)

    def forgotten(self) -> InnerStep:
        """The step without θ, g and the optimizer's state."""
        for part in self.passes:
            part.forget()
        return replace(self, grads={}, state=None)

    def again(self, params: Tree, state: Any) -> InnerStep:
        """A forgotten step with θ, g and the optimizer's state; cost: a forward and a backward pass of the student."""
        if self.kept:
            return self
        pieces = zip(self.passes, self._batches, self.signal.chunks(len(self.passes)), strict=True)
        grads = [part.gradient_again(params, mean_inner_loss(self.problem, signal, x)) for part, x, signal in pieces]
        return replace(self, grads=mean_tree(grads), state=state)

    def on(self, signal: Signal) -> InnerStep:
        """The same step on another signal; cost: a forward and a backward pass of the student."""
        step = replace(self, signal=signal, grads={}).again(self.params, self.state)
        return replace(step, inner_loss=self.inner_losses(self.outputs, signal, self.params).mean())

    @cached_property
    def outputs(self) -> Tensor:
        """z = S(x; θ), (B, ...), without a graph."""
        return joined([part.outputs for part in self.passes])

    @property
    def signal_has_rows(self) -> bool:
        """Whether the signal has a row for each example of the batch."""
        return has_rows(self.problem, self.signal, self.outputs)

    def of_batch(self, h: Tensor) -> Tensor:
        """The feedback on the whole batch: the sum over micro-batches, each of which has a signal without rows."""
        parts = len(self.passes)
        return h if parts == 1 or self.signal_has_rows else h.reshape(parts, -1, *h.shape[1:]).sum(0)

    @cached_property
    def gradient(self) -> Tree:
        """g, without a graph."""
        return {name: g.detach() for name, g in self.grads.items()}

    @property
    def params(self) -> Tree:
        """θ."""
        return self.passes[0].params

    @cached_property
    def moved(self) -> tuple[Tree, Any]:
        """θ′ and s′, with a graph if the path keeps it."""
        return self.update.update(self.params, self.grads, self.state)

    @cached_property
    def new_params(self) -> Tree:
        """θ′, without a graph. Unlike :attr:`moved`, it does not keep s′, which one step of the student never reads."""
        kept = "moved" in self.__dict__ or any(g.requires_grad for g in self.grads.values())
        params = self.moved[0] if kept else self.update.update(self.params, self.grads, self.state)[0]
        return {name: p.detach() for name, p in params.items()}

    def commit(self, parameters: Parameters) -> None:
        """Take the step, from the parameters and the optimizer's state as they are now."""
        self.update.commit(parameters, self.gradient, lambda: self.moved)

    @property
    def student(self) -> LocalStudent:
        """The student whose step this is."""
        return self.passes[0].student

    @property
    def space(self) -> Space:
        """Products and norms of trees of the student's weights, over all processes that hold parts of them."""
        return self.student.space

    @property
    def learning_rate(self) -> float | None:
        """η, or None if the optimizer does not expose it."""
        return self.update.learning_rate

    def tangent(self, w: Tree) -> Tensor:
        """ż = d/dε S(x; θ + εw), (B, ...), by forward-mode AD."""
        return joined([part.tangent(w) for part in self.passes])

    def shifted(self, factor: Tensor, w: Tree) -> Tensor:
        """S(x; θ + factor·w), (B, ...), in float32 or wider; the weights stay at θ."""
        return joined([part.shifted(factor, w) for part in self.passes])

    def check_shifted(self, outputs: Tensor) -> None:
        """Refuse shifted outputs that differ from those at θ by more than the second order of the shift."""
        for part, chunk in zip(self.passes, outputs.chunk(len(self.passes)), strict=True):
            part.check_shifted(chunk)

    def inner_losses(self, outputs: Tensor, signal: Signal, params: Tree) -> Tensor:
        """ℓ_i, (B,), micro-batch by micro-batch: a loss may look at the batch as a whole."""
        parts = len(self.passes)
        pieces = zip(outputs.chunk(parts), signal.chunks(parts), self._batches, strict=True)
        return joined([self.problem.inner_loss(z, part, x, params) for z, part, x in pieces])

    def mean_over_batch(self, losses: Tensor) -> Tensor:
        """This rank's share of (1/B) Σ ℓ_i, B being the rows of all ranks: the shares add up to the mean."""
        ranks = self.student.ranks
        return losses.mean() if ranks.alone else losses.mean() / ranks.size

    @property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the pass: a key of the tolerances in :mod:`metapl.execution.agreement`."""
        return self.passes[0].rounded_to

    @property
    def shifted_dtype(self) -> torch.dtype:
        """The narrowest dtype in a shifted pass, such as that of a float32 body, or cast, in a float64 student."""
        formats = {wide(t).dtype for t in (*self.params.values(), self.outputs)}
        formats |= {dtype for part in self.passes for dtype in part.narrowed}
        return torch.float32 if torch.float32 in formats else torch.float64

    @property
    def in_full_precision(self) -> bool:
        """Whether the pass computed in float32 or wider throughout, by its weights and PyTorch's settings."""
        return all(part.ran_in_full_precision() for part in self.passes)

    def pullback(self, v: Tree) -> Tree:
        """w = (∂U/∂g)ᵀ v."""
        return self.update.pullback(self.params, self.gradient, self.state, v)

    @contextmanager
    def hessian(self) -> Iterator[Callable[[Tree], Tree]]:
        """A function for products with ∂²ℓ/∂θ², valid inside the block."""
        with ExitStack() as stack:
            signals = self.signal.chunks(len(self.passes))
            products = [
                stack.enter_context(part.hessian(mean_inner_loss(self.problem, signal, x)))
                for part, x, signal in zip(self.passes, self._batches, signals, strict=True)
            ]
            yield lambda w: mean_tree([product(w) for product in products])

    def adjoint(self, v: Tree, state_cotangent: Any, fields: Mapping[str, Tensor]) -> Adjoint:
        """The adjoint of this step, from the cotangents of θ′ and s′.

        Args:
            v, state_cotangent: the cotangents of θ′ and s′; None: zero.
            fields: the fields of the signal, with the values at which the mixed derivatives are taken.
        """
        bar = self.update.vjp(self.params, self.gradient, self.state, v, state_cotangent)
        parts = len(self.passes)
        pieces = [t.chunk(parts) for t in fields.values()]
        curved: list[Tree] = []
        mixed: list[list[Tensor | None]] = []
        for i, (part, x, signal) in enumerate(zip(self.passes, self._batches, self.signal.chunks(parts), strict=True)):
            at_fields = as_leaves({name: t[i] for name, t in zip(fields, pieces, strict=True)})
            loss = mean_inner_loss(self.problem, replace(signal, **at_fields), x)
            product, in_fields = part.second_derivatives(bar.gradient, loss, list(at_fields.values()))
            curved.append(product)
            mixed.append(in_fields)
        hessian = mean_tree(curved)
        columns = zip(fields, zip(*mixed, strict=True), strict=True)
        in_signal = {name: None if t[0] is None else joined([x / parts for x in t]) for name, t in columns}
        params = {name: t + hessian[name] for name, t in bar.params.items()}
        return Adjoint(bar.gradient, params, bar.state, in_signal)

    @property
    def _batches(self) -> list[Any]:
        return micro_batches(self.batch, len(self.passes), "unlabeled")


@dataclass(frozen=True)
class Adjoint:
    """The result of :meth:`InnerStep.adjoint`.

    Args:
        w: the cotangent of g.
        params, state: the cotangents of θ, including the Hessian product, and of the state before the step.
        in_signal: the derivative of ⟨g, w⟩ in each field of the signal, which is minus the feedback; None for a field
            that the inner loss does not depend on.
    """

    w: Tree
    params: Tree
    state: Any
    in_signal: dict[str, Tensor | None]


def mean_inner_loss(problem: Problem, signal: Signal, batch: Any) -> Loss:
    """The mean of ℓ_i as a function of outputs and weights."""

    def loss(outputs: Tensor, params: Tree) -> Tensor:
        losses = problem.inner_loss(outputs, signal, batch, params)
        if losses.shape != outputs.shape[:1]:
            raise MetaplError(
                f"inner_loss returned shape {tuple(losses.shape)} for a batch of {len(outputs)}; expected one "
                f"loss per example, ({len(outputs)},): leave the mean to metapl."
            )
        return losses.mean()

    return loss
