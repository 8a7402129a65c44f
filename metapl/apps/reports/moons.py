"""Decision regions of several methods in the plane, and how many of their runs succeed."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.apps.reports.canvas import axes_at, drawing, headed_page, write_heading, write_note, write_page
from metapl.apps.reports.style import INK, MARGIN, NOTE_SIZE, PALETTE, QUIET

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CLASS_COLORS = (PALETTE[0], PALETTE[1])
SUCCESS_COLOR = PALETTE[2]

# Inches.
PANEL, REGION_HEIGHT, STRIP_HEIGHT, BETWEEN, ABOVE, BELOW_REGION, BELOW = 4.1, 3.1, 1.1, 0.55, 0.75, 0.3, 0.35

BINS = 40
"""Bars of the histogram of accuracies, from 0 to 1."""


@dataclass(frozen=True)
class Regions:
    """What is drawn of a method.

    Args:
        title, note: above the panel.
        points: (n, 2), of the run that is shown.
        classes: n, 0 or 1.
        labeled: the positions of the labeled points.
        corner, far_corner: of the rectangle that was classified.
        grid: rows of classes, from the corner, as the run classifies the rectangle.
        accuracy: of all runs.
    """

    title: str
    note: str
    points: Sequence[Sequence[float]]
    classes: Sequence[int]
    labeled: Sequence[int]
    corner: tuple[float, float]
    far_corner: tuple[float, float]
    grid: Sequence[Sequence[int]]
    accuracy: Sequence[float]


def draw_regions(
    path: str | os.PathLike[str], title: str, note: str, methods: Sequence[Regions], success: float
) -> None:
    """Draw the methods side by side: the regions of one run each, and below them the accuracies of all runs.

    Args:
        path: of the PNG, replaced as a whole.
        title, note: of the page.
        methods: one or more.
        success: a run with an accuracy above it succeeds.
    """
    with drawing([title, note, *(text for method in methods for text in (method.title, method.note))]):
        write_page(path, _page(title, note, methods, success))


def _page(title: str, note: str, methods: Sequence[Regions], success: float) -> Figure:
    width = 2 * MARGIN + len(methods) * PANEL + (len(methods) - 1) * BETWEEN
    top = MARGIN + REGION_HEIGHT + BELOW_REGION + STRIP_HEIGHT + BELOW
    figure = headed_page(title, note, width, top + ABOVE)
    highest = max(int(np.histogram(method.accuracy, BINS, (0.0, 1.0))[0].max()) for method in methods)
    lowest = min(0.4, *(min(method.accuracy) - 0.02 for method in methods))  # one axis, so that panels can be compared
    for number, method in enumerate(methods):
        left = MARGIN + number * (PANEL + BETWEEN)
        _draw_region(axes_at(figure, (left, top - REGION_HEIGHT, PANEL, REGION_HEIGHT)), method)
        strip = axes_at(figure, (left, MARGIN + BELOW, PANEL, STRIP_HEIGHT))
        _draw_accuracies(strip, method.accuracy, success, lowest, highest)
        if number == 0:
            strip.set_ylabel("runs", fontsize=NOTE_SIZE, labelpad=2)
    return figure


def _draw_region(axes: Axes, method: Regions) -> None:
    from matplotlib.colors import ListedColormap

    (left, bottom), (right, top) = method.corner, method.far_corner
    extent = (left, right, bottom, top)
    pale: Any = ListedColormap(CLASS_COLORS)
    axes.imshow(
        method.grid, origin="lower", extent=extent, cmap=pale, vmin=0, vmax=1, alpha=0.22, aspect="auto", zorder=0
    )
    for c, color in enumerate(CLASS_COLORS):
        members = [point for point, true in zip(method.points, method.classes, strict=True) if true == c]
        across, up = zip(*members, strict=True)
        axes.scatter(across, up, s=3, color=color, alpha=0.55, linewidths=0, zorder=2)
    for position in method.labeled:
        marker, color = (("o", "s")[method.classes[position]], CLASS_COLORS[method.classes[position]])
        x, y = method.points[position]
        axes.scatter([x], [y], s=110, marker=marker, color=color, edgecolors=INK, linewidths=1.6, zorder=4)
    axes.set_xlim(left, right)
    axes.set_ylim(bottom, top)
    axes.set_xticks([])
    axes.set_yticks([])
    write_heading(axes, method.title)
    write_note(axes, method.note)


def _draw_accuracies(axes: Axes, accuracy: Sequence[float], success: float, lowest: float, highest: int) -> None:
    from matplotlib.ticker import MaxNLocator

    parts = [[value for value in accuracy if (value > success) == succeeded] for succeeded in (True, False)]
    axes.hist(parts, bins=BINS, range=(0.0, 1.0), stacked=True, rwidth=0.9, color=[SUCCESS_COLOR, QUIET], zorder=2)
    axes.axvline(success, color=INK, linewidth=1.0, linestyle=(0, (3, 2)), zorder=4)
    axes.grid(axis="y")
    axes.set_xlim(lowest, 1.0)
    axes.set_ylim(0, 1.1 * highest)
    axes.yaxis.set_major_locator(MaxNLocator(3, integer=True))
    axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.3g} %")
    axes.set_xlabel("accuracy on all points", loc="right", labelpad=1, fontsize=NOTE_SIZE)
