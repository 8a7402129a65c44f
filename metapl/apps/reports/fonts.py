"""Texts in any script: the fonts that have their letters, how much room a line takes, and how it is made to fit."""

from __future__ import annotations

import unicodedata
from bisect import bisect
from collections.abc import Iterable
from functools import cache

BASE = "DejaVu Sans"
"""The font of all pictures, which matplotlib brings along."""

PLACEHOLDERS = ("Last Resort", "LastResort", "Adobe Blank")
"""Fonts that have a box, or nothing, for every letter."""


def families(texts: Iterable[str]) -> list[str]:
    """The families to draw texts in: DejaVu Sans, and as few of the installed ones as have the letters it lacks.

    Cost: where it lacks a letter, the tables of all installed fonts are read, once in a process.
    """
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


def explained(texts: Iterable[str]) -> str:
    """What a reader should know where letters are drawn as codes; empty where none is."""
    codes = [letter for letter in _lacking("".join(texts)) if unicodedata.category(letter) != "Cf"]
    if not codes:
        return ""
    return f"No font here has {len(codes)} of the letters: they stand as codes, such as U+{ord(codes[0]):04X}."


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
    """Shortens the middle of a long name, for names differ at either end.

    >>> short_name("a species of the genus 12")
    'a species…genus 12'
    """
    name = drawable(name)
    return name if len(name) <= 18 else f"{name[:9]}…{name[-8:]}"
