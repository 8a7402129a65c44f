"""How far something is that takes long, on one line of the terminal."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

EVERY = 0.1
"""Seconds between two looks."""


@contextmanager
def counting(what: str, shown: bool, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Give a function that is told how many are done; the line on standard error goes when the block ends.

    Nothing is shown where ``shown`` is False or standard error is no terminal.
    """
    shown = shown and sys.stderr.isatty()
    last, width = time.monotonic(), 0

    def tell(done: int) -> None:
        nonlocal last, width
        if not shown or time.monotonic() - last < EVERY:
            return
        text = f"{what}: {done:,}" + ("" if total is None else f" of {total:,}")
        print(f"\r{text:<{width}}", end="", file=sys.stderr, flush=True)
        last, width = time.monotonic(), max(width, len(text))

    try:
        yield tell
    finally:
        if width:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
