"""What an ablation finds: figures as values, as JSON and in lines of a terminal, and the mode that they recommend."""

from __future__ import annotations

import json
import math
import statistics
import textwrap
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, is_dataclass
from functools import partial
from typing import Any

from metapl.feedback import MODES, Estimator, Implicit, estimator

WIDTH = 80  # columns of a terminal

CONTROLS = "altered feedback, as a control:"

SETTINGS = {  # what is varied, by its key in the results
    "epsilon": "step size of the finite difference, over a typical weight",
    "temperature": "temperature of the pseudo-labels",
    "batch_size": "examples in the unlabeled batch",
}

# A mode that should be exact is taken for it up to this distance: in bfloat16, and where the gradient itself is nearly
# zero, as in the first steps of Adam, two exact modes differ by as much as some hundredths. Rounding beyond the second
# is told.
TRUSTED, TOLD = 0.1, 1e-3
NEAR = 0.01  # distance, noise included, up to which a gradient is near the exact one
EQUAL = 0.1  # times, and bytes, that differ by no more than this fraction count as equal: timings are noisy
PREFERRED = "forward"  # between modes that are equal otherwise: exact, without a second backward pass and its memory


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
        """Error and noise together, the distance of one draw; at most √(1 + 1/n) times too large, for the error holds
        1/n of the noise already."""
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
        validation_loss, accuracy: of classes, on the validation data; of another problem its loss. None without them.
        value: by another metric, where one was asked for.
    """

    outer_loss: tuple[float, ...]
    validation_loss: tuple[float, ...] | None = None
    accuracy: tuple[float, ...] | None = None
    value: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Trainings:
    """Short trainings from the same start.

    Args:
        steps: of each.
        seeds: of the order of batches, dropout and drawn labels.
        modes: by name: what they ended with, or the reason why a mode could not train.
        metric: the name of that on the validation data; None without them.
    """

    steps: int
    seeds: tuple[int, ...]
    modes: dict[str, Outcome | str]
    metric: str | None = None


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
        content = {"modes": _plain(self.modes), "recommendation": self.recommendation, "recommended": self.recommended}
        content |= {"points": list(self.points), "altered": _plain(self.altered)}
        asked = {"stability": self.stability, "trainings": self.trainings}
        return content | {name: _plain(found) for name, found in asked.items() if found}

    def to_json(self) -> str:
        """:meth:`as_dict` as text; what is not a finite number is null."""
        finite = json.loads(json.dumps(self.as_dict()), parse_constant=lambda name: None)
        return json.dumps(finite, indent=1, ensure_ascii=False) + "\n"

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
    if isinstance(found, str):
        return {"reason": found}
    if isinstance(found, Outcome):
        return {name: None if values is None else spread(values) for name, values in vars(found).items()}
    if is_dataclass(found):
        return _plain(vars(found))
    if isinstance(found, dict):
        return {name: _plain(one) for name, one in found.items()}
    return list(map(_plain, found)) if isinstance(found, tuple) else found


def spread(values: Sequence[float]) -> dict[str, Any]:
    error = statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_error": error, "values": list(values)}


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows with their columns aligned: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])] for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in lines)


def _filled(text: str, indent: str = "") -> str:
    return textwrap.fill(text, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=not indent)


def _mark(reason: str, notes: list[str]) -> str:
    """What stands in a table for a reason, which is said once, by its number."""
    if reason not in notes:
        notes.append(reason)
    return f"[{notes.index(reason) + 1}]"


def _with_controls(rows: Sequence[Sequence[str]], controls: Collection[str], more: Mapping[str, str]) -> str:
    """A table that says what its controls are; ``more`` stands in the place of figures, by the name of the row."""
    head, *lines = table(rows).splitlines()
    width, shown = max(len(row[0]) for row in rows), [head]
    for (name, *_), line in zip(rows[1:], lines, strict=True):
        if name in controls and CONTROLS not in shown:
            shown.append(CONTROLS)
        shown.append(f"{name:<{width}}  {more[name]}" if name in more else line)
    return "\n".join(shown)


def _modes(found: Ablation, notes: list[str]) -> str:
    every = {**found.modes, **found.altered}
    ran = {name: mode for name, mode in every.items() if isinstance(mode, ModeCost)}
    seconds, peaks = ([getattr(mode, key) for mode in ran.values()] for key in ("seconds", "peak_bytes"))
    time_unit, time = _unit(max(seconds, default=0.0), SECONDS)
    peak_unit, peak = _unit(max(peaks, default=0.0), BYTES)
    rows = [["mode", "cosine", "rel. error", "noise", "passes", f"time, {time_unit}", f"peak, {peak_unit}"]]
    for name in every:
        rows.append([name, *[""] * 6])
        if name in ran:
            mode = ran[name]
            shares = mode.relative_error, mode.noise_to_signal, mode.seconds / time, mode.peak_bytes / peak
            error, noise, took, held = map(_short, shares)
            rows[-1] = [name, f"{mode.cosine:.3f}", error, noise, f"{mode.passes:.1f}", took, held]
    reasons = {n: f"cannot run on this model {_mark(m, notes)}" for n, m in every.items() if isinstance(m, str)}
    return _with_controls(rows, found.altered, reasons)


def _sweep(title: str, sweep: Sweep | str, notes: list[str]) -> str:
    if isinstance(sweep, str):
        return _filled(f"{title}: not varied, {sweep}")

    def cell(found: Distance | str) -> str:
        return _mark(found, notes) if isinstance(found, str) else f"{found.cosine:.2f} {_short(found.of_one_draw):>5}"

    rows = [["mode", *map(_short, sweep.values)], *([mode, *map(cell, row)] for mode, row in sweep.modes.items())]
    return "\n".join([title, table(rows)])


def _trainings(made: Trainings, controls: Collection[str], notes: list[str]) -> str:
    seeds = f"{len(made.seeds)} seed{'s' * (len(made.seeds) > 1)}"
    title = f"trainings of {made.steps:,} steps from the same start, {seeds}: mean ± standard error"
    outcomes = {name: mode for name, mode in made.modes.items() if isinstance(mode, Outcome)}
    columns = {"val. loss": "validation_loss", "accuracy, %": "accuracy", str(made.metric): "value"}
    columns = {head: key for head, key in columns.items() if any(getattr(end, key) for end in outcomes.values())}
    last = list(columns.values())[-1] if columns else "outer_loss"  # whose difference from no feedback is told
    rows = [["mode", "outer loss", *columns, *["minus none"] * bool(columns)]]
    none = getattr(outcomes.get("none"), last, None)

    def cell(key: str, values: Sequence[float], sign: str = "") -> str:
        return _spread([100 * a for a in values], 1, sign) if key == "accuracy" else _spread(values, sign=sign)

    for name, mode in made.modes.items():
        row = [name, _mark(mode, notes) if isinstance(mode, str) else _spread(mode.outer_loss)]
        if isinstance(mode, Outcome) and columns:
            row += [cell(key, getattr(mode, key)) for key in columns.values()]
            if none is not None and name != "none":  # the gain over no feedback, seed by seed
                row.append(cell(last, [a - b for a, b in zip(getattr(mode, last), none, strict=True)], "+"))
        rows.append(row + [""] * (len(rows[0]) - len(row)))
    return "\n".join([title, _with_controls(rows, controls, {})])


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


# ------------------------------------------------------------------------------------------------- what to take


def gives_the_gradient_of_a_step(mode: Estimator) -> bool:
    """Whether a mode gives feedback, and that through the student's step, which is what it is compared with."""
    return mode.credits != "nothing" and not isinstance(mode, Implicit)


