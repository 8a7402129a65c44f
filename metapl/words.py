"""Names and values as messages show them."""

from __future__ import annotations

import difflib
import textwrap
import unicodedata
from collections.abc import Sequence

TURNS = frozenset(
    "\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff"
)
"""Characters that change the direction of a line, or end it."""


def shown(text: object, keep: str = "") -> str:
    """A name or a message with control characters, turns of direction and bytes that are not UTF-8
    escaped, but for those to ``keep``."""
    letters = []
    for letter in str(text):
        if letter in keep or (
            letter not in TURNS and unicodedata.category(letter) not in ("Cc", "Cs")
        ):
            letters.append(letter)
        elif (
            0xDC80 <= ord(letter) <= 0xDCFF
        ):  # a byte that is not UTF-8, as Python has it in names of files
            letters.append(f"\\x{ord(letter) - 0xDC00:02x}")
        else:
            letters.append(letter.encode("unicode_escape", "surrogatepass").decode("ascii"))
    return "".join(letters)


def did_you_mean(given: str, known: Sequence[str], *, likeness: float = 0.75) -> str:
    """A question to append to a refusal, or nothing where nothing known is like what was given."""
    close = difflib.get_close_matches(given, known, n=3, cutoff=likeness)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def summary(name: str, **parts: object) -> str:
    """A short ``repr``.

    Numbers to four digits, tensors of more by their shape, dicts by their names.
    """

    def brief(part: object) -> str:
        if getattr(part, "shape", None) == ():  # a tensor of one number
            part = float(part)  # type: ignore[arg-type]
        if isinstance(part, float):
            return f"{part:.4g}"
        if isinstance(part, dict | tuple):
            few = [str(key) if isinstance(part, dict) else brief(key) for key in [*part][:3]]
            more = f" and {len(part) - 3:,} more" if len(part) > 3 else ""
            return ("{{{}}}" if isinstance(part, dict) else "({})").format(", ".join(few) + more)
        shape = getattr(part, "shape", None)
        return str(part) if shape is None else f"tensor{[*shape]}".replace(" ", "")

    text = f"{name}({', '.join(f'{key}={brief(part)}' for key, part in parts.items())})"
    return textwrap.fill(text, 80, break_on_hyphens=False, break_long_words=False)
