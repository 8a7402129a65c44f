"""What ends a fit early: a callback, Ctrl-C, SIGTERM or SIGHUP."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from metapl.runs.signals import END, is_heard

Callback = Callable[[int, Mapping[str, float], Any], object]
"""Called with the number of steps done, the row recorded after them and the trainer; a dict of numbers
that it returns becomes part of the row.

An object with ``state_dict()`` and ``load_state_dict(state)`` beside its ``__call__`` is saved in the checkpoints and
goes on where it was when the fit is resumed.
"""


class StopFit(Exception):
    """Raised by a callback to end the fit after the step at hand, as if it had been the last one.

    The student is then chosen as at the end of any fit, a checkpoint is written, the text is shown, and the fit counts
    as finished when it is resumed. During ``wait`` the student has not begun, and is returned untrained.

    >>> import torch, metapl
    >>> def stop_at_small_loss(step, row, trainer):
    ...     if row["loss"] < 0.1:
    ...         raise metapl.StopFit(f"the loss is {row['loss']:.2f}")

    To stop once the validation has not become better for a while, a callback counts, and keeps its count in the
    checkpoints:

    >>> class Patience:
    ...     best, since = float("-inf"), 0
    ...     def __call__(self, step, row, trainer):
    ...         if "student_validation_accuracy" in row:
    ...             value = row["student_validation_accuracy"]
    ...             self.best, self.since = (value, 0) if value > self.best else (self.best, self.since + 1)
    ...             if self.since == 5:
    ...                 raise metapl.StopFit("five validations without a better one")
    ...     def state_dict(self):
    ...         return dict(vars(self))
    ...     def load_state_dict(self, state):
    ...         vars(self).update(state)
    """


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

    before: dict[int, Any] = {}
    try:
        with suppress(ValueError):  # only the main thread may handle signals
            before |= {number: signal.signal(number, note) for number in filter(is_heard, (signal.SIGINT, *END))}
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
