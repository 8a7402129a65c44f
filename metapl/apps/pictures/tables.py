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
    """The examples in a CSV file, one a row, with the lines they stand on.

    A first row without any number is a header, and so is 0, 1, …, ``columns`` − 1, the names that a table without names
    is often saved with. Empty lines are passed over.

    Args:
        path: a file in UTF-8, with commas.
        columns: numbers in a row.
        highest: each number is between 0 and this.

    Returns:
        pairs of the line, the first being 1, and the numbers, float32 (columns,).

    Raises:
        MetaplError: the file cannot be read, or a row is not as above; nothing of such a file is used.
    """
    try:
        with io.TextIOWrapper(open_plain(path), encoding="utf-8-sig", newline="") as file:
            reader = csv.reader(file)
            rows = [(reader.line_num, row) for row in reader if any(cell.strip() for cell in row)]
    except (OSError, ValueError, csv.Error) as error:
        raise MetaplError(f"{path}: the file cannot be read: {reason_of(error)}.") from error
    first = [cell.strip() for cell in rows[0][1]] if rows else []
    if all(_number(cell) is None for cell in first) or first == [str(column) for column in range(columns)]:
        del rows[:1]
    if not rows:
        raise MetaplError(f"{path}: there is no row of numbers in it.")
    return [(line, _numbers(f"{path}:{line}", row, columns, highest)) for line, row in rows]


def _numbers(where: str, row: list[str], columns: int, highest: float) -> Tensor:
    if len(row) != columns:
        raise MetaplError(f"{where}: the row has {len(row)} cells; expected {columns} numbers and nothing else.")
    values = []
    for index, cell in enumerate(row, 1):
        value = _number(cell)
        if value is None or not 0 <= value <= highest:
            raise MetaplError(f"{where}: cell {index} is {cell!r}; expected a number from 0 to {highest:g}.")
        values.append(value)
    return torch.tensor(values, dtype=torch.float32)


def _number(cell: str) -> float | None:
    try:
        return float(cell)
    except ValueError:
        return None
