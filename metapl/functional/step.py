r"""One step of Algorithm 1 as one pure function, in every mode but ``implicit``:

    state, report = step(state, outer, inner, noise=None)

Nothing is hidden: weights, buffers, optimizers, their settings and the step's number go in and come
out, labels are drawn by the noise that is given, and only dropout draws from torch's default
generator. So ``torch.compile`` takes the step whole, ``torch.func.vmap`` takes many states at once,
and it can be read from top to bottom.

The mathematics is that of :mod:`metapl.feedback.forward`. With z = S(x_u; θ) and its pullback c ↦
(∂z/∂θ)ᵀ c,

- g = (∂z/∂θ)ᵀ ∂ℓ/∂z, θ′ = U(θ, g), v = ∇L(θ′), w = (∂U/∂g)ᵀ v;
- ż = (∂z/∂θ) w is the *transpose of the pullback*, which is linear in c: its own pullback along w.
  So the student runs once, and ż has the dropout masks and the batch statistics of that one pass;
- h = −∂/∂(signal) ⟨∂ℓ/∂z (z, signal), ż⟩, in the head alone;
- the teacher's gradient is that of −λ Σ sg(h)·signal + Σ its own losses, by one pullback of its
  passes; where L reads the teacher itself, λ L(sg(θ′); θ_T) is added, the direct term.

What h is, its units and its baseline stand with the mode, in
:meth:`metapl.feedback.Estimator.feedback`; here is how w, v and ż are found
(:mod:`metapl.feedback.roads`). The parts, from the bottom up:

- :class:`StepRules`: what all steps of a trainer have in common;
- :class:`StepCall`: one call, with the passes of both networks and the two losses;
- :class:`BegunStep`: a step of the student, up to the teacher's signal;
- :class:`PureStep` and :class:`PurePath`: what an estimator is handed;
- :func:`make_step`: Algorithm 1, line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl.errors import MetaplError
from metapl.execution.numerics import Tree, as_real, wide
from metapl.feedback.base import Estimator
from metapl.feedback.door import has_direct_term, outer_loss_reads_more
from metapl.feedback.inner_step import Credited, Move, credited, inner_loss
from metapl.feedback.roads import Gradients, StudentStep
from metapl.feedback.size import FeedbackSize, ratio_of
from metapl.functional.state import (
    SPACE,
    Function,
    Network,
    PureSpace,
    Report,
    State,
    as_dict,
    dot,
    norm,
    rounded_steps,
    with_fields,
)
from metapl.problems.base import (
    Problem,
    Signal,
    enters_input,
    overrides,
    reads_signal_in_outer_input,
    sum_and_weight,
)
from metapl.problems.losses import sum_of_terms
from metapl.updates import Update

Step = Callable[..., tuple[State, Report]]
Options = list[dict[str, Any]]
grad = torch.func.grad
grad_and_value = torch.func.grad_and_value
vjp: Any = torch.func.vjp
vmap = torch.func.vmap


@dataclass(frozen=True)
class StepRules:
    """What all steps of a trainer have in common: networks, losses and rules, but no tensor.

    Args:
        inner_update: U of the student, perhaps behind a clip.
        outer_update: that of the teacher; None without a teacher.
        inner_constants: what the param groups hold besides the settings, which are in the state.
        outer_constants: the same of the teacher's optimizer.
        losses_for: the teacher's own losses, by the inner batch.
        steps: K.
        feedback_size: the rule that gives λ.
        signal_enters_input: whether the student's input is made from the signal.
        signal_enters_outer_input: whether that of its outer pass is.
        outer_loss_reads_teacher: whether L depends on θ_T otherwise than by θ′.
        has_direct_term: whether that dependence is a part of the teacher's gradient.
        has_feedback: whether the mode has any; the control has none.
        revises_signal: whether the student's real step is on a signal that is made from h.
    """

    teacher: Function
    student: Function
    problem: Problem
    mode: Estimator
    inner_update: Update
    outer_update: Update | None
    inner_constants: Options
    outer_constants: Options
    losses_for: Callable[[Any], Sequence[Any]]
    steps: int
    feedback_size: FeedbackSize
    signal_enters_input: bool
    signal_enters_outer_input: bool
    outer_loss_reads_teacher: bool
    has_direct_term: bool
    has_feedback: bool
    revises_signal: bool


class Carry(NamedTuple):
    """What a step of the student hands to the next."""

    theta: Tree
    optimizer_state: Any
    # Buffers and frozen parameters.
    student_state: Tree
    teacher_state: Tree


class StudentPass(NamedTuple):
    """A pass on an inner batch.

    Attributes:
        outputs: z = S(x; θ), (B, ...).
        pull: its pullback, c ↦ (∂z/∂θ)ᵀ c.
        student_state: the buffers that the pass leaves.
    """

    outputs: Tensor
    pull: Any
    student_state: Tree


class Answer(NamedTuple):
    """What the teacher says about an inner batch.

    Attributes:
        signal: with the teacher's graph.
        own_losses: the teacher's own losses by name, with the last batch alone.
        own_gradient: the gradient of their sum, where it is taken apart from that of the feedback.
    """

    signal: Signal
    own_losses: Tree
    own_gradient: Tree
    teacher_state: Tree


class Descent(NamedTuple):
    """Line 3: ℓ and g = ∇_θ ℓ, with the pass that they come from."""

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


class StepCall:
    """One call of the step: its batches, and the passes of both networks on them."""

    def __init__(self, rules: StepRules, state: State, outer: Any, inner: Any, noise: Any) -> None:
        self.rules = rules
        self.state = state
        self.outer_batch = rules.problem.outer_batch(outer)
        if rules.steps == 1:
            self.batches = [inner]
            self.noises = [noise]
        else:
            self.batches = list(inner)
            self.noises = list(noise or [None] * rules.steps)
        self.inner_options = with_settings(rules.inner_constants, state.inner.settings)
        self.outer_options = with_settings(rules.outer_constants, state.outer.settings)

    def student_outputs(
        self, theta: Tree, student_state: Tree, number: int, *entering: Signal
    ) -> tuple[Tensor, Tree]:
        """Return z = S(x; θ), (B, ...), on an inner batch, and the buffers that the pass leaves."""
        inputs = self.rules.problem.student_input(self.batches[number], *entering)
        return self.rules.student.outputs(theta, student_state, inputs)

    def student_pass(
        self, theta: Tree, student_state: Tree, number: int, *entering: Signal
    ) -> StudentPass:
        """Return a pass on an inner batch, with its pullback c ↦ (∂z/∂θ)ᵀ c."""

        def run(theta: Tree) -> tuple[Tensor, Tree]:
            return self.student_outputs(theta, student_state, number, *entering)

        outputs, pull, left = vjp(run, theta, has_aux=True)
        return StudentPass(outputs, pull, left)

    def inner_loss(
        self, z: Tensor, theta: Tree, student_state: Tree, number: int, signal: Signal, leaves: Tree
    ) -> Tensor:
        """Return ℓ = (1/B) Σ factor_i ℓ_i(z, signal, θ), a scalar.

        Args:
            leaves: tensors in the place of the signal's fields, by name, and perhaps ``"factors"``.
        """

        # A loss may read ``student.parameters()``, so it is called while these weights are in the
        # student.
        def mean(network: nn.Module) -> Tensor:
            return inner_loss(
                self.rules.problem,
                signal.having(leaves),
                self.batches[number],
                readable=True,
                factors=leaves.get("factors"),
                outputs=z,
                params=theta,
            )

        loss: Tensor
        loss, _ = self.rules.student.at(theta, student_state, mean)
        return loss

    def outer_loss(
        self, theta: Tree, student_state: Tree, signal: Signal, theta_T: Tree | None = None
    ) -> Tensor:
        """Return L, by a pass with batch statistics of its own.

        The running statistics stay as they are.

        Args:
            signal: of the last step, for a problem whose outer input is made from it.
            theta_T: the teacher's weights, where L reads them; None: those of the state.
        """
        rules = self.rules

        def judge(teacher: nn.Module | None) -> Tensor:
            entering = [signal] if rules.signal_enters_outer_input else []
            inputs = rules.problem.outer_input(self.outer_batch, *entering)
            z, left = rules.student.outputs(theta, student_state, inputs)
            (total, weight), _ = rules.student.at(
                theta,
                left,
                lambda student: sum_and_weight(rules.problem.outer_loss(z, self.outer_batch)),
            )
            loss: Tensor = total / weight
            return loss

        if not rules.outer_loss_reads_teacher:
            return judge(None)
        # The module holds θ_T meanwhile.
        params = self.state.teacher.params if theta_T is None else theta_T
        loss: Tensor
        loss, _ = rules.teacher.at(params, self.state.teacher.state, judge)
        return loss

    def ask_teacher(
        self, theta_T: Tree, teacher_state: Tree, number: int, student_outputs: Tensor | None
    ) -> Answer:
        """Return line 2, ŷ ~ T(x_u) or the soft label; with the last batch the own losses too.

        Losses that read no graph of the signal are taken by themselves, where the rule of the
        feedback's size needs their gradient alone: a pullback of both would run through all passes
        of the teacher once more.
        """
        rules = self.rules
        batch = self.batches[number]
        losses: Sequence[Any] = ()
        if number == rules.steps - 1:
            losses = rules.losses_for(batch)
        compares = rules.feedback_size.compares and rules.has_feedback
        are_apart = compares and all(getattr(loss, "detaches_signal", False) for loss in losses)

        def ask(network: Any) -> tuple[Signal, Tree]:
            signal = rules.problem.signal(
                network, batch, student_outputs, generator=self.noises[number]
            )
            return signal, {} if are_apart else self.own_losses(network, losses, signal, number)

        (signal, own_losses), left = rules.teacher.at(theta_T, teacher_state, ask)
        answer = Answer(signal, own_losses, {}, left)
        if losses and are_apart:
            return self.with_losses_apart(answer, losses, number)
        return answer

    def own_losses(self, network: Any, losses: Sequence[Any], signal: Signal, number: int) -> Tree:
        """Return lines 6-7, the teacher's own losses by name."""
        return sum_of_terms(
            network,
            losses,
            labeled=self.outer_batch,
            unlabeled=self.batches[number],
            signal=signal,
            step=self.state.step,
        )

    def with_losses_apart(self, answer: Answer, losses: Sequence[Any], number: int) -> Answer:
        """Return an answer with the teacher's own losses, and with the gradient of their sum."""
        signal = answer.signal.detached()

        def sum_of_losses(theta_T: Tree) -> tuple[Tensor, tuple[Tree, Tree]]:
            own_losses, left = self.rules.teacher.at(
                theta_T,
                answer.teacher_state,
                lambda network: self.own_losses(network, losses, signal, number),
            )
            return torch.stack([*own_losses.values()]).sum(), (own_losses, left)

        gradient, (_, (own_losses, left)) = grad_and_value(sum_of_losses, has_aux=True)(
            self.state.teacher.params
        )
        return Answer(answer.signal, own_losses, gradient, left)


