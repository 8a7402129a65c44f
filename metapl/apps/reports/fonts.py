"""Fonts in which a text can be drawn, whatever its script."""

from __future__ import annotations

import unicodedata
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
    names = sorted({entry.name for entry in fontManager.ttflist if not entry.name.startswith(PLACEHOLDERS)})
    while missing:
        best = max(names, key=lambda name: (len(missing & letters_of(name)), "Sans" in name, -len(name)))
        if not missing & letters_of(best):
            break
        chosen.append(best)
        missing -= letters_of(best)
    return chosen


def drawable(text: str) -> str:
    r"""A text as one line that can be drawn: a name may hold line breaks, undecodable bytes, or letters that none of
    the current families has, in whose place their codes stand, as Unicode writes them.

    >>> drawable("a\nb \udcff"), drawable("a\U0010fffd\U0010fffdb")
    ('a b ?', 'aU+10FFFD U+10FFFDb')
    """
    letters = "".join(" " if letter.isspace() or letter < " " else letter for letter in text)
    letters = letters.encode("utf-8", "replace").decode()
    missing = _lacking(letters)
    for letter in missing:
        # What joins or turns letters is not seen itself.
        letters = letters.replace(letter, "" if unicodedata.category(letter) == "Cf" else f"\0U+{ord(letter):04X}\0")
    return letters.replace("\0\0", " ").replace("\0", "")


def explained(texts: Iterable[str]) -> str:
    """What a reader should know where letters are drawn as codes; empty where none is."""
    codes = [letter for letter in _lacking("".join(texts)) if unicodedata.category(letter) != "Cf"]
    if not codes:
        return ""
    return f"No font here has {len(codes)} of the letters: they stand as codes, such as U+{ord(codes[0]):04X}."


@cache  # families of this machine's fonts
def letters_of(family: str) -> frozenset[str]:
    """The letters that a family has, upright and bold alike; none where matplotlib cannot draw it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    try:
        properties = [FontProperties(family=[family], weight=weight) for weight in ("normal", "bold")]
        fonts = [get_font(findfont(one, fallback_to_default=False)) for one in properties]
    except (OSError, RuntimeError, ValueError):  # gone, of an unknown kind, or not there
        return frozenset()
    if not all(font.scalable for font in fonts):  # pictures of fixed sizes, such as colored emoji
        return frozenset()
    return frozenset.intersection(*(frozenset(map(chr, font.get_charmap())) for font in fonts))


def _lacking(text: str, names: Iterable[str] | None = None) -> list[str]:
    """The letters of a text that no family has, each once; surrogates are drawn as question marks."""
    from matplotlib import rcParams

    if text.isascii():
        return []
    known = [letters_of(name) for name in names or rcParams["font.family"]]
    drawn = [x for x in dict.fromkeys(text) if not x.isspace() and unicodedata.category(x) not in ("Cc", "Cs")]
    return [letter for letter in drawn if not any(letter in letters for letters in known)]
