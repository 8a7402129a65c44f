"""An ablation in lines of a terminal."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence

from metapl.ablation.figures import SETTINGS, Distance, ModeCost, Outcome, Sweep, Trainings, spread
from metapl.words import table

WIDTH = 80
"""Columns of a terminal."""

CONTROLS = "altered feedback, as a control:"


def tables(
    modes: Mapping[str, ModeCost | str],
    altered: Mapping[str, ModeCost | str],
    stability: Mapping[str, Sweep | str],
    trainings: Trainings | None,
) -> str:
    """All tables, and below them the reasons for what is missing; the arguments are as in
    :class:`metapl.ablation.Ablation`."""
    notes = _Notes()
    parts = [_modes(modes, altered, notes)]
    if stability:
        parts.append("Cosine, and error and noise of one draw together, over values of a setting:")
        parts += [_sweep(name, sweep, notes) for name, sweep in stability.items()]
    if trainings is not None:
        parts.append(_trainings(trainings, [*altered], notes))
    return "\n\n".join([*parts, *notes.lines()])


class _Notes:
    """Reasons, each said once, by number."""

    def __init__(self) -> None:
        self.reasons: list[str] = []

    def mark(self, reason: str) -> str:
        """What stands in a table for a reason.

        >>> notes = _Notes()
        >>> notes.mark("too large"), notes.mark("too small"), notes.mark("too large")
        ('[1]', '[2]', '[1]')
        """
        if reason not in self.reasons:
            self.reasons.append(reason)
        return f"[{self.reasons.index(reason) + 1}]"

    def lines(self) -> list[str]:
        """The reasons."""
        return [
            textwrap.fill(
                f"[{number}] {' '.join(reason.split())}",
                WIDTH,
                subsequent_indent="    ",
                break_on_hyphens=False,
                break_long_words=False,
            )
            for number, reason in enumerate(self.reasons, 1)
        ]


def _modes(modes: Mapping[str, ModeCost | str], altered: Mapping[str, ModeCost | str], notes: _Notes) -> str:
    every = {**modes, **altered}
    ran = {name: mode for name, mode in every.items() if isinstance(mode, ModeCost)}
    time_unit, time = _unit([mode.seconds for mode in ran.values()], {"s": 1.0, "ms": 1e-3})
    peak_unit, peak = _unit([mode.peak_bytes for mode in ran.values()], {"GB": 1e9, "MB": 1e6, "KB": 1e3})
    head = ("mode", "cosine", "rel. error", "noise", "passes", f"time, {time_unit}", f"peak, {peak_unit}")
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
        for name, mode in ran.items()
    ]
    width = max(len(name) for name in ("mode", *every))
    head_line, *ran_lines = table([(head[0].ljust(width), *head[1:]), *rows]).splitlines()
    lines = dict(zip(ran, ran_lines, strict=True))
    lines |= {
        name: f"{name:<{width}}  cannot run on this model {notes.mark(mode)}"
        for name, mode in every.items()
        if isinstance(mode, str)
    }
    block = [head_line, *(lines[name] for name in modes)]
    if altered:
        block += [CONTROLS, *(lines[name] for name in altered)]
    return "\n".join(block)


def _sweep(name: str, sweep: Sweep | str, notes: _Notes) -> str:
    title = SETTINGS.get(name, name)
    if isinstance(sweep, str):
        return textwrap.fill(f"{title}: not varied, {sweep}", WIDTH, break_on_hyphens=False)
    rows = [("mode", *(_short(value) for value in sweep.values))]
    rows += [(mode, *(_cell(one, notes) for one in row)) for mode, row in sweep.modes.items()]
    return "\n".join([title, table(rows)])


def _cell(found: Distance | str, notes: _Notes) -> str:
    if isinstance(found, str):
        return notes.mark(found)
    return f"{found.cosine:.2f} {_short(found.of_one_draw):>5}"


def _trainings(made: Trainings, controls: Sequence[str], notes: _Notes) -> str:
    seeds = f"{len(made.seeds)} seed{'s' * (len(made.seeds) > 1)}"
    title = f"trainings of {made.steps:,} steps from the same start, {seeds}: mean ± standard error"
    outcomes = {name: mode for name, mode in made.modes.items() if isinstance(mode, Outcome)}
    validated = any(outcome.accuracy is not None for outcome in outcomes.values())
    head = ("mode", "outer loss", *(("val. loss", "accuracy, %", "minus none") if validated else ()))
    none = outcomes.get("none")
    rows: list[tuple[str, ...]] = [head]
    for name, mode in made.modes.items():
        if isinstance(mode, str):
            rows.append((name, notes.mark(mode), *[""] * (len(head) - 2)))
            continue
        row: tuple[str, ...] = (name, _spread(mode.outer_loss))
        if mode.validation_loss is not None and mode.accuracy is not None:
            against = "" if none is None or none.accuracy is None or mode is none else _gain(mode, none.accuracy)
            row = (*row, _spread(mode.validation_loss), _spread([100 * a for a in mode.accuracy], 1), against)
        rows.append(row)
    head_line, *lines = table(rows).splitlines()
    first = next((number for number, name in enumerate(made.modes) if name in controls), len(lines))
    return "\n".join([title, head_line, *lines[:first], *[CONTROLS] * (first < len(lines)), *lines[first:]])


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
