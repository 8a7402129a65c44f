"""A page without a display: the look that all pictures share, texts in any script, and the file that it becomes."""

from __future__ import annotations

import io
import logging
import os
import unicodedata
from bisect import bisect
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from metapl.apps.machine.sealed import write_whole
from metapl.words import shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SOFTWARE = "metapl"  # what a page says of who drew it

# Okabe and Ito's palette without its yellow, which is too pale for a line on white; the color-blind can distinguish
# the others.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, QUIET, FRAME, AXIS = "#222222", "#6B6B6B", "#BDBDBD", "#9A9A9A"
DASHED = (0, (4, 1.8))

MARGIN = 0.4  # inches around a page
# Inches from one line of letters to the next, and points of letters.
TITLE_LINE, SUMMARY_LINE, PANEL_TITLE_LINE, NOTE_LINE, CAPTION_LINE = 0.36, 0.26, 0.24, 0.19, 0.165
TITLE_SIZE, SUMMARY_SIZE, PANEL_TITLE_SIZE, NOTE_SIZE, CAPTION_SIZE = 18.0, 11.5, 12.5, 10.0, 9.0

MOST_NAMED = 40  # classes that are drawn by their names; more are drawn by their size

STYLE: dict[str, Any] = {
    "figure.dpi": 150,
    "savefig.dpi": "figure",
    "figure.facecolor": "white",
    "font.size": 10,
    "axes.edgecolor": AXIS,
    "axes.labelcolor": QUIET,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#E4E4E4",
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "lines.linewidth": 1.9,
    **{f"{axis}tick.{which}.size": 0 for axis in "xy" for which in ("major", "minor")},
    **{f"{axis}tick.{name}": value for axis in "xy" for name, value in (("labelcolor", QUIET), ("labelsize", 9.5))},
    "text.color": INK,
    "text.parse_math": False,  # a name such as "$5" is not a formula
}


@contextmanager
def drawing(texts: Iterable[str]) -> Iterator[str]:
    """Everything is measured and drawn within this block; matplotlib's global state is as it was when it ends.

    ``texts`` are drawn and may be in any script. The block gets what a reader should know of letters that no font has.
    """
    import matplotlib.style

    texts = list(texts)
    log = logging.getLogger("matplotlib.font_manager")  # that a family has no bold letters is no news to a user
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        # "default" first, so that a user's own matplotlibrc does not change the picture; both end with the block.
        with matplotlib.style.context(["default", STYLE, {"font.family": families(texts)}]):
            codes = [letter for letter in _lacking("".join(texts)) if unicodedata.category(letter) != "Cf"]
            drawn = f"they stand as codes, such as U+{ord(codes[0]):04X}." if codes else ""
            yield f"No font here has {len(codes)} of the letters: {drawn}" if codes else ""
    finally:
        log.setLevel(level)


def headed_page(title: str, summary: str, width: float, below: float) -> Figure:
    """A white page of so many inches, with ``below`` inches beneath its title and the sentences under it."""
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
    """Panels share the page between two heights in inches: matplotlib finds room for all that is written at them."""
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


def write_heading(axes: Axes, title: str, note: str = "") -> None:
    axes.set_title(title, loc="left", fontsize=PANEL_TITLE_SIZE, fontweight="bold", pad=29)
    if note:
        place: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points"}
        # The title makes room for it; the panel keeps its width where the line is longer.
        axes.annotate(note, (0, 1), (0, 8), fontsize=NOTE_SIZE, color=QUIET, **place).set_in_layout(False)


def png(figure: Figure) -> bytes:
    from matplotlib.text import Text

    for text in figure.findobj(Text):
        text.set_text("\n".join(map(drawable, text.get_text().split("\n"))))
    file = io.BytesIO()
    figure.savefig(file, format="png", metadata={"Software": SOFTWARE})
    return file.getvalue()


def write_page(path: str | os.PathLike[str], figure: Figure) -> None:
    """Write the page as a PNG file, which takes its name only when it is whole."""
    write_whole(Path(path), png(figure), "any earlier one is as it was")


def name_rows(axes: Axes, names: Sequence[str]) -> None:
    """Name horizontal bars, the first at the top, and count along the lower edge."""
    axes.set_yticks(range(len(names)), [short_name(name) for name in names])
    axes.invert_yaxis()
    axes.margins(y=0.01)
    axes.grid(axis="x")
    dress_counts(axes)


def draw_by_size(axes: Axes, counts: Sequence[int], lines: Sequence[tuple[Sequence[int], str]]) -> None:
    """Numbers by class as lines, each with its color; the class with the largest of ``counts`` comes first."""
    order = np.argsort(-np.asarray(counts), kind="stable")
    for values, color in lines:
        axes.plot(np.asarray(values)[order], color=color)
    axes.set_ylim(bottom=0)
    axes.set_xlabel("classes, the largest first")
    axes.grid()
    dress_counts(axes)


