"""The confusion matrix: which class was taken for which."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import Box, axes_at, write_heading, write_note
from metapl.apps.reports.style import INK
from metapl.apps.reports.text import short_name, text_width
from metapl.errors import MetaplError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches.
SMALLEST_MATRIX, LARGEST_MATRIX, MATRIX_CELL, COLOR_BAR = 5.2, 10.5, 0.26, 0.75
SMALLEST_LINED_CELL = 0.04  # lines between smaller ones would hide them


def checked_counts(confusion: Sequence[Sequence[int]], classes: Sequence[str] | None) -> list[list[int]]:
    """The counts as a square of whole numbers, one row and one column for each class."""
    counts = [[int(count) for count in row] for row in confusion]
    if not counts or any(len(row) != len(counts) for row in counts):
        raise MetaplError(
            f"the confusion has rows of {sorted({len(row) for row in counts})}; expected C rows of C counts"
        )
    if classes is not None and len(classes) != len(counts):
        raise MetaplError(f"{len(classes)} names of classes were given for a confusion of {len(counts)} classes")
    return counts


@dataclass(frozen=True)
class Matrix:
    """The counts with what their size decides: inches around the cells, points of the names and of the counts."""

    counts: list[list[int]]
    names: tuple[str, ...]
    side: float
    left: float
    below: float
    right: float
    turned: bool  # the names below stand upright
    name_points: float
    count_points: float | None  # None: too small to be read, so a color bar stands for the counts

    @classmethod
    def of(cls, counts: list[list[int]], names: Sequence[str]) -> Matrix:
        """Whatever is decided by the number of classes, the length of their names and the largest count."""
        size = len(counts)
        side = min(max(SMALLEST_MATRIX, MATRIX_CELL * size), LARGEST_MATRIX)
        cell = 72 * side / size
        short = tuple(short_name(name) for name in names)
        # Not below 5 points: for many classes, every second or third is named instead.
        name_points = min(max(0.72 * cell, 5.0), 10.0)
        widest = max(text_width(name, name_points) for name in short)
        turned = 72 * widest > 0.9 * cell
        # A digit is 0.64 of its size wide.
        count_points = min(11.0, 0.6 * cell, 1.35 * cell / len(str(max(map(max, counts)))))
        return cls(
            counts=counts,
            names=short,
            side=side,
            left=widest + 0.5,
            below=(widest if turned else 0.2) + 0.4,
            right=0.1 if count_points >= 5 else COLOR_BAR,
            turned=turned,
            name_points=name_points,
            count_points=count_points if count_points >= 5 else None,
        )


def draw_matrix(figure: Figure, box: Box, matrix: Matrix) -> None:
    """Draws it with its cells in the box; names, title and color bar stand around it."""
    from matplotlib.colors import LinearSegmentedColormap, PowerNorm

    axes = axes_at(figure, box)
    totals = [max(sum(row), 1) for row in matrix.counts]
    shares = [[count / total for count in row] for row, total in zip(matrix.counts, totals, strict=True)]
    colors = LinearSegmentedColormap.from_list("share", ["#FFFFFF", "#CFE3F1", "#6BAED6", "#0072B2", "#003B5C"])
    # The square root lets a mistake in a hundred be seen beside a diagonal that is nearly all of its row.
    image = axes.imshow(shares, cmap=colors, norm=PowerNorm(0.5, 0.0, 1.0), aspect="auto", interpolation="nearest")
    _dress_matrix(axes, matrix)
    if matrix.count_points is not None:
        _write_counts(axes, matrix, shares)
        return
    left, bottom, width, height = box
    bar = figure.colorbar(image, cax=axes_at(figure, (left + width + 0.15, bottom, 0.12, height)))
    bar.set_ticks([0, 0.01, 0.05, 0.1, 0.25, 0.5, 1], labels=["0", "1 %", "5 %", "10 %", "25 %", "50 %", "100 %"])
    bar.outline.set_visible(False)


def _dress_matrix(axes: Axes, matrix: Matrix) -> None:
    size, total = len(matrix.counts), sum(map(sum, matrix.counts))
    correct = sum(matrix.counts[index][index] for index in range(size))
    write_heading(axes, "Confusion on the test set")
    share = f"{100 * correct / total:.1f} % of {total:,} correct; " if total else ""
    write_note(axes, f"{share}color: share of the true class")
    ticks = range(0, size, math.ceil(1.1 * matrix.name_points / (72 * matrix.side / size)))
    labels = [matrix.names[index] for index in ticks]
    axes.set_xticks(ticks, labels, fontsize=matrix.name_points, rotation=90 if matrix.turned else 0)
    axes.set_yticks(ticks, labels, fontsize=matrix.name_points)
    axes.set_xlabel("predicted class", labelpad=5)
    axes.set_ylabel("true class", labelpad=5)
    axes.spines[:].set_visible(False)
    if matrix.side / size >= SMALLEST_LINED_CELL:
        edges = [index - 0.5 for index in range(size + 1)]
        axes.set_xticks(edges, minor=True)
        axes.set_yticks(edges, minor=True)
        axes.grid(which="minor", linewidth=0.8 if size <= 30 else 0.3)
    axes.tick_params(which="both", pad=3)


def _write_counts(axes: Axes, matrix: Matrix, shares: Sequence[Sequence[float]]) -> None:
    for row, counts in enumerate(matrix.counts):
        for column, count in enumerate(counts):
            if count:
                color = "white" if shares[row][column] > 0.3 else INK
                look: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": matrix.count_points}
                axes.text(column, row, str(count), color=color, **look)
