"""A page without a display, and the file that it becomes."""

from __future__ import annotations

import io
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.fonts import any_weight, explained, families
from metapl.apps.reports.style import (
    DOTS_PER_INCH,
    MARGIN,
    NOTE_ABOVE,
    NOTE_SIZE,
    PANEL_TITLE_SIZE,
    QUIET,
    STYLE,
    SUMMARY_LINE,
    SUMMARY_SIZE,
    TITLE_ABOVE,
    TITLE_LINE,
    TITLE_SIZE,
)
from metapl.apps.reports.text import wrap
from metapl.runs.atomic import write_whole
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Text

SOFTWARE = "metapl"
"""What a page says of who drew it."""

Box = tuple[float, float, float, float]  # left, bottom, width, height in inches, from the lower left of the page


@contextmanager
def drawing(texts: Iterable[str]) -> Iterator[str]:
    """Everything is measured and drawn within this block; matplotlib's global state is as it was when it ends.

    Args:
        texts: what is drawn and may be in any script, such as names of classes.

    Returns: what a reader should know of letters that no font has, or nothing.
    """
    import matplotlib.style

    texts = list(texts)
    # "default" first, so that a user's own matplotlibrc does not change the picture; both end with the block.
    with matplotlib.style.context(["default", STYLE, {"font.family": families(texts)}]), any_weight():
        yield explained(texts)


def blank_page(width: float, height: float) -> Figure:
    """A white page of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DOTS_PER_INCH, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def headed_page(title: str, summary: str, width: float, below: float) -> Figure:
    """A white page that is so many inches wide, with ``below`` inches beneath its title and the sentences under it."""
    room = width - 2 * MARGIN
    title_lines = wrap(shown(title), room, TITLE_SIZE, "bold")
    summary_lines = wrap(shown(summary, keep="\n"), room, SUMMARY_SIZE)
    y = below + TITLE_LINE * len(title_lines) + SUMMARY_LINE * len(summary_lines)
    figure = blank_page(width, y + MARGIN)
    for line in title_lines:
        write_at(figure, MARGIN, y - 0.1, line, fontsize=TITLE_SIZE, fontweight="bold", va="center")
        y -= TITLE_LINE
    for line in summary_lines:
        write_at(figure, MARGIN, y - 0.1, line, fontsize=SUMMARY_SIZE, color=QUIET, va="center")
        y -= SUMMARY_LINE
    return figure


def axes_at(figure: Figure, box: Box) -> Axes:
    """A panel in a box of the page."""
    (page_width, page_height), (left, bottom, width, height) = figure.get_size_inches(), box
    return figure.add_axes((left / page_width, bottom / page_height, width / page_width, height / page_height))


def write_at(figure: Figure, x: float, y: float, text: str, **look: Any) -> Text:
    """Writes a line of text at inches from the lower left."""
    width, height = figure.get_size_inches()
    return figure.text(x / width, y / height, text, **look)


def write_heading(axes: Axes, title: str) -> None:
    """The title above a panel."""
    axes.set_title(title, loc="left", fontsize=PANEL_TITLE_SIZE, fontweight="bold", pad=72 * TITLE_ABOVE)


def write_note(axes: Axes, text: str) -> None:
    """The line between the title and the panel."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    axes.annotate(text, (0, 1), (0, 72 * NOTE_ABOVE), fontsize=NOTE_SIZE, color=QUIET, **place)


def png(figure: Figure) -> bytes:
    """The page as the bytes of a PNG file."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_parse_math(False)  # a name such as "$5" is not a formula
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": SOFTWARE})
    return file.getvalue()


def write_page(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write the page as a PNG file, which takes its name only when it is whole."""
    write_whole(Path(path), png(figure), "any earlier one is as it was")
