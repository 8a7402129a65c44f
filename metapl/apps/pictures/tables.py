"""Tables of numbers that a user brings, as tensors."""

from __future__ import annotations

import csv
import io
from pathlib import Path

import torch
from torch import Tensor

from metapl.errors import MetaplError, reason_of
from metapl.runs.sealed import open_plain


def csv_rows(path: Path, columns: int, highest: float) -> list[tuple[int, Tensor]]:
    """The examples in a CSV file in UTF-8: of each row the line, the first being 1, and ``columns`` numbers between 0
    and ``highest``, float32.

    A first row without any number is a header, and so is 0, 1, …, ``columns`` − 1, the names that a table without names
    is often saved with. Empty lines are passed over.

    Raises:
        MetaplError: the file cannot be read, or a row is not as above; nothing of such a file is used.
    """
    try:
        with io.TextIOWrapper(open_plain(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, ValueError, csv.Error) as error:
        raise MetaplError(f"{path}: the file cannot be read: {reason_of(error)}.") from error
    header = [str(column) for column in range(columns)]
    found = []
    for place, (line, row) in enumerate(rows):
        values = [_number(cell) for cell in row]
        if place == 0 and (values == [None] * len(row) or [cell.strip() for cell in row] == header):
            continue
        if len(row) != columns:
            raise MetaplError(f"{path}:{line}: the row has {len(row)} cells; expected {columns} numbers, nothing else.")
        for index, value in enumerate(values):
            if value is None or not 0 <= value <= highest:
                where, given = f"{path}:{line}: cell {index + 1}", row[index]
                raise MetaplError(f"{where} is {given!r}; expected a number from 0 to {highest:g}.")
        found.append((line, torch.tensor(values, dtype=torch.float32)))
    if not found:
        raise MetaplError(f"{path}: there is no row of numbers in it.")
    return found


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
