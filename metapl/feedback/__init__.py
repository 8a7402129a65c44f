"""Estimators of the teacher's gradient, one a file.

A mode is a name from :data:`MODES` or an estimator value. A mode, a problem and networks that do
not go together are refused here too, in one line, before a step is taken.

The default is ``forward``; ``reinforce`` is the paper's Algorithm 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Literal

from torch import Tensor, nn

from metapl.core.feedback import Feedback
from metapl.core.lookahead import Lookahead
from metapl.errors import MetaplError, few
from metapl.execution import checks
from metapl.execution.layout import CURVATURE, ONE_PROCESS, THROUGH_INPUT, Layout
from metapl.feedback.base import Estimator
from metapl.feedback.difference import Difference
from metapl.feedback.direct import Direct
from metapl.feedback.forward import Forward
from metapl.feedback.implicit import Implicit
from metapl.feedback.loss_difference import LossDifference
from metapl.feedback.none import NoFeedback
from metapl.feedback.reinforce import Reinforce
from metapl.feedback.reinforce_per_example import ReinforcePerExample
from metapl.feedback.unrolled import Unrolled
from metapl.problems import PseudoLabels
from metapl.problems.base import (
    BilevelProblem,
    Kind,
    Signal,
    enters_input,
    kind_of,
    outer_variables,
    overrides,
    refuse_signal_in_outer_input,
)
from metapl.words import did_you_mean

__all__ = [
    "MODES",
    "Difference",
    "Direct",
    "Estimator",
    "Feedback",
    "Forward",
    "Implicit",
    "Lookahead",
    "LossDifference",
    "Mode",
    "NoFeedback",
    "Reinforce",
    "ReinforcePerExample",
    "Unrolled",
    "estimator",
    "modes_for",
]
__dir__ = __all__.copy

ModeName = Literal[
    "unrolled",
    "forward",
    "difference",
    "reinforce",
    "reinforce_per_example",
    "loss_difference",
    "implicit",
    "direct",
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
    "direct": Direct(),
    "none": NoFeedback(),
}
"""The modes by name, with their defaults.

