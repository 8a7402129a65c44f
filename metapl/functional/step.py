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
  So the student runs once, and ż has the dropout masks and the batch statistics of that one pass.
  Of a student that draws nothing, ``compile="cudagraphs"`` takes ż by a second pass in forward
  mode, which is less work without a compiler;
- h = −∂/∂(signal) ⟨∂ℓ/∂z (z, signal), ż⟩, in the head alone;
- the teacher's gradient is that of −λ Σ sg(h)·signal + Σ its own losses, by one pullback of its
  passes; where L reads the teacher itself, λ L(sg(θ′); θ_T) is added, the direct term.

What h is, its units and its baseline stand with the mode, in
:meth:`metapl.feedback.Estimator.feedback`; how v, w and ż are found is in
:mod:`metapl.functional.path`, and the passes of both networks are in :mod:`metapl.functional.call`.
Here is Algorithm 1, line by line.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from metapl.core.size import FeedbackSize, ratio_of
from metapl.execution.batch import Batch
from metapl.execution.numerics import Tree
from metapl.feedback.base import Estimator
from metapl.functional.call import Options, StepCall, StepRules
from metapl.functional.path import End, PurePath
from metapl.functional.state import (
    Function,
    Network,
    Report,
    State,
    as_dict,
    norm,
    rounded_steps,
    with_fields,
)
from metapl.problems.base import (
    BilevelProblem,
    Signal,
    enters_input,
    kind_of,
    outer_variables,
    overrides,
)
from metapl.problems.losses import TeacherLoss
from metapl.updates import Update

Step = Callable[..., tuple[State, Report]]
vjp: Any = torch.func.vjp


class Outcome(NamedTuple):
    """What lines 2 to 7 of Algorithm 1 leave besides the teacher's losses: tensors alone.

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
    feedback, mode_state = rules.mode.drawn_feedback(path, call.state.mode)
    end = path.end
    from_feedback = 0 * end.inner_losses[0]
    shown = []
    for of_step, fields in zip(feedback, end.signals, strict=True):
        signal = Signal(**fields)
        from_feedback = from_feedback + of_step.loss_term(signal)
        shown.append(of_step.on_value(signal.value))
    outer_loss = path.known_outer_loss
    if rules.has_direct_term:
        # L(θ′; θ_T) at fixed θ′.
        theta = {name: t.detach() for name, t in end.carry.theta.items()}
        student_state = {name: t.detach() for name, t in end.carry.student_state.items()}
        direct_loss = call.outer_loss(theta, student_state, theta_T)
        from_feedback = from_feedback + direct_loss
        if rules.mode.credits == "nothing":
            # No other pass has taken it.
            outer_loss = direct_loss.detach()
    own = torch.stack([0 * from_feedback, *end.own_losses.values()]).sum()
    outcome = Outcome(end, outer_loss, shown, mode_state, path.gap)
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
    descent = begun.descend({}, signal)
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
    problem: BilevelProblem,
    mode: Estimator,
    inner_update: Update,
    outer_update: Update | None,
    constants: Sequence[Options],
    losses_for: Callable[[Batch], Sequence[TeacherLoss]],
    *,
    steps: int = 1,
    feedback_size: FeedbackSize,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    replays_tangent: bool = False,
) -> Step:
    """Return the step of these networks, losses and rules.

    The modules' own tensors are not read, those of the state are.

    Args:
        constants: what the param groups of the two optimizers hold besides the settings.
        autocast: makes the context of the networks' passes.

    The other arguments are those of :class:`StepRules`.
    """
    inner_constants, outer_constants = constants
    reads_teacher = bool(outer_variables(problem, teacher))
    rules = StepRules(
        teacher=Function(teacher, f"teacher, or the signal of {kind_of(problem)},"),
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
        outer_loss_reads_teacher=reads_teacher,
        has_direct_term=reads_teacher and mode.has_direct_term,
        has_feedback=mode.gives_gradient,
        revises_signal=overrides(problem, "revised_signal"),
        replays_tangent=replays_tangent,
    )

    def step(state: State, outer: Batch, inner: Batch, noise: Any = None) -> tuple[State, Report]:
        call = StepCall(rules, state, outer, inner, noise)
        theta_T = state.teacher.params
        gradient: Tree = {}
        sizes: Tree = {}
        # Lines 2 to 7. Fused kernels of attention have neither a second derivative nor a forward
        # mode.
        with autocast(), sdpa_kernel(SDPBackend.MATH):
            if not theta_T:
                (_, own), outcome = run_student(call, {})
            else:
                (_, own), pull, outcome = vjp(
                    lambda theta_T: run_student(call, theta_T), theta_T, has_aux=True
                )
                gradient, sizes = teacher_gradient(rules, pull, own, outcome.end.own_gradient)
        end = outcome.end

        # Line 8. A teacher that gets no gradient at all does not move, not even by weight decay.
        # Of a teacher that gets one, a parameter that no loss reaches does decay.
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
