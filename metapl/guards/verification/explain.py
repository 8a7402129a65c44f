"""Why a gradient is off the loss after real steps.

A good reason, which is allowed, or the likely causes.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Literal

import torch
from torch import Tensor

from metapl.errors import MetaplError, few
from metapl.execution.state import trainable
from metapl.feedback import Estimator, estimator
from metapl.guards.verification.case import Case, flat
from metapl.guards.verification.causes import likely_causes, own_functions_in
from metapl.guards.verification.differences import (
    compare,
    errors_of,
    errors_of_direct_term,
    errors_of_h,
    errors_of_signal,
)
from metapl.guards.verification.real_step import Evaluation, Move, Tree
from metapl.updates import parts_of

Explanation = tuple[Literal["allowed", "refused"], str]

PAST_THE_SIGNAL = (
    "the student, or a loss, reads the teacher, or a parameter of the problem, past the signal and "
    "without a gradient (.detach(), .item()), and is left out; in the signal it would count."
)


OUTER_LOSS_READS_TEACHER = (
    "likely the outer loss reads the teacher by .detach() or .item(), or through a backward of its "
    "own that is not the derivative; expected a read with its graph, or of a copy that stays."
)


OF_ADAM = (
    "a first step of Adam, which divides each gradient by its size and which no difference "
    "follows, while mode 'forward' does"
)


def explain(case: Case) -> Explanation:
    """Return whether a gradient that is off is allowed, and why; or the likely causes."""
    if not case.off(errors_of(case, states=case.real.states)):
        return (
            "allowed",
            "state that passes carry on (buffers, frozen parameters) depends on the weights.",
        )
    if case.mode.credits == "nothing":
        return "refused", OUTER_LOSS_READS_TEACHER
    if case.teacher_gradient and not case.off(errors_of_h(case)):
        return explain_signal(case)
    bent = []
    for name, loss in (("inner", "inner_loss"), ("outer", "loss")):
        if case.off(
            compare(
                case,
                name,
                case.real.gradients[name],
                value=attrgetter(loss),
                signals=case.signals,
            )
        ):
            bent.append(name)
    which = (
        f"the gradient of the {' and '.join(bent)} loss in the student's weights is not its "
        "derivative"
    )
    if bent and follows_double_backward(case):
        return (
            "allowed",
            f"{which} (straight-through, detached, a backward of its own), and the mode follows "
            "it.",
        )
    likely = [which] if bent else []
    likely += likely_causes(case)
    if not likely and case.mode.takes_differences:
        likely = [
            "what the inner loss reads of the forward besides its outputs, such as an auxiliary "
            "loss in an attribute, which mode 'forward' follows"
        ]
        likely += [OF_ADAM] if is_moved_by_adam(case) else []
    if not likely and case.mode.draws:
        likely = ["the draws of the mode; expected verify=False, and metapl.ablate"]
    return (
        "refused",
        f"likely {'; '.join(likely) or 'the mode, or a derivative of torch that it takes'}.",
    )


def explain_signal(case: Case) -> Explanation:
    """Return why the teacher's gradient of the signal is off, while h is right."""
    if moves_past_the_signal(case):
        return "allowed", PAST_THE_SIGNAL
    if case.moved == "weights":
        return (
            "refused",
            "the gradient of log_prob in the teacher is not its derivative: is it detached?",
        )
    functions = own_functions_in(case.score(case.real))
    if functions:
        return (
            "refused",
            f"the backward of {few(functions)} in the signal is not the derivative of its forward.",
        )
    leaves_out_direct_term = case.outer_loss_reads_teacher and not case.mode.has_direct_term
    if leaves_out_direct_term and not case.off(errors_of_signal(case)):
        return "allowed", (
            f"the outer loss reads the teacher, and mode {case.mode.name!r} leaves out that direct "
            "term (has_direct_term)."
        )
    has_direct_term = case.outer_loss_reads_teacher and case.mode.has_direct_term
    if has_direct_term and case.off(errors_of_direct_term(case)):
        return "refused", OUTER_LOSS_READS_TEACHER
    if len(case.step.inner_batches) > 1:
        return "allowed", (
            "the signal is detached in part (detach, no_grad, argmax), or reads the student, "
            "which the mode takes for a constant in each step: that part is left out."
        )
    if case.off(errors_of_signal(case)):
        return (
            "allowed",
            "the signal is detached in part (detach, no_grad, argmax), which leaves out that part.",
        )
    if case.mode.takes_differences and is_moved_by_adam(case):
        return "refused", f"likely {OF_ADAM}."
    return "refused", "the loss depends on the teacher in a way that neither h nor the signal has."


