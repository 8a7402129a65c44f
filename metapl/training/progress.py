"""How far a fit is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"
"""What matters most comes first: what a narrow terminal has no room for is cut off at the end."""

AT_LEAST = BAR.replace("{remaining} left", "at least {remaining} left")
"""While steps are cheaper than those to come."""

LINE_EVERY = 60.0
"""The fewest seconds between two lines of a phase; only its last line does not wait."""

EVERY = 0.1
"""Seconds between two updates of a count."""


class Progress:
    """How far a fit is.

    Args:
        name: of the phase.
        start, steps: the step it stands at, of how many.
        bar: of tqdm, on a terminal.
        lines: write lines, for pipes, files and notebooks: at the first validation, then at validations that come
            :data:`LINE_EVERY` seconds or more after the last line, and at the end.
        dearer: steps from which on each costs more than those before, such as the first one with UDA. The time that is
            left is told by the steps since the last of these, and until the last one has come as a lower bound.
    """

    def __init__(
        self, name: str, start: int, steps: int, bar: Any = None, lines: bool = False, dearer: Sequence[int] = ()
    ) -> None:
        self.name, self.start, self.steps, self.bar, self.lines = name, start, steps, bar, lines
        self.done, self.examples, self.since = start, 0, time.monotonic()
        self.dearer = sorted(step for step in {*dearer} if start < step < steps)
        self.timed = start, self.since  # from which step on the time of a step is measured, and when that was
        self.accuracy = ""
        self.last_line = -math.inf  # when it was
        self._show_bound()

    def advance(
        self, batches: Iterable[Any], row: Mapping[str, float], *, due: bool = False, examples: int = 0
    ) -> None:
        """One step further: on these batches, with what was measured at it, ``due`` where it was validated, on so many
        examples."""
        self.done += 1
        accuracy, now = row.get("student_validation_accuracy"), time.monotonic()
        if accuracy is not None:
            self.accuracy = f"{accuracy:.1%} of {examples:,}"
        seconds = max(now - self.since, 1e-9)
        if self.bar is not None:
            self.bar.update()
            self.examples += sum(map(examples_in, batches))
            if row:
                shown = f"accuracy {self.accuracy}, " if self.accuracy else ""
                self.bar.set_postfix_str(f"{shown}{self.examples / seconds:.0f} examples/s", refresh=False)
        elif self.lines and due and (self.done >= self.steps or now - self.last_line >= LINE_EVERY):
            self.last_line, (step, moment) = now, self.timed
            validated = "" if accuracy is None else f", validation accuracy {self.accuracy}"
            left = duration((self.steps - self.done) * (now - moment) / (self.done - step))
            when = f"{'at least' if self.dearer else 'about'} {left} left"
            when = when if self.done < self.steps else f"after {duration(seconds)}"
            line = f"{self.name}: step {self.done:,} of {self.steps:,}{validated}, {when}"
            print(line, file=sys.stderr, flush=True)
        if self.done in self.dearer:
            self.dearer.remove(self.done)
            self.timed = self.done, now
            self._show_bound()

    def _show_bound(self) -> None:
        if self.bar is not None:
            self.bar.bar_format = AT_LEAST if self.dearer else BAR


@contextmanager
def progress(shown: bool, *, name: str, start: int, steps: int, dearer: Sequence[int] = ()) -> Iterator[Progress]:
    """What shows each step, if ``shown``; where standard error is not a terminal, in lines. See :class:`Progress`."""
    # Not tqdm's disable=True: it makes locks between processes even so, which a killed worker would leave behind.
    if not shown or not sys.stderr.isatty():
        yield Progress(name, start, steps, lines=shown, dearer=dearer)
        return
    from tqdm import tqdm

    with tqdm(
        total=steps, initial=start, desc=name, leave=False, bar_format=BAR, dynamic_ncols=True, file=sys.stderr
    ) as bar:
        yield Progress(name, start, steps, bar, dearer=dearer)


def duration(seconds: float) -> str:
    """A time as one would say it.

    >>> duration(41.7), duration(200), duration(9000)
    ('42 s', '3 min', '2 h 30 min')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def examples_in(batch: Any) -> int:
    """How many examples a batch holds: the rows of its first tensor that has any."""
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


@contextmanager
def counting(what: str, shown: bool, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many are done, and shows it on one line of the terminal while the block lasts.

    Nothing is shown where ``shown`` is False or standard error is not a terminal.
    """
    shown = shown and sys.stderr.isatty()
    last, width = time.monotonic(), 0

    def update(done: int) -> None:
        nonlocal last, width
        if not shown or time.monotonic() - last < EVERY:
            return
        text = f"{what}: {done:,}" + ("" if total is None else f" of {total:,}")
        print(f"\r{text:<{width}}", end="", file=sys.stderr, flush=True)
        last, width = time.monotonic(), max(width, len(text))

    try:
        yield update
    finally:
        if width:
            print(f"\r{'':<{width}}\r", end="", file=sys.stderr, flush=True)
