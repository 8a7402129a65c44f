"""Names, messages and tables as they are shown.

What a file is called must not move the cursor, or turn the line.
"""

from __future__ import annotations

import csv
import importlib.util
import io
import itertools
import re
import signal
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

from metapl.errors import MissingPackage
from metapl.runs.folder import replacing
from metapl.words import shown

WIDTH = 80  # columns of text
FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what makes a spreadsheet take a cell for a formula


def width_of(text: str) -> int:
    r"""Columns of a terminal that a text takes: two for a wide letter, none for a mark on the one before.

    >>> width_of("cat"), width_of("猫"), width_of("e\u0301")
    (3, 2, 1)
    """
    return len(text) if text.isascii() else sum(map(_width, text))


def _width(letter: str) -> int:
    wide = unicodedata.east_asian_width(letter) in ("W", "F")
    return 0 if unicodedata.category(letter) in ("Mn", "Me", "Cf") else 1 + wide


def short(name: str, most: int = 30) -> str:
    """A name that fits, without its middle where need be: ends tell classes apart too.

    >>> short("crane (n02012849)", 12), short("猫の写真クラス", 12)
    ('crane...849)', '猫の...ラス')
    """
    name, tail = shown(name), (most - 3) // 2
    return (
        name
        if width_of(name) <= most
        else f"{_begin(name, most - 3 - tail)}...{_begin(name[::-1], tail)[::-1]}"
    )


def _begin(text: str, most: int) -> str:
    return text[: sum(width <= most for width in itertools.accumulate(map(_width, text)))]


def tell(*parts: object, file: TextIO | None = None) -> None:
    """Print a message, with what must not be shown escaped, to standard output unless a ``file`` is given."""
    print(" ".join(shown(part, keep="\n") for part in parts), file=file or sys.stdout, flush=True)


def as_flags(text: str) -> str:
    """A message of the library in which the arguments that are flags of a training are called as the flags are.

    >>> as_flags("leave out feedback_weight, or give feedback_bound=0.1")
    'leave out --feedback-weight, or give --feedback-bound 0.1'
    """
    text = re.sub(r", as by outer_optimizer=.*", "", text)  # the optimizer is no flag
    named = re.sub(r"\bfeedback_(weight|ratio|bound)=", r"--feedback-\1 ", text)
    return re.sub(r"\bfeedback_(weight|ratio|bound)\b", r"--feedback-\1", named)


def wrapped(text: str) -> str:
    """Each line of a text in lines of :data:`WIDTH`, broken at spaces alone."""
    how: Any = {"break_on_hyphens": False, "break_long_words": False}
    return "\n".join(textwrap.fill(line, WIDTH, **how) for line in text.split("\n"))


def cell(text: str) -> str:
    """A name as a cell of CSV: one that a spreadsheet would take for a formula begins with an
    apostrophe; a negative number is none.

    >>> cell("=1+1"), cell("a=1"), cell("-1+1"), cell("-1.5e-05")
    ("'=1+1", 'a=1', "'-1+1", '-1.5e-05')
    """
    number = re.fullmatch(r"-[\d.]+(e[+-]\d+)?", text)
    return f"'{text}" if text.startswith(FORMULA) and number is None else text


class CsvRows:
    """CSV in which no name is taken for a formula, or for the end of a line.

    On a terminal, names are escaped.
    """

    def __init__(self, sink: TextIO) -> None:
        self.plain = csv.writer(sink, lineterminator="\n")
        self.quoted = csv.writer(sink, lineterminator="\n", quoting=csv.QUOTE_ALL)
        self.on_terminal = sink.isatty()

    def writerow(self, row: Sequence[str]) -> None:
        cells = [cell(shown(text) if self.on_terminal else text) for text in row]
        # Python's own quotes a newline, and before 3.13 not a carriage return.
        (self.quoted if any("\r" in text for text in cells) else self.plain).writerow(cells)


@contextmanager
def written_csv(path: Path) -> Iterator[CsvRows]:
    """A file of CSV, written by :func:`~metapl.runs.folder.replacing`."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield CsvRows(text)
        text.flush()
        text.detach()


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Rows with their columns aligned: the first ``left`` to the left, the others to the right.

    >>> print(table([("class", "right"), ("cat", "97.5%"), ("dog", "8.0%")]))
    class  right
    cat    97.5%
    dog     8.0%
    """
    widths, lines = [max(map(width_of, column)) for column in zip(*rows, strict=True)], []
    for row in rows:
        gaps = [" " * (width - width_of(text)) for text, width in zip(row, widths, strict=True)]
        cells = [
            text + gap if i < left else gap + text
            for i, (text, gap) in enumerate(zip(row, gaps, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def require_packages(need: str, *modules: str) -> None:
    """Refuse to go on without these optional packages, before anything has been done."""
    for module in modules:
        if importlib.util.find_spec(module) is None:
            raise MissingPackage(need, module)


def exit_code(stopped: KeyboardInterrupt) -> int:
    """That of a process which the signal has ended."""
    return 128 + int(getattr(stopped, "signal_number", signal.SIGINT))
