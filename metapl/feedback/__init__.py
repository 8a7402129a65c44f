"""Estimators of the teacher's gradient, one a file; a mode is a name from :data:`MODES` or an estimator value."""

from __future__ import annotations

from metapl.errors import MetaplError
from metapl.feedback.altered import Altered
from metapl.feedback.base import Estimator, Feedback
from metapl.feedback.difference import Difference
from metapl.feedback.forward import Forward
from metapl.feedback.loss_difference import LossDifference
from metapl.feedback.none import NoFeedback
from metapl.feedback.reinforce import Reinforce
from metapl.feedback.reinforce_per_example import ReinforcePerExample
from metapl.feedback.unrolled import Unrolled

__all__ = [
    "MODES",
    "Altered",
    "Difference",
    "Estimator",
    "Feedback",
    "Forward",
    "LossDifference",
    "NoFeedback",
    "Reinforce",
    "ReinforcePerExample",
    "Unrolled",
    "estimator",
]

_REGISTRY: dict[str, type[Estimator]] = {
    kind.name: kind
    for kind in (Unrolled, Forward, Difference, Reinforce, ReinforcePerExample, LossDifference, NoFeedback)
}

MODES: tuple[str, ...] = tuple(_REGISTRY)
"""The names of the modes."""


def estimator(mode: str | Estimator) -> Estimator:
    """The estimator that ``mode`` names or is.

    >>> estimator("reinforce")
    Reinforce(similarity='dot', baseline=None, normalization='gradient')
    >>> estimator(Reinforce(baseline=0.99)).name
    'reinforce'
    """
    if isinstance(mode, str) and mode in _REGISTRY:
        return _REGISTRY[mode]()
    if not isinstance(mode, str | type) and isinstance(mode, Estimator):
        return mode
    raise MetaplError(
        f"mode={mode!r} was given; expected one of {', '.join(MODES)}, "
        'or an estimator value such as metapl.feedback.Reinforce(similarity="cosine").'
    )
