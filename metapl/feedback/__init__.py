"""Estimators of the teacher's gradient, one a file; a mode is a name from :data:`MODES` or an estimator value.

The default is ``forward``; ``reinforce`` is the paper's Algorithm 1.
"""

from __future__ import annotations

from typing import Literal

from metapl.errors import MetaplError
from metapl.feedback.base import Estimator
from metapl.feedback.credit import Feedback
from metapl.feedback.difference import Difference
from metapl.feedback.forward import Forward
from metapl.feedback.implicit import Implicit
from metapl.feedback.lookahead import Lookahead
from metapl.feedback.loss_difference import LossDifference
from metapl.feedback.none import NoFeedback
from metapl.feedback.reinforce import Reinforce
from metapl.feedback.reinforce_per_example import ReinforcePerExample
from metapl.feedback.unrolled import Unrolled
from metapl.problems.base import Kind
from metapl.words import did_you_mean

__all__ = ["MODES", "Difference", "Estimator", "Feedback", "Forward", "Implicit", "Lookahead", "LossDifference", "Mode"]
__all__ += ["NoFeedback", "Reinforce", "ReinforcePerExample", "Unrolled", "estimator", "modes_for"]
__dir__ = __all__.copy

ModeName = Literal[
    "unrolled", "forward", "difference", "reinforce", "reinforce_per_example", "loss_difference", "implicit", "none"
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
"""The modes, with their defaults; a new one is a file and a line here, and its name above for type checkers."""

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
    Reinforce(similarity='dot', baseline=None, normalization='gradient')
    >>> estimator(Reinforce(baseline=0.99)).name
    'reinforce'
    """
    if isinstance(mode, Estimator):
        return mode
    for name in MODES:
        if mode == name:
            return _REGISTRY[name]
    expected = f"one of {', '.join(MODES)}, or an estimator such as metapl.feedback.Reinforce()"
    raise MetaplError(f"mode={mode!r} was given; expected {expected}{did_you_mean(str(mode), MODES)}.")
