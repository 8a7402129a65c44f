"""The rows that a fit records."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from metapl.errors import MetaplError, reason_of
from metapl.feedback.report import Say
from metapl.runs.folder import Folder
from metapl.runs.rows import Metrics


@contextmanager
def _writing() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise MetaplError(f"the rows of the fit could not be written: {reason_of(error)}") from error


class Records:
    """The rows of one phase, in ``metrics.jsonl`` and a copy for TensorBoard where there is a folder ``out``.

    Rows and events after step ``start`` belong to work that was lost, and are removed. A copy that fails is said once
    and ends. ``history`` has the rows so far.
    """

    @_writing()
    def __init__(self, out: Folder | None, phase: str, start: int, say: Say) -> None:
        self.phase, self.start, self.say = phase, start, say
        self.history: list[dict[str, float]] = []
        self.metrics = None if out is None else Metrics(out.path / "metrics.jsonl")
        self.curves = None if out is None else str(out.path / "tensorboard" / phase)
        self.events: Any = None
        if self.metrics is None:
            return
        if start and not self.metrics.file.exists():
            say(f"{self.metrics.file} is missing: it begins again after step {start:,}, without earlier rows")
        self.metrics.cut(phase, start)
        for row in self.metrics.rows(phase):
            del row["phase"]
            # JSON knows no NaN, which is null there.
            self.history.append({name: math.nan if value is None else value for name, value in row.items()})

    @_writing()
    def add(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.metrics is None:
            return
        plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
        self.metrics.add({"phase": self.phase, **plain})
        try:
            if self.curves is not None and self.events is None:
                from torch.utils.tensorboard import SummaryWriter  # takes a second

                self.events = SummaryWriter(self.curves, purge_step=self.start + 1 if self.start else None)
            for name in row.keys() - {"step"} if self.events is not None else ():
                self.events.add_scalar(name, row[name], int(row["step"]))
        except Exception as error:
            self.curves = self.events = None
            self.say(f"note: no more curves for TensorBoard ({type(error).__name__}: {error}); metrics.jsonl goes on")

    @_writing()
    def flush(self) -> None:
        """Bring the rows to the disk: those before a checkpoint are not written again."""
        if self.metrics is not None:
            self.metrics.sync()

    def close(self) -> None:
        with suppress(Exception):  # of a full disk
            if self.events is not None:
                self.events.close()
