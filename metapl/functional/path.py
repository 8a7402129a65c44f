"""The student's steps on the pure road: how v, w and ż are found there.

:class:`PurePath` and its :class:`PureStep` are what an estimator is handed, in the terms of
:mod:`metapl.core.terms`. The derivation is at the head of :mod:`metapl.functional.step`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from metapl.core.lesson import Credited, credited
from metapl.core.path import Drawing
from metapl.core.step import Move
from metapl.errors import MetaplError
from metapl.execution.numerics import Tree, as_real, no_fast_path, wide
from metapl.execution.tangents import norms_by_backward_kernels
from metapl.functional.call import Options, StepCall, StudentPass
from metapl.functional.state import (
    SPACE,
    PureSpace,
    as_dict,
    dot,
    norm,
    with_fields,
)
from metapl.problems.base import Signal
from metapl.updates.base import OptimizerState

if TYPE_CHECKING:
    from metapl.core.terms import Gradients, StudentStep

grad = torch.func.grad
grad_and_value = torch.func.grad_and_value
jvp: Any = torch.func.jvp
vjp: Any = torch.func.vjp
vmap = torch.func.vmap


class Carry(NamedTuple):
    """What a step of the student hands to the next."""

    theta: Tree
    optimizer_state: OptimizerState
    # Buffers and frozen parameters.
    student_state: Tree
    teacher_state: Tree


class Descent(NamedTuple):
    """Line 3 of Algorithm 1: ℓ and g = ∇_θ ℓ, with the pass that they come from."""

    inner_loss: Tensor
    gradient: Tree
    passed: StudentPass


class End(NamedTuple):
    """What the student's K steps end in: tensors alone, so that it can leave a transform.

    Attributes:
        outer_loss: L(θ′), where a derivative of the whole path has taken it, else NaN.
        outputs: z of the last step, (B, ...).
        inner_losses: ℓ of each step.
        gradients: g of each step.
        signals: the fields of each signal by name, with the teacher's graph.
        in_signals: dL(θ′)/d(field) of each signal, of a path that is differentiated as a whole.
        own_losses, own_gradient: of the last :class:`Answer`.
        carry: θ′ and what comes with it.
    """

    outer_loss: Tensor
    outputs: Tensor
    inner_losses: list[Tensor]
    gradients: list[Tree]
    signals: list[dict[str, Any]]
    in_signals: list[Tree]
    own_losses: Tree
    own_gradient: Tree
    carry: Carry


class BegunStep:
    """A step of the student, up to the teacher's signal about its batch."""

    def __init__(self, call: StepCall, number: int, theta_T: Tree, carry: Carry) -> None:
        self.call = call
        self.number = number
        self.carry = carry
        # Where the signal enters the student's input, it is asked for before the student runs.
        self.passed: StudentPass | None = None
        student_outputs = None
        if not call.rules.signal_enters_input:
            self.passed = call.student_pass(carry.theta, carry.student_state, number)
            student_outputs = self.passed.outputs.detach()
        self.answer = call.ask_teacher(theta_T, carry.teacher_state, number, student_outputs)
        # A constant for the student.
        self.signal = self.answer.signal.detached()

    def descend(self, leaves: Tree, signal: Signal | None = None) -> Descent:
        """Return ℓ and g = ∇_θ (1/B) Σ ℓ_i as functions of fields of the signal.

        This is line 3 of Algorithm 1.

        Args:
            leaves: tensors in the place of the fields, by name.
            signal: another one than the teacher's.
        """
        if signal is None:
            signal = self.signal
        call = self.call
        theta = self.carry.theta
        passed = self.passed
        if passed is None:
            entering = signal if signal.sampled else signal.having(leaves)
            passed = call.student_pass(theta, self.carry.student_state, self.number, entering)
        left = passed.student_state

        def loss_of(z: Tensor, theta: Tree) -> Tensor:
            return call.inner_loss(z, theta, left, self.number, signal, leaves)

        (in_outputs, in_weights), loss = grad_and_value(loss_of, (0, 1))(passed.outputs, theta)
        (by_outputs,) = passed.pull(in_outputs)
        gradient = {name: t + in_weights[name] for name, t in by_outputs.items()}
        return Descent(loss, gradient, passed)

    def moved(self, descent: Descent) -> Carry:
        """Return line 3, θ′ = U(θ, g), and what comes with it."""
        theta, optimizer_state = self.call.rules.inner_update.update(
            self.carry.theta,
            descent.gradient,
            self.carry.optimizer_state,
            self.call.inner_options,
        )
        left = descent.passed.student_state
        return Carry(theta, optimizer_state, left, self.answer.teacher_state)

    def end(self, descent: Descent, carry: Carry, outer_loss: Tensor) -> End:
        """Return the end of a path whose last step this is."""
        return End(
            outer_loss=outer_loss,
            outputs=descent.passed.outputs,
            inner_losses=[descent.inner_loss],
            gradients=[descent.gradient],
            signals=[as_dict(self.answer.signal)],
            in_signals=[],
            own_losses=self.answer.own_losses,
            own_gradient=self.answer.own_gradient,
            carry=carry,
        )


