"""One picture of many: what a classifier took each of them for."""

from __future__ import annotations

import math
import os
from typing import TYPE_CHECKING

from metapl.errors import MetaplError
from metapl.report.canvas import blank_page, draw_head, drawing, head_height, png, wrap_head, write_whole
from metapl.report.gallery import Columns, Gallery, Hanging, draw_gallery
from metapl.report.style import MARGIN

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GRID_SHOWN = 64
"""Pictures that a grid shows at most."""

MOST_COLUMNS = 8

# Inches.
PICTURE, PITCH = 1.4, 1.62
BELOW_HEAD = 0.2
NARROWEST = 5.0


def draw_grid(
    path: str | os.PathLike[str], gallery: Gallery, *, total: int | None = None, columns: int | None = None
) -> None:
    """Draws a grid of pictures with their captions as one PNG file.

    Args:
        path: the file; its folder exists. It takes this name only when it is whole.
        gallery: the pictures; the first 64 are drawn.
        total: how many pictures there were of which these are the first; by default there were no others. The note
            says how many of them are drawn.
        columns: pictures side by side; by default up to 8, in rows of about equal length.

    No display is needed and matplotlib's global state stays as it was.

    Raises:
        MetaplError: there is no picture, a number does not fit, or the file cannot be written.
    """
    shown, total = min(len(gallery), GRID_SHOWN), len(gallery) if total is None else total
    if not shown:
        raise MetaplError("there is nothing to draw: the grid has no picture")
    if total < len(gallery):
        raise MetaplError(
            f"{len(gallery)} pictures of a total of {total} were given; expected a total as large at least"
        )
    if columns is not None and not 1 <= columns <= GRID_SHOWN:
        raise MetaplError(f"{columns} columns were asked for; expected 1 to {GRID_SHOWN}")
    with drawing(gallery.texts) as explanation:
        image = png(_figure(gallery, shown, total, columns, explanation))
    write_whole(path, image)


def _figure(gallery: Gallery, shown: int, total: int, columns: int | None, explanation: str) -> Figure:
    count = min(columns or math.ceil(shown / math.ceil(shown / MOST_COLUMNS)), shown)
    hanging = Hanging(gallery, Columns(count, PICTURE, PITCH), shown)
    width = max(2 * MARGIN + PITCH * (count - 1) + PICTURE, NARROWEST)
    note = f"{_with_counts(gallery.note, shown, total)}{explanation and '. '}{explanation}"
    title, summary = wrap_head(gallery.title, note, width)
    figure = blank_page(width, 2 * MARGIN + head_height(title, summary) + BELOW_HEAD + hanging.height)
    draw_gallery(figure, hanging, MARGIN, draw_head(figure, title, summary) - BELOW_HEAD)
    return figure


def _with_counts(note: str, shown: int, total: int) -> str:
    """
    >>> _with_counts("class and file", 64, 5000), _with_counts("", 1, 1)
    ('class and file; the first 64 of 5,000 pictures', '1 picture')
    """
    some = f"the first {shown:,} of " if shown < total else ""
    counts = f"{some}{total:,} picture{'' if total == 1 else 's'}"
    return f"{note}; {counts}" if note else counts
