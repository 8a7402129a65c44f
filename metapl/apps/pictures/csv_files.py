"""CSV that a user gets, for a spreadsheet, and tables of numbers that a user brings."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor

from metapl.apps.machine.sealed import open_plain, replacing
from metapl.apps.words import cell
from metapl.errors import MetaplError, reason_of
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


def csv_rows(path: Path, columns: int, highest: float) -> list[tuple[int, Tensor]]:
    """The examples in a CSV file in UTF-8: of each row the line, the first being 1, and ``columns`` numbers between 0
    and ``highest``, float32; a MetaplError where a row is not so.

    A first row without any number is a header, and so is 0, 1, …, ``columns`` − 1, the names that a table without names
    is often saved with. Empty lines are passed over.
    """
    try:
        with io.TextIOWrapper(open_plain(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(text.strip() for text in row)]
    except (OSError, ValueError, csv.Error) as error:
        raise MetaplError(f"{path}: the file cannot be read: {reason_of(error)}.") from error
    header = [str(column) for column in range(columns)]
    found = []
    for place, (line, row) in enumerate(rows):
        values = [_number(text) for text in row]
        if place == 0 and (values == [None] * len(row) or [text.strip() for text in row] == header):
            continue
        if len(row) != columns:
            raise MetaplError(f"{path}:{line}: the row has {len(row)} cells; expected {columns} numbers, nothing else.")
        for index, value in enumerate(values):
            if value is None or not 0 <= value <= highest:
                where = f"{path}:{line}: cell {index + 1}"
                raise MetaplError(f"{where} is {row[index]!r}; expected a number from 0 to {highest:g}.")
        found.append((line, torch.tensor(values, dtype=torch.float32)))
    if not found:
        raise MetaplError(f"{path}: there is no row of numbers in it.")
    return found


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
