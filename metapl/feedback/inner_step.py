r"""A step of the student, and its adjoint.

From its current weights θ_1 the student takes K steps, each on its own batch x_k and the teacher's
signal about it:

.. math:: g_k = \nabla_\theta \tfrac1B \sum_i \ell_i(S(x_k; \theta_k), \mathrm{signal}_k), \quad
          (\theta_{k+1}, s_{k+1}) = U(\theta_k, g_k, s_k)

and is then judged by L(θ_{K+1}). The adjoint runs backwards, from v = ∇L and no cotangent of the
state:

.. math:: (w_k, \bar\theta_k, \bar s_k) =
          \Big(\frac{\partial U}{\partial (g, \theta, s)}\Big)^{\!\top}
          (\lambda_{k+1}, \bar s_{k+1}), \qquad
          \lambda_k = \bar\theta_k + \frac{\partial^2 \ell_k}{\partial\theta^2} w_k

The feedback on signal_k needs only w_k (see :mod:`metapl.feedback.forward`). With K = 1 it is
w = (∂U/∂g)ᵀ v, and no Hessian is formed.

A signal may depend on the student's outputs at θ_k; they are detached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, reason_of
from metapl.execution import checks
from metapl.execution.batch import Batch, joined, leaves_of, map_tensors, micro_batches
from metapl.execution.compare import (
    BY_DIFFERENCE,
    EXACTLY,
    ROUNDINGS,
    SlopesDiffer,
    check_same_slopes,
    slopes_differ,
)
from metapl.execution.local import NOTHING, LocalStudent, Loss, Pass, mean_of_scalars, plain_leaves
from metapl.execution.numerics import (
    MissingDerivative,
    Space,
    Tree,
    TreeSum,
    reduced_float32,
    wide,
)
from metapl.feedback.order import Order
from metapl.problems.base import BilevelProblem, Signal, has_rows
from metapl.updates import Cotangents, Options, Update

Credits = Literal["signal", "example", "batch", "nothing"]
"""For what feedback has one number each: an entry of the signal, an example, the whole batch; or
there is no feedback."""

Credited = Literal["signal", "example"]
"""In what a step is differentiated: in each entry of the signal, or in a factor of each example's
loss."""


@dataclass(frozen=True)
class Move:
    """The student's outputs after two moves of its weights along w, in the units of w.

    Args:
        ahead: S(x; θ + after·w), (B, ...).
        behind: S(x; θ + before·w), (B, ...).
        after: the factor of the first move.
        before: the factor of the second one, negative or zero.
        width: after − before.
        rounding: a bound on the norm of the error of ahead − behind.
    """

    ahead: Tensor
    behind: Tensor
    after: Tensor
    before: Tensor
    width: Tensor
    rounding: Tensor


class SignalInput:
    """The student's input in a micro-batch where the signal enters it.

    It keeps the graph from the signal to the input, by which a derivative in the input goes on to
    the signal. So the input is computed once, and may draw noise.

    Args:
        in_graph: compute the input from the signal's own tensors; else from leaves in their places.

    Attributes:
        fields: the floating-point fields of the signal that the input is computed from.
        inputs: the student's input; without a graph unless ``in_graph``.
    """

    def __init__(
        self, problem: BilevelProblem, batch: Batch, signal: Signal, *, in_graph: bool
    ) -> None:
        fields = {name: t for name, t in signal.fields().items() if t.is_floating_point()}
        self.fields = fields if in_graph else plain_leaves(fields)
        self._input_with_graph = problem.student_input(batch, signal.having(self.fields))  # type: ignore[call-arg]
        self._entering = [
            t
            for t in leaves_of(self._input_with_graph)
            if isinstance(t, Tensor) and t.requires_grad
        ]
        self.inputs = self._input_with_graph
        if not in_graph:
            self.inputs = map_tensors(Tensor.detach, self._input_with_graph)

    def as_leaves(self) -> tuple[list[Tensor], Any]:
        """Return the tensors of the input that depend on the signal, as leaves.

        And the input with these leaves in their places.
        """
        leaves = [t.detach().requires_grad_() for t in self._entering]
        leaf_of = {id(t): leaf for t, leaf in zip(self._entering, leaves, strict=True)}
        return leaves, map_tensors(lambda t: leaf_of.get(id(t), t), self._input_with_graph)

    def in_fields(self, cotangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """Return derivatives in the leaves of :meth:`as_leaves` as derivatives in the fields."""
        reached: list[Tensor] = []
        cotangents_of_reached: list[Tensor] = []
        for t, cotangent in zip(self._entering, cotangents, strict=True):
            if cotangent is not None:
                reached.append(t)
                cotangents_of_reached.append(cotangent)
        if not reached:
            return dict.fromkeys(self.fields)
        grads = torch.autograd.grad(
            reached,
            list(self.fields.values()),
            cotangents_of_reached,
            retain_graph=True,
            allow_unused=True,
        )
        return dict(zip(self.fields, grads, strict=True))


def inner_loss(
    problem: BilevelProblem,
    signal: Signal,
    batch: Batch,
    readable: bool,
    factors: Tensor | None,
    outputs: Tensor,
    params: Tree,
) -> Tensor:
    """Return the mean of factor_i ℓ_i, where ℓ is (B,), a scalar.

    Args:
        readable: whether this process holds the weights whole, so that a loss may read them.
        factors: (B,); None: 1 each.
    """
    losses = problem.inner_loss(outputs, signal, batch, params if readable else None)
    if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
        raise MetaplError(
            f"inner_loss returned {checks.described(losses)}; expected one loss per example, "
            f"({len(outputs)},)."
        )
    return losses.mean() if factors is None else (factors * losses).mean()


@dataclass(eq=False)
class InnerStep:
    """One step of the student, with the operations that estimators need.

    Args:
        problem: the inner loss.
        update: U.
        passes: S(x; θ) on each micro-batch.
        inner_batch: x, or (weak, strong), ...
        signal: the teacher's, without its graph.
        inner_loss: the mean of ℓ_i, a scalar.
        grads: g, with a graph if the path keeps it; empty if the step was forgotten.
        state: the optimizer's, before the step.
        signal_inputs: of each micro-batch, where the signal enters the student's input.
        by_optimizer: whether θ′ is that of the optimizer's own step, since the roundings of several
            steps grow.
        digest: of the batch, where it may be dropped and read again.
        order: how ⟨g, w⟩ is differentiated where no Hessian product is needed; None: by tangent.

    Attributes:
        student: whose step it is.
        params: θ.
        space: products and norms over all processes that hold parts of the weights.
    """

    problem: BilevelProblem
    update: Update
    passes: Sequence[Pass]
    inner_batch: Batch
    signal: Signal
    inner_loss: Tensor
    grads: Tree
    state: Any
    signal_inputs: Sequence[SignalInput] = ()
    by_optimizer: bool = False
    digest: Tensor | None = None
    order: Order | None = None
    student: LocalStudent = field(init=False)
    params: Tree = field(init=False)
    space: Space = field(init=False)

    def __post_init__(self) -> None:
        self.student = self.passes[0].student
        self.params = self.passes[0].params
        self.space = self.student.space

    def forgotten(self, *, batch_too: bool = False) -> InnerStep:
        """Return the step without what :meth:`recomputed` has again.

        That is θ, g, s and, with ``batch_too`` and unless the signal enters it, the batch.
        """
        batch_too = batch_too and not self.signal_inputs
        for inner_pass in self.passes:
            inner_pass.forget(inputs_and_outputs=batch_too)
        inner_batch = None if batch_too else self.inner_batch
        return replace(self, grads={}, state=None, inner_batch=inner_batch)

    def recomputed(self, params: Tree, state: Any, inner_batch: Batch = None) -> InnerStep:
        """Return a forgotten step with θ, g, s and its batch.

        Args:
            inner_batch: the batch; None: it was not forgotten.

        Cost: a forward and a backward pass of the student.
        """
        step = self if inner_batch is None else replace(self, inner_batch=inner_batch)
        if self.inner_batch is None:
            for inner_pass, batch in zip(step.passes, step.micro_batches, strict=True):
                inner_pass.inputs = step.problem.student_input(batch)
        gradients = TreeSum()
        for inner_pass, signal, batch in step.parts():
            loss = step._loss(signal, batch)
            gradients.add(inner_pass.recompute_gradient(params, loss))
        return replace(step, grads=gradients.mean(), state=state)

    def with_signal(self, signal: Signal) -> InnerStep:
        """Return the same step on another signal.

        Cost: a forward and a backward pass of the student.
        """
        step = replace(self, signal=signal, grads={}).recomputed(self.params, self.state)
        losses = []
        for inner_pass, signal_of_part, batch in step.parts():
            with inner_pass.drawing_as_loss():
                loss = self._loss(signal_of_part, batch)
                losses.append(loss(inner_pass.outputs, self.params))
        return replace(step, inner_loss=mean_of_scalars(losses))

    @property
    def learning_rate(self) -> float | None:
        """η of the first param group; None where the optimizer has no single rate."""
        return self.update.learning_rate

    @property
    def processes(self) -> int:
        """The number of processes that share the batch."""
        return self.student.ranks.size

    @property
    def outputs(self) -> Tensor:
        """z = S(x; θ), (B, ...), without a graph."""
        if len(self.passes) == 1:
            return self.passes[0].outputs
        return joined([inner_pass.outputs for inner_pass in self.passes])

    def has_rows(self, name: str) -> bool:
        """Return whether a field of the signal has a row for each example.

        The field ``log_prob`` has, where all of the value has.
        """
        rows = sum(len(inner_pass.outputs) for inner_pass in self.passes)
        by_field = has_rows(self.problem, self.signal, rows)
        return by_field.get(name, all(by_field.values()))

    @property
    def gradient(self) -> Tree:
        """g, without a graph."""
        if not self.student.double_backward:
            return self.grads
        return {name: g.detach() for name, g in self.grads.items()}

    @cached_property
    def updated(self) -> tuple[Tree, Any]:
        """θ′ and s′, with a graph if the path keeps it."""
        has_graph = self.student.double_backward
        if self.by_optimizer and not has_graph:
            return self.update.stepped(self.params, self.grads, self.state)
        updated = self.update.update(self.params, self.grads, self.state)
        if not (self.student.has_half_precision and has_graph):
            return updated
        # The values are the optimizer's, and the derivatives those of the same update in float64:
        # see :meth:`vjp`.
        in_float64 = self.update.update(*_double((self.params, self.grads, self.state)))

        def with_graph(value: Any, exact: Any) -> Any:
            if not isinstance(exact, Tensor) or not exact.requires_grad:
                return value
            return value.detach() + (exact - exact.detach()).to(value.dtype)

        with_graphs: tuple[Tree, Any] = pytree.tree_map(with_graph, updated, in_float64)
        return with_graphs

    @cached_property
    def new_params(self) -> Tree:
        """θ′, without a graph, and without s′, which one step of the student never reads."""
        has_graph = self.student.double_backward
        if self.by_optimizer or has_graph:
            params, _ = self.updated
        else:
            params, _ = self.update.update(self.params, self.grads, self.state)
        if not has_graph:
            return params
        return {name: p.detach() for name, p in params.items()}

    def tangent(self, w: Tree) -> Tensor:
        """Return ż = d/dε S(x; θ + εw), (B, ...), by forward-mode AD."""
        return joined([inner_pass.tangent(w) for inner_pass in self.passes])

    def shifted(self, factor: Tensor, w: Tree) -> Tensor:
        """Return S(x; θ + factor·w), (B, ...), in float32 or wider; the weights stay at θ."""
        return joined([inner_pass.shifted(factor, w) for inner_pass in self.passes])

    @property
    def shifted_dtype(self) -> torch.dtype:
        """The narrowest dtype in a shifted pass.

        It may be that of a float32 body, or cast, in a float64 student.
        """
        dtypes = {wide(t).dtype for t in (*self.params.values(), self.outputs)}
        return torch.float32 if torch.float32 in dtypes else torch.float64

    @property
    def in_full_precision(self) -> bool:
        """Whether the pass computed in float32 or wider throughout.

        That depends on its weights and on PyTorch's settings.
        """
        student = self.student
        is_rounded = torch.float32 in student.dtypes and reduced_float32(student.device)
        has_autocast = torch.is_autocast_enabled(student.device.type)
        return not (is_rounded or student.has_half_precision or has_autocast)

    def pullback(self, v: Tree) -> Tree:
        """Return w = (∂U/∂g)ᵀ v, computed as :meth:`vjp` is."""
        arguments = (self.params, self.gradient, self.state, v)
        if not self.student.has_half_precision:
            return self.update.pullback(*arguments)
        return self._as_params(self.update.pullback(*_double(arguments)))

    def vjp(self, v: Tree, state_cotangent: Any = None) -> Cotangents:
        """Return the adjoint of U at this step, from the cotangents of θ′ and s′.

        Of weights in half precision it is computed in float64, for its terms nearly cancel in the
        first steps of Adam.
        """
        arguments = (self.params, self.gradient, self.state, v, state_cotangent)
        if not self.student.has_half_precision:
            return self.update.vjp(*arguments)
        cotangents = self.update.vjp(*_double(arguments))
        return Cotangents(
            gradient=self._as_params(cotangents.gradient),
            params=self._as_params(cotangents.params),
            state=cotangents.state,
        )

    def setting_cotangents(self, names: Sequence[str], v: Tree, state_cotangent: Any) -> Options:
        """Return the derivatives in settings of the optimizer, by param group.

        Args:
            names: of the settings.
            v, state_cotangent: the cotangents of θ′ and s′.
        """
        arguments = (self.params, self.gradient, self.state, v, state_cotangent)
        if self.student.has_half_precision:
            arguments = _double(arguments)
        return self.update.setting_cotangents(names, *arguments)

    def _as_params(self, tree: Tree) -> Tree:
        return {name: t.to(self.params[name].dtype) for name, t in tree.items()}

    @contextmanager
    def hessian(self) -> Iterator[Callable[[Tree], Tree]]:
        """Yield a function that returns products with ∂²ℓ/∂θ², valid inside the block."""
        with ExitStack() as stack:
            products = []
            for inner_pass, signal, batch in self.parts():
                block = inner_pass.hessian(self._loss(signal, batch))
                products.append(stack.enter_context(block))

            def hessian_product(w: Tree) -> Tree:
                in_weights = TreeSum()
                for product in products:
                    product_of_part, _ = product(w)
                    in_weights.add(product_of_part)
                return in_weights.mean()

            yield hessian_product

    def parts(self) -> Iterator[tuple[Pass, Signal, Any]]:
        """Return the micro-batches, each as its pass, signal and batch."""
        signals = self.signal.chunks(len(self.passes))
        return zip(self.passes, signals, self.micro_batches, strict=True)

    def second_derivatives(
        self, w: Tree, fields: Mapping[str, Tensor], *, curved: bool = True
    ) -> tuple[Tree, dict[str, Tensor | None]]:
        """Return the derivatives of ⟨g, w⟩ in the weights, and in fields of the signal.

        Args:
            fields: what of the signal to differentiate in.
            curved: whether the Hessian product (∂²ℓ/∂θ²) w is asked for; else it is empty.

        Returns: the product, and the derivative in each field; None where nothing depends on it.
        """
        count = len(self.passes)
        products = TreeSum()
        in_leaves_by_part: list[list[Tensor | None]] = []
        slopes: list[Tensor] = []
        for i, (inner_pass, signal, batch) in enumerate(self.parts()):
            fields_of_part = dict(fields)
            if count > 1:
                fields_of_part = {name: t.chunk(count)[i] for name, t in fields.items()}
            field_leaves = plain_leaves(fields_of_part)
            input_leaves: list[Tensor] = []
            inputs = inner_pass.inputs
            if self.signal_inputs:
                input_leaves, inputs = self.signal_inputs[i].as_leaves()
            loss = self._loss(signal.having(field_leaves), batch, field_leaves.get("factors"))
            leaves = [*field_leaves.values(), *input_leaves]
            if self.student.has_whole_weights and not self.student.compares_gradients:
                product, in_leaves = inner_pass.second_derivatives(
                    w, loss, leaves, inputs, curved=curved
                )
            else:
                # Blocks of a sharded student are run apart: ⟨g, w⟩, the derivative in a factor of
                # the loss, tells whether anything reaches them past their arguments. And where ż
                # was none that g knows of, it tells whether this g is the first one.
                factor = torch.ones_like(self.inner_loss, requires_grad=True)
                product, (*in_leaves, slope) = inner_pass.second_derivatives(
                    w, scaled(loss, factor), [*leaves, factor], inputs, curved=curved
                )
                if slope is not None:
                    slopes.append(slope)
            products.add(product)
            in_leaves_by_part.append(in_leaves)
        if slopes:
            self._check_slopes(slopes, w)
        hessian: Tree = {}
        if curved:
            hessian = self.student.over_ranks(products.mean())
        return hessian, self.in_signal(fields, in_leaves_by_part)

    def _check_slopes(self, slopes: Sequence[Tensor], w: Tree) -> None:
        """Compare ⟨g, w⟩ of gradients that were computed again with that of g."""
        by_gradient, spread = self.space.slope(self.gradient, w)
        eps = torch.finfo(self.shifted_dtype).eps
        check_same_slopes(
            self.student.ranks.mean(mean_of_scalars(slopes)),
            by_gradient,
            spread,
            EXACTLY[self.passes[0].rounded_to].slope,
            ROUNDINGS * eps * self.space.norm(self.gradient) * self.space.norm(w),
        )

    def derivatives_along(self, w: Tree, of: Credited = "signal") -> dict[str, Tensor | None]:
        """Return ∂⟨g, w⟩/∂(what is credited), exactly, in the order of this step.

        From the graph of g where the pass has kept it; by ż; or by double backward, as always where
        the signal enters the student's input, and ⟨∂ℓ/∂z, ż⟩ goes through the whole network.
        """
        in_leaves = [part.in_leaves(w) for part in self.passes]
        if in_leaves[0] is not None:
            return self.in_signal(credited(self.signal, of), in_leaves)  # type: ignore[arg-type]
        if self.signal_inputs:
            _, gradients = self.second_derivatives(w, self.signal.differentiable(), curved=False)
            return gradients
        if self.order == "double_backward":
            _, gradients = self.second_derivatives(w, credited(self.signal, of), curved=False)
            return gradients
        return self.derivatives_by_tangent(w, self.tangent(w), of=of)

    def derivatives_by_tangent(
        self, w: Tree, z_dot: Tensor, rounding: Tensor | None = None, of: Credited = "signal"
    ) -> dict[str, Tensor | None]:
        """Return ∂⟨g, w⟩/∂(what is credited) from ż, (B, ...), in the head alone.

        For sampled labels ℓ is linear in its target, so −h_ik = (1/B) d/dε ℓ(z_i, class k) is the
        derivative at the one-hot rows of the labels. And Σ_i u_i d/dε ℓ_i is linear in u, so its
        gradient is d/dε ℓ itself: forward mode by two reverse passes.

        Args:
            rounding: a bound on the norm of the error of ż, where it is no exact derivative.
        """
        leaves = plain_leaves(credited(self.signal, of))
        slope = _slope(self, leaves, w, z_dot, rounding)
        gradients: Sequence[Tensor | None] = [None] * len(leaves)
        if slope.requires_grad:
            gradients = torch.autograd.grad(slope, list(leaves.values()), allow_unused=True)
        return dict(zip(leaves, gradients, strict=True))

    def derivatives_by_move(
        self, w: Tree, move: Move, of: Credited = "signal"
    ) -> dict[str, Tensor | None]:
        """Return ∂⟨g, w⟩/∂(what is credited) by a difference, of outputs or of losses.

        Of losses where the step's order says so: the derivative of the loss in what is credited is
        taken at both outputs, which needs first derivatives alone. Its error is O(δ²), of a
        one-sided move O(δ), and the rounding of that derivative over the move's length.
        """
        if self.order == "losses":
            return _derivatives_by_losses(self, plain_leaves(credited(self.signal, of)), w, move)
        z_dot = (move.ahead - move.behind) / move.width
        return self.derivatives_by_tangent(w, z_dot, move.rounding / move.width, of=of)

    def check_shifted(self, first: Tensor, second: Tensor) -> None:
        """Flag shifted outputs whose mean, z to second order of the shift, is not the pass's."""
        parts = len(self.passes)
        for part, one, other in zip(
            self.passes, first.chunk(parts), second.chunk(parts), strict=True
        ):
            part.check_shifted(one, other)

    def in_signal(
        self, fields: Mapping[str, Tensor], in_leaves: Sequence[Sequence[Tensor | None]]
    ) -> dict[str, Tensor | None]:
        """Return derivatives in leaves of each micro-batch as those in the signal's fields.

        Args:
            in_leaves: of each micro-batch, the derivatives in its part of the fields, and then in
                the leaves of its input. They are of the mean over its rows.

        Returns: the derivatives of the mean over all rows, of all ranks.
        """
        parts = len(self.passes) * self.student.ranks.size
        if len(self.passes) == 1 and parts == 1 and not self.signal_inputs:
            return dict(zip(fields, in_leaves[0], strict=True))
        pieces: dict[str, list[Tensor]] = {name: [] for name in fields}
        for i, leaves in enumerate(in_leaves):
            through_input: dict[str, Tensor | None] = {}
            if self.signal_inputs:
                through_input = self.signal_inputs[i].in_fields(leaves[len(fields) :])
            for name, direct in zip(fields, leaves, strict=False):
                terms = [t for t in (direct, through_input.get(name)) if t is not None]
                if terms:
                    pieces[name].append(sum(terms[1:], terms[0]) / parts)
        return {
            name: joined(pieces_of_field) if pieces_of_field else None
            for name, pieces_of_field in pieces.items()
        }

    def _loss(self, signal: Signal, batch: Batch, factors: Tensor | None = None) -> Loss:
        """Return the inner loss of a micro-batch, as a function of outputs and weights."""
        readable = self.student.has_whole_weights
        return partial(inner_loss, self.problem, signal, batch, readable, factors)

    @property
    def micro_batches(self) -> list[Any]:
        return micro_batches(self.inner_batch, len(self.passes), "inner")


