"""Why a gradient is off the loss after real steps: a good reason, which is allowed, or the likely causes."""

from __future__ import annotations

from typing import Literal

import torch

from metapl.errors import MetaplError, few
from metapl.feedback import estimator
from metapl.training.verification.case import Case, flat
from metapl.training.verification.causes import likely_causes, own_functions_in
from metapl.training.verification.differences import compare, errors_of, errors_of_h
from metapl.training.verification.real_step import Evaluation

Explanation = tuple[Literal["allowed", "refused"], str]


def explain(case: Case) -> Explanation:
    """Return whether a gradient that is off is allowed, and why; or the likely causes."""
    if not case.off(errors_of(case, states=case.real.states)):
        return "allowed", "state that passes carry on (buffers, frozen parameters) depends on the weights."
    if case.teacher_gradient and not case.off(errors_of_h(case)):
        return explain_signal(case)
    bent = []
    for name, loss in (("inner", inner_loss_of), ("outer", outer_loss_of)):
        if case.off(compare(case, name, case.real.gradients[name], value=loss, signals=case.signals)):
            bent.append(name)
    which = f"the gradient of the {' and '.join(bent)} loss in the student's weights is not its derivative"
    if bent and follows_double_backward(case):
        return "allowed", f"{which} (straight-through, detached, a backward of its own), and the mode follows it."
    likely = [which] if bent else []
    likely += likely_causes(case)
    return "refused", f"likely {'; '.join(likely) or 'the mode, or a derivative of torch that it takes'}."


def explain_signal(case: Case) -> Explanation:
    """Return why the teacher's gradient of the signal is off, while h is right."""
    if case.moved == "weights":
        return "refused", "the gradient of log_prob in the teacher is not its derivative: is it detached?"
    functions = own_functions_in(case.score(case.real))
    if functions:
        return "refused", f"the backward of {few(functions)} in the signal is not the derivative of its forward."
    return "allowed", "the signal is detached in part (detach, no_grad, argmax), which leaves out that part."


def inner_loss_of(evaluation: Evaluation) -> torch.Tensor:
    return evaluation.inner_loss


def outer_loss_of(evaluation: Evaluation) -> torch.Tensor:
    return evaluation.loss


REFERENCE_MODES = {"unrolled": "forward", "reinforce": "reinforce_per_example", "reinforce_per_example": "reinforce"}


def follows_double_backward(case: Case) -> bool:
    """Return whether h is that of double backward on the same copies, or of a mode like it."""
    reference = REFERENCE_MODES.get(case.mode.name, "unrolled")
    try:
        expected = flat(case.step.by_mode(estimator(reference)).feedback)
    except (RuntimeError, MetaplError):
        # An operation lacks that derivative, or labels were drawn.
        return case.takes_expectation or reference == "forward"
    h = flat(case.h)
    if case.moved == "weights":
        # The scalar of the batch.
        h, expected = h.sum(), expected.sum()
    return bool(torch.dist(h, expected) <= case.tolerance * expected.norm())
