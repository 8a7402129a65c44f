"""What a long run says of how far it is.

On a terminal a bar shows it (:mod:`metapl.runs.terminal`), or a count. Into a pipe or a log file
goes a line every half minute.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm

from metapl.apps.printing import tell
from metapl.runs.terminal import Pace, draws_bars
from metapl.training import Say

# Seconds between two updates of a count on a terminal.
BAR_EVERY = 0.1


def is_watched() -> bool:
    """Return whether both standard streams show the bar, so that it is all that is asked for.

    Where one of them is not, lines are said too: ``metapl ... > log`` shows the bar on the screen,
    and the log has the lines.
    """
    return sys.stdout.isatty() and draws_bars()


class CountLines:
    """Say a line every half minute of how many of something are done.

    Args:
        say: where a line goes.
        name: of what is counted, such as "looking at labeled files".
        total: how many there are, or None where that is not known.
        done: how many are done already.
        clock: gives seconds.
    """

    def __init__(
        self,
        say: Say,
        name: str,
        *,
        total: int | None = None,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.say = say
        self.name = name
        self.total = total
        self.pace = Pace(total or 0, done, clock)

    def update(self, done: int) -> None:
        """Take how many are done by now."""
        if not self.pace.is_due():
            return
        if self.total is None:
            self.say(f"{self.name}: {done:,}")
        else:
            self.say(f"{self.name}: {done:,} of {self.total:,}{self.pace.time_left(done)}")


def count_lines(
    name: str, *, is_shown: bool, total: int | None = None, done: int = 0
) -> Callable[[int], None]:
    """Return a function that takes how many are done, and says so on standard error now and then.

    It says nothing where ``is_shown`` is False or standard error has a bar. Standard output is left
    to what the command makes, such as rows of CSV.
    """
    if not is_shown or draws_bars():
        return lambda done: None

    def say(text: str) -> None:
        tell(text, file=sys.stderr)

    return CountLines(say, name, total=total, done=done).update


@contextmanager
def count_bar(
    name: str, is_shown: bool, total: int | None = None
) -> Iterator[Callable[[int], None]]:
    """Give a function that takes how many are done, and shows it on standard error.

    While the block lasts it is one line of a terminal, which is overwritten; elsewhere it is a line
    every half minute. With ``is_shown`` False it is nothing.
    """
    lines = count_lines(name, is_shown=is_shown, total=total)
    text = "{desc}: {n:,}"
    if total is not None:
        text += f" of {total:,}"
    bar = tqdm(
        total=total,
        desc=name,
        bar_format=text,
        leave=False,
        file=sys.stderr,
        delay=BAR_EVERY,
        mininterval=BAR_EVERY,
        miniters=1,
        disable=not (is_shown and draws_bars()),
    )

    def update(done: int) -> None:
        bar.update(done - bar.n)
        lines(done)

    with bar:
        yield update