def scaled(loss: Loss, factor: Tensor) -> Loss:
    """Return a loss times a number."""

    def scaled_loss(outputs: Tensor, params: Tree) -> Tensor:
        return factor * loss(outputs, params)

    return scaled_loss


def credited(signal: Signal, of: Credited = "signal") -> dict[str, Tensor]:
    """Return what gets the feedback, with its values, by name.

    Args:
        of: ``"example"``: the factor of each example's loss. ``"signal"``: the differentiable
            fields of the signal, or of sampled labels their one-hot rows, in the place of their
            distribution.
    """
    if of == "example":
        assert signal.log_prob is not None, "the mode takes sampled labels"
        return {"factors": torch.ones_like(signal.log_prob)}
    if not signal.sampled:
        return signal.differentiable()
    if signal.probs is None:
        raise MetaplError(
            "the sampled signal has no probs; expected Signal(value, log_prob, probs=...)."
        )
    # One-hot rows, by an operation that torch.func.vmap has a rule for.
    one_hot = torch.zeros_like(signal.probs).scatter(-1, signal.value[..., None], 1.0)
    return {"value": one_hot}


def _derivatives_by_losses(
    step: InnerStep, leaves: Tree, w: Tree, move: Move
) -> dict[str, Tensor | None]:
    """Return ∂⟨g, w⟩/∂(leaves) by a difference of the loss's derivative in the leaves."""
    after, gradients = _loss_in_leaves(step, leaves, w, move.ahead, factor=move.after)
    before, others = _loss_in_leaves(step, leaves, w, move.behind, factor=move.before)
    differences: dict[str, Tensor | None] = {}
    for name, gradient, other in zip(leaves, gradients, others, strict=True):
        if gradient is None or other is None:
            differences[name] = None
        else:
            differences[name] = (gradient - other) / move.width
    by_gradient, spread = step.space.slope(step.gradient, w)
    slope = step.student.ranks.sum(after - before) / move.width
    eps = torch.finfo(step.shifted_dtype).eps
    rounding = ROUNDINGS * eps * step.space.norm(step.gradient) * step.space.norm(w)
    rounding = rounding + ROUNDINGS * eps * step.student.ranks.sum(after.abs()) / move.width
    tolerance = BY_DIFFERENCE[step.passes[0].rounded_to].slope
    check_same_slopes(slope, by_gradient, spread + slope.abs(), tolerance, rounding)
    return differences


