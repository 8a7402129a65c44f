r"""The student's steps, K of them in a look-ahead, and their adjoint.

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

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl import checks
from metapl.batch import first_input, joined, micro_batches, plain
from metapl.errors import MetaplError
from metapl.execution.kernels import refuse_checkpoints
from metapl.execution.local import Local, Loss, Pass, as_leaves, gradient_through
from metapl.execution.rng import RandomState
from metapl.numerics import Tree, dot, mean_tree, norm, wide
from metapl.problems.base import Problem, Signal, joined_signals
from metapl.updates import Update

Teach = Callable[[Any, Tensor], Signal]
"""The teacher's signal about a batch, given the student's outputs on it."""


@dataclass(frozen=True)
class Lookahead:
    """K inner batches, one for each student step of a look-ahead; given in place of ``unlabeled``.

    Args:
        batches: each of them as for ``unlabeled``.

    >>> len(Lookahead([torch.zeros(4, 3), torch.zeros(4, 3)]))
    2
    """

    batches: Sequence[Any]

    def __post_init__(self) -> None:
        given = self.batches
        if not isinstance(given, Sequence) or isinstance(given, str) or not given:
            raise MetaplError(
                f"Lookahead was given {checks.described(given)}; expected a list of batches, one for each student "
                "step, such as metapl.Lookahead([u1, u2])."
            )

    def __len__(self) -> int:
        return len(self.batches)


def inner_batches(unlabeled: Any) -> Sequence[Any]:
    """The batches of a look-ahead; any other batch is a look-ahead of one step."""
    return unlabeled.batches if isinstance(unlabeled, Lookahead) else (unlabeled,)


def plain_inner(unlabeled: Any) -> Any:
    """An inner batch, or a look-ahead, with its dict-like parts as dicts."""
    return Lookahead([plain(u) for u in unlabeled.batches]) if isinstance(unlabeled, Lookahead) else plain(unlabeled)


@dataclass(frozen=True)
class InnerStep:
    """One step of the student, with the operations that estimators need.

    Args:
        problem, update: the losses, and U.
        passes: S(x; θ) on each micro-batch; one pass if the batch is not split.
        batch: x, or (weak, strong), ...
        signal: the teacher's signal, without its graph.
        inner_loss: the mean of ℓ_i, a scalar.
        grads: g, with a graph if the path keeps it.
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

    @cached_property
    def outputs(self) -> Tensor:
        """z = S(x; θ), (B, ...), without a graph."""
        return joined([part.outputs for part in self.passes])

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

    @property
    def learning_rate(self) -> float | None:
        """η, or None if the optimizer does not expose it."""
        return self.update.learning_rate

    def along_gradient(self, w: Tree) -> Tensor:
        """⟨w, g⟩, a scalar."""
        return dot(w, self.gradient)

    def length(self, w: Tree) -> Tensor:
        """‖w‖, a scalar."""
        return norm(w)

    def size(self, w: Tree) -> Tensor:
        """‖w‖·‖g‖, a scalar."""
        return norm(w) * norm(self.gradient)

    def typical_weight(self) -> Tensor:
        """‖θ‖/√n, the root mean square of the n weights, a scalar."""
        return norm(self.params) / math.sqrt(sum(t.numel() for t in self.params.values()))

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

    @property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the pass: a key of the tolerances in :mod:`metapl.execution.agreement`."""
        return self.passes[0].rounded_to

    @property
    def shifted_dtype(self) -> torch.dtype:
        """The narrowest dtype in a shifted pass, such as that of a float32 body under a float64 head."""
        formats = {wide(t).dtype for t in (*self.params.values(), self.outputs)}
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
                stack.enter_context(part.hessian(_inner_loss(self.problem, signal, x)))
                for part, x, signal in zip(self.passes, self._batches, signals, strict=True)
            ]
            yield lambda w: mean_tree([product(w) for product in products])

    def scaled(self, tree: Tree, factor: float) -> Tree:
        """A tree of the student's weights times a number."""
        return {name: factor * t for name, t in tree.items()}

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
            loss = _inner_loss(self.problem, replace(signal, **at_fields), x)
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


