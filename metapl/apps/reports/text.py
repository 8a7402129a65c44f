"""How much room a line of text takes, and how it is made to fit."""

from __future__ import annotations

from bisect import bisect_right

from metapl.apps.reports.fonts import spelled

LONGEST_NAME = 18


def drawable(text: str) -> str:
    """A text as one line that can be drawn: a name may hold line breaks, undecodable bytes, or letters that no font
    has.

    >>> drawable("a\\nb \\udcff")
    'a b ?'
    """
    letters = text.encode("utf-8", "replace").decode()
    return spelled("".join(" " if letter.isspace() or letter < " " else letter for letter in letters))


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """Inches that a line takes."""
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    font = FontProperties(size=size, weight=weight)
    return float(text_to_path.get_text_width_height_descent(text, font, ismath=False)[0]) / 72


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
    return name if len(name) <= LONGEST_NAME else without_middle(name, LONGEST_NAME - 1)


def without_middle(text: str, kept: int) -> str:
    """The first and the last letters of a text, `kept` of them.

    >>> without_middle("a species of the genus 12", 5)
    'a s…12'
    """
    return f"{text[: (kept + 1) // 2]}…{text[len(text) - kept // 2 :]}"


def fitted(text: str, width: float, size: float, weight: str = "normal") -> str:
    """The text, or as much of its ends as `width` inches have room for.

    >>> fitted("a species of the genus 12", 1.0, 9.0)
    'a speci…nus 12'
    """
    if text_width(text, size, weight) <= width:
        return text
    lengths = range(1, len(text))
    fits = bisect_right(lengths, width, key=lambda kept: text_width(without_middle(text, kept), size, weight))
    return without_middle(text, fits)
