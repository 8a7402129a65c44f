"""What a long run shows of how far it is, and how it is asked to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

from tqdm import tqdm

# What matters most comes first: what a narrow terminal has no room for is cut off at the end.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

# By which a process is asked to end, from outside or by a terminal that is closed; Windows has no
# SIGHUP.
END = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def progress(shown: bool, *, name: str, start: int, steps: int) -> Any:
    """A bar of tqdm on standard error, where that is a terminal, over so many steps, at step
    ``start``; close it, or use it in a ``with`` block."""
    how: dict[str, Any] = {
        "disable": None if shown else True,
        "leave": False,
        "dynamic_ncols": True,
    }
    return tqdm(total=steps, initial=start, desc=name, bar_format=BAR, **how)


@contextmanager
def step_bar(shown: bool, steps: int, name: str, start: int) -> Iterator[Callable[[], object]]:
    """A function to call after each step, which advances the bar of :func:`progress`."""
    with progress(shown, name=name, start=start, steps=steps) as bar:
        yield bar.update


def is_heard(number: int) -> bool:
    """Whether this process was not started to ignore a signal.

    As ``nohup`` and a shell's background commands are.
    """
    return signal.getsignal(number) is not signal.SIG_IGN


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP instead of being torn out of a step.

    A second Ctrl-C is not held back.
    """
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        # Not on a second SIGTERM: who stops a group of processes may reach one of them twice.
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # only the main thread may handle signals
            before |= {
                number: signal.signal(number, note)
                for number in filter(is_heard, (signal.SIGINT, *END))
            }
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