@dataclass
class Path:
    """The student's steps from θ to θ′, where the outer loss is taken; no weight moves before :meth:`commit`.

    Args:
        problem, local, update: the losses, the student, and U.
        labeled: the outer batch, in micro-batches.
        steps: at least one.
    """

    problem: Problem
    local: Local
    update: Update
    labeled: Sequence[Any]
    steps: list[InnerStep] = field(default_factory=list)

    @property
    def params(self) -> Tree:
        """θ′ after the last step, without a graph."""
        return {name: p.detach() for name, p in self.steps[-1].moved[0].items()}

    @property
    def state(self) -> Any:
        """The optimizer's state after the last step, without a graph."""
        return pytree.tree_map_only(Tensor, Tensor.detach, self.steps[-1].moved[1])

    @property
    def inner_loss(self) -> Tensor:
        """The mean of the inner losses over the steps, a scalar."""
        return torch.stack([step.inner_loss for step in self.steps]).mean()

    @cached_property
    def outer_loss(self) -> Tensor:
        """L(θ′), without a graph. Cost: one labeled forward pass, unless its gradient has been computed."""
        return self._outer[0] if "_outer" in self.__dict__ else self._outer_loss_at(self.params)

    @cached_property
    def outer_loss_before(self) -> Tensor:
        """L(θ), with the dropout masks of L(θ′); one forward pass."""
        return self._outer_loss_at(self.local.params)

    def known_outer_loss(self) -> dict[str, Tensor]:
        """``{"outer_loss": L(θ′)}`` if an estimator has computed it, else an empty dict."""
        known = "_outer" in self.__dict__ or "outer_loss" in self.__dict__
        return {"outer_loss": self.outer_loss} if known else {}

    def outer_gradient(self) -> Tree:
        """v = ∇L(θ′), one forward and backward pass on the labeled batch (with its own batch statistics)."""
        return self._outer[1]

    def outer_gradient_before(self) -> Tree:
        """∇L(θ), one forward and backward pass on the labeled batch."""
        self.__dict__["outer_loss_before"], v = self.local.loss_and_gradient(self.local.params, *self._outer_pass())
        return v

    def pullback(self) -> tuple[InnerStep, Tree]:
        """The step of a path with one step, and its w = (∂U/∂g)ᵀ v."""
        (step,) = self.steps
        return step, step.pullback(self.outer_gradient())

    def adjoints(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None = None
    ) -> Iterator[tuple[InnerStep, Tree, dict[str, Tensor | None] | None]]:
        """The steps from the last to the first, each with its w and the derivatives of ⟨g, w⟩ in fields of the signal.

        The derivatives are computed together with the step's Hessian product. The first step needs no Hessian product;
        its derivatives are None.

        Args:
            fields: returns the fields of a step's signal, with the values at which the derivatives are taken.
            truncate: the number of last steps; None: all.
        """
        v, state_cotangent = self.outer_gradient(), None
        counted = self.steps if truncate is None else self.steps[-truncate:]
        for step in reversed(counted[1:]):
            bar = step.adjoint(v, state_cotangent, fields(step.signal))
            v, state_cotangent = bar.params, bar.state
            yield step, bar.w, bar.in_signal
        first = counted[0]
        if state_cotangent is None:
            yield first, first.pullback(v), None
        else:
            bar_first = first.update.vjp(first.params, first.gradient, first.state, v, state_cotangent)
            yield first, bar_first.gradient, None

    def gradients_in_signals(self, truncate: int | None = None) -> list[tuple[InnerStep, dict[str, Tensor | None]]]:
        """dL(θ′)/d(field) for the fields of each signal, by double backward through the path.

        Args:
            truncate: the number of last steps; None: all.

        Returns: each step with its derivatives by field; None for a field that the inner loss does not depend on.
        """
        counted = self.steps[-(truncate or 0) :]
        leaves = [t for step in counted for t in step.signal.differentiable().values()]
        gradients = iter(gradient_through(self.local, self.steps[-1].moved[0], self.outer_gradient(), leaves))
        return [(step, {name: next(gradients) for name in step.signal.differentiable()}) for step in counted]

    def commit(self) -> None:
        """Move the student to θ′, with its optimizer."""
        for step in self.steps:
            new_params, new_state = pytree.tree_map_only(Tensor, Tensor.detach, step.moved)
            self.update.commit(self.local.parameters, step.gradient, new_params, new_state)

    @cached_property
    def _outer(self) -> tuple[Tensor, Tree]:
        return self.local.loss_and_gradient(self.params, *self._outer_pass())

    def _outer_loss_at(self, params: Tree) -> Tensor:
        return self.local.loss(params, *self._outer_pass())

    def _outer_pass(self) -> tuple[list[Any], list[Loss], RandomState]:
        """The student's inputs, their losses, and the start of a random stream.

        The stream is independent of the default one, from whose state after the inner pass the teacher draws.
        """
        start = self.steps[-1].passes[-1].after.branch()
        return [first_input(part) for part in self.labeled], [_outer_loss(self.problem, p) for p in self.labeled], start