# Modes that are exact but for rounding; and that are never recommended: no feedback, and another gradient.
EXACT = tuple(name for name in MODES if estimator(name).exact)
NEVER = tuple(name for name in MODES if not gives_the_gradient_of_a_step(estimator(name)))


def recommendation(
    modes: Mapping[str, ModeCost | str], exact_modes: Collection[str] = EXACT, never: Collection[str] = NEVER
) -> tuple[str | None, str]:
    """The name of the mode to take, and the sentences that say so and what decided.

    Of the modes that are exact to rounding, and without noise, the fastest is taken; where times are within 10 % the
    one with the least memory; where that is too, ``forward``. Where none is exact to rounding, the same holds for those
    within 1 %; where there are none of these either, the nearest in one draw is taken. ``none`` gives no feedback and
    ``implicit`` is another gradient: neither is recommended.

    Args:
        modes: as in :class:`metapl.ablation.Ablation`.
        exact_modes: names of modes that are exact but for rounding; of labels that are drawn none is.
        never: names of modes that are not recommended.

    Returns: the name, None where no mode ran; and the text.
    """
    ran = {n: m for n, m in modes.items() if isinstance(m, ModeCost) and n not in never}
    if not ran:
        return None, "No mode that gives feedback can run on this model; the reasons stand beside the modes."
    off = {name: mode.of_one_draw for name, mode in ran.items()}
    sure = {n: m for n, m in ran.items() if n in exact_modes and m.noise_to_signal == 0}
    exact = {n: m for n, m in sure.items() if m.relative_error <= TRUSTED}
    near = {name: mode for name, mode in ran.items() if off[name] <= NEAR}
    if exact:
        name, decided = _cheapest(exact)
        rounding = max(off[name] for name in exact)
        told = f" (which is {rounding:.1g} of its length here)" if rounding > TOLD else ""
        why = f"its gradient is the exact one to rounding{told}, without noise"
        why += f", {decided}" if decided else "; no other of these modes is exact to rounding"
    elif near:
        name, decided = _cheapest(near)
        why = f"none of these modes is exact to rounding; its gradient is within {off[name]:.1g} of the exact one"
        why += f", {decided}" if decided else ""
    else:
        name = min(ran, key=off.__getitem__)
        why = (
            "none of these modes is exact, or nearly; of one draw of labels its gradient is the nearest to the exact "
            f"one (error {ran[name].relative_error:.2g}, noise {ran[name].noise_to_signal:.2g} of its length)"
        )
    text = f"Take {name}: {why}. A call takes {duration(ran[name].seconds)} and {size(ran[name].peak_bytes)}."
    clearly = {n: m.seconds for n, m in near.items() if m.seconds * (1 + EQUAL) < ran[name].seconds and n not in exact}
    if exact and clearly:
        other = min(clearly, key=clearly.__getitem__)
        text += f" {other} is within {off[other]:.1g} of it and takes {duration(clearly[other])}."
    if "reinforce" in ran and name != "reinforce":
        text += (
            f" Algorithm 1's scalar (reinforce) takes {duration(ran['reinforce'].seconds)}, and error and noise of one "
            f"draw are {off['reinforce']:.2g} times the signal."
        )
    return name, text


