"""How far a long computation is: a bar on standard error where that is a terminal, nothing elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

# What matters most comes first: what a narrow terminal has no room for is cut off at the end.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"


def progress(shown: bool, *, name: str, start: int, steps: int) -> Any:
    """A bar of tqdm over so many steps, at step ``start``; close it, or use it in a ``with`` block."""
    how: dict[str, Any] = {"disable": None if shown else True, "leave": False, "dynamic_ncols": True}
    return tqdm(total=steps, initial=start, desc=name, bar_format=BAR, **how)


@contextmanager
def counted(shown: bool, steps: int, name: str, start: int) -> Iterator[Callable[[Any], None]]:
    """Give a function that is called at each step, with its batch, and shows it as :func:`progress` does."""
    with progress(shown, name=name, start=start, steps=steps) as bar:
        yield lambda batch: bar.update()