A new one is a file and a line here, and its name above for type checkers.
"""

MODES: tuple[ModeName, ...] = tuple(_REGISTRY)
"""The names of the modes."""


def modes_for(kind: Kind | None = None, *, looks_ahead: bool = False) -> tuple[ModeName, ...]:
    """Return the names of the modes that take a kind of signal, or several student steps.

    >>> modes_for(looks_ahead=True)
    ('unrolled', 'forward', 'direct', 'none')
    """
    names: list[ModeName] = []
    for name, mode in _REGISTRY.items():
        takes_signal = kind is None or kind in mode.labels
        if takes_signal and (mode.looks_ahead or not looks_ahead):
            names.append(name)
    return tuple(names)


def proposed_modes(kind: Kind | None = None, *, looks_ahead: bool) -> str:
    """Return the modes of :func:`modes_for` in words, but for ``direct``.

    That one takes a problem that holds the teacher.
    """
    fitting = []
    for name in modes_for(kind, looks_ahead=looks_ahead):
        mode = _REGISTRY[name]
        if mode.credits != "nothing" or not mode.has_direct_term:
            fitting.append(name)
    return ", ".join(fitting)


def estimator(mode: str | Estimator) -> Estimator:
    """Return the estimator that ``mode`` names or is.

    >>> estimator("reinforce")
    Reinforce(similarity='dot', baseline=None, normalization='gradient', reduction='mean')
    >>> estimator(Reinforce(baseline=0.99)).name
    'reinforce'
    """
    if isinstance(mode, Estimator):
        if missing := mode.missing():
            raise MetaplError(f"{type(mode).__name__} lacks {missing}.")
        return mode
    for name in MODES:
        if mode == name:
            return _REGISTRY[name]
    # None is no misspelt "none".
    hint = (did_you_mean(mode, MODES) if isinstance(mode, str) else "") or "."
    raise MetaplError(f"mode={mode!r}: expected an estimator, or one of {', '.join(MODES)}{hint}")


def mode_words(mode: Estimator) -> str:
    """Return a mode as code: its name, where it is what the name stands for.

    >>> mode_words(Reinforce()), mode_words(Direct())
    ("'reinforce'", "'direct'")
    """
    for name, default in _REGISTRY.items():
        if mode == default:
            return repr(name)
    return repr(mode)


# Compiled graphs are known by their problem, so that all trainers without one share it.
@cache
def default_problem(labels: tuple[Kind, ...], mode: str) -> BilevelProblem:
    """Return pseudo-labels of a kind that the mode takes; in each call the same value."""
    return PseudoLabels().for_modes(labels, mode)


def prepare(problem: BilevelProblem | None, mode: Estimator) -> BilevelProblem:
    """Return the problem (default: pseudo-labels) with a kind of signal that the mode takes."""
    if problem is None:
        return default_problem(mode.labels, mode.name)
    if not isinstance(problem, BilevelProblem):
        raise checks.unexpected("problem is", problem, "one such as metapl.PseudoLabels()")
    refuse_signal_in_outer_input(problem)
    return problem.for_modes(mode.labels, mode.name)


def in_place_of(mode: Estimator, steps: int, problem: BilevelProblem, wrt: Sequence[str]) -> str:
    """Return what an error expects where an operation lacks a derivative that a mode needs.

    Args:
        steps: of the student.
        wrt: what the gradient is in besides the signals, which differences do not give.
    """
    if wrt or enters_input(problem):
        return "another operation"
    expected = f"another operation, or {mode.by_differences}"
    return expected if steps == 1 else f"{expected} with one student step"


def check_teacher(teacher: nn.Module | None, problem: BilevelProblem, **is_given: bool) -> None:
    """Refuse a missing teacher, one that is not used, and options for one that is not there.

    Args:
        is_given: whether an option of the teacher was given, by the option's name.
    """
    if (teacher is not None) != problem.has_teacher:
        expected = "a module (problem=EqualWeights() takes none)" if problem.has_teacher else "none"
        raise checks.unexpected("teacher is", teacher, f"{expected}, with {kind_of(problem)}")
    unused = [name for name, was_given in is_given.items() if was_given and teacher is None]
    if unused:
        raise MetaplError(f"{few(unused)} was given with teacher=None; expected it left out.")


def check_direct_term(mode: Estimator, problem: BilevelProblem, layouts: Sequence[Layout]) -> None:
    """Refuse a direct term where a network is sharded, and a mode of it alone where it is none.

    Args:
        layouts: of the teacher, where there is one, and of the student.
    """
    kind = kind_of(problem)
    reads_teacher = bool(outer_variables(problem, layouts[0].network if layouts[1:] else None))
    if reads_teacher and any(layout.is_sharded for layout in layouts):
        raise MetaplError(
            f"{kind} holds the teacher, which its outer loss may read, and a network is sharded; "
            "expected whole networks in each process, as in DistributedDataParallel."
        )
    if mode.has_direct_term and mode.credits == "nothing" and not reads_teacher:
        raise MetaplError(
            f"mode {mode.name!r} was given with {kind}, which does not hold the teacher, so that "
            "its outer loss does not read it; expected a problem that does, or mode='none'."
        )


def check_mode(mode: Estimator, steps: int, problem: BilevelProblem, student: Layout) -> None:
    """Refuse what the mode, the problem and the student's layout cannot do together.

    Args:
        steps: of the student.
    """
    if reason := why_not_together(mode, steps, problem, student):
        raise MetaplError(f"mode {mode.name!r} was given with {kind_of(problem)}, {reason}.")


def why_not_together(mode: Estimator, steps: int, problem: BilevelProblem, student: Layout) -> str:
    """Return what a mode cannot do, and what to give instead; "" for nothing."""
    lacking = lacking_in(student, mode, steps, problem)
    if not lacking:
        return conflict_of(mode, steps, problem)
    fitting = []
    for name, other in _REGISTRY.items():
        takes_signal = other.credits != "nothing" and {*other.labels} >= {*mode.labels}
        if takes_signal and not conflict_of(other, steps, problem):
            fitting += [] if lacking_in(student, other, steps, problem) else [repr(name)]
    if steps > 1 and not lacking_in(student, mode, 1, problem):
        fitting = ["one student step", *fitting]
    what = f"whose {steps} steps take" if steps > 1 else "whose step takes"
    return (
        f"{what} {' and '.join(lacking)}, and a student that is {student.description}; expected "
        f"{', or '.join(['one process', *fitting])}"
    )


def conflict_of(mode: Estimator, steps: int, problem: BilevelProblem) -> str:
    """Return what a mode cannot do with a problem on any student; "" for nothing."""
    revises_signal = overrides(problem, "revised_signal")
    signal_enters_input = enters_input(problem)
    moves_signal = mode.takes_differences or mode.takes_outer_losses
    if steps > 1 and revises_signal:
        return f"which takes one student step, and with {steps} of them; expected one"
    if revises_signal and mode.credits == "nothing":
        return "which makes its signal of the feedback; expected 'forward', or Implicit()"
    if revises_signal and signal_enters_input:
        return "which has revised_signal and student_input(batch, signal); expected one of the two"
    if revises_signal and mode.normalization == "cosine":
        return 'whose gradient is zero, by the norm of which "cosine" divides; expected "gradient"'
    if steps > 1 and not mode.looks_ahead:
        modes = proposed_modes(looks_ahead=True)
        return f"and with {steps} student steps, of which it takes one; expected one, or {modes}"
    if signal_enters_input and mode.credits == "signal" and moves_signal:
        return "which has student_input(batch, signal); expected mode 'forward' or 'unrolled'"
    return ""


def lacking_in(student: Layout, mode: Estimator, steps: int, problem: BilevelProblem) -> list[str]:
    """Return what a mode's steps take and a student has not, in words."""
    required = set(mode.requires)
    if steps > 1:
        required.add(CURVATURE)
    if enters_input(problem) and mode.credits == "signal":
        required.add(THROUGH_INPUT)
    if overrides(problem, "revised_signal"):
        required.add(ONE_PROCESS)
    return sorted(capability.value for capability in required - student.capabilities)