def _loss_in_leaves(
    step: InnerStep, leaves: Tree, w: Tree, z: Tensor, *, factor: Tensor
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return this rank's mean loss at z and weights θ + factor·w, and its gradient in leaves."""
    student = step.student
    theta: Tree = {}
    weights: AbstractContextManager[Any] = NOTHING
    if student.has_whole_weights:
        for name, p in step.params.items():
            theta[name] = wide(p) + factor * wide(w[name]) if name in w else p
        # A loss may read ``student.parameters()``, which are then these.
        weights = student.with_weights(theta)
    with weights, torch.enable_grad():
        mean = _mean_loss(step, leaves, z, theta)
        if not mean.requires_grad:
            return mean.detach(), [None] * len(leaves)
        return mean.detach(), torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)


def _mean_loss(step: InnerStep, leaves: Tree, z: Tensor, theta: Tree) -> Tensor:
    """Return this rank's share of (1/B) Σ_i factor_i ℓ_i(z, signal, θ), by micro-batches."""
    ranks = step.student.ranks
    parts = len(step.passes)
    # A loss may look at the batch as a whole, so it is given the micro-batches of the passes.
    signals = step.signal.having(leaves).chunks(parts)
    outputs = z.chunk(parts)
    factors: Sequence[Tensor | None] = [None] * parts
    if "factors" in leaves:
        factors = leaves["factors"].chunk(parts)
    losses = []
    for i, (part, batch) in enumerate(zip(step.passes, step.micro_batches, strict=True)):
        loss = step._loss(signals[i], batch, factors[i])
        with part.drawing_as_loss():
            losses.append(loss(outputs[i], theta))
    # The ranks' shares add up to the mean.
    return mean_of_scalars(losses) if ranks.alone else mean_of_scalars(losses) / ranks.size


