"""What an ablation returns: the figures of every mode, as JSON and in lines of a terminal."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from metapl.ablation.figures import SETTINGS, Distance, ModeCost, Outcome, Sweep, Trainings, spread
from metapl.words import table

WIDTH = 80
"""Columns of a terminal."""

CONTROLS = "altered feedback, as a control:"


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
        content = {
            "modes": _plain(self.modes),
            "recommendation": self.recommendation,
            "recommended": self.recommended,
            "points": list(self.points),
            "altered": _plain(self.altered),
        }
        if self.stability:
            content["stability"] = _plain(self.stability)
        if self.trainings is not None:
            content["trainings"] = asdict(self.trainings) | {
                "seeds": list(self.trainings.seeds),
                "modes": _plain(self.trainings.modes),
            }
        return content

    def to_json(self) -> str:
        """:meth:`as_dict` as text; what is not a finite number is null."""
        return json.dumps(_finite(self.as_dict()), indent=1, ensure_ascii=False) + "\n"

    def table(self) -> str:
        """The figures in lines of a terminal of 80 columns; the reasons for what is missing stand below."""
        notes: list[str] = []
        parts = [_modes(self, notes)]
        if self.stability:
            parts.append("Cosine, and error and noise of one draw together, over values of a setting:")
            parts += [_sweep(SETTINGS.get(name, name), sweep, notes) for name, sweep in self.stability.items()]
        if self.trainings is not None:
            parts.append(_trainings(self.trainings, self.altered, notes))
        reasons = (f"[{number}] {' '.join(reason.split())}" for number, reason in enumerate(notes, 1))
        return "\n\n".join([*parts, *(_filled(reason, "    ") for reason in reasons)])


def _plain(found: Any) -> Any:
    """Figures by name, as dicts and lists; a text among them is the reason why there are none."""
    if isinstance(found, str):
        return {"reason": found}
    if isinstance(found, dict):
        return {name: _plain(one) for name, one in found.items()}
    if isinstance(found, tuple):
        return [_plain(one) for one in found]
    if isinstance(found, Sweep):
        return {"values": list(found.values), "modes": _plain(found.modes)}
    if isinstance(found, Outcome):
        return {name: None if values is None else spread(values) for name, values in vars(found).items()}
    return asdict(found)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_finite(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=not indent)


def _mark(reason: str, notes: list[str]) -> str:
    """What stands in a table for a reason, which is said once, by its number.

    >>> notes = []
    >>> [_mark(reason, notes) for reason in ("too large", "too small", "too large")]
    ['[1]', '[2]', '[1]']
    """
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


def _modes(found: Ablation, notes: list[str]) -> str:
    every = {**found.modes, **found.altered}
    ran = [mode for mode in every.values() if isinstance(mode, ModeCost)]
    time_unit, time = _unit([mode.seconds for mode in ran], {"s": 1.0, "ms": 1e-3})
    peak_unit, peak = _unit([mode.peak_bytes for mode in ran], {"GB": 1e9, "MB": 1e6, "KB": 1e3})
    width = max(len(name) for name in ("mode", *every))
    head = ("mode".ljust(width), "cosine", "rel. error", "noise", "passes", f"time, {time_unit}", f"peak, {peak_unit}")
    rows = [
        (
            name,
            f"{mode.cosine:.3f}",
            _short(mode.relative_error),
            _short(mode.noise_to_signal),
            f"{mode.passes:.1f}",
            _short(mode.seconds / time),
            _short(mode.peak_bytes / peak),
        )
        for name, mode in every.items()
        if isinstance(mode, ModeCost)
    ]
    first, *lines = table([head, *rows]).splitlines()
    left = iter(lines)
    lines = [
        f"{name:<{width}}  cannot run on this model {_mark(mode, notes)}" if isinstance(mode, str) else next(left)
        for name, mode in every.items()
    ]
    return "\n".join([first, *_with_controls(lines, len(found.modes))])


def _with_controls(lines: list[str], first: int) -> list[str]:
    """The lines with what is said before those of altered feedback, which begin at ``first``."""
    return [*lines[:first], *[CONTROLS] * (first < len(lines)), *lines[first:]]


def _sweep(title: str, sweep: Sweep | str, notes: list[str]) -> str:
    if isinstance(sweep, str):
        return _filled(f"{title}: not varied, {sweep}")
    rows = [("mode", *(_short(value) for value in sweep.values))]
    rows += [(mode, *(_cell(one, notes) for one in row)) for mode, row in sweep.modes.items()]
    return "\n".join([title, table(rows)])


def _cell(found: Distance | str, notes: list[str]) -> str:
    if isinstance(found, str):
        return _mark(found, notes)
    return f"{found.cosine:.2f} {_short(found.of_one_draw):>5}"


def _trainings(made: Trainings, controls: Collection[str], notes: list[str]) -> str:
    seeds = f"{len(made.seeds)} seed{'s' * (len(made.seeds) > 1)}"
    title = f"trainings of {made.steps:,} steps from the same start, {seeds}: mean ± standard error"
    outcomes = {name: mode for name, mode in made.modes.items() if isinstance(mode, Outcome)}
    validated = any(outcome.accuracy is not None for outcome in outcomes.values())
    head = ("mode", "outer loss", *(("val. loss", "accuracy, %", "minus none") if validated else ()))
    none = outcomes.get("none")
    rows: list[tuple[str, ...]] = [head]
    for name, mode in made.modes.items():
        if isinstance(mode, str):
            rows.append((name, _mark(mode, notes), *[""] * (len(head) - 2)))
            continue
        row: tuple[str, ...] = (name, _spread(mode.outer_loss))
        if mode.validation_loss is not None and mode.accuracy is not None:
            against = "" if none is None or none.accuracy is None or mode is none else _gain(mode, none.accuracy)
            row = (*row, _spread(mode.validation_loss), _spread([100 * a for a in mode.accuracy], 1), against)
        rows.append(row)
    head_line, *lines = table(rows).splitlines()
    first = next((number for number, name in enumerate(made.modes) if name in controls), len(lines))
    return "\n".join([title, head_line, *_with_controls(lines, first)])


def _gain(mode: Outcome, none: Sequence[float]) -> str:
    """The gain in accuracy over no feedback, seed by seed, in points."""
    return _spread([100 * (a - b) for a, b in zip(mode.accuracy or (), none, strict=True)], 1, sign="+")


def _spread(values: Sequence[float], digits: int = 3, sign: str = "") -> str:
    found = spread(values)
    error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.{digits}f}"
    return f"{found['mean']:{sign}.{digits}f}{error}"


def _short(value: float) -> str:
    """At most five letters for what is not huge.

    >>> [_short(value) for value in (0.0, 4.2e-08, 0.00031, 0.047, 0.62, 7.04, 184.3, 1840.0, 18400.0)]
    ['0', '4e-08', '3e-04', '0.047', '0.62', '7', '184', '1840', '2e+04']
    """
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e4:
        return f"{value:.0e}"
    return f"{value:.0f}" if abs(value) >= 100 else f"{value:.2g}"


def _unit(values: Sequence[float], units: Mapping[str, float]) -> tuple[str, float]:
    """The largest unit in which the greatest value is 1 or more; the units from the largest on."""
    greatest = max(values, default=0.0)
    return next(((name, one) for name, one in units.items() if greatest >= one), list(units.items())[-1])
