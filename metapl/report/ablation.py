"""The picture of an ablation: how far each mode is from the exact gradient, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metapl.report.style import DOTS_PER_INCH, PALETTE, QUIET, STYLE
from metapl.report.text import wrap
from metapl.runs.atomic import replacing

SMALLEST = 1e-9
"""Distances below it are drawn at it."""


def draw_ablation(path: Path, modes: Mapping[str, Mapping[str, float]], recommendation: str) -> None:
    """Draw the modes that ran, one a row: distance and noise on a logarithmic scale, passes, time and memory.

    Args:
        path: of the PNG, replaced as a whole.
        modes: by name, with the figures of :class:`metapl.ablation.ModeCost`.
        recommendation: the sentence above the panels.
    """
    import matplotlib as mpl
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    names = list(modes)[::-1]
    columns = [
        ("distance from the exact", [_distance(modes[name]) for name in names]),
        ("student passes a step", [modes[name]["passes"] for name in names]),
        ("seconds", [modes[name]["seconds"] for name in names]),
        ("peak memory, MB", [modes[name]["peak_bytes"] / 1e6 for name in names]),
    ]
    style: Any = STYLE  # matplotlib types its keys
    with mpl.rc_context(style):
        figure = Figure(figsize=(12, 1.8 + 0.38 * len(names)), dpi=DOTS_PER_INCH, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(1, len(columns), sharey=True)
        for axis, (title, values), color in zip(axes, columns, PALETTE, strict=False):
            axis.barh(names, values, color=color)
            axis.set_title(title, fontsize=10.5, loc="left")
            axis.grid(axis="x", color="#E4E4E4")
        axes[0].set_xscale("log")
        axes[0].set_xlim(left=SMALLEST)
        axes[0].set_xlabel("error and noise together, over the gradient's length", color=QUIET, fontsize=8.5)
        figure.suptitle("\n".join(wrap(recommendation, 11.5, 10)), fontsize=10, x=0.01, ha="left")
        with replacing(path) as file:
            figure.savefig(file, format="png")


def _distance(mode: Mapping[str, float]) -> float:
    return max(SMALLEST, math.hypot(mode["relative_error"], mode["noise_to_signal"]))
