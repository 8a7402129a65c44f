"""The picture of an ablation: how far each mode is from the exact gradient, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.ablation.results import SETTINGS
from metapl.apps.reports.canvas import drawing, headed_page, lay_out, write_page
from metapl.apps.reports.style import INK, MARGIN, PALETTE, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST = 1e-9
"""Distances below it are drawn at it."""

WIDTH = 12.0
"""Inches."""

TAKEN, OTHER, CONTROL = PALETTE[0], "#9DB8CC", "#D0D0D0"
"""The mode that is recommended, the other modes, altered feedback."""

Figures = Mapping[str, Any]


def draw_ablation(path: Path, found: Figures) -> None:
    """Draw the modes one a row: distance and noise on a logarithmic scale, passes, time and memory.

    Below, where they were measured: the modes over step sizes, temperatures and batch sizes, and what short trainings
    ended with.

    Args:
        path: of the PNG, replaced as a whole.
        found: :meth:`metapl.ablation.Ablation.as_dict`.
    """
    rows = {**found["modes"], **found["altered"]}
    sweeps = {n: s for n, s in found.get("stability", {}).items() if "reason" not in s and _drawable(s)}
    outcomes = {n: m for n, m in found.get("trainings", {}).get("modes", {}).items() if "reason" not in m}
    bars, lines, dots = 0.9 + 0.3 * len(rows), 4.6 * bool(sweeps), (1.0 + 0.3 * len(outcomes)) * bool(outcomes)
    heights = [height for height in (bars, lines, dots) if height]
    high = MARGIN + sum(heights)
    with drawing([found["recommendation"], *rows]) as explanation:
        figure = headed_page("", f"{found['recommendation']} {explanation}", WIDTH, high)
        lay_out(figure, MARGIN, high)
        parts = iter(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        _draw_modes(next(parts), rows, found)
        if sweeps:
            _draw_sweeps(next(parts), sweeps)
        if outcomes:
            _draw_trainings(next(parts), outcomes, found)
        write_page(path, figure)


def _draw_modes(figure: Any, rows: Figures, found: Figures) -> None:
    names = list(rows)
    ran = {name: row for name, row in rows.items() if "reason" not in row}
    unit, one = ("s", 1.0) if max((row["seconds"] for row in ran.values()), default=0) >= 1 else ("ms", 1e-3)
    from matplotlib.ticker import LogLocator

    axes = figure.subplots(1, 4, sharey=True, width_ratios=(1.3, 1, 1, 1))
    panels: tuple[tuple[str, Callable[[Figures], float]], ...] = (
        ("distance from the exact gradient", lambda row: max(SMALLEST, _distance(row))),
        ("student passes", lambda row: row["passes"]),
        (f"time, {unit}", lambda row: row["seconds"] / one),
        ("peak memory, MB", lambda row: row["peak_bytes"] / 1e6),
    )
    for axis, (title, value) in zip(axes, panels, strict=True):
        values = [value(ran[name]) if name in ran else 0.0 for name in names]
        axis.barh(range(len(names)), values, color=[_color(name, found) for name in names], height=0.7)
        _dress(axis, title, "x")
    axes[0].set_xscale("log")
    axes[0].xaxis.set_major_locator(LogLocator(numticks=4))
    axes[0].xaxis.set_major_formatter(_plain)
    axes[0].set_xlim(left=SMALLEST / 3)
    axes[0].set_xlabel("error and noise of one draw, over the gradient's length", fontsize=8.5, loc="left")
    for number, name in enumerate(names):
        if name not in ran:
            axes[0].text(SMALLEST, number, "cannot run", va="center", fontsize=8.5, color=QUIET)
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.4, -0.6)
    for label, name in zip(axes[0].get_yticklabels(), names, strict=True):
        label.set_color(QUIET if name in found["altered"] else INK)
        label.set_fontweight("bold" if name == found["recommended"] else "normal")


def _draw_sweeps(figure: Any, sweeps: Figures) -> None:
    """Cosines above, distances below; a column for each setting."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes = figure.subplots(2, len(sweeps), sharex="col", sharey="row", squeeze=False)
    names = list(dict.fromkeys(name for sweep in sweeps.values() for name in sweep["modes"]))
    colors = dict(zip(names, (PALETTE[i % len(PALETTE)] for i in range(len(names))), strict=True))
    for column, (setting, sweep) in enumerate(sweeps.items()):
        for axis, title, value in (
            (axes[0][column], "cosine", lambda one: one["cosine"]),
            (axes[1][column], "error and noise of one draw", lambda one: max(SMALLEST, _distance(one))),
        ):
            for name, row in sweep["modes"].items():
                points = [(v, value(one)) for v, one in zip(sweep["values"], row, strict=True) if "reason" not in one]
                if points:
                    dashed = "-" if names.index(name) < len(PALETTE) else "--"
                    axis.plot(*zip(*points, strict=True), dashed, marker="o", ms=4, lw=1.6, color=colors[name])
            _dress(axis, title if column == 0 else "", "both")
            axis.set_xscale("log")
            axis.xaxis.set_major_locator(FixedLocator(sweep["values"]))
            axis.xaxis.set_minor_locator(NullLocator())
            axis.xaxis.set_major_formatter(_plain)
        axes[1][column].set_yscale("log")
        axes[1][column].yaxis.set_major_formatter(_plain)
        axes[1][column].set_xlabel(SETTINGS.get(setting, setting).partition(",")[0], loc="left")
    rows = [row for sweep in sweeps.values() for row in sweep["modes"].values()]
    lowest = min((one["cosine"] for row in rows for one in row if "reason" not in one), default=0.0)
    axes[0][0].set_ylim(min(-0.05, lowest - 0.05), 1.05)  # shared by the row
    handles = [axes[0][0].plot([], [], marker="o", ms=4, color=colors[name])[0] for name in names]
    figure.legend(handles, names, loc="outside upper left", ncols=min(6, len(names)), fontsize=9)