def take_steps(
    student: nn.Module,
    update: Update,
    problem: Problem,
    *,
    labeled: Any,
    batches: Sequence[Any],
    teach: Teach,
    parts: int = 1,
    keep_graph: bool = False,
) -> Path:
    """The student's steps on the inner batches: Algorithm 1, lines 2 and 3.

    Buffers and generators advance as in training; the weights do not move.

    Args:
        student, update, problem: the network, U and the losses.
        labeled: the outer batch.
        batches: the inner batches, one for each step.
        teach: called once for each micro-batch, after the student's pass on it.
        parts: the number of micro-batches in a batch.
        keep_graph: keep the path differentiable with respect to the signals, for :meth:`Path.gradients_in_signals`.
    """
    local = Local(student, update.parameters, double_backward=keep_graph)
    path = Path(problem, local, update, micro_batches(labeled, parts, "labeled"))
    several = keep_graph and len(batches) > 1
    # A graph of several steps begins at leaves, so that the student's own parameters are in none but by mistake.
    params, state = as_leaves(local.params) if several else local.params, update.read_state()
    for batch in batches:
        if path.steps:
            params, state = path.steps[-1].moved
        path.steps.append(_step(path, batch, params, state, teach, refuse_checkpoints if several else nullcontext))
    return path


def _step(
    path: Path, batch: Any, params: Tree, state: Any, teach: Teach, around: Callable[[], AbstractContextManager[None]]
) -> InnerStep:
    """One step; ``around``: what the student's passes run in."""
    passes: list[Pass] = []
    signals: list[Signal] = []
    losses: list[Tensor] = []
    grads: list[Tree] = []
    for x, labeled in zip(micro_batches(batch, len(path.labeled), "unlabeled"), path.labeled, strict=True):
        with around():
            student = path.local.run(params, path.problem.student_input(x))
        path.problem.check(student.outputs, labeled, x)
        checks.finite_student(student.outputs)
        signal = teach(x, student.outputs).detached()  # line 2: ŷ ~ T(x), or the soft label
        if path.local.double_backward:
            for t in signal.differentiable().values():
                t.requires_grad_()
        loss, gradient = student.gradient(_inner_loss(path.problem, signal, x))  # line 3: g
        checks.dense_gradients(gradient)
        passes.append(student)
        signals.append(signal)
        losses.append(loss)
        grads.append(gradient)
    return InnerStep(
        path.problem,
        path.update,
        passes,
        batch,
        joined_signals(signals),
        torch.stack(losses).mean(),
        mean_tree(grads),
        state,
    )


def _inner_loss(problem: Problem, signal: Signal, batch: Any) -> Loss:
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


def _outer_loss(problem: Problem, batch: Any) -> Loss:
    def loss(outputs: Tensor, params: Tree) -> Tensor:
        value = problem.outer_loss(outputs, batch)
        checks.scalar_loss(value, "the problem's outer_loss")
        return value

    return loss