def check_signal(
    signal: Any, mode: Estimator, problem: BilevelProblem, *, student_steps: int
) -> None:
    """Refuse what is no signal of tensors, or of a kind that the mode cannot differentiate in.

    Args:
        student_steps: how many the mode differentiates.
    """
    value = getattr(signal, "value", None)
    log_prob = getattr(signal, "log_prob", None)
    values = [*value.values()] if isinstance(value, dict) else [value]
    fits = bool(values) and all(isinstance(t, Tensor) and not t.is_complex() for t in values)
    if fits and log_prob is not None:
        fits = isinstance(value, Tensor) and log_prob.shape == value.shape[:1]
    if not fits or not isinstance(signal, Signal):
        value = value if isinstance(signal, Signal) else signal
        expected = (
            "metapl.Signal(value) of tensors of real numbers (of complex ones torch.view_as_real), "
            "or Signal(value, log_prob=...) of drawn labels"
        )
        raise checks.unexpected(f"{kind_of(problem)}.signal returned", value, expected)
    kind: Kind = "soft" if log_prob is None else "hard"
    credits_labels = kind == "hard" and mode.credits in ("signal", "example")
    is_constant = kind == "soft" and mode.credits != "nothing" and not signal.differentiable()
    if (credits_labels and enters_input(problem)) or is_constant or kind not in mode.labels:
        with_or_without = "without" if log_prob is None else "with"
        fitting_modes = proposed_modes(kind, looks_ahead=student_steps > 1)
        expected = "a signal of floating point with its graph"
        if kind not in mode.labels:
            expected = "soft ones" if log_prob is not None else "drawn labels, with their log_prob"
        raise MetaplError(
            f"the signal of {kind_of(problem)} is {checks.described(value)} {with_or_without} a "
            f"log_prob, in which mode {mode.name!r} does not differentiate; expected {expected}, "
            f"or the mode {fitting_modes}."
        )