class PureTerms:
    """What the pure road hands to an estimator; anything else is refused by its name."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        raise MetaplError(
            f"an estimator asks a {type(self).__name__} for {name!r}, which the pure road does not "
            "have; expected the terms of metapl.core.terms, or a trainer without compile and "
            "without functional()."
        )


class ComposedStep(PureTerms):
    """A step of a path that was differentiated as a whole: nothing else can be asked of it."""

    space: PureSpace = SPACE
    processes = 1

    def __init__(
        self, signal: Signal, inner_loss: Tensor, gradient: Tree, learning_rate: Any
    ) -> None:
        self.signal = signal
        self.inner_loss = inner_loss
        self.gradient = gradient
        self.learning_rate = learning_rate


class PureStep(PureTerms):
    """A step of the student on the pure road: a :class:`metapl.core.terms.StudentStep`."""

    space: PureSpace = SPACE
    processes = 1
    in_full_precision = False
    order = None

    def __init__(self, begun: BegunStep, descent: Descent) -> None:
        self.begun = begun
        self.passed = descent.passed
        self.signal = begun.signal
        self.params = begun.carry.theta
        self.outputs = descent.passed.outputs
        self.inner_loss = descent.inner_loss
        self.gradient = descent.gradient
        # Between the sides of ⟨∂ℓ/∂z, ż⟩ = ⟨g, w⟩, relative to their terms: the report's flag.
        self.gap = 0 * descent.inner_loss

    @property
    def learning_rate(self) -> Tensor | None:
        """η of the first param group, a scalar."""
        return rate_of(self.begun.call.inner_options)

    @property
    def shifted_dtype(self) -> torch.dtype:
        """The dtype of the weights in a shifted pass."""
        return as_real(wide(next(iter(self.params.values())))).dtype

    def shifted(self, factor: Tensor, w: Tree) -> Tensor:
        """Return S(x; θ + factor·w), (B, ...), in float32 or wider."""
        theta = {}
        for name, t in self.params.items():
            theta[name] = wide(t) + factor * w[name] if name in w else wide(t)
        call = self.begun.call
        with torch.autocast(self.outputs.device.type, enabled=False):
            z, _ = call.student_outputs(theta, self.begun.carry.student_state, self.begun.number)
        return z

    def check_shifted(self, first: Tensor, second: Tensor) -> None:
        """Do nothing: a pure pass is one function at all weights."""

    def pullback(self, v: Tree) -> Tree:
        """Return w = (∂U/∂g)ᵀ v."""
        carry = self.begun.carry
        call = self.begun.call
        return call.rules.inner_update.pullback(
            self.params, self.gradient, carry.optimizer_state, v, call.inner_options
        )

    def tangent(self, w: Tree) -> Tensor:
        """Return ż = (∂z/∂θ) w, (B, ...), as the pullback of the pullback, which is linear.

        Without a compiler that takes some three times as long as a pass in forward mode, on a
        network with batch norms. Such a pass is taken where it has no masks of its own.
        """
        direction = self.with_zeros(w)
        call = self.begun.call
        if call.rules.replays_tangent:

            def outputs(theta: Tree) -> Tensor:
                z, _ = call.student_outputs(
                    theta, self.begun.carry.student_state, self.begun.number
                )
                return z

            z_dot: Tensor
            norms = norms_by_backward_kernels(call.rules.student.module)
            with no_fast_path(math=True), norms:
                _, z_dot = jvp(outputs, (self.params,), (direction,))
            return z_dot
        _, transposed = vjp(lambda c: self.passed.pull(c)[0], torch.zeros_like(self.outputs))
        (z_dot,) = transposed(direction)
        return z_dot

    def derivatives_along(self, w: Tree, of: Credited = "signal") -> Tree:
        """Return ∂⟨g, w⟩/∂(what is credited), by ż."""
        if self.begun.passed is None:
            raise MetaplError(
                "the signal enters the student's input, and the estimator asks a step for a "
                "derivative along w; expected path.adjoints or path.gradients_in_signals, or a "
                "trainer without compile and without functional()."
            )
        return self.derivatives_by_tangent(w, self.tangent(w), of=of)

    def derivatives_by_move(self, w: Tree, move: Move, of: Credited = "signal") -> Tree:
        """Return ∂⟨g, w⟩/∂(what is credited), by a difference of outputs."""
        return self.derivatives_by_tangent(w, (move.ahead - move.behind) / move.width, of=of)

    def derivatives_by_tangent(
        self, w: Tree, z_dot: Tensor, rounding: Tensor | None = None, of: Credited = "signal"
    ) -> Tree:
        """Return ∂⟨g, w⟩/∂(what is credited) from ż, (B, ...), in the head alone.

        Args:
            rounding: is not read: what the report's flag is compared with allows for it.
        """
        w = self.with_zeros(w)
        left = self.passed.student_state

        def slope(leaves: Tree) -> tuple[Tensor, Tensor]:
            """Return d/dε (1/B) Σ f_i ℓ_i(z + εż, signal, θ + εw), and the size of its terms."""

            def loss_of(z: Tensor, theta: Tree) -> Tensor:
                begun = self.begun
                return begun.call.inner_loss(z, theta, left, begun.number, self.signal, leaves)

            in_outputs, in_weights = grad(loss_of, (0, 1))(self.outputs, self.params)
            terms = {"z": in_outputs * z_dot}
            for name, t in in_weights.items():
                terms[name] = as_real(t) * as_real(w[name])
            return torch.stack([t.sum() for t in terms.values()]).sum(), norm(terms)

        derivatives: Tree
        derivatives, (along, size_of_terms) = grad_and_value(slope, has_aux=True)(
            credited(self.signal, of)
        )
        # The gap is the difference of two ways to ⟨g, w⟩, relative to the size of the terms of
        # both. Where the terms themselves are sums that cancel, only their rounding is left: a
        # floor of 1e4 roundings of ‖g‖ ‖w‖ in the denominator makes such a difference count as
        # small.
        g = self.gradient
        limits = torch.finfo(self.outputs.dtype)
        floor = 1e4 * limits.eps * norm(g) * norm(w)
        size_of_products = norm({name: t * w[name] for name, t in g.items()})
        scale = size_of_terms + size_of_products + floor
        self.gap = (along - dot(g, w)).abs() / scale.clamp_min(limits.tiny)
        return derivatives

    def with_zeros(self, w: Tree) -> Tree:
        """Return w with a zero for each parameter that it lacks."""
        whole = {}
        for name, t in self.params.items():
            whole[name] = w[name] if name in w else torch.zeros_like(t)
        return whole


def rate_of(options: Options) -> Tensor | None:
    """Return η of the first param group, a scalar; None for a transform, which has no groups."""
    return options[0]["lr"] if options else None


class PurePath(PureTerms, Drawing):
    """The student's K steps on the pure road: a :class:`metapl.core.terms.StudentPath`.

    The steps are taken when they are asked for: with the derivative of the whole path
    (:meth:`adjoints` of several steps, :meth:`gradients_in_signals`), or without it.
    """

    def __init__(self, call: StepCall, theta_T: Tree) -> None:
        self.call = call
        self.theta_T = theta_T
        state = call.state
        carry = Carry(
            state.student.params, state.inner.state, state.student.state, state.teacher.state
        )
        self.first = BegunStep(call, 0, theta_T, carry)
        self._steps: list[Any] = []
        self._end: End | None = None
        self._outer_loss: Tensor | None = None
        self._outer_gradient: Tree | None = None

    @property
    def steps(self) -> Sequence[StudentStep]:
        """The K steps; taken without a derivative, unless they have been taken."""
        if self._end is None:
            self._take_steps()
        return self._steps

    @property
    def end(self) -> End:
        """What the steps end in."""
        if self._end is None:
            self._take_steps()
        assert self._end is not None
        return self._end

    @property
    def gap(self) -> Tensor:
        """The gap of the last step, between the sides of ⟨∂ℓ/∂z, ż⟩ = ⟨g, w⟩; 0 without ż."""
        step = self.steps[-1]
        return step.gap if isinstance(step, PureStep) else 0 * step.inner_loss

    @property
    def known_outer_loss(self) -> Tensor:
        """L(θ′), or NaN where nothing has asked for it."""
        return self.end.outer_loss if self._outer_loss is None else self._outer_loss

    @property
    def outer_loss(self) -> Tensor:
        """L(θ′), a scalar."""
        if self._outer_loss is None:
            carry = self.end.carry
            self._outer_loss = self.call.outer_loss(carry.theta, carry.student_state)
        return self._outer_loss

    @property
    def outer_loss_before(self) -> Tensor:
        """L(θ), in one pass with L(θ′), so that both have the same dropout masks."""
        end = self.end.carry
        before: Tensor
        before, self._outer_loss = self._outer_losses_at(
            [end._replace(theta=self.call.state.student.params), end]
        )
        return before

    def outer_losses(self, signals: Sequence[Signal]) -> Tensor:
        """Return L after the step on each of several signals, (n,), in one pass.

        So all have the same dropout masks.
        """
        (_,) = self.steps
        ends = []
        for signal in signals:
            ends.append(self.first.moved(self.first.descend({}, signal.detached())))
        return self._outer_losses_at(ends)

    def _outer_losses_at(self, ends: Sequence[Carry]) -> Tensor:
        """Return L at the ends of several steps, (n,), by one pass, with the same dropout masks."""
        weights = {name: torch.stack([e.theta[name] for e in ends]) for name in ends[0].theta}
        buffers = {}
        for name in ends[0].student_state:
            buffers[name] = torch.stack([e.student_state[name] for e in ends])
        losses: Tensor = vmap(self.call.outer_loss, randomness="same")(weights, buffers)
        return losses

    def outer_gradient(self) -> Tree:
        """Return v = ∇L(θ′)."""
        if self._outer_gradient is None:
            carry = self.end.carry
            self._outer_gradient, self._outer_loss = grad_and_value(self.call.outer_loss)(
                carry.theta, carry.student_state
            )
        return self._outer_gradient

    def pullback(self) -> tuple[StudentStep, Tree]:
        """Return the step of a path of one step, and its w = (∂U/∂g)ᵀ v."""
        (step,) = self.steps
        w: Tree = step.pullback(self.outer_gradient())  # type: ignore[attr-defined]
        return step, w

    def adjoints(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None = None
    ) -> list[tuple[StudentStep, Tree, Gradients | None]]:
        """Return the last ``truncate`` steps from the last to the first.

        One step has its w, and no derivatives yet; several, or one whose signal enters the input,
        have these by the derivative of the whole path, and no w.
        """
        rules = self.call.rules
        if rules.steps == 1 and not rules.signal_enters_input and truncate != 0:
            step, w = self.pullback()
            return [(step, w, None)]
        in_order = self._differentiate(fields, truncate)
        return [(step, {}, gradients) for step, gradients in reversed(in_order)]

    def gradients_in_signals(
        self, truncate: int | None = None
    ) -> list[tuple[StudentStep, Gradients]]:
        """Return the last ``truncate`` steps, the first first, each with dL(θ′)/d(field)."""
        return self._differentiate(Signal.differentiable, truncate)

    def _take_steps(self) -> None:
        """Take all steps, without the derivative of the path."""
        losses = []
        gradients = []
        signals = []
        carry = self.first.carry
        for number in range(self.call.rules.steps):
            begun = self.first
            if number > 0:
                begun = BegunStep(self.call, number, self.theta_T, carry)
            descent = begun.descend({})
            carry = begun.moved(descent)
            self._steps.append(PureStep(begun, descent))
            losses.append(descent.inner_loss)
            gradients.append(descent.gradient)
            signals.append(as_dict(begun.answer.signal))
        not_taken = torch.full_like(descent.inner_loss, torch.nan)
        end = begun.end(descent, carry, outer_loss=not_taken)
        self._end = with_fields(end, inner_losses=losses, gradients=gradients, signals=signals)

    def _differentiate(
        self, fields: Callable[[Signal], Mapping[str, Tensor]], truncate: int | None
    ) -> list[tuple[StudentStep, Gradients]]:
        """Take all steps with the derivative of L(θ_K) in the signals of the last ``truncate``."""
        steps = self.call.rules.steps
        first = 0 if truncate is None else max(0, steps - truncate)
        end = self._walk(self.first, fields, first)
        self._end = end
        self._outer_loss = end.outer_loss
        rate = rate_of(self.call.inner_options)
        for number in range(steps):
            signal = Signal(**end.signals[number]).detached()
            step = ComposedStep(signal, end.inner_losses[number], end.gradients[number], rate)
            self._steps.append(step)
        return list(zip(self._steps[first:], end.in_signals[first:], strict=True))

    def _walk(
        self, begun: BegunStep, fields: Callable[[Signal], Mapping[str, Tensor]], first: int
    ) -> End:
        """Take this step and those after it, with the derivative of L(θ_K) in the signal of each.

        A signal may read the student's outputs, so it is known only once the steps before it are
        taken. Hence its derivative is taken within the function that the step before it
        differentiates: vjp of step 0 (step 0, vjp of step 1 (step 1, ...)).

        Args:
            first: the first step whose signal gets a derivative.
        """

        def onward(leaves: Tree) -> tuple[Tensor, End]:
            """Return L(θ_K) as a function of this signal, through this step and all after it."""
            descent = begun.descend(leaves)
            carry = begun.moved(descent)
            if begun.number + 1 < self.call.rules.steps:
                following = BegunStep(self.call, begun.number + 1, self.theta_T, carry)
                end = self._walk(following, fields, first)
                end = with_fields(
                    end,
                    inner_losses=[descent.inner_loss, *end.inner_losses],
                    gradients=[descent.gradient, *end.gradients],
                    signals=[as_dict(begun.answer.signal), *end.signals],
                )
                return end.outer_loss, end
            loss = self.call.outer_loss(carry.theta, carry.student_state)
            return loss, begun.end(descent, carry, outer_loss=loss)

        end: End
        leaves = dict(fields(begun.signal))
        if begun.number < first:
            _, end = onward(leaves)
            return with_fields(end, in_signals=[{}, *end.in_signals])
        loss, pull, end = vjp(onward, leaves, has_aux=True)
        # What else this step adds to the end, `onward` has put in front. The derivative in its
        # signal is there only now, after the vjp.
        (in_signal,) = pull(torch.ones_like(loss))
        return with_fields(end, in_signals=[in_signal, *end.in_signals])
