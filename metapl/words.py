"""Names, messages and tables as they are shown: what a file is called must not move the cursor, or turn the line."""

from __future__ import annotations

import sys
import unicodedata
from collections.abc import Sequence
from typing import TextIO

TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029\ufeff")
"""Characters that change the direction of a line, or end it."""

FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What makes a spreadsheet take a cell for a formula."""


def shown(text: object, keep: str = "") -> str:
    r"""A name or a message as it is shown: control characters, turns of direction and bytes that are not UTF-8 escaped.

    Args:
        text: any value; its text counts.
        keep: characters that stay as they are, such as newlines of a message.

    >>> shown("a\x1b[2Jb\n"), shown("caf\udce9"), shown("größe 猫")
    ('a\\x1b[2Jb\\n', 'caf\\xe9', 'größe 猫')
    """
    text = str(text)
    if text.isprintable() and text.isascii():
        return text
    return "".join(letter if letter in keep or not _is_escaped(letter) else _escape(letter) for letter in text)


def short(name: str, most: int = 30) -> str:
    """A name that fits, without its middle where need be: ends tell classes apart too.

    >>> short("crane (n02012849)", 12)
    'crane...849)'
    """
    name = shown(name)
    if len(name) <= most:
        return name
    tail = (most - 3) // 2
    return f"{name[: most - 3 - tail]}...{name[-tail:]}"


def tell(*parts: object, file: TextIO | None = None, end: str = "\n") -> None:
    """Print a message, with what must not be shown escaped; standard output unless ``file`` is given."""
    print(*(shown(part, keep="\n") for part in parts), file=file or sys.stdout, end=end, flush=True)


def cell(text: str) -> str:
    """A name as a cell of CSV: one that a spreadsheet would take for a formula begins with an apostrophe.

    >>> cell("=1+1"), cell("a=1")
    ("'=1+1", 'a=1')
    """
    return f"'{text}" if text.startswith(FORMULA) else text


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows with their columns aligned: the first ``left`` to the left, the others to the right.

    >>> print(table([("class", "right"), ("cat", "97.5%"), ("dog", "8.0%")]))
    class  right
    cat    97.5%
    dog     8.0%
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < left else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    )


def _is_escaped(letter: str) -> bool:
    return letter in TURNS or unicodedata.category(letter) in ("Cc", "Cs")


def _escape(letter: str) -> str:
    code = ord(letter)
    if 0xDC80 <= code <= 0xDCFF:  # a byte that is not UTF-8, as Python has it in names of files
        return f"\\x{code - 0xDC00:02x}"
    return letter.encode("unicode_escape", "surrogatepass").decode("ascii")
