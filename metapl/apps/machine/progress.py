"""How far a fit is: a bar on a terminal, elsewhere a line now and then."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

# What matters most comes first: what a narrow terminal has no room for is cut off at the end.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

LINE_EVERY = 60.0  # the fewest seconds between two lines of a phase; only its last line does not wait
EVERY = 0.1  # seconds between two updates of a count


class Progress:
    """How far a fit is.

    Args:
        name: of the phase.
        start, steps: the step it stands at, of how many.
        bar: of tqdm, on a terminal.
        lines: write lines, for pipes, files and notebooks: at the first validation, then at validations that come
            :data:`LINE_EVERY` seconds or more after the last line, and at the end. The time that is left is told by the
            steps since the last line, for later steps may cost more than the first ones.
    """

    def __init__(self, name: str, start: int, steps: int, bar: Any = None, lines: bool = False) -> None:
        self.name, self.steps, self.bar, self.lines = name, steps, bar, lines
        self.done, self.examples, self.since = start, 0, time.monotonic()
        self.timed = start, self.since  # from which step on the time of a step is measured, and when that was
        self.last_line = -math.inf  # when it was

    def advance(
        self, batches: Iterable[Any], row: Mapping[str, float], *, due: bool = False, validated: str = ""
    ) -> None:
        """One step further: on these batches, with what was measured at it, ``due`` where it was validated, and what
        the student's last validation has shown, in words."""
        self.done += 1
        now = time.monotonic()
        if self.bar is not None:
            self.bar.update()
            self.examples += sum(map(examples_in, batches))
            if row:
                shown = f"{validated}, " if validated else ""
                rate = self.examples / max(now - self.since, 1e-9)
                self.bar.set_postfix_str(f"{shown}{rate:.0f} examples/s", refresh=False)
        elif self.lines and due and (self.done >= self.steps or now - self.last_line >= LINE_EVERY):
            step, moment = self.timed
            self.timed, self.last_line = (self.done, now), now
            when = f"about {duration((self.steps - self.done) * (now - moment) / (self.done - step))} left"
            when = when if self.done < self.steps else f"after {duration(now - self.since)}"
            shown = f", validation {validated}" if validated else ""
            line = f"{self.name}: step {self.done:,} of {self.steps:,}{shown}, {when}"
            print(line, file=sys.stderr, flush=True)


@contextmanager
def progress(shown: bool, *, name: str, start: int, steps: int) -> Iterator[Progress]:
    """What shows each step, if ``shown``; where standard error is not a terminal, in lines. See :class:`Progress`."""
    # Not tqdm's disable=True: it makes locks between processes even so, which a killed worker would leave behind.
    if not shown or not sys.stderr.isatty():
        yield Progress(name, start, steps, lines=shown)
        return
    from tqdm import tqdm

    how: dict[str, Any] = {"leave": False, "bar_format": BAR, "dynamic_ncols": True, "file": sys.stderr}
    with tqdm(total=steps, initial=start, desc=name, **how) as bar:
        yield Progress(name, start, steps, bar)


def duration(seconds: float) -> str:
    """
    >>> duration(41.7), duration(200), duration(9000)
    ('42 s', '3 min', '2 h 30 min')
    """
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def examples_in(batch: Any) -> int:
    """How many examples a batch holds: the rows of its first tensor that has any."""
    leaves = pytree.tree_leaves(batch)
    return next((len(leaf) for leaf in leaves if isinstance(leaf, Tensor) and leaf.ndim), 0)


@contextmanager
def counting(what: str, shown: bool, total: int | None = None) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many are done, and shows it on one line of the terminal while the block lasts;
    nothing where ``shown`` is False or standard error is no terminal."""
    if not shown or not sys.stderr.isatty():
        yield lambda done: None
        return
    from tqdm import tqdm

    often: dict[str, float] = {"delay": EVERY, "mininterval": EVERY, "miniters": 1}
    text = "{desc}: {n:,}" + ("" if total is None else f" of {total:,}")
    with tqdm(total=total, desc=what, bar_format=text, leave=False, file=sys.stderr, **often) as bar:
        yield lambda done: bar.update(done - bar.n)
