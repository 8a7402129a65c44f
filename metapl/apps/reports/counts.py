"""How many examples each class has: bars by name, or lines by size where there are many classes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from metapl.apps.reports.fonts import short_name

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_NAMED = 40
"""Classes that are drawn by their names; more are drawn by their size."""


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name horizontal bars, the first at the top, and count along the lower edge."""
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="x")
    dress_counts(axes)


def draw_by_size(axes: Axes, counts: Sequence[int], lines: Sequence[tuple[Sequence[int], str]]) -> None:
    """Draw numbers by class as lines, each with its color; the class with the largest of ``counts`` comes first."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    for values, color in lines:
        axes.plot(np.asarray(values)[order], color=color)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes, the largest first")
    axes.grid()
    dress_counts(axes)


def dress_counts(axes: Axes) -> None:
    """Whole numbers at the ticks of the axis that counts: the horizontal one beside named rows."""
    from matplotlib.ticker import EngFormatter, MaxNLocator

    counted = axes.xaxis if axes.yaxis_inverted() else axes.yaxis
    counted.set_major_locator(MaxNLocator(5, integer=True))
    counted.set_major_formatter(EngFormatter(sep=""))
