"""Whether a mode, a problem and networks go together: refused at the door, in one line."""

from __future__ import annotations

from functools import cache

from torch import nn

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.layout import CURVATURE, ONE_PROCESS, THROUGH_INPUT, Layout
from metapl.feedback import Estimator, modes_for
from metapl.problems import PseudoLabels
from metapl.problems.base import BilevelProblem, Kind, Problem, enters_input, has_own, kind_of


@cache  # compiled graphs are known by their problem
def default_problem(labels: tuple[Kind, ...], mode: str) -> Problem:
    return PseudoLabels().for_modes(labels, mode)


def prepare(problem: BilevelProblem | None, mode: Estimator) -> Problem:
    """The problem (default: pseudo-labels) with a kind of signal that the mode takes."""
    if problem is None:
        return default_problem(mode.labels, mode.name)
    if isinstance(problem, type) or not isinstance(problem, BilevelProblem):
        given = f"the class {problem.__name__}" if isinstance(problem, type) else checks.described(problem)
        raise MetaplError(f"problem is {given}; expected a metapl.BilevelProblem, such as metapl.PseudoLabels().")
    return problem.for_modes(mode.labels, mode.name)


def check_teacher(teacher: nn.Module | None, problem: Problem, **given: bool) -> None:
    """Refuse a missing teacher, one that is not used, and options that are ``given`` for one where there is none."""
    if (teacher is not None) != problem.has_teacher:
        expected = "a torch.nn.Module, which makes its signal" if problem.has_teacher else "teacher=None"
        raise MetaplError(f"teacher is of type {type(teacher).__name__}; {kind_of(problem)} expects {expected}.")
    for name in (name for name, is_given in given.items() if is_given and teacher is None):
        raise MetaplError(f"{name} was given with teacher=None, and there is no teacher to use it; leave it out.")


def check_mode(mode: Estimator, steps: int, problem: Problem, student: Layout) -> None:
    """Refuse steps of the student that the mode or the problem cannot take, and what the layout does not offer."""
    kind, revising, entering = kind_of(problem), has_own(problem, "revised_signal"), enters_input(problem)
    if steps > 1 and (revising or not mode.looks_ahead):
        who, several = kind if revising else f"mode '{mode.name}'", ", ".join(modes_for(looks_ahead=True))
        raise MetaplError(f"{who} takes one student step, and {steps} were given; expected one, or one of {several}.")
    if entering and getattr(mode, "base", mode).name == "difference":
        raise MetaplError(f"{kind} has student_input(batch, signal); expected mode 'forward' or 'unrolled'.")
    if entering and revising:
        raise MetaplError(f"{kind} has revised_signal and student_input(batch, signal); expected one of the two.")
    if revising and getattr(mode, "normalization", None) == "cosine":
        raise MetaplError('normalization="cosine" divides by a gradient that is zero here; expected "gradient".')
    required = {*mode.requires, *[CURVATURE] * (steps > 1), *[THROUGH_INPUT] * (entering and mode.credits == "signal")}
    required |= {ONE_PROCESS} if revising else set()
    if lacking := sorted(need.value for need in required - student.offers):
        given = f"mode {mode.name!r} takes {' and '.join(lacking)} (with {kind}, steps={steps})"
        raise MetaplError(
            f"{given}, and the student is {student.how}; expected one process, 'difference' or 'reinforce'."
        )
