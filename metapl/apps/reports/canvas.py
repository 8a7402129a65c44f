"""A page without a display, and the file that it becomes."""

from __future__ import annotations

import io
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from metapl.apps.reports.fonts import drawable, explained, families, wrap
from metapl.apps.reports.style import (
    MARGIN,
    NOTE_SIZE,
    PANEL_TITLE_SIZE,
    QUIET,
    STYLE,
    SUMMARY_LINE,
    SUMMARY_SIZE,
    TITLE_LINE,
    TITLE_SIZE,
)
from metapl.runs.atomic import write_whole
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFTWARE = "metapl"
"""What a page says of who drew it."""


@contextmanager
def drawing(texts: Iterable[str]) -> Iterator[str]:
    """Everything is measured and drawn within this block; matplotlib's global state is as it was when it ends.

    Args:
        texts: what is drawn and may be in any script, such as names of classes.

    Returns: what a reader should know of letters that no font has, or nothing.
    """
    import matplotlib.style

    texts = list(texts)
    log = logging.getLogger("matplotlib.font_manager")  # that a family has no bold letters is no news to a user
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # "default" first, so that a user's own matplotlibrc does not change the picture; both end with the block.
        with matplotlib.style.context(["default", STYLE, {"font.family": families(texts)}]):
            yield explained(texts)
    finally:
        log.setLevel(level)


def headed_page(title: str, summary: str, width: float, below: float) -> Figure:
    """A white page that is so many inches wide, with ``below`` inches beneath its title and the sentences under it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    titles = wrap(shown(title), width - 2 * MARGIN, TITLE_SIZE, "bold")
    sentences = wrap(shown(summary, keep="\n"), width - 2 * MARGIN, SUMMARY_SIZE)
    y = below + 0.15 + TITLE_LINE * len(titles) + SUMMARY_LINE * len(sentences)
    figure = Figure(figsize=(width, y + 0.25))
    FigureCanvasAgg(figure)
    y = write_lines(figure, MARGIN, y, titles, TITLE_LINE, fontsize=TITLE_SIZE, fontweight="bold")
    write_lines(figure, MARGIN, y, sentences, SUMMARY_LINE, fontsize=SUMMARY_SIZE, color=QUIET)
    return figure


def lay_out(figure: Figure, low: float, high: float) -> None:
    """Panels, by ``subplots`` or ``subfigures``, share the page between two heights in inches: matplotlib finds room
    for all that is written at them."""
    (width, height), around = figure.get_size_inches(), 0.2
    left = (MARGIN - around) / width
    rect = (left, low / height, 1 - 2 * left, (high - low) / height)
    figure.set_layout_engine("constrained", w_pad=around, h_pad=around / 2, wspace=0, hspace=0, rect=rect)


def write_lines(figure: Figure, x: float, y: float, lines: Sequence[str], pitch: float, **look: Any) -> float:
    """Writes lines downwards from inches from the lower left; where the next one would begin."""
    for number, line in enumerate(lines):
        # Centered within its pitch, whatever letters the line has.
        figure.text(x, y - pitch * (number + 0.5), line, va="center_baseline", transform=figure.dpi_scale_trans, **look)
    return y - pitch * len(lines)


def write_heading(axes: Axes, title: str) -> None:
    """The title above a panel."""
    axes.set_title(title, loc="left", fontsize=PANEL_TITLE_SIZE, fontweight="bold", pad=29)


def write_note(axes: Axes, text: str) -> None:
    """The line between the title and the panel."""
    place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
    # The title above makes room for it; the panel keeps its width where the line is longer.
    axes.annotate(text, (0, 1), (0, 8), fontsize=NOTE_SIZE, color=QUIET, **place).set_in_layout(False)


def png(figure: Figure) -> bytes:
    """The page as the bytes of a PNG file."""
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text("\n".join(map(drawable, text.get_text().split("\n"))))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": SOFTWARE})
    return file.getvalue()


def write_page(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write the page as a PNG file, which takes its name only when it is whole."""
    write_whole(Path(path), png(figure), "any earlier one is as it was")