def with_settings(constants: Options, settings: Options) -> Options:
    """Return the options of param groups: what is constant, and the settings of the state."""
    return [{**group, **now} for group, now in zip(constants, settings, strict=True)]


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

    def descend(self, leaves: Tree) -> Descent:
        """Return line 3, ℓ and g = ∇_θ (1/B) Σ ℓ_i, as functions of fields of the signal.

        Args:
            leaves: tensors in the place of the fields, by name.
        """
        call = self.call
        theta = self.carry.theta
        passed = self.passed
        if passed is None:
            entering = self.signal if self.signal.sampled else self.signal.having(leaves)
            passed = call.student_pass(theta, self.carry.student_state, self.number, entering)
        left = passed.student_state

        def loss_of(z: Tensor, theta: Tree) -> Tensor:
            return call.inner_loss(z, theta, left, self.number, self.signal, leaves)

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
            "have; expected the terms of metapl.feedback.roads, or a trainer without compile and "
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
    """A step of the student on the pure road: a :class:`metapl.feedback.roads.StudentStep`."""

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
        """Return ż = (∂z/∂θ) w, (B, ...), as the pullback of the pullback, which is linear."""
        direction = self.with_zeros(w)
        _, transposed = vjp(lambda c: self.passed.pull(c)[0], torch.zeros_like(self.outputs))
        z_dot: Tensor
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
        """Return ∂⟨g, w⟩/∂(what is credited) from ż, (B, ...), in the head alone."""
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

        found: Tree
        found, (along, size) = grad_and_value(slope, has_aux=True)(credited(self.signal, of))
        # Where both sides cancel, their rounding is left.
        g = self.gradient
        dtype = torch.finfo(self.outputs.dtype)
        cancelled = 1e4 * dtype.eps * norm(g) * norm(w)
        size = size + norm({name: t * w[name] for name, t in g.items()}) + cancelled
        self.gap = (along - dot(g, w)).abs() / size.clamp_min(dtype.tiny)
        return found

    def with_zeros(self, w: Tree) -> Tree:
        """Return w with a zero for each parameter that it lacks."""
        whole = {}
        for name, t in self.params.items():
            whole[name] = w[name] if name in w else torch.zeros_like(t)
        return whole


