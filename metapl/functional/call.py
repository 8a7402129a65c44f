"""One call of a pure step: the passes of both networks, and the two losses.

Every function here takes the tensors that it computes with: the modules' own are not read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metapl.core.lesson import inner_loss
from metapl.core.size import FeedbackSize
from metapl.execution.numerics import Tree
from metapl.feedback.base import Estimator
from metapl.functional.state import (
    Function,
    State,
)
from metapl.problems.base import (
    BilevelProblem,
    Signal,
    sum_and_weight,
)
from metapl.problems.losses import sum_of_terms
from metapl.updates import Update

Options = list[dict[str, Any]]
"""The options of each param group of an optimizer, by name."""

grad_and_value = torch.func.grad_and_value
vjp: Any = torch.func.vjp


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
        outer_loss_reads_teacher: whether L depends on θ_T otherwise than by θ′.
        has_direct_term: whether that dependence is a part of the teacher's gradient.
        has_feedback: whether the mode has any; the control has none.
        revises_signal: whether the student's real step is on a signal that is made from h.
        replays_tangent: whether ż is found by a second pass of the student, which has to draw
            nothing.
    """

    teacher: Function
    student: Function
    problem: BilevelProblem
    mode: Estimator
    inner_update: Update
    outer_update: Update | None
    inner_constants: Options
    outer_constants: Options
    losses_for: Callable[[Any], Sequence[Any]]
    steps: int
    feedback_size: FeedbackSize
    signal_enters_input: bool
    outer_loss_reads_teacher: bool
    has_direct_term: bool
    has_feedback: bool
    revises_signal: bool
    replays_tangent: bool


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

    def outer_loss(self, theta: Tree, student_state: Tree, theta_T: Tree | None = None) -> Tensor:
        """Return L, by a pass with batch statistics of its own.

        The running statistics stay as they are.

        Args:
            theta_T: the teacher's weights, where L reads them; None: those of the state.
        """
        rules = self.rules

        def judge(teacher: nn.Module | None) -> Tensor:
            inputs = rules.problem.outer_input(self.outer_batch)
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
        """Return line 2 of Algorithm 1, ŷ ~ T(x_u) or the soft label.

        With the last batch the teacher's own losses are returned too.

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
        detach_signal = all(getattr(loss, "detaches_signal", False) for loss in losses)
        are_apart = len(losses) > 0 and compares and detach_signal

        def ask(network: Any) -> tuple[Signal, Tree]:
            signal = rules.problem.signal(
                network, batch, student_outputs, generator=self.noises[number]
            )
            own_losses: Tree = {}
            if not are_apart:
                own_losses = self.own_losses(network, losses, signal, number)
            return signal, own_losses

        (signal, own_losses), left = rules.teacher.at(theta_T, teacher_state, ask)
        answer = Answer(signal, own_losses, {}, left)
        if are_apart:
            return self.with_losses_apart(answer, losses, number)
        return answer

    def own_losses(self, network: Any, losses: Sequence[Any], signal: Signal, number: int) -> Tree:
        """Return lines 6-7 of Algorithm 1, the teacher's own losses by name."""
        return sum_of_terms(
            network,
            losses,
            outer=self.outer_batch,
            inner=self.batches[number],
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
