"""What an ablation returns: figures of each mode, as values, as JSON and as tables."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Distance:
    """How far a mode's gradient is from the exact one.

    Args:
        cosine: of its gradient, averaged over the draws, with the exact one.
        relative_error: ‖mean − exact‖/‖exact‖.
        noise_to_signal: √(mean ‖draw − mean‖²)/‖exact‖; 0 for a mode that draws nothing.
    """

    cosine: float
    relative_error: float
    noise_to_signal: float

    @property
    def of_one_draw(self) -> float:
        """Error and noise together: the root mean square distance of one draw from the exact gradient."""
        return math.hypot(self.relative_error, self.noise_to_signal)


@dataclass(frozen=True)
class ModeCost(Distance):
    """What was found of one mode.

    Args:
        cosine: as in :class:`Distance`; the mean over the points.
        relative_error, noise_to_signal: as in :class:`Distance`; root mean squares over the points.
        passes: floating-point operations over those of a forward pass of the student on the unlabeled batch.
        seconds: a call, the median over interleaved rounds.
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

    def as_dict(self) -> dict[str, Any]:
        """Mean, standard error and values of each."""
        figures = {name: getattr(self, name) for name in ("outer_loss", "validation_loss", "accuracy")}
        return {name: None if values is None else spread(values) for name, values in figures.items()}


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


@dataclass(frozen=True)
class Ablation:
    """What :func:`metapl.ablate` returns.

    Args:
        modes: by name: the costs, or the reason why a mode cannot run on this model.
        recommendation: which mode to take, and why.
        points: the steps of training that were looked at.
        altered: the figures of a mode's feedback, altered (:class:`metapl.feedback.Altered`); controls.
        stability: by setting (``epsilon``, ``temperature``, ``batch_size``): the modes over its values, or the reason
            why there is nothing to vary; empty unless it was asked for.
        trainings: short trainings; None unless they were asked for.
        recommended: the name in the recommendation; None where no mode can be recommended.
    """

    modes: dict[str, ModeCost | str]
    recommendation: str
    points: tuple[int, ...]
    altered: dict[str, ModeCost | str] = field(default_factory=dict)
    stability: dict[str, Sweep | str] = field(default_factory=dict)
    trainings: Trainings | None = None
    recommended: str | None = None

    def as_dict(self) -> dict[str, Any]:
        """``modes``, ``recommendation``, ``recommended``, ``points``, ``altered``; and ``stability`` and ``trainings``
        where they were asked for. In the place of figures that could not be had stands ``{"reason": ...}``."""
        content: dict[str, Any] = {
            "modes": _rows(self.modes),
            "recommendation": self.recommendation,
            "recommended": self.recommended,
            "points": list(self.points),
            "altered": _rows(self.altered),
        }
        if self.stability:
            content["stability"] = {name: _sweep(sweep) for name, sweep in self.stability.items()}
        if self.trainings is not None:
            made = self.trainings
            outcomes = {n: {"reason": m} if isinstance(m, str) else m.as_dict() for n, m in made.modes.items()}
            content["trainings"] = {"steps": made.steps, "seeds": list(made.seeds), "modes": outcomes}
        return content

    def to_json(self) -> str:
        """:meth:`as_dict` as text; what is not a finite number is null."""
        return json.dumps(_finite(self.as_dict()), indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The figures in lines of a terminal of 80 columns; the reasons for what is missing stand below."""
        from metapl.ablation.tables import tables

        return tables(self)


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, standard error (None for one value) and the values.

    >>> spread([1.0, 2.0, 3.0])["standard_error"] == 1 / 3**0.5
    True
    """
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": list(values)}


def _rows(modes: Mapping[str, Distance | str]) -> dict[str, Any]:
    return {name: _figures(mode) for name, mode in modes.items()}


def _figures(mode: Distance | str) -> dict[str, Any]:
    return {"reason": mode} if isinstance(mode, str) else asdict(mode)


def _sweep(sweep: Sweep | str) -> dict[str, Any]:
    if isinstance(sweep, str):
        return {"reason": sweep}
    return {"values": list(sweep.values), "modes": {n: [_figures(m) for m in row] for n, row in sweep.modes.items()}}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
