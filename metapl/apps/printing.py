"""Names, messages and tables as they are shown.

What a file is called must not move the cursor, or turn the line.
"""

from __future__ import annotations

import csv
import inspect
import io
import itertools
import re
import sys
import textwrap
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from metapl.runs.folder import replacing
from metapl.words import shown

# Columns of text.
WIDTH = 80

# The flags that are called otherwise than their fields.
NAMED_OTHERWISE = {"recipe": "config", "replicate": "mesh.replicate", "shard": "mesh.shard"}

# What a cell begins with that a spreadsheet takes for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def width_of(text: str) -> int:
    r"""Return the columns of a terminal that a text takes.

    A wide letter takes two, and a mark on the letter before it none.

    >>> width_of("cat"), width_of("猫"), width_of("e\u0301")
    (3, 2, 1)
    """
    if text.isascii():
        return len(text)
    return sum(_width(letter) for letter in text)


def _width(letter: str) -> int:
    if unicodedata.category(letter) in ("Mn", "Me", "Cf"):
        return 0
    is_wide = unicodedata.east_asian_width(letter) in ("W", "F")
    return 2 if is_wide else 1


def short(name: str, most: int = 30) -> str:
    """Return a name that fits, without its middle where need be: ends tell classes apart too.

    >>> short("crane (n02012849)", 12), short("猫の写真クラス", 12)
    ('crane...849)', '猫の...ラス')
    """
    name = shown(name)
    if width_of(name) <= most:
        return name
    width_of_end = (most - 3) // 2
    beginning = _beginning(name, most - 3 - width_of_end)
    end = _beginning(name[::-1], width_of_end)[::-1]
    return f"{beginning}...{end}"


def _beginning(text: str, most: int) -> str:
    """Return as much of the beginning of a text as fits into so many columns."""
    widths = itertools.accumulate(_width(letter) for letter in text)
    fitting = sum(width <= most for width in widths)
    return text[:fitting]


def tell(*parts: object, file: TextIO | None = None) -> None:
    """Print a message with what must not be shown escaped, to standard output or to ``file``."""
    print(" ".join(shown(part, keep="\n") for part in parts), file=file or sys.stdout, flush=True)


def tell_wrong(text: str) -> None:
    """Print a message on standard error, broken into lines on a terminal.

    A program that reads it has it in a line.
    """
    text = f"metapl: {text}"
    tell(wrapped(text) if sys.stderr.isatty() else text, file=sys.stderr)


def as_flags(text: str) -> str:
    """Return a message of the library with the arguments that are flags called as the flags.

    >>> as_flags("Fitting(labeled_batch=-1): expected a whole number >= 1 or None.")
    '--labeled-batch -1: expected a whole number >= 1.'
    >>> as_flags("leave out feedback_weight, or give feedback_bound=0.1")
    'leave out --feedback-weight, or give --feedback-bound 0.1'
    >>> as_flags("it was begun otherwise (lr was 1); expected the same, or resume='anyway'.")
    'it was begun otherwise (lr was 1); put it back, or take another --out.'
    """
    field = re.match(r"[A-Z]\w*\((\w+)=(.*?)\): (expected .*)", text)
    if field:
        name, value, expected = field.groups()
        flag = NAMED_OTHERWISE.get(name, name).replace("_", "-")
        # Several values stand behind a flag without brackets and commas, and texts without quotes.
        typed = re.sub(r"[()',]", "", value)
        # None is no value that can be typed.
        text = f"--{flag} {typed}: {expected.replace(' or None', '')}"
    # The command compares whatever is resumed.
    way_out = "put it back, or take another --out"
    text = text.replace("expected the same, or resume='anyway'", way_out)
    # The optimizer is no flag.
    text = re.sub(r", as by outer_optimizer=.*", "", text)
    named = re.sub(r"\bfeedback_(weight|ratio|bound)=", r"--feedback-\1 ", text)
    return re.sub(r"\bfeedback_(weight|ratio|bound)\b", r"--feedback-\1", named)


def wrapped(text: str) -> str:
    """Return a text whose lines are broken, at spaces alone, to be :data:`WIDTH` wide at most."""
    lines = []
    for line in text.split("\n"):
        lines.append(textwrap.fill(line, WIDTH, break_on_hyphens=False, break_long_words=False))
    return "\n".join(lines)


def paragraphs(docstring: str) -> str:
    """Return what a docstring says before its arguments, in paragraphs :data:`WIDTH` wide.

    Their further lines are indented: tyro would join lines that begin with a letter.
    """
    description, _, _ = inspect.cleandoc(docstring).partition("\n\nArgs:")
    texts = []
    for paragraph in description.split("\n\n"):
        text = " ".join(paragraph.split())
        texts.append(textwrap.fill(text, WIDTH, subsequent_indent="  "))
    return "\n\n".join(texts)


def cell(text: str) -> str:
    """Return a name as a cell of CSV.

    One that a spreadsheet would take for a formula begins with an apostrophe. A negative number is
    no formula.

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
    """Open a file of CSV, written by :func:`~metapl.runs.folder.replacing`, for this block."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield CsvRows(text)
        text.flush()
        text.detach()


def table(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """Return rows with their columns aligned: the first ``left`` to the left, others to the right.

    >>> print(table([("class", "right"), ("cat", "97.5%"), ("dog", "8.0%")]))
    class  right
    cat    97.5%
    dog     8.0%
    """
    widths = [max(width_of(text) for text in column) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = []
        for number, (text, width) in enumerate(zip(row, widths, strict=True)):
            gap = " " * (width - width_of(text))
            cells.append(text + gap if number < left else gap + text)
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
