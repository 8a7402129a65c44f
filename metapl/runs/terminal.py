"""What a long run shows of how far it is, and how it is asked to end.

On a terminal a bar shows it. Elsewhere, as in a pipe or a log file, a fit says a line every half
minute. Lines of anything else go to the logger "metapl" at the level INFO, which the command prints
on standard error.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tqdm import tqdm

LOG = logging.getLogger("metapl")

# Seconds between two lines: a log of a day has some 3,000.
LINE_EVERY = 30.0

# The column of a recorded row that is shown as its loss: the first of these that the row has. The
# first is that of a network that learns alone, the others those of a student and of its teacher.
LOSS_COLUMNS = ("loss", "inner_loss", "teacher_loss")

# What matters most comes first: what a narrow terminal has no room for is cut off at the end.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

# The signals by which a process is asked to end, from outside or by a terminal that is closed.
# Windows has no SIGHUP.
END = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def draws_bars() -> bool:
    """Return whether standard error is a terminal with a size, which that of a container may lack.

    tqdm shows no bar in a terminal of no lines.
    """
    if not sys.stderr.isatty():
        return False
    try:
        return 0 not in os.get_terminal_size(sys.stderr.fileno())
    except OSError:
        # Its size is not known, and tqdm takes the usual one.
        return True


SecondsLeft = Callable[[int], float | None]
"""Returns the seconds that are left after so many steps; None where it does not know them."""


class Bar(tqdm):  # type: ignore[misc]
    """A bar with the time left of whoever knows it."""

    seconds_left: SecondsLeft | None = None

    @property
    def format_dict(self) -> dict[str, Any]:
        """Return what the bar shows, with the rate at which the other steps take that time."""
        shown: dict[str, Any] = super().format_dict
        seconds = None if self.seconds_left is None else self.seconds_left(self.n)
        if seconds:
            shown["rate"] = (self.total - self.n) / seconds
        return shown


def progress(
    shown: bool, *, name: str, start: int, steps: int, seconds_left: SecondsLeft | None = None
) -> Any:
    """Return a bar of tqdm over so many steps, at step ``start``.

    It is shown where :func:`draws_bars`. Close it, or use it in a ``with`` block.

    Args:
        seconds_left: where it is not given, later steps are taken to be as long as the last ones.
    """
    bar = Bar(
        total=steps,
        initial=start,
        desc=name,
        bar_format=BAR,
        disable=not (shown and draws_bars()),
        leave=False,
        dynamic_ncols=True,
    )
    bar.seconds_left = seconds_left
    return bar


def spoken_time(seconds: float) -> str:
    """Say how long something takes, in the greatest unit of which there are two.

    >>> spoken_time(0.2), spoken_time(110), spoken_time(130), spoken_time(8000), spoken_time(2e5)
    ('1 s', '110 s', '2 min', '2.2 h', '2.3 days')
    """
    if seconds < 120:
        return f"{max(1, round(seconds))} s"
    if seconds < 2 * 3600:
        return f"{round(seconds / 60)} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 86400:.1f} days"


class Pace:
    """When the next line is due, and how much time is left.

    Args:
        total: how many steps there are.
        done: how many were done when this began, before the time that is measured; None where that
            is not known before the first of them is counted, as in a fit that is resumed.
        clock: gives seconds.
    """

    def __init__(
        self, total: int, done: int | None = 0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.total = total
        self.done_at_start = done
        self.clock = clock
        self.started = clock()
        self.last_line = self.started

    def is_due(self) -> bool:
        """Return whether half a minute has gone by since the last line; then it counts as said."""
        now = self.clock()
        if now - self.last_line < LINE_EVERY:
            return False
        self.last_line = now
        return True

    def time_left(self, done: int) -> str:
        """Return ", 4 min left" as the steps so far went, or nothing where none has been timed."""
        if self.done_at_start is None:
            self.done_at_start = done
            self.started = self.clock()
        steps_timed = done - self.done_at_start
        if steps_timed <= 0:
            return ""
        seconds_per_step = (self.clock() - self.started) / steps_timed
        return f", {spoken_time(seconds_per_step * (self.total - done))} left"


class FitLines:
    """A callback of a fit that says a line every half minute: step, loss, validation, time left.

    Called with recorded rows alone, which are perhaps further apart, it says each of them.

    Args:
        say: where a line goes.
        steps: of the fit.
        phase: its name; "fit" is left out.
        done: steps before this began; None where that is not known, as in a fit that is resumed.
        clock: gives seconds.
        seconds_left: where it is not given, later steps are taken to be as long as the first ones.
    """

    def __init__(
        self,
        say: Callable[[str], object],
        *,
        steps: int,
        phase: str = "fit",
        done: int | None = 0,
        clock: Callable[[], float] = time.monotonic,
        seconds_left: SecondsLeft | None = None,
    ) -> None:
        self.say = say
        self.steps = steps
        self.prefix = "" if phase == "fit" else f"{phase}, "
        self.pace = Pace(steps, done, clock)
        self.seconds_left = seconds_left
        self.loss: float | None = None
        self.validation: dict[str, str] = {}

    def __call__(self, step: int, row: Mapping[str, float], trainer: Any) -> None:
        """Remember the row, and say a line where one is due."""
        for column in LOSS_COLUMNS:
            if column in row:
                self.loss = row[column]
                break
        for column, value in row.items():
            role, separator, metric = column.partition("_validation_")
            if separator:
                is_accuracy = metric == "accuracy"
                self.validation[role] = f"{value:.1%}" if is_accuracy else f"{metric} {value:.4g}"
        time_left = self.pace.time_left(step)
        if not self.pace.is_due():
            return
        seconds = None if self.seconds_left is None else self.seconds_left(step)
        if seconds is not None:
            time_left = f", {spoken_time(seconds)} left"
        text = f"{self.prefix}step {step:,} of {self.steps:,}"
        if self.loss is not None:
            text += f", loss {self.loss:.3g}"
        # That of the student, which is what is delivered; of a teacher only while it learns alone.
        for role in ("student", "teacher"):
            if role in self.validation:
                text += f", validation {self.validation[role]}"
                break
        self.say(text + time_left)


@contextmanager
def step_bar(shown: bool, steps: int, name: str) -> Iterator[Callable[[], object]]:
    """Give a function to call after each step.

    It advances the bar of :func:`progress`. Where no bar is drawn it logs a line every half minute,
    with the steps that are done and the time that is left.
    """
    logs_lines = shown and not draws_bars()
    with progress(shown, name=name, start=0, steps=steps) as bar:
        yield ShownSteps(name, steps, bar=bar, logs_lines=logs_lines).advance


class ShownSteps:
    """The steps that a bar shows, or that are logged.

    Args:
        name: what they are called.
        steps: how many there are.
        bar: of tqdm.
        logs_lines: whether a line is logged every half minute.
    """

    def __init__(self, name: str, steps: int, *, bar: Any, logs_lines: bool) -> None:
        self.name = name
        self.steps = steps
        self.done = 0
        self.bar = bar
        self.logs_lines = logs_lines
        self.pace = Pace(steps)

    def advance(self) -> None:
        """Count one step as done."""
        self.bar.update()
        self.done += 1
        if self.logs_lines and self.pace.is_due():
            time_left = self.pace.time_left(self.done)
            LOG.info("%s: %s of %s%s", self.name, f"{self.done:,}", f"{self.steps:,}", time_left)


def is_heard(number: int) -> bool:
    """Return whether this process was not started to ignore a signal.

    ``nohup`` and a shell's background commands are started so.
    """
    return signal.getsignal(number) is not signal.SIG_IGN


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP instead of being torn out of a step.

    A second Ctrl-C is not held back.
    """
    requests: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        # Not on a second SIGTERM: who stops a group of processes may reach one of them twice.
        if number == signal.SIGINT and number in requests:
            raise KeyboardInterrupt
        requests.append(number)

    former_handlers: dict[int, Any] = {}
    try:
        # Only the main thread may handle signals.
        with suppress(ValueError):
            for number in (signal.SIGINT, *END):
                if is_heard(number):
                    former_handlers[number] = signal.signal(number, note)
        yield requests
    finally:
        for number, handler in former_handlers.items():
            signal.signal(number, handler)


def exit_code(stopped: KeyboardInterrupt) -> int:
    """Return the exit code of a process that the signal has ended."""
    return 128 + int(getattr(stopped, "signal_number", signal.SIGINT))
