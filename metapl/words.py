"""Names and values as messages show them."""

from __future__ import annotations

import difflib
import textwrap
import unicodedata
from collections.abc import Sequence

# As many as a summary names of what it cannot list.
MOST_NAMED = 3

TURNS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff"
)
"""Characters that change the direction of a line, or end it."""


def composed(name: str) -> str:
    """Return a name in the Unicode form in which names are compared, NFC.

    Names that came through a Mac are in another one, and look alike.
    """
    return unicodedata.normalize("NFC", name)


def shown(text: object, keep: str = "") -> str:
    """Return a name or a message in which what a terminal would not show is escaped.

    That is control characters, turns of direction and bytes that are not UTF-8, but for those to
    ``keep``.
    """
    letters = []
    for letter in str(text):
        is_visible = letter not in TURNS and unicodedata.category(letter) not in ("Cc", "Cs")
        if letter in keep or is_visible:
            letters.append(letter)
        elif 0xDC80 <= ord(letter) <= 0xDCFF:
            # Python has a byte that is not UTF-8 so, in names of files.
            letters.append(f"\\x{ord(letter) - 0xDC00:02x}")
        else:
            letters.append(letter.encode("unicode_escape", "surrogatepass").decode("ascii"))
    return "".join(letters)


def did_you_mean(word: str, names: Sequence[str], *, likeness: float = 0.75) -> str:
    """Return a question to append to a refusal, or nothing where no name is like the word.

    >>> did_you_mean("forwrd", ["forward", "unrolled"]), did_you_mean("mlp", ["mpl", "uda"])
    ('; did you mean forward?', '; did you mean mpl?')
    """
    similar = difflib.get_close_matches(word, names, n=3, cutoff=likeness)
    if not similar:
        # In a short name, two letters that have changed places are a large part of it.
        similar = [name for name in names if sorted(name) == sorted(word)]
    if not similar:
        return ""
    return f"; did you mean {' or '.join(similar)}?"


def summary(name: str, **parts: object) -> str:
    """Return a short ``repr``.

    It has numbers to four digits, tensors of more than one by their shape, dicts by their names.
    """
    shown_parts = ", ".join(f"{key}={_brief(part)}" for key, part in parts.items())
    text = f"{name}({shown_parts})"
    return textwrap.fill(text, 80, break_on_hyphens=False, break_long_words=False)


def _brief(part: object) -> str:
    """Return a value as :func:`summary` shows it."""
    if getattr(part, "shape", None) == ():
        # A tensor of one number.
        part = float(part)  # type: ignore[arg-type]
    if isinstance(part, float):
        return f"{part:.4g}"
    if isinstance(part, dict):
        return f"{{{_first_of([str(key) for key in part])}}}"
    if isinstance(part, tuple):
        return f"({_first_of([_brief(entry) for entry in part])})"
    shape = getattr(part, "shape", None)
    if shape is None:
        return str(part)
    return f"tensor{[*shape]}".replace(" ", "")


def _first_of(texts: Sequence[str]) -> str:
    """Return the first few texts, and how many more there are."""
    enumeration = ", ".join(texts[:MOST_NAMED])
    if len(texts) > MOST_NAMED:
        enumeration += f" and {len(texts) - MOST_NAMED:,} more"
    return enumeration