def is_moved_by_adam(case: Case) -> bool:
    """Return whether the student's optimizer is an Adam, or has one among its parts."""
    update = case.step.update
    parts = parts_of(vars(update).get("optimizer", update))
    return any(isinstance(part, torch.optim.Adam | torch.optim.AdamW) for part in parts)


def moves_past_the_signal(case: Case) -> bool:
    """Return whether the student's step moves with the teacher, or the problem, past the signal.

    The signal stays as it is. What reads the teacher with a gradient was refused when the step was
    opened (:mod:`metapl.guards.door`); so this does without one.
    """
    if not case.teacher_gradient:
        return False
    move = Move("teacher", random_direction(case.teacher_gradient), 1e-2)
    moved = Evaluation(case.step, move, signals=case.signals)
    rounding = 1000 * case.eps
    # Also the gradient, which a small rate or a fresh Adam hides from the loss.
    g = flat(case.real.gradients["inner"])
    g_moved = flat(moved.gradients["inner"])
    gradient_moves = float(torch.dist(g, g_moved)) > rounding * float(g.norm())
    loss = float(case.real.loss)
    loss_moves = abs(float(moved.loss) - loss) > rounding * max(abs(loss), 1e-3)
    if case.outer_loss_reads_teacher:
        # The loss moves by the direct term, which the differences see.
        loss_moves = False
    return gradient_moves or loss_moves


def holds_outputs(case: Case) -> str:
    """Return what a mode leaves out where signals are made of the student's outputs."""
    if len(case.step.inner_batches) == 1 and not case.step.in_start:
        return ""
    move = Move("inner", random_direction(trainable(case.step.student)), 1e-5)
    held = Evaluation(case.step, move, student_outputs=case.real.outputs)
    gap = abs(float(Evaluation(case.step, move).loss) - float(held.loss))
    if gap <= 1000 * case.eps * max(abs(float(case.real.loss)), 1e-3):
        return ""
    return (
        "the signals are made of the student's outputs, which each step takes for constants: what "
        "earlier steps, or the start, do to a signal is left out."
    )


def random_direction(like: Mapping[str, Tensor]) -> Tree:
    """Return a direction in the space of some tensors."""
    draw = torch.Generator().manual_seed(2)
    return {name: torch.randn(t.shape, generator=draw).to(t) for name, t in like.items()}


def reference_for(mode: Estimator) -> str:
    """Return the name of a mode of the same kind of feedback that takes another way to it."""
    if mode.credits == "batch":
        return "reinforce_per_example"
    if mode.credits == "example":
        return "reinforce"
    return "forward" if mode.keep_graph else "unrolled"


def follows_double_backward(case: Case) -> bool:
    """Return whether h is that of double backward on the same copies, or of a mode like it."""
    reference = reference_for(case.mode)
    try:
        expected = flat(case.step.by_mode(estimator(reference))[1])
    except (RuntimeError, MetaplError):
        # An operation lacks that derivative, or labels were drawn.
        return case.takes_expectation or reference == "forward"
    h = flat(case.h)
    if case.moved == "weights":
        # The scalar of the batch.
        h = h.sum()
        expected = expected.sum()
    return bool(torch.dist(h, expected) <= case.tolerance * expected.norm())
