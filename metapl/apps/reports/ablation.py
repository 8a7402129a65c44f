"""The picture of an ablation: how far each mode is from the exact gradient, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import INK, MARGIN, PALETTE, QUIET, drawing, headed_page, lay_out, write_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SMALLEST = 1e-9  # distances below it are drawn at it

Figures = Mapping[str, Any]


def draw_ablation(path: Path, found: Figures) -> None:
    """Draw what :meth:`metapl.ablation.Ablation.as_dict` gives: the modes one a row."""
    rows = {**found["modes"], **found["altered"]}
    colors = {name: "#D0D0D0" if name in found["altered"] else "#9DB8CC" for name in rows}
    colors[found["recommended"]] = PALETTE[0]
    high = MARGIN + 0.9 + 0.3 * len(rows)
    with drawing([found["recommendation"], *rows]) as explanation:
        figure = headed_page("", f"{found['recommendation']} {explanation}", 12.0, high)
        lay_out(figure, MARGIN, high)
        _draw_modes(figure, found, rows, colors)
        write_page(path, figure)


def _draw_modes(figure: Figure, found: Figures, rows: Figures, colors: Mapping[str, str]) -> None:
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
