"""Tables of plain text."""

from __future__ import annotations

from collections.abc import Sequence


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
