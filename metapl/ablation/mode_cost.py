"""The figures of a mode: how far its gradient is from the exact one, and what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class ModeDistance:
    """How far a mode's gradient is from the exact one at one point of a training.

    Args:
        cosine: of its gradient, averaged over the draws, with the exact one.
        relative_error, noise_to_signal: as :func:`metapl.ablate` defines them.
        length: of its gradient as it is, averaged over the draws, over that of the exact one.
    """

    cosine: float
    relative_error: float
    noise_to_signal: float
    length: float

    @property
    def of_one_draw(self) -> float:
        """Error and noise together, the distance of one draw from the exact gradient.

        It is at most √(1 + 1/n) times too large.
        """
        return math.hypot(self.relative_error, self.noise_to_signal)


@dataclass(frozen=True)
class ModeCost:
    """How far a mode's gradient is from the exact one, and what it costs.

    Args:
        cosine: of its gradient, averaged over the draws, with the exact one; the mean over the
            points.
        relative_error, noise_to_signal: as :func:`metapl.ablate` defines them, the latter 0 for a
            mode that draws nothing; root mean squares over the points. Those of a mode with
            ``reduction="mean"`` are of B times its gradient, the sum.
        passes: floating-point operations over those of a forward pass of the student on the
            inner batch.
        seconds: a call, the least of interleaved rounds; on a CPU the processor's time, where that
            is less.
        peak_bytes: what a call holds at its fullest, beyond what was held before.
        length: of its gradient as it is, averaged over the draws, over that of the exact one; the
            mean over the points. Of Algorithm 1's mean it is about 1/B.
        by_point: the distances at each of the points.
    """

    cosine: float
    relative_error: float
    noise_to_signal: float
    passes: float
    seconds: float
    peak_bytes: int
    length: float = 1.0
    by_point: tuple[ModeDistance, ...] = ()

    @property
    def of_one_draw(self) -> float:
        """Error and noise together, the distance of one draw from the exact gradient.

        It is at most √(1 + 1/n) times too large.
        """
        return math.hypot(self.relative_error, self.noise_to_signal)
