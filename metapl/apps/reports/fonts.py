"""Fonts in which a text can be drawn, whatever its script."""

from __future__ import annotations

import logging
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache, lru_cache

BASE = "DejaVu Sans"
"""The font of all pictures, which matplotlib brings along."""

PLACEHOLDERS = ("Last Resort", "LastResort", "Adobe Blank")
"""Fonts that have a box, or nothing, for every letter."""


def families(texts: Iterable[str]) -> list[str]:
    """The families to draw texts in: DejaVu Sans, and as few of the installed ones as have the letters it lacks.

    Cost: where it lacks a letter, the tables of all installed fonts are read, once in a process.
    """
    from matplotlib.font_manager import fontManager

    chosen, missing = [BASE], set(_letters(texts)) - letters_of(BASE)
    names = sorted({entry.name for entry in fontManager.ttflist if not entry.name.startswith(PLACEHOLDERS)})
    while missing:
        best = max(names, key=lambda name: (len(missing & letters_of(name)), "Sans" in name, -len(name)))
        if not missing & letters_of(best):
            break
        chosen.append(best)
        missing -= letters_of(best)
    return chosen


def undrawable(text: str) -> list[str]:
    """The letters of a text that none of the current families has, each once."""
    from matplotlib import rcParams

    known = _letters_of_all(tuple(rcParams["font.family"]))
    return [letter for letter in _letters([text]) if letter not in known]


def spelled(text: str) -> str:
    """A text with the codes of letters that cannot be drawn in their place, as Unicode writes them.

    >>> spelled("cat"), spelled("a\\U0010fffd\\U0010fffdb")
    ('cat', 'aU+10FFFD U+10FFFDb')
    """
    missing = set(undrawable(text))
    drawn, after_code = "", False
    for letter in text:
        if letter not in missing:
            drawn, after_code = drawn + letter, False
        elif unicodedata.category(letter) != "Cf":  # what joins or turns letters is not seen itself
            drawn, after_code = f"{drawn}{' ' if after_code else ''}U+{ord(letter):04X}", True
    return drawn


def explained(texts: Iterable[str]) -> str:
    """What a reader should know where letters are drawn as codes; empty where none is."""
    codes = [letter for letter in undrawable("".join(texts)) if unicodedata.category(letter) != "Cf"]
    if not codes:
        return ""
    return f"No font here has {len(codes)} of the letters: they stand as codes, such as U+{ord(codes[0]):04X}."


@cache  # families of this machine's fonts
def letters_of(family: str) -> frozenset[str]:
    """The letters that a family has, upright and bold alike; none where matplotlib cannot draw it."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    charmaps = []
    for weight in ("normal", "bold"):
        try:
            with any_weight():
                file = findfont(FontProperties(family=[family], weight=weight), fallback_to_default=False)
            font = get_font(file)
        except (OSError, RuntimeError, ValueError):  # gone, of an unknown kind, or not there
            return frozenset()
        if not font.scalable:  # pictures of fixed sizes, such as colored emoji
            return frozenset()
        charmaps.append(frozenset(map(chr, font.get_charmap())))
    return charmaps[0] & charmaps[1]


@contextmanager
def any_weight() -> Iterator[None]:
    """Within it matplotlib does not log that a family has no bold letters: it then takes the others, as it should."""
    log = logging.getLogger("matplotlib.font_manager")
    before = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(before)


@lru_cache(maxsize=8)
def _letters_of_all(names: tuple[str, ...]) -> frozenset[str]:
    return frozenset().union(*map(letters_of, names))


def _letters(texts: Iterable[str]) -> Sequence[str]:
    """Those that have to be drawn, each once; surrogates are drawn as question marks."""
    seen = dict.fromkeys("".join(texts))
    return [letter for letter in seen if not letter.isspace() and unicodedata.category(letter) not in ("Cc", "Cs")]
