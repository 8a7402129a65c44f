"""The picture of an ablation: how far each mode is from the exact gradient, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.ablation.results import SETTINGS
from metapl.apps.reports.canvas import INK, MARGIN, PALETTE, QUIET, drawing, headed_page, lay_out, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import SubFigure

SMALLEST = 1e-9  # distances below it are drawn at it

Figures = Mapping[str, Any]


def draw_ablation(path: Path, found: Figures) -> None:
    """Draw what :meth:`metapl.ablation.Ablation.as_dict` gives: the modes one a row; below, where they were measured,
    over step sizes, temperatures and batch sizes, and what short trainings ended with."""
    rows = {**found["modes"], **found["altered"]}
    colors = {name: "#D0D0D0" if name in found["altered"] else "#9DB8CC" for name in rows}
    colors[found["recommended"]] = PALETTE[0]
    sweeps = {
        setting: sweep
        for setting, sweep in found.get("stability", {}).items()
        if any("reason" not in one for row in sweep.get("modes", {}).values() for one in row)
    }
    trained = found.get("trainings", {})
    ends = {name: end for name, end in trained.get("modes", {}).items() if "reason" not in end}
    heights = [0.9 + 0.3 * len(rows), 4.6 * bool(sweeps), (1.0 + 0.3 * len(ends)) * bool(ends)]
    high = MARGIN + sum(heights)
    with drawing([found["recommendation"], *rows]) as explanation:
        figure = headed_page("", f"{found['recommendation']} {explanation}", 12.0, high)
        lay_out(figure, MARGIN, high)
        heights = [height for height in heights if height]
        parts = list(figure.subfigures(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0])
        _draw_modes(parts[0], found, rows, colors)
        if sweeps:
            _draw_sweeps(parts[1], sweeps)
        if ends:
            _draw_trainings(parts[-1], ends, colors, trained)
        write_page(path, figure)


def _draw_modes(figure: SubFigure, found: Figures, rows: Figures, colors: Mapping[str, str]) -> None:
    """A row for each mode: distance and noise on a logarithmic scale, passes, time and memory."""
    from matplotlib.ticker import LogLocator

    ran = {name: row for name, row in rows.items() if "reason" not in row}
    unit, one = ("s", 1.0) if max((row["seconds"] for row in ran.values()), default=0) >= 1 else ("ms", 1e-3)
    values = {
        "distance from the exact gradient": {name: _distance(row) for name, row in ran.items()},
        "student passes": {name: row["passes"] for name, row in ran.items()},
        f"time, {unit}": {name: row["seconds"] / one for name, row in ran.items()},
        "peak memory, MB": {name: row["peak_bytes"] / 1e6 for name, row in ran.items()},
    }
    first, *others = figure.subplots(1, 4, sharey=True, width_ratios=(1.3, 1, 1, 1))
    for axes, (title, of) in zip((first, *others), values.items(), strict=True):
        axes.barh(range(len(rows)), [of.get(name, 0.0) for name in rows], color=list(colors.values()), height=0.7)
        _dress(axes, title, "x")
    first.set_xscale("log")
    first.xaxis.set_major_locator(LogLocator(numticks=4))
    first.xaxis.set_major_formatter(_plain)
    first.set_xlim(left=SMALLEST / 3)
    first.set_xlabel("error and noise of one draw, over the gradient's length", fontsize=8.5, loc="left")
    for number, name in enumerate(rows):
        if name not in ran:
            first.text(SMALLEST, number, "cannot run", va="center", fontsize=8.5, color=QUIET)
    _name_rows(first, list(rows))
    for label, name in zip(first.get_yticklabels(), rows, strict=True):
        label.set_color(QUIET if name in found["altered"] else INK)
        label.set_fontweight("bold" if name == found["recommended"] else "normal")


def _draw_sweeps(figure: SubFigure, sweeps: Figures) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator

    cosines, distances = figure.subplots(2, len(sweeps), sharex="col", sharey="row", squeeze=False)
    names = list(dict.fromkeys(name for sweep in sweeps.values() for name in sweep["modes"]))
    looks = {name: (PALETTE[i % len(PALETTE)], "-" if i < len(PALETTE) else "--") for i, name in enumerate(names)}
    lowest = 0.0
    for above, below, (setting, sweep) in zip(cosines, distances, sweeps.items(), strict=True):
        for name, row in sweep["modes"].items():
            points = [(x, one) for x, one in zip(sweep["values"], row, strict=True) if "reason" not in one]
            places, ran, (color, dashes) = [x for x, _ in points], [one for _, one in points], looks[name]
            lowest = min([lowest, *(one["cosine"] for one in ran)])
            for axes, values in ((above, [one["cosine"] for one in ran]), (below, list(map(_distance, ran)))):
                axes.plot(places, values, dashes, marker="o", ms=4, lw=1.6, color=color)
        for axes, title in ((above, "cosine"), (below, "error and noise of one draw")):
            _dress(axes, title if axes in (cosines[0], distances[0]) else "", "both")
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(FixedLocator(sweep["values"]))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.xaxis.set_major_formatter(_plain)
        below.set_yscale("log")
        below.yaxis.set_major_formatter(_plain)
        below.set_xlabel(SETTINGS.get(setting, setting).partition(",")[0], loc="left")
    cosines[0].set_ylim(lowest - 0.05, 1.05)  # shared by the row
    handles = [cosines[0].plot([], [], marker="o", ms=4, color=looks[name][0])[0] for name in names]
    figure.legend(handles, names, loc="outside upper left", ncols=min(6, len(names)), fontsize=9)


def _draw_trainings(figure: SubFigure, ends: Figures, colors: Mapping[str, str], trained: Figures) -> None:
    steps, seeds = trained["steps"], len(trained["seeds"])
    titles = {"outer_loss": "outer loss", "validation_loss": "validation loss", "accuracy": "validation accuracy, %"}
    titles["value"] = f"validation {trained.get('metric')}"
    titles = {key: title for key, title in titles.items() if any(end.get(key) for end in ends.values())}
    first, *others = figure.subplots(1, len(titles), sharey=True, squeeze=False)[0]
    for axes, (key, title) in zip((first, *others), titles.items(), strict=True):
        times = 100 if key == "accuracy" else 1
        for number, (name, of) in enumerate((name, end[key]) for name, end in ends.items()):
            if of:
                axes.plot(
                    [times * x for x in of["values"]], [number] * len(of["values"]), "|", ms=7, color=colors[name]
                )
                error = times * (of["standard_error"] or 0)
                axes.errorbar(times * of["mean"], number, xerr=error, fmt="o", ms=5, lw=2, color=colors[name])
        _dress(axes, title, "x")
    _name_rows(first, list(ends))
    note = f" from the same start: mean, standard error and {seeds} seeds" if seeds > 1 else ""
    first.set_xlabel(f"after {steps:,} steps{note}", fontsize=8.5, loc="left")


def _name_rows(axes: Axes, names: Sequence[str]) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.4, -0.6)


def _dress(axes: Axes, title: str, grid: Any) -> None:
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.grid(axis=grid)


def _plain(value: float, position: int) -> str:
    return f"{value:.3g}"


def _distance(row: Mapping[str, float]) -> float:
    return max(SMALLEST, math.hypot(row["relative_error"], row["noise_to_signal"]))
