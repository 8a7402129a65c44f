"""How far the rows of the suite are from red, in points.

python tests/outcomes/outcome_table.py              # all of them
python tests/outcomes/outcome_table.py Muon fit     # those with these words
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable

import test_first_call
import test_modes
import test_optimizers
from trainings import Comparison, Row, comparisons

import metapl


def all_rows() -> list[Row]:
    """Return the rows of all files, each once."""
    rows = (
        test_modes.QUICK
        + test_modes.LONG
        + test_first_call.QUICK
        + test_first_call.LONG
        + test_optimizers.LONG
    )
    return list(dict.fromkeys(rows))


def print_row(title: str, compared: Iterable[Comparison]) -> None:
    """Train, and print the smallest margin, what was compared, and the processor time."""
    began = time.process_time()
    try:
        found = [*compared]
    except metapl.MetaplError as error:
        print(f"| error | {title} | {error} | |", flush=True)
        return
    seconds = time.process_time() - began
    margin = min(comparison.margin for comparison in found)
    words = "; ".join(map(str, found))
    print(f"| {100 * margin:+.1f} | {title} | {words} | {seconds:.1f} |", flush=True)


def main() -> None:
    words = sys.argv[1:]
    print("| margin | row | what was compared | seconds |\n|---:|---|---|---:|", flush=True)
    for row in all_rows():
        if all(word in row.title for word in words):
            print_row(row.title, comparisons(row))


if __name__ == "__main__":
    main()
