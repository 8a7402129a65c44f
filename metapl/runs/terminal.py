"""What a long run shows of how far it is, and how it is asked to end."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

from tqdm import tqdm

# What matters most comes first: what a narrow terminal has no room for is cut off at the end.
BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {remaining} left{postfix}"

# The signals by which a process is asked to end, from outside or by a terminal that is closed.
# Windows has no SIGHUP.
END = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


def progress(shown: bool, *, name: str, start: int, steps: int) -> Any:
    """Return a bar of tqdm over so many steps, at step ``start``.

    It is shown on standard error, where that is a terminal. Close it, or use it in a ``with``
    block.
    """
    return tqdm(
        total=steps,
        initial=start,
        desc=name,
        bar_format=BAR,
        # With None, tqdm shows the bar where standard error is a terminal.
        disable=None if shown else True,
        leave=False,
        dynamic_ncols=True,
    )


@contextmanager
def step_bar(shown: bool, steps: int, name: str, start: int) -> Iterator[Callable[[], object]]:
    """Give a function to call after each step, which advances the bar of :func:`progress`."""
    with progress(shown, name=name, start=start, steps=steps) as bar:
        yield bar.update


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
