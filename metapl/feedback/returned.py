"""What an estimator of a user's own returns, looked at in a first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.terms import StudentStep
from metapl.errors import few
from metapl.execution import checks

# What reports have of each step, and an estimator's own numbers may not be called.
NUMBERS_OF_STEPS = frozenset(
    ["inner_loss", "outer_loss", "feedback_weight", "feedback_ratio", "step_rounding"]
)


def what_is_unfit(given: Any, steps: Sequence[StudentStep]) -> str:
    """Return what of a first feedback is not what was expected, in words; "" for nothing.

    Args:
        steps: of the student.
    """
    match given:
        case [list(feedback), dict()]:
            pass
        case _:
            parts = given if isinstance(given, tuple) else (given,)
            described = " and ".join(checks.described(part) for part in parts)
            return (
                f"{described}; expected a list of a Feedback for each student step, and the next "
                "state"
            )
    if len(feedback) != len(steps):
        return f"a list of {len(feedback)}; expected a Feedback for each of {len(steps)} steps"
    for step, of_step in zip(steps, feedback, strict=True):
        if not isinstance(of_step, Feedback):
            return f"{checks.described(of_step)} in its list; expected a Feedback"
        names = step.signal.fields()
        given_names = [name for name in (of_step.part, *of_step.others) if name is not None]
        unknown = [name for name in given_names if name not in names]
        if unknown:
            return f"h on {few(unknown)}; expected fields of the signal: {few([*names])}"
        for h in (of_step.h, *of_step.others.values()):
            if not isinstance(h, Tensor) or not h.is_floating_point():
                return f"{checks.described(h)} for h; expected a tensor of real numbers"
        for name, number in of_step.numbers.items():
            if not isinstance(number, Tensor) or number.numel() != 1:
                return f"{checks.described(number)} for its number {name!r}; expected a scalar"
        taken = NUMBERS_OF_STEPS.intersection(of_step.numbers)
        taken |= {name for name in of_step.numbers if name.startswith("teacher_")}
        if taken:
            return f"numbers {few(sorted(taken))}, which a report has already; expected other names"
    return ""
