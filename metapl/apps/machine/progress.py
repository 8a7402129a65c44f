"""How many of many are done, on a terminal, and how long that took in words."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

EVERY = 0.1  # seconds between two updates of a count


@contextmanager
def counting(what: str, shown: bool, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many are done, and shows it on one line of the terminal while the block lasts;
    nothing where ``shown`` is False or standard error is no terminal."""
    often: dict[str, Any] = {"delay": EVERY, "mininterval": EVERY, "miniters": 1, "disable": None if shown else True}
    text = "{desc}: {n:,}" + ("" if total is None else f" of {total:,}")
    with tqdm(total=total, desc=what, bar_format=text, leave=False, file=sys.stderr, **often) as bar:
        yield lambda done: bar.update(done - bar.n)
