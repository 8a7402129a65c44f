"""The confusion matrix: which class was taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from metapl.apps.reports.canvas import write_heading, write_note
from metapl.apps.reports.style import INK
from metapl.apps.reports.text import short_name, text_width
from metapl.errors import MetaplError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMALLEST, LARGEST, CELL = 5.2, 10.5, 0.26
"""Inches of a matrix, and of the cells between these bounds."""

SMALLEST_LINED_CELL = 0.04  # lines between smaller ones would hide them


def checked_counts(confusion: Sequence[Sequence[int]], classes: Sequence[str] | None) -> NDArray[np.int64]:
    """The counts as a square of whole numbers, one row and one column for each class."""
    rows = [[int(count) for count in row] for row in confusion]
    if not rows or any(len(row) != len(rows) for row in rows):
        raise MetaplError(
            f"the confusion has rows of {sorted({len(row) for row in rows})}; expected C rows of C counts"
        )
    if classes is not None and len(classes) != len(rows):
        raise MetaplError(f"{len(classes)} names of classes were given for a confusion of {len(rows)} classes")
    return np.array(rows)


def _cell(size: int) -> float:
    """Inches."""
    return min(max(SMALLEST / size, CELL), LARGEST / size)


def _name_points(size: int) -> float:
    """Not below 5: for many classes, every second or third is named instead."""
    return min(max(0.72 * 72 * _cell(size), 5.0), 10.0)


def room(names: Sequence[str]) -> tuple[float, float]:
    """Width and height in inches of the matrix with all that stands around it."""
    widest = max(text_width(short_name(name), _name_points(len(names))) for name in names)
    side = _cell(len(names)) * len(names)
    return side + widest + 1.2, side + widest + 1.5


def draw_matrix(axes: Axes, counts: NDArray[np.int64], names: Sequence[str]) -> None:
    """Draws it where there is :func:`room` for it."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    size, cell, correct = len(counts), _cell(len(counts)), int(np.trace(counts))
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    colors = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#CFE3F1", "#6BAED6", "#0072B2", "#003B5C"])
    # The square root lets a mistake in a hundred be seen beside a diagonal that is nearly all of its row.
    image = axes.imshow(shares, cmap=colors, norm=PowerNorm(0.5, 0.0, 1.0), interpolation="nearest")
    axes.set_anchor("NW")
    write_heading(axes, "Confusion on the test set")
    share = f"{100 * correct / counts.sum():.1f} % of {counts.sum():,} correct; " if counts.any() else ""
    write_note(axes, f"{share}color: share of the true class")
    points = _name_points(size)
    ticks = range(0, size, math.ceil(1.1 * points / (72 * cell)))
    labels = [short_name(names[index]) for index in ticks]
    turned = max(text_width(label, points) for label in labels) > 0.9 * cell * ticks.step
    axes.set_xticks(ticks, labels, fontsize=points, rotation=90 if turned else 0)
    axes.set_yticks(ticks, labels, fontsize=points)
    axes.set_xlabel("predicted class", labelpad=5)
    axes.set_ylabel("true class", labelpad=5)
    axes.spines[:].set_visible(False)
    if cell >= SMALLEST_LINED_CELL:
        edges = np.arange(size + 1) - 0.5
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", linewidth=0.8 if size <= 30 else 0.3)
    axes.tick_params(which="both", pad=3)
    # A digit is 0.64 of its size wide; what is too small to be read, a color bar stands for.
    count_points = min(11.0, 72 * cell * min(0.6, 1.35 / len(str(counts.max()))))
    if count_points >= 5:
        for row, column in np.argwhere(counts):
            color = "white" if shares[row, column] > 0.3 else INK
            axes.text(column, row, counts[row, column], color=color, ha="center", va="center", fontsize=count_points)
        return
    bar = axes.figure.colorbar(image, cax=axes.inset_axes((1.02, 0, 0.015, 1)))
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])
    bar.outline.set_visible(False)
