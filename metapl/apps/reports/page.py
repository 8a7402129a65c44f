"""One picture of a training: how well it went, what the feedback was, and what the test set says."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.canvas import drawing, headed_page, lay_out, write_page
from metapl.apps.reports.curves import PANELS, Curves, draw_panel, has_figures
from metapl.apps.reports.gallery import Gallery, draw_galleries, hang
from metapl.apps.reports.matrix import checked_counts, draw_matrix, room
from metapl.apps.reports.style import MARGIN, PALETTE, SUMMARY_SIZE
from metapl.apps.reports.text import fitted, text_width
from metapl.errors import MetaplError
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_WIDTH, PANEL_HEIGHT, METHODS_LINE = 5.0, 3.6, 0.26
"""Inches of a panel with all that is written around it, and of a line of the legend."""


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
    names = classes if classes is not None else [str(label) for label in range(0 if counts is None else len(counts))]
    texts = [title, summary, *curves, *names, *(text for gallery in galleries for text in gallery.texts)]
    with drawing(texts) as explanation:
        columns = 1 if counts is not None and len(panels) == 2 else min(len(panels), 2)
        rows = math.ceil(len(panels) / max(columns, 1))
        matrix_width, matrix_height = (0.0, 0.0) if counts is None else room(names)
        # A page of nothing but pictures is as wide as two panels.
        width = 2 * MARGIN + PANEL_WIDTH * (columns if panels or counts is not None else 2) + matrix_width
        body = max(rows * PANEL_HEIGHT, matrix_height)
        hangings = hang(galleries, width - 2 * MARGIN)
        low = MARGIN + sum(hanging.height for hanging in hangings)
        methods = [fitted(name, width - 2 * MARGIN - 0.5, SUMMARY_SIZE) for name in curves] if len(curves) > 1 else []
        beside = max(
            1, int((width - 2 * MARGIN) / max((text_width(m, SUMMARY_SIZE) + 0.5 for m in methods), default=1))
        )
        top = low + body + METHODS_LINE * math.ceil(len(methods) / beside) + 0.1 * bool(methods)
        figure = headed_page(title, f"{summary} {explanation}", width, top)
        _draw_methods(figure, methods, beside, MARGIN / width, (top - 0.05) / figure.get_figheight())
        draw_galleries(figure, hangings, MARGIN, low)
        if panels or counts is not None:
            lay_out(figure, low, low + body)
            widths = [share for share in (PANEL_WIDTH * columns, matrix_width) if share]
            parts = list(figure.subfigures(1, len(widths), width_ratios=widths, squeeze=False)[0])
            if counts is not None:
                draw_matrix(parts.pop().subplots(), counts, names)
            if panels:
                # The last one of an odd number takes the whole row rather than leave a hole beside it.
                places = [*range(len(panels)), *[len(panels) - 1] * (len(panels) % columns)]
                mosaic = [places[start : start + columns] for start in range(0, len(places), columns)]
                for number, axes in parts.pop().subplot_mosaic(mosaic).items():
                    draw_panel(axes, panels[number], curves, along, body / rows)
        write_page(path, figure)


def _draw_methods(figure: Figure, methods: Sequence[str], beside: int, left: float, top: float) -> None:
    """The legend of colors, once for all panels."""
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], color=color, linewidth=4.5) for color in PALETTE[: len(methods)]]
    place: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (left, top), "borderpad": 0, "borderaxespad": 0}
    look: dict[str, Any] = {"fontsize": SUMMARY_SIZE, "handlelength": 1.1, "handletextpad": 0.5, "columnspacing": 1.8}
    if methods:
        figure.legend(handles, methods, ncols=beside, **place, **look)