def _cheapest(modes: Mapping[str, ModeCost]) -> tuple[str, str]:
    """The mode that costs least, and what decided, as part of a sentence; nothing where there is one."""
    if len(modes) == 1:
        return next(iter(modes)), ""
    seconds = {name: mode.seconds for name, mode in modes.items()}
    fastest, next_one = _least(seconds)
    if len(fastest) == 1:
        times = f"{duration(seconds[fastest[0]])}; next {duration(next_one)}"
        return fastest[0], f"and of {_listed(modes)} it is the fastest ({times})"
    smallest, next_one = _least({name: modes[name].peak_bytes for name in fastest})
    of_all = f"of {_listed(modes)}, " if len(fastest) < len(modes) else ""
    tied = f"and as {of_all}{_listed(fastest)} take the same time within {100 * EQUAL:.0f} %"
    if len(smallest) == 1:
        needs = f"{size(modes[smallest[0]].peak_bytes)}; next {size(next_one)}"
        return smallest[0], f"{tied}, the least memory decided ({needs})"
    if PREFERRED in smallest:
        return PREFERRED, f"{tied}, and memory too, the choice is {PREFERRED}, which needs no second derivatives"
    nearest = min(smallest, key=lambda name: modes[name].of_one_draw)
    return nearest, f"{tied}, and memory too, the nearest to the exact gradient is taken"


def _least(values: Mapping[str, float]) -> tuple[list[str], float]:
    """The names whose value is the least, or equal to it within the tolerance; and the least of the others."""
    most = min(values.values()) * (1 + EQUAL)
    names = [name for name, value in values.items() if value <= most]
    return names, min((value for value in values.values() if value > most), default=0.0)


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} and {last}" if first else last


SECONDS, BYTES = {"s": 1.0, "ms": 1e-3}, {"GB": 1e9, "MB": 1e6, "KB": 1e3}


def _unit(value: float, units: Mapping[str, float]) -> tuple[str, float]:
    """The first of these units, which begin with the greatest, that a value reaches in three digits; or the last."""
    return next(((name, one) for name, one in units.items() if value >= 0.9995 * one), list(units.items())[-1])


def in_units(value: float, units: Mapping[str, float]) -> str:
    """
    >>> in_units(0.00247, SECONDS), in_units(12.3, SECONDS), in_units(264_000_000, BYTES)
    ('2.47 ms', '12.3 s', '264 MB')
    """
    name, one = _unit(value, units)
    return f"{value / one:.3g} {name}"


duration, size = partial(in_units, units=SECONDS), partial(in_units, units=BYTES)
