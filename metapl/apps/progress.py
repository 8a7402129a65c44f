"""What a long run says of how far it is.

On a terminal a bar shows it (:mod:`metapl.runs.terminal`), or a count. Into a pipe or a log file
goes a line every half minute: the step, the loss, the last validation, and the time that is left.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from metapl.apps.printing import tell
from metapl.runs.terminal import Pace
from metapl.training import Say

# Seconds between two updates of a count on a terminal.
BAR_EVERY = 0.1

# The column of a recorded row that is shown as its loss: the first of these that the row has. The
# first is that of a network that learns alone, the others those of a student and of its teacher.
LOSS_COLUMNS = ("loss", "inner_loss", "teacher_loss")


def is_watched() -> bool:
    """Return whether both standard streams are a terminal, so that a bar is all that is asked for.

    Where one of them is not, lines are said too: ``metapl ... > log`` shows the bar on the screen,
    and the log has the lines.
    """
    return sys.stdout.isatty() and sys.stderr.isatty()


class FitLines:
    """A callback of a fit that says a line every half minute, with the row that is recorded then.

    Rows are recorded at ``log_every`` and ``validate_every``: where those are further apart than
    half a minute, each of them is said.

    Args:
        say: where a line goes.
        steps: of the fit.
        phase: its name; "fit" is left out.
        resume: whether the fit goes on from a checkpoint, at a step that is not known yet.
        clock: gives seconds.
    """

    def __init__(
        self,
        say: Say,
        *,
        steps: int,
        phase: str = "fit",
        resume: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.say = say
        self.steps = steps
        self.prefix = "" if phase == "fit" else f"{phase}, "
        self.pace = Pace(steps, None if resume else 0, clock)
        self.loss: float | None = None
        self.validation: dict[str, float] = {}

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> None:
        """Remember the row, and say a line where one is due."""
        for column in LOSS_COLUMNS:
            if column in row:
                self.loss = row[column]
                break
        for column, value in row.items():
            role, separator, metric = column.partition("_validation_")
            if separator and metric == "accuracy":
                self.validation[role] = value
        time_left = self.pace.time_left(step)
        if not self.pace.is_due():
            return
        text = f"{self.prefix}step {step:,} of {self.steps:,}"
        if self.loss is not None:
            text += f", loss {self.loss:.3g}"
        # That of the student, which is what is delivered; of a teacher only while it learns alone.
        for role in ("student", "teacher"):
            if role in self.validation:
                text += f", validation {self.validation[role]:.1%}"
                break
        self.say(text + time_left)


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

    It says nothing where ``is_shown`` is False or standard error is a terminal, which has a bar.
    Standard output is left to what the command makes, such as rows of CSV.
    """
    if not is_shown or sys.stderr.isatty():
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
        # None shows the bar on a terminal alone.
        disable=None if is_shown else True,
    )

    def update(done: int) -> None:
        bar.update(done - bar.n)
        lines(done)

    with bar:
        yield update