def rate_of(options: Options) -> Tensor | None:
    """Return η of the first param group, a scalar; None for a transform, which has no groups."""
    return options[0]["lr"] if options else None


class PurePath(PureTerms):
    """The student's K steps on the pure road: a :class:`metapl.feedback.roads.StudentPath`.

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
            self._outer_loss = self.call.outer_loss(
                carry.theta, carry.student_state, self.steps[-1].signal
            )
        return self._outer_loss

    @property
    def outer_loss_before(self) -> Tensor:
        """L(θ), in one pass with L(θ′), so that both have the same dropout masks."""
        carry = self.end.carry
        signal = self.steps[-1].signal
        theta = self.call.state.student.params
        weights = {name: torch.stack([t, carry.theta[name]]) for name, t in theta.items()}
        buffers = {name: torch.stack([t, t]) for name, t in carry.student_state.items()}

        def judge(theta: Tree, student_state: Tree) -> Tensor:
            return self.call.outer_loss(theta, student_state, signal)

        before: Tensor
        before, self._outer_loss = vmap(judge, randomness="same")(weights, buffers)
        return before

    def outer_gradient(self) -> Tree:
        """Return v = ∇L(θ′)."""
        if self._outer_gradient is None:
            carry = self.end.carry
            self._outer_gradient, self._outer_loss = grad_and_value(self.call.outer_loss)(
                carry.theta, carry.student_state, self.steps[-1].signal
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
        differentiates.

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
            loss = self.call.outer_loss(carry.theta, carry.student_state, begun.signal)
            return loss, begun.end(descent, carry, outer_loss=loss)

        end: End
        leaves = dict(fields(begun.signal))
        if begun.number < first:
            _, end = onward(leaves)
            return with_fields(end, in_signals=[{}, *end.in_signals])
        loss, pull, end = vjp(onward, leaves, has_aux=True)
        (in_signal,) = pull(torch.ones_like(loss))
        return with_fields(end, in_signals=[in_signal, *end.in_signals])


class Outcome(NamedTuple):
    """What lines 2 to 7 leave besides the teacher's losses: tensors alone.

    Attributes:
        end: of the student's steps, the real one where the problem revises the signal.
        outer_loss: L(θ′), or NaN where the mode does not take it.
        feedback: h on each signal, as the signal's value is.
        mode_state: the estimator's next state.
        gap: that of :class:`PureStep`.
    """

    end: End
    outer_loss: Tensor
    feedback: list[Any]
    mode_state: Tree
    gap: Tensor


def run_student(call: StepCall, theta_T: Tree) -> tuple[tuple[Tensor, Tensor], Outcome]:
    """Return lines 2 to 7 as a function of the teacher's weights.

    Returns: −Σ sg(h)·signal plus the direct term, and the sum of the teacher's own losses, both
    scalars with the teacher's graph; and what else there is.
    """
    rules = call.rules
    path = PurePath(call, theta_T)
    feedback, mode_state = rules.mode.feedback(path, call.state.mode)
    end = path.end
    from_feedback = 0 * end.inner_losses[0]
    shown = []
    for of_step, fields in zip(feedback, end.signals, strict=True):
        signal = Signal(**fields)
        from_feedback = from_feedback + of_step.loss_term(signal)
        shown.append(of_step.on_value(signal.value))
    if rules.has_direct_term:
        # L(θ′; θ_T) at fixed θ′.
        theta = {name: t.detach() for name, t in end.carry.theta.items()}
        student_state = {name: t.detach() for name, t in end.carry.student_state.items()}
        signal = Signal(**end.signals[-1])
        from_feedback = from_feedback + call.outer_loss(theta, student_state, signal, theta_T)
    own = torch.stack([0 * from_feedback, *end.own_losses.values()]).sum()
    outcome = Outcome(end, path.known_outer_loss, shown, mode_state, path.gap)
    if rules.revises_signal:
        outcome = with_fields(outcome, end=revised(path, shown[0]))
    return (from_feedback, own), outcome


def revised(path: PurePath, h: Any) -> End:
    """Return the end of the real step, on the signal that the problem makes of the feedback.

    Line 3 once more; a problem that returns None takes the step that is there.
    """
    begun = path.first
    signal = path.call.rules.problem.revised_signal(begun.signal, h)
    if signal is None:
        return path.end
    descent = begun.descend(signal.fields())
    return with_fields(
        path.end,
        inner_losses=[descent.inner_loss],
        gradients=[descent.gradient],
        signals=[as_dict(signal)],
        carry=begun.moved(descent),
    )


def make_step(
    teacher: nn.Module | None,
    student: nn.Module,
    problem: Problem,
    mode: Estimator,
    inner_update: Update,
    outer_update: Update | None,
    constants: Sequence[Options],
    losses_for: Callable[[Any], Sequence[Any]],
    *,
    steps: int = 1,
    feedback_size: FeedbackSize,
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Step:
    """Return the step of these networks, losses and rules.

    The modules' own tensors are not read, those of the state are.

    Args:
        constants: what the param groups of the two optimizers hold besides the settings.
        autocast: makes the context of the networks' passes.

    The other arguments are those of :class:`StepRules`.
    """
    inner_constants, outer_constants = constants
    rules = StepRules(
        teacher=Function(teacher, "teacher"),
        student=Function(student),
        problem=problem,
        mode=mode,
        inner_update=inner_update,
        outer_update=outer_update,
        inner_constants=inner_constants,
        outer_constants=outer_constants,
        losses_for=losses_for,
        steps=steps,
        feedback_size=feedback_size,
        signal_enters_input=enters_input(problem),
        signal_enters_outer_input=reads_signal_in_outer_input(problem),
        outer_loss_reads_teacher=outer_loss_reads_more(problem, teacher),
        has_direct_term=has_direct_term(mode.name, problem, teacher),
        has_feedback=mode.credits != "nothing",
        revises_signal=overrides(problem, "revised_signal"),
    )

    def step(state: State, outer: Any, inner: Any, noise: Any = None) -> tuple[State, Report]:
        call = StepCall(rules, state, outer, inner, noise)
        theta_T = state.teacher.params
        gradient: Tree = {}
        sizes: Tree = {}
        # Lines 2 to 7. Fused kernels of attention have no second derivative.
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            if not theta_T:
                (_, own), outcome = run_student(call, {})
            else:
                (_, own), pull, outcome = vjp(
                    lambda theta_T: run_student(call, theta_T), theta_T, has_aux=True
                )
                gradient, sizes = teacher_gradient(rules, pull, own, outcome.end.own_gradient)
        end = outcome.end

        # Line 8. What nothing reaches does not decay.
        s_T = state.outer.state
        if rules.outer_update is not None and (rules.has_feedback or end.own_losses):
            theta_T, s_T = rules.outer_update.update(theta_T, gradient, s_T, call.outer_options)
        loss = torch.stack(end.inner_losses).mean()
        # Line 3, as the optimizer itself takes it.
        theta = end.carry.theta
        s = end.carry.optimizer_state
        rounding = 0 * loss
        if rules.inner_update.is_rounded:
            theta, s, rounding = rounded_steps(
                rules.inner_update,
                state.student.params,
                state.inner.state,
                call.inner_options,
                gradients=end.gradients,
                exact=end.carry.theta,
            )

        signals = [as_dict(Signal(**fields).detached()) for fields in end.signals]
        feedback = outcome.feedback
        # NaN where anything is not finite.
        sums = [own]
        for h in feedback:
            for t in h.values() if isinstance(h, dict) else [h]:
                sums.append(t.sum())
        flag = outcome.gap + 0 * (loss + torch.stack(sums).sum())
        is_single = rules.steps == 1
        report = Report(
            feedback=feedback[0] if is_single else feedback,
            signal=signals[0] if is_single else signals,
            student_outputs=end.outputs.detach(),
            inner_loss=loss,
            outer_loss=outcome.outer_loss,
            teacher_loss=own,
            flag=flag,
            teacher_losses=end.own_losses,
            step_rounding=rounding,
            sizes=sizes,
        )
        moved = State(
            teacher=Network(theta_T, end.carry.teacher_state),
            student=Network(theta, end.carry.student_state),
            inner=with_fields(state.inner, state=s),
            outer=with_fields(state.outer, state=s_T),
            mode=outcome.mode_state,
            step=state.step + 1,
        )
        return moved, report

    return step


def teacher_gradient(
    rules: StepRules, pull: Any, own: Tensor, own_gradient: Tree
) -> tuple[Tree, Tree]:
    """Return G = λ G_h + G_own, and λ and ‖λ G_h‖ / ‖G_own‖ by name, where the rule needs them.

    Args:
        pull: the pullback of :func:`run_student`'s two scalars to the teacher's weights.
        own: the second of these scalars.
        own_gradient: G_own, where it has been taken; else empty.
    """
    size = rules.feedback_size
    one = torch.ones_like(own)
    gradient: Tree
    if not (size.compares and rules.has_feedback):
        (gradient,) = pull((size.weight * one, one))
        return gradient, {}
    of_feedback: Tree
    (of_feedback,) = pull((one, 0 * one))
    of_losses = own_gradient
    if not of_losses:
        (of_losses,) = pull((0 * one, one))
    feedback_norm = norm(of_feedback)
    own_norm = norm(of_losses)
    weight = size.weight_for(feedback_norm, own_norm)
    gradient = {name: weight * t + of_losses[name] for name, t in of_feedback.items()}
    ratio = ratio_of(weight, feedback_norm, own_norm)
    return gradient, {"feedback_weight": weight, "feedback_ratio": ratio}
