"""One picture of a training: how well it went, what the feedback was, and what the test set says."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import Box, axes_at, drawing, headed_page, write_page
from metapl.apps.reports.curves import PANELS, Curves, Panel, draw_panel, has_figures
from metapl.apps.reports.gallery import Gallery, draw_galleries, hang
from metapl.apps.reports.matrix import Matrix, checked_counts, draw_matrix
from metapl.apps.reports.style import ABOVE_PANEL, MARGIN, PALETTE, SUMMARY_SIZE
from metapl.apps.reports.text import drawable
from metapl.errors import MetaplError
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Inches.
PANEL_WIDTH, PANEL_HEIGHT = 3.8, 2.3
LEFT_OF_PANEL, RIGHT_OF_PANEL, BELOW_PANEL = 0.55, 0.65, 0.5
CELL_WIDTH = LEFT_OF_PANEL + PANEL_WIDTH + RIGHT_OF_PANEL
METHODS_LINE = 0.34


def draw_report(
    path: str | os.PathLike[str],
    *,
    title: str,
    curves: Curves,
    confusion: Sequence[Sequence[int]] | None,
    classes: Sequence[str] | None,
    summary: str,
    galleries: Sequence[Gallery] = (),
    along: str = "step",
) -> None:
    """Draws a training, or several to compare, as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        title: a few words.
        curves: rows of figures by the name of the method. A row has "step" and any of the keys in `PANELS`;
            accuracies, confidence and agreement are fractions. Rows may lack keys; what is not finite is left out.
        confusion: (C, C) counts on the test set, [true][predicted], or None.
        classes: C names, or None for numbers.
        summary: a sentence or two beneath the title.
        galleries: pictures below all that, each gallery in one row or two; those beyond are left out.
        along: what steps are counted in.

    A panel without figures is left out, and so is a gallery without pictures. Figures that jump from step to step are
    drawn as a running mean over a fortieth of the steps, with the single steps pale behind them. No display is needed
    and matplotlib's global state stays as it was.

    Raises:
        MetaplError: there is nothing to draw, there are more than 7 methods, the counts and the names do not fit, or
            the file cannot be written.
    """
    classes = None if classes is None else [shown(name) for name in classes]
    if len(curves) > len(PALETTE):
        raise MetaplError(
            f"{len(curves)} methods were given; at most {len(PALETTE)} can be distinguished by their colors"
        )
    counts = None if confusion is None else checked_counts(confusion, classes)
    choices = (panel if has_figures(panel, curves) else panel.otherwise for panel in PANELS)
    panels = [panel for panel in choices if panel and has_figures(panel, curves)]
    galleries = [gallery for gallery in galleries if len(gallery)]
    if counts is None and not panels and not galleries:
        raise MetaplError(
            "there is nothing to draw: no row has a step and a figure of a known name, no confusion and no picture"
        )
    names = [str(name) for name in (classes if classes is not None else range(len(counts or ())))]
    texts = [title, summary, *curves, *names, *(text for gallery in galleries for text in gallery.texts)]
    with drawing(texts) as explanation:
        matrix = None if counts is None else Matrix.of(counts, names)
        write_page(path, _figure(title, f"{summary} {explanation}", curves, panels, matrix, galleries, along))


def _figure(
    title: str,
    summary: str,
    curves: Curves,
    panels: Sequence[Panel],
    matrix: Matrix | None,
    galleries: Sequence[Gallery],
    along: str,
) -> Figure:
    """Panels in two columns on the left, or in one where there are two beside a matrix; the matrix on the right; the
    galleries below, from the panels' left edge to the right edge of what is above."""
    columns = 1 if matrix and len(panels) == 2 else min(len(panels), 2)
    rows = math.ceil(len(panels) / columns) if columns else 0
    # A page of nothing but pictures is as wide as two panels.
    cells = CELL_WIDTH * (columns if panels or matrix else 2)
    width = 2 * MARGIN + cells + (matrix.left + matrix.side + matrix.right if matrix else 0.0)
    body = rows * (ABOVE_PANEL + PANEL_HEIGHT + BELOW_PANEL)
    if matrix:
        body = max(body, ABOVE_PANEL + matrix.side + matrix.below)
    left = MARGIN + (LEFT_OF_PANEL if panels else 0.0)
    right = MARGIN + (matrix.right if matrix else RIGHT_OF_PANEL if panels else 0.0)
    hangings = hang(galleries, width - left - right)
    low = MARGIN + sum(hanging.height for hanging in hangings)
    top = low + body + (METHODS_LINE if len(curves) > 1 else 0.0)
    figure = headed_page(title, summary, width, top)
    if len(curves) > 1:
        _draw_methods(figure, MARGIN / width, (top - 0.15) / figure.get_figheight(), list(curves))
    for panel, box in zip(panels, _panel_boxes(len(panels), columns, low, body / max(rows, 1)), strict=True):
        draw_panel(axes_at(figure, box), panel, curves, along)
    if matrix:
        corner = MARGIN + cells + matrix.left, low + body - ABOVE_PANEL - matrix.side
        draw_matrix(figure, (*corner, matrix.side, matrix.side), matrix)
    draw_galleries(figure, hangings, left, low)
    return figure


def _panel_boxes(panels: int, columns: int, low: float, row_height: float) -> Iterator[Box]:
    """From the upper left, row by row; the last row begins at `low`."""
    for index in range(panels):
        row, column = divmod(index, columns)
        below = math.ceil(panels / columns) - 1 - row
        # The last one of an odd number takes the whole row rather than leave a hole beside it.
        wide = PANEL_WIDTH + (CELL_WIDTH if index == panels - 1 and column == 0 and columns == 2 else 0.0)
        left = MARGIN + column * CELL_WIDTH + LEFT_OF_PANEL
        yield left, low + below * row_height + BELOW_PANEL, wide, row_height - ABOVE_PANEL - BELOW_PANEL


def _draw_methods(figure: Figure, left: float, y: float, methods: Sequence[str]) -> None:
    """The legend of colors, once for all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=PALETTE[index], linewidth=4.5) for index in range(len(methods))]
    place: dict[str, Any] = {"loc": "center left", "bbox_to_anchor": (left, y), "borderpad": 0, "borderaxespad": 0}
    look: dict[str, Any] = {"fontsize": SUMMARY_SIZE, "handlelength": 1.1, "handletextpad": 0.5, "columnspacing": 1.8}
    figure.legend(handles, [*map(drawable, methods)], ncols=len(methods), frameon=False, **place, **look)
