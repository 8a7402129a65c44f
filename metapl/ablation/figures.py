"""Figures of the modes, as values."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SETTINGS = {
    "epsilon": "step size of the finite difference, over a typical weight",
    "temperature": "temperature of the pseudo-labels",
    "batch_size": "examples in the unlabeled batch",
}
"""What is varied, by its key in the results."""


@dataclass(frozen=True)
class Distance:
    """How far a mode's gradient is from the exact one.

    Args:
        cosine: of its gradient, averaged over the draws, with the exact one.
        relative_error: ‖mean − exact‖/‖exact‖.
        noise_to_signal: √(Σ ‖draw − mean‖² / (n − 1))/‖exact‖ of n draws; 0 for a mode that draws nothing.
    """

    cosine: float
    relative_error: float
    noise_to_signal: float

    @property
    def of_one_draw(self) -> float:
        """Error and noise together, the distance of one draw; the error holds 1/n of the noise already, so it is at
        most √(1 + 1/n) times too large."""
        return math.hypot(self.relative_error, self.noise_to_signal)


@dataclass(frozen=True)
class ModeCost(Distance):
    """What was found of one mode.

    Args:
        cosine: as in :class:`Distance`; the mean over the points.
        relative_error, noise_to_signal: as in :class:`Distance`; root mean squares over the points.
        passes: floating-point operations over those of a forward pass of the student on the unlabeled batch.
        seconds: a call, the least of interleaved rounds, for other work on the machine only adds; on a CPU the time
            that it had of the processor, where that is less.
        peak_bytes: what a call holds at its fullest, beyond what was held before.
    """

    passes: float
    seconds: float
    peak_bytes: int


@dataclass(frozen=True)
class Sweep:
    """The modes over the values of one setting.

    Args:
        values: of the setting.
        modes: by name: for each value the distance, or the reason why the mode could not run with it.
    """

    values: tuple[float, ...]
    modes: dict[str, tuple[Distance | str, ...]]


@dataclass(frozen=True)
class Outcome:
    """What short trainings by one mode ended with, a number for each seed.

    Args:
        outer_loss: of the student on the labeled batch that comes next, in eval mode.
        validation_loss, accuracy: on the validation data; None without them.
    """

    outer_loss: tuple[float, ...]
    validation_loss: tuple[float, ...] | None = None
    accuracy: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Trainings:
    """Short trainings from the same start.

    Args:
        steps: of each.
        seeds: of the order of batches, dropout and drawn labels.
        modes: by name: what they ended with, or the reason why a mode could not train.
    """

    steps: int
    seeds: tuple[int, ...]
    modes: dict[str, Outcome | str]


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error (None for one value) and the values.

    >>> spread([1.0, 2.0, 3.0])["standard_error"] == 1 / 3**0.5
    True
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": list(values)}
