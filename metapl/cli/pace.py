"""How long the jobs of a comparison will still take."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Sequence


class Pace:
    """Times of the jobs that are done, and what they say of the others.

    Args:
        methods: of the jobs that are to be run, one each.
        together: how many run at a time.

    >>> pace = Pace(["mpl", "uda", "mpl", "uda"], together=2)
    >>> pace.left() is None
    True
    >>> pace.done("mpl", 60.0)
    >>> pace.done("uda", 20.0)
    >>> pace.left()
    40.0
    """

    def __init__(self, methods: Sequence[str], together: int) -> None:
        self.waiting, self.together = list(methods), together
        self.times: defaultdict[str, list[float]] = defaultdict(list)

    def done(self, method: str, seconds: float) -> None:
        """A job by ``method`` is done."""
        self.waiting.remove(method)
        self.times[method].append(seconds)

    def left(self) -> float | None:
        """Seconds until all are done: methods take times of their own, and one that is not known yet takes the mean.

        None while no job is done, as where a comparison that is resumed only gives what was done before.
        """
        if not self.waiting:
            return 0.0
        if not self.times:
            return None
        means = {method: statistics.fmean(times) for method, times in self.times.items()}
        usual = statistics.fmean(means.values())
        work = sum(means.get(method, usual) for method in self.waiting)
        return work / min(self.together, len(self.waiting))
