"""When a fit ends early: as soon as its metric has not become better for a while."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from metapl.metrics.metric import Metric


class Patience:
    """Counts the student's validations since the last one that was better than all before it.

    An equal value counts as none better, so that a metric that stands still ends the fit too.

    Args:
        limit: how many of them end the fit; None: none do.
        metric: which says whether a smaller or a greater value is better.

    >>> from metapl.metrics.metric import LOSS
    >>> patience = Patience(2, LOSS)
    >>> for loss in (0.9, 0.5, 0.5, 0.6):
    ...     patience.validated(loss)
    >>> patience.is_exhausted, patience.validations_since_best
    (True, 2)
    >>> patience.reason()
    'the last 2 validations have no better loss than 0.5'
    >>> patience = Patience(1, LOSS)
    >>> for loss in (0.9, 1.0):
    ...     patience.validated(loss)
    >>> patience.reason()
    'the last validation has no better loss than 0.9'
    """

    def __init__(self, limit: int | None, metric: Metric | None) -> None:
        self.limit = limit
        self.metric = metric
        self.best: float | None = None
        self.validations_since_best = 0

    def validated(self, value: float) -> None:
        """Count what the student reaches on the validation data."""
        assert self.metric is not None, "a value is one of a metric"
        if self.metric.is_better(value, self.best):
            self.best = value
            self.validations_since_best = 0
        else:
            self.validations_since_best += 1

    @property
    def is_exhausted(self) -> bool:
        return self.limit is not None and self.validations_since_best >= self.limit

    def reason(self) -> str:
        """Return why the fit ends."""
        assert self.metric is not None, "a value is one of a metric"
        validations = f"{self.validations_since_best} validations have"
        if self.validations_since_best == 1:
            validations = "validation has"
        return f"the last {validations} no better {self.metric.name} than {self.best:.4g}"

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "validations_since_best": self.validations_since_best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.best = state["best"]
        self.validations_since_best = state["validations_since_best"]
