"""Estimators of the teacher's gradient, one a file; a mode is a name from :data:`MODES` or an estimator value.

Here too: whether a mode, a problem and networks go together, refused at the door in one line.

The default is ``forward``; ``reinforce`` is the paper's Algorithm 1.
"""

from __future__ import annotations

from functools import cache
from typing import Literal

from torch import nn

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.layout import CURVATURE, ONE_PROCESS, THROUGH_INPUT, Layout
from metapl.feedback.base import Estimator, Feedback
from metapl.feedback.difference import Difference
from metapl.feedback.forward import Forward
from metapl.feedback.implicit import Implicit
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.loss_difference import LossDifference
from metapl.feedback.none import NoFeedback
from metapl.feedback.reinforce import Reinforce
from metapl.feedback.reinforce_per_example import ReinforcePerExample
from metapl.feedback.unrolled import Unrolled
from metapl.problems import PseudoLabels
from metapl.problems.base import BilevelProblem, Kind, Problem, enters_input, kind_of, overrides
from metapl.words import did_you_mean

__all__ = [
    "MODES",
    "Difference",
    "Estimator",
    "Feedback",
    "Forward",
    "Implicit",
    "Lookahead",
    "LossDifference",
    "Mode",
]
__all__ += ["NoFeedback", "Reinforce", "ReinforcePerExample", "Unrolled", "estimator", "modes_for"]
__dir__ = __all__.copy

ModeName = Literal[
    "unrolled",
    "forward",
    "difference",
    "reinforce",
    "reinforce_per_example",
    "loss_difference",
    "implicit",
    "none",
]
Mode = ModeName | Estimator
"""What is taken as a mode, so that an editor and a type checker know the names."""

_REGISTRY: dict[ModeName, Estimator] = {
    "unrolled": Unrolled(),
    "forward": Forward(),
    "difference": Difference(),
    "reinforce": Reinforce(),
    "reinforce_per_example": ReinforcePerExample(),
    "loss_difference": LossDifference(),
    "implicit": Implicit(),
    "none": NoFeedback(),
}
"""The modes, with their defaults.

A new one is a file and a line here, and its name above for type checkers.
"""

MODES: tuple[ModeName, ...] = tuple(_REGISTRY)
"""The names of the modes."""


def modes_for(kind: Kind | None = None, *, looks_ahead: bool = False) -> tuple[ModeName, ...]:
    """The names of the modes that take a kind of signal, or that take more than one student step.

    >>> modes_for(looks_ahead=True)
    ('unrolled', 'forward', 'none')
    """
    fits = [name for name, e in _REGISTRY.items() if kind is None or kind in e.labels]
    return tuple(name for name in fits if _REGISTRY[name].looks_ahead or not looks_ahead)


def estimator(mode: str | Estimator) -> Estimator:
    """The estimator that ``mode`` names or is.

    >>> estimator("reinforce")
    Reinforce(similarity='dot', baseline=None, normalization='gradient', reduction='mean')
    >>> estimator(Reinforce(baseline=0.99)).name
    'reinforce'
    """
    if isinstance(mode, Estimator):
        return mode
    for name in MODES:
        if mode == name:
            return _REGISTRY[name]
    expected = f"one of {', '.join(MODES)}, or an estimator such as metapl.feedback.Reinforce()"
    raise MetaplError(
        f"mode={mode!r} was given; expected {expected}{did_you_mean(str(mode), MODES)}."
    )


@cache  # compiled graphs are known by their problem
def default_problem(labels: tuple[Kind, ...], mode: str) -> Problem:
    return PseudoLabels().for_modes(labels, mode)


def prepare(problem: BilevelProblem | None, mode: Estimator) -> Problem:
    """The problem (default: pseudo-labels) with a kind of signal that the mode takes."""
    if problem is None:
        return default_problem(mode.labels, mode.name)
    if isinstance(problem, type) or not isinstance(problem, BilevelProblem):
        given = (
            f"the class {problem.__name__}"
            if isinstance(problem, type)
            else checks.described(problem)
        )
        raise MetaplError(
            f"problem is {given}; expected a metapl.BilevelProblem, such as metapl.PseudoLabels()."
        )
    return problem.for_modes(mode.labels, mode.name)


def check_teacher(teacher: nn.Module | None, problem: Problem, **given: bool) -> None:
    """Refuse a missing teacher, one that is not used, and options that are ``given`` for one where there is none."""
    if (teacher is not None) != problem.has_teacher:
        expected = (
            "a torch.nn.Module, which makes its signal" if problem.has_teacher else "teacher=None"
        )
        raise MetaplError(
            f"teacher is of type {type(teacher).__name__}; {kind_of(problem)} expects {expected}."
        )
    for name in (name for name, is_given in given.items() if is_given and teacher is None):
        raise MetaplError(
            f"{name} was given with teacher=None, and there is no teacher to use it; leave it out."
        )


def check_mode(mode: Estimator, steps: int, problem: Problem, student: Layout) -> None:
    """Refuse steps of the student that the mode or the problem cannot take, and what the layout does not offer."""
    kind, revising, entering = (
        kind_of(problem),
        overrides(problem, "revised_signal"),
        enters_input(problem),
    )
    if steps > 1 and (revising or not mode.looks_ahead):
        who, several = (
            kind if revising else f"mode '{mode.name}'",
            ", ".join(modes_for(looks_ahead=True)),
        )
        raise MetaplError(
            f"{who} takes one student step, and {steps} were given; expected one, or one of "
            f"{several}."
        )
    if entering and getattr(mode, "base", mode).name == "difference":
        raise MetaplError(
            f"{kind} has student_input(batch, signal); expected mode 'forward' or 'unrolled'."
        )
    if entering and revising:
        raise MetaplError(
            f"{kind} has revised_signal and student_input(batch, signal); expected one of the two."
        )
    if revising and getattr(mode, "normalization", None) == "cosine":
        raise MetaplError(
            'normalization="cosine" divides by a gradient that is zero here; expected "gradient".'
        )
    required = {
        *mode.requires,
        *[CURVATURE] * (steps > 1),
        *[THROUGH_INPUT] * (entering and mode.credits == "signal"),
    }
    required |= {ONE_PROCESS} if revising else set()
    if lacking := sorted(need.value for need in required - student.capabilities):
        given = f"mode {mode.name!r} takes {' and '.join(lacking)} (with {kind}, steps={steps})"
        expected = (
            "one process, 'difference' or 'reinforce'"
            if steps == 1
            else "one process, or one student step"
        )
        raise MetaplError(
            f"{given}, and the student is {student.description}; expected {expected}."
        )