def _draw_trainings(figure: Any, outcomes: Figures, found: Figures) -> None:
    """Means and standard errors, and each seed."""
    made = found["trainings"]
    validated = any(outcome["accuracy"] for outcome in outcomes.values())
    keys = ["outer_loss", *(["validation_loss", "accuracy"] if validated else [])]
    titles = {"outer_loss": "outer loss", "validation_loss": "validation loss", "accuracy": "validation accuracy, %"}
    axes = figure.subplots(1, len(keys), sharey=True, squeeze=False)[0]
    for axis, key in zip(axes, keys, strict=True):
        for number, (name, outcome) in enumerate(outcomes.items()):
            if not outcome[key]:
                continue
            times, color = 100 if key == "accuracy" else 1, _color(name, found)
            values = [times * value for value in outcome[key]["values"]]
            axis.plot(values, [number] * len(values), "|", ms=7, color=color)
            error = times * (outcome[key]["standard_error"] or 0)
            axis.errorbar(times * outcome[key]["mean"], number, xerr=error, fmt="o", ms=5, lw=2, color=color)
        _dress(axis, titles[key], "x")
    axes[0].set_yticks(range(len(outcomes)), list(outcomes))
    axes[0].set_ylim(len(outcomes) - 0.4, -0.6)
    count = len(made["seeds"])
    note = f"after {made['steps']:,} steps from the same start: mean, standard error and {count} seeds"
    axes[0].set_xlabel(note if count > 1 else f"after {made['steps']:,} steps", fontsize=8.5, loc="left")


def _dress(axis: Axes, title: str, grid: Any) -> None:
    axis.set_title(title, fontsize=10.5, loc="left")
    axis.grid(axis=grid)


def _plain(value: float, position: int) -> str:
    return f"{value:.3g}"


def _color(name: str, found: Figures) -> str:
    return TAKEN if name == found["recommended"] else CONTROL if name in found["altered"] else OTHER


def _distance(row: Mapping[str, float]) -> float:
    return math.hypot(row["relative_error"], row["noise_to_signal"])


def _drawable(sweep: Figures) -> bool:
    rows: Sequence[Sequence[Figures]] = list(sweep["modes"].values())
    return any("reason" not in one for row in rows for one in row)