def dress_counts(axes: Axes) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator

    counted = axes.xaxis if axes.yaxis_inverted() else axes.yaxis
    counted.set_major_locator(MaxNLocator(5, integer=True))
    counted.set_major_formatter(EngFormatter(sep=""))


BASE = "DejaVu Sans"  # the font of all pictures, which matplotlib brings along
PLACEHOLDERS = ("Last Resort", "LastResort", "Adobe Blank")  # fonts that have a box, or nothing, for every letter


def families(texts: Iterable[str]) -> list[str]:
    """The families to draw texts in: DejaVu Sans, and as few of the installed ones as have the letters it lacks, whose
    tables are read once in a process."""
    from matplotlib.font_manager import fontManager

    chosen, missing = [BASE], set(_lacking("".join(texts), [BASE]))
    names = {entry.name for entry in fontManager.ttflist if not entry.name.startswith(PLACEHOLDERS)}
    while missing:
        best = max(sorted(names), key=lambda name: (len(missing & letters_of(name)), "Sans" in name, -len(name)))
        if not missing & letters_of(best):
            break
        chosen.append(best)
        missing -= letters_of(best)
    return chosen


@cache  # families of this machine's fonts
def letters_of(family: str) -> frozenset[str]:
    """The letters that a family has, upright and bold alike; none where matplotlib cannot draw it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    try:
        properties = [FontProperties(family=[family], weight=weight) for weight in ("normal", "bold")]
        fonts = [get_font(findfont(one, fallback_to_default=False)) for one in properties]
    except (OSError, RuntimeError, ValueError):  # gone, of an unknown kind, or not there
        return frozenset()
    # Those of fixed sizes, such as colored emoji, are not drawn.
    return frozenset.intersection(*(frozenset(map(chr, font.get_charmap() if font.scalable else ())) for font in fonts))


def _lacking(text: str, names: Iterable[str] | None = None) -> list[str]:
    """The letters of a text that no family has, each once; surrogates are drawn as question marks."""
    from matplotlib import rcParams

    if text.isascii():
        return []
    known = frozenset().union(*map(letters_of, names or rcParams["font.family"]))
    drawn = [x for x in dict.fromkeys(text) if not x.isspace() and unicodedata.category(x) not in ("Cc", "Cs")]
    return [letter for letter in drawn if letter not in known]


def drawable(text: str) -> str:
    r"""A text as one line that can be drawn: a name may hold line breaks, undecodable bytes, or letters that none of
    the current families has, in whose place their codes stand, as Unicode writes them.

    >>> drawable("a\nb \udcff"), drawable("a\U0010fffd\U0010fffdb")
    ('a b ?', 'aU+10FFFD U+10FFFDb')
    """
    letters = "".join(" " if letter.isspace() or letter < " " else letter for letter in text)
    letters = letters.encode("utf-8", "replace").decode()
    for letter in _lacking(letters):
        # What joins or turns letters is not seen itself.
        letters = letters.replace(letter, "" if unicodedata.category(letter) == "Cf" else f"\0U+{ord(letter):04X}\0")
    return letters.replace("\0\0", " ").replace("\0", "")


@cache  # of the fonts of this machine
def _width(letter: str, weight: str, *names: str) -> float:
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=names, size=72, weight=weight)
    return float(text_to_path.get_text_width_height_descent(letter, font, ismath=False)[0]) / 72


def text_width(text: str, size: float, weight: str = "normal") -> float:
    from matplotlib import rcParams

    return sum(_width(letter, weight, *rcParams["font.family"]) for letter in text) * size / 72


def wrap(text: str, width: float, size: float, weight: str = "normal") -> list[str]:
    """Breaks a text into lines that are at most `width` inches long; a word that is longer loses its middle."""
    lines: list[str] = []
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(fitted(word, width, size, weight))
    return lines


def fitted(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text as it can be drawn, or as much of its ends as `width` inches have room for.

    >>> fitted("a species of the genus 12", 1.0, 9.0)
    'a speci…nus 12'
    """
    text = drawable(text)
    if text_width(text, size, weight) <= width:
        return text
    cut = [f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}" for kept in range(1, len(text))]
    return cut[max(0, bisect(cut, width, key=lambda one: text_width(one, size, weight)) - 1)] if cut else text


def short_name(name: str) -> str:
    """A long name without its middle, for names differ at either end."""
    name = drawable(name)
    return name if len(name) <= 18 else f"{name[:9]}…{name[-8:]}"
