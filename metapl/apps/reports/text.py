"""How much room a line of text takes, and how it is made to fit."""

from __future__ import annotations

from functools import cache
from itertools import accumulate

from metapl.apps.reports.fonts import drawable

LONGEST_NAME = 18


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line takes, letter by letter: letters that are joined take a little less."""
    from matplotlib import rcParams

    return sum(_width(letter, weight, *rcParams["font.family"]) for letter in text) * size / 72


@cache  # letters of the fonts of this machine
def _width(letter: str, weight: str, *families: str) -> float:
    """Of a letter, in units of its size."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(family=families, size=72, weight=weight)
    return float(text_to_path.get_text_width_height_descent(letter, font, ismath=False)[0]) / 72


def wrap(text: str, width: float, size: float, weight: str = "normal") -> tuple[str, ...]:
    """Breaks a text into lines that are at most `width` inches long; a word that is longer loses its middle."""
    lines: list[str] = []
    for word in drawable(text).split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and text_width(longer, size, weight) <= width:
            lines[-1] = longer
        else:
            lines.append(fitted(word, width, size, weight))
    return tuple(lines)


def short_name(name: str) -> str:
    """Shortens the middle of a long name, for names differ at either end.

    >>> short_name("a species of the genus 12")
    'a species…genus 12'
    """
    name = drawable(name)
    return name if len(name) <= LONGEST_NAME else f"{name[:9]}…{name[-8:]}"


def fitted(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text as it can be drawn, or as much of its ends as `width` inches have room for.

    >>> fitted("a species of the genus 12", 1.0, 9.0)
    'a speci…nus 12'
    """
    text = drawable(text)
    if text_width(text, size, weight) <= width:
        return text
    room = width - text_width("…", size, weight)
    turns = zip(text, reversed(text), strict=True)  # the first letter, the last one, the second one ...
    widths = accumulate(text_width(letter, size, weight) for pair in turns for letter in pair)
    kept = max(1, sum(one <= room for one, _ in zip(widths, text, strict=False)))
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"