def _slope(
    step: InnerStep, leaves: Tree, w: Tree, z_dot: Tensor, rounding_of_z_dot: Tensor | None
) -> Tensor:
    """Return this rank's share of d/dε (1/B) Σ_i factor_i ℓ_i(z + εż, signal, θ + εw).

    It is flagged where it is not ⟨w, g⟩, to which it is equal by the chain rule.
    """
    student = step.student
    ranks = student.ranks
    z = step.outputs.detach().requires_grad_()
    # A loss may read the weights as ``params``, or as ``student.parameters()``: both are these
    # leaves.
    weights: AbstractContextManager[Tree] = nullcontext({})
    if student.has_whole_weights:
        weights = student.with_leaves(step.params)
    is_choosing = rounding_of_z_dot is None and student.chooses_order
    with weights as theta, torch.enable_grad():
        try:
            mean = _mean_loss(step, leaves, z, theta)
        except Exception as error:
            if not is_choosing or isinstance(error, MetaplError):
                raise
            # It ran in the inner pass, so it needs the graph that was there, as a penalty on its
            # own gradient does.
            student.compares_gradients = True
            what = "the inner loss does not run on the outputs without the graph of the forward"
            raise MissingDerivative(f"{what} ({reason_of(error)})") from error
        gradients = torch.autograd.grad(
            mean, [z, *theta.values()], create_graph=True, allow_unused=True
        )
        directions = [z_dot]
        for name, p in theta.items():
            directions.append(w[name] if name in w else torch.zeros_like(p))
        terms = []
        for gradient, direction in zip(gradients, directions, strict=True):
            if gradient is not None:
                terms.append(gradient * direction)
        if len(terms) == 1:
            slope = terms[0].sum()
        else:
            slope = torch.stack([term.sum() for term in terms]).sum()

    by_gradient, spread = step.space.slope(step.gradient, w)
    forward = ranks.sum(slope.detach())
    tolerances = EXACTLY if rounding_of_z_dot is None else BY_DIFFERENCE
    tolerance = tolerances[step.passes[0].rounded_to].slope
    for term in terms:
        spread = spread + ranks.norm(term.detach())
    # The usual case, by as few operations as possible.
    is_read_at_once = ranks.alone and not checks.waits(slope)
    if is_read_at_once and bool((forward - by_gradient).abs() <= tolerance * spread):
        return slope
    # Both sums may cancel to rounding: of a bias before batch normalization, whose gradient is zero
    # but for rounding, a first step of Adam makes the whole direction.
    eps = torch.finfo(step.shifted_dtype).eps
    rounding = ROUNDINGS * eps * step.space.norm(step.gradient) * step.space.norm(w)
    in_outputs = gradients[0]
    if rounding_of_z_dot is not None and in_outputs is not None:
        rounding = rounding + ranks.norm(in_outputs.detach()) * rounding_of_z_dot
    if is_choosing:
        # The host waits for a device here, once: another order may follow what the outputs do not
        # carry.
        differ = ranks.any(bool(slopes_differ(forward, by_gradient, spread, tolerance, rounding)))
        if differ:
            student.compares_gradients = True
            raise SlopesDiffer
    check_same_slopes(forward, by_gradient, spread, tolerance, rounding)
    return slope


def _double(trees: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda t: t.double() if t.is_floating_point() else t, trees)
