"""Ctrl-C, SIGTERM and SIGHUP, heard between steps."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metapl.runs.signals import END, is_heard


class Interrupted(KeyboardInterrupt):
    """A fit that was asked to stop (Ctrl-C, SIGTERM, SIGHUP); what was done is saved, if there is where."""

    def __init__(self, step: int, signal_number: int, saved: Path | None) -> None:
        where = f"saved to {saved}" if saved else "nothing saved: fit was given no out"
        super().__init__(f"stopped after step {step}; {where}")
        self.step, self.signal_number, self.saved = step, signal_number, saved


@contextmanager
def stop_requests() -> Iterator[list[int]]:
    """Collect Ctrl-C, SIGTERM and SIGHUP instead of being torn out of a step; a second Ctrl-C is not held back."""
    asked: list[int] = []

    def note(number: int, frame: Any) -> None:
        # Not on a second SIGTERM: who stops a group of processes may reach one of them twice.
        if number == signal.SIGINT and number in asked:
            raise KeyboardInterrupt
        asked.append(number)

    try:
        before = {number: signal.signal(number, note) for number in filter(is_heard, (signal.SIGINT, *END))}
    except ValueError:  # only the main thread may handle signals
        yield asked
        return
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
