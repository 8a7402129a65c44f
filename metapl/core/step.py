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

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.core.lesson import Credited, credited, plain_leaves
from metapl.core.order import Order
from metapl.errors import MetaplError, reason_of
from metapl.execution import checks
from metapl.execution.batch import Batch
from metapl.execution.compare import (
    BY_DIFFERENCE,
    EXACTLY,
    ROUNDINGS,
    SlopesDiffer,
    check_same_slopes,
    slopes_differ,
)
from metapl.execution.numerics import MissingDerivative, Space, Tree, reduced_float32, wide
from metapl.execution.ranks import NOTHING
from metapl.problems.base import BilevelProblem, Signal, enters_input, has_rows
from metapl.updates import Cotangents, Options, Update

if TYPE_CHECKING:
    from metapl.core.engine import Derivatives, Descent, Engine


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


@dataclass(eq=False)
class InnerStep:
    """One step of the student, with the operations that estimators need.

    Args:
        update: U.
        descent: the student's pass on the inner batch, with its loss ℓ and g.
        state: the optimizer's, before the step; None: it was forgotten.
        by_optimizer: whether θ′ is that of the optimizer's own step, since the roundings of several
            steps grow.
        digest: of the batch, where it may be dropped and read again.
        order: how ⟨g, w⟩ is differentiated where no Hessian product is needed; None: by tangent.

    Attributes:
        student: whose step it is.
        space: products and norms over all processes that hold parts of the weights.
        signal: the teacher's about the batch, without its graph.
        params: θ, the weights before the step.
        outputs: z = S(x; θ), (B, ...), without a graph.
        inner_loss: ℓ = (1/B) Σ ℓ_i, a scalar.
        gradient: g, without a graph.
    """

    update: Update
    descent: Descent
    state: Any
    by_optimizer: bool = False
    digest: Tensor | None = None
    order: Order | None = None
    student: Engine = field(init=False)
    space: Space = field(init=False)
    signal: Signal = field(init=False)
    params: Tree = field(init=False)
    outputs: Tensor = field(init=False)
    inner_loss: Tensor = field(init=False)
    gradient: Tree = field(init=False)

    def __post_init__(self) -> None:
        self.student = self.descent.student
        self.space = self.student.space
        self.signal = self.descent.signal
        self.inner_loss = self.descent.inner_loss
        self._read()

    def _read(self) -> None:
        """Read what a step forgets, and has again, from its pass."""
        self.params = self.descent.params
        self.outputs = self.descent.outputs
        self.gradient = self.descent.gradient
        if self.student.double_backward:
            self.gradient = {name: g.detach() for name, g in self.gradient.items()}

    def forget(self, *, batch_too: bool = False) -> None:
        """Drop what :meth:`recompute` has again: θ, g, s and, with ``batch_too``, the batch."""
        self.descent.forget(batch_too=batch_too)
        self.state = None
        self._read()
        for name in ("updated", "new_params"):
            vars(self).pop(name, None)

    def recompute(self, params: Tree, state: Any, inner_batch: Batch = None) -> None:
        """Give a forgotten step its θ, g, s and its batch again.

        Args:
            inner_batch: the batch; None: it was not forgotten.

        Cost: a forward and a backward pass of the student.
        """
        self.descent.recompute(params, inner_batch)
        self.state = state
        self._read()

    def with_signal(self, signal: Signal) -> InnerStep:
        """Return the same step on another signal.

        Cost: a forward and a backward pass of the student.
        """
        return replace(self, descent=self.descent.again(signal))

    @property
    def problem(self) -> BilevelProblem:
        """The two losses and the signal."""
        return self.descent.lesson.problem

    @property
    def inner_batch(self) -> Batch:
        """x, or (weak, strong), ..."""
        return self.descent.lesson.batch

    @property
    def learning_rate(self) -> float | None:
        """η of the first param group; None where the optimizer has no single rate."""
        return self.update.learning_rate

    @property
    def processes(self) -> int:
        """The number of processes that share the batch."""
        return self.student.ranks.size

    def has_rows(self, name: str) -> bool:
        """Return whether a field of the signal has a row for each example.

        The field ``log_prob`` has, where all of the value has.
        """
        by_field = has_rows(self.problem, self.signal, len(self.outputs))
        return by_field.get(name, all(by_field.values()))

    @cached_property
    def updated(self) -> tuple[Tree, Any]:
        """θ′ and s′, with a graph if the path keeps it."""
        has_graph = self.student.double_backward
        if self.by_optimizer and not has_graph:
            return self.update.stepped(self.params, self.descent.gradient, self.state)
        updated = self.update.update(self.params, self.descent.gradient, self.state)
        if not (self.student.has_half_precision and has_graph):
            return updated
        # The values are the optimizer's, and the derivatives those of the same update in float64:
        # see :meth:`vjp`.
        in_float64 = self.update.update(*_double((self.params, self.descent.gradient, self.state)))

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
            params, _ = self.update.update(self.params, self.descent.gradient, self.state)
        if has_graph:
            params = {name: p.detach() for name, p in params.items()}
        return params

    def shifted(self, factor: Tensor, w: Tree) -> Tensor:
        """Return S(x; θ + factor·w), (B, ...), in float32 or wider; the weights stay at θ."""
        return self.descent.shifted(factor, w)

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

    def second_derivatives(
        self, w: Tree, fields: Mapping[str, Tensor], *, curved: bool = True
    ) -> tuple[Tree, Derivatives]:
        """Return the derivatives of ⟨g, w⟩ in the weights, and in fields of the signal.

        Args:
            fields: what of the signal to differentiate in.
            curved: whether the Hessian product (∂²ℓ/∂θ²) w is asked for; else it is empty.

        Returns: the product, and the derivative in each field; None where nothing depends on it.
        """
        # Blocks of a sharded student are run apart: ⟨g, w⟩, the derivative in a factor of the loss,
        # tells whether anything reaches them past their arguments. And where ż was none that g
        # knows of, it tells whether this g is the first one.
        student = self.student
        with_slope = student.compares_gradients or not student.has_whole_weights
        product, derivatives, slope = self.descent.second_derivatives(
            w, fields, curved=curved, with_slope=with_slope
        )
        if slope is not None:
            self._check_slope(slope, w)
        hessian = student.over_ranks(product) if curved else {}
        return hessian, derivatives

    def _check_slope(self, slope: Tensor, w: Tree) -> None:
        """Compare ⟨g, w⟩ of a gradient that was computed again with that of g."""
        by_gradient, spread = self.space.slope(self.gradient, w)
        eps = torch.finfo(self.shifted_dtype).eps
        check_same_slopes(
            self.student.ranks.mean(slope),
            by_gradient,
            spread,
            EXACTLY[self.descent.rounded_to].slope,
            ROUNDINGS * eps * self.space.norm(self.gradient) * self.space.norm(w),
        )

    def derivatives_along(self, w: Tree, of: Credited = "signal") -> Derivatives:
        """Return ∂⟨g, w⟩/∂(what is credited), exactly, in the order of this step.

        From the graph of g where the pass has kept it; by ż; or by double backward, as always where
        the signal enters the student's input, and ⟨∂ℓ/∂z, ż⟩ goes through the whole network.
        """
        by_kept_graph = self.descent.along_kept_graph(w)
        if by_kept_graph is not None:
            return by_kept_graph[1]
        if enters_input(self.problem):
            _, gradients = self.second_derivatives(w, self.signal.differentiable(), curved=False)
            return gradients
        if self.order == "double_backward":
            _, gradients = self.second_derivatives(w, credited(self.signal, of), curved=False)
            return gradients
        return self.derivatives_by_tangent(w, self.descent.tangent(w), of=of)

    def derivatives_by_tangent(
        self, w: Tree, z_dot: Tensor, rounding: Tensor | None = None, of: Credited = "signal"
    ) -> Derivatives:
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

    def derivatives_by_move(self, w: Tree, move: Move, of: Credited = "signal") -> Derivatives:
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
        self.descent.check_shifted(first, second)


def _derivatives_by_losses(step: InnerStep, leaves: Tree, w: Tree, move: Move) -> Derivatives:
    """Return ∂⟨g, w⟩/∂(leaves) by a difference of the loss's derivative in the leaves."""
    after, gradients = _loss_in_leaves(step, leaves, w, move.ahead, factor=move.after)
    before, others = _loss_in_leaves(step, leaves, w, move.behind, factor=move.before)
    differences: Derivatives = {}
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
    tolerance = BY_DIFFERENCE[step.descent.rounded_to].slope
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
        mean = step.descent.mean_loss(z, theta, leaves)
        if not mean.requires_grad:
            return mean.detach(), [None] * len(leaves)
        return mean.detach(), torch.autograd.grad(mean, list(leaves.values()), allow_unused=True)


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
            mean = step.descent.mean_loss(z, theta, leaves)
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
    tolerance = tolerances[step.descent.rounded_to].slope
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
