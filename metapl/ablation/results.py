"""What an ablation returns: the figures of every mode, as JSON and as tables."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from metapl.ablation.figures import Distance, ModeCost, Sweep, Trainings
from metapl.ablation.tables import tables


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
        return tables(self.modes, self.altered, self.stability, self.trainings)


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
