"""CSV that a user gets, for a spreadsheet."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from metapl.apps.words import cell
from metapl.runs.atomic import replacing
from metapl.words import shown


class CsvRows:
    """CSV in which no name is taken for a formula, or for the end of a line; on a terminal, names are escaped."""

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
    """A file of CSV, written by :func:`~metapl.runs.atomic.replacing`."""
    with replacing(path) as file:
        text = io.TextIOWrapper(file, encoding="utf-8", errors="surrogateescape", newline="")
        yield CsvRows(text)
        text.flush()
        text.detach()
