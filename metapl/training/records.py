"""What a fit leaves in its folder: rows, a copy of them for TensorBoard, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError, reason_of
from metapl.runs.folder import Folder
from metapl.runs.rows import Metrics
from metapl.training.options import FitOptions


class Records:
    """The records of one phase, in the run's folder ``out``; None: nothing is kept.

    Attributes:
        history: the rows so far.
        saved_at: the last checkpoint.
    """

    def __init__(self, out: Folder | None, options: FitOptions, say: Any) -> None:
        self.out, self.phase, self.say = out, options.phase, say
        self.checkpoints = None if out is None else out.checkpoints(options.phase, options.keep)
        self.metrics = None if out is None else Metrics(out.path / "metrics.jsonl")
        self.history: list[dict[str, float]] = []
        self.saved_at: Path | None = None
        self._events: Any = None

    @contextmanager
    def opened(self, start: int) -> Iterator[None]:
        """Record from step ``start`` on; rows and events after it belong to work that was lost, and are removed."""
        if self.out is None or self.metrics is None:
            yield
            return
        if start and not self.metrics.file.exists():
            self.say(f"{self.metrics.file} is missing: it begins again after step {start:,}, without earlier rows")
        with self._writing():
            self.metrics.cut(self.phase, start)
        for row in self.metrics.rows(self.phase):
            del row["phase"]
            # JSON knows no NaN, which is null there.
            self.history.append({name: math.nan if value is None else value for name, value in row.items()})
        with self._copying():
            from torch.utils.tensorboard import SummaryWriter  # takes a second

            folder = self.out.path / "tensorboard" / self.phase
            self._events = SummaryWriter(str(folder), purge_step=start + 1 if start else None)
        try:
            yield
        finally:
            with self._copying():
                if self._events is not None:
                    self._events.close()

    def row(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.metrics is not None:
            with self._writing():
                plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
                self.metrics.add({"phase": self.phase, **plain})
            with self._copying():
                for name in row.keys() - {"step"} if self._events is not None else ():
                    self._events.add_scalar(name, row[name], int(row["step"]))

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Write a checkpoint; its path, or None without a folder."""
        if self.checkpoints is not None:
            self.saved_at = self.checkpoints.write(step, state)
        return self.saved_at

    def flush(self) -> None:
        """Bring the rows to the disk: those before a checkpoint are not written again."""
        if self.metrics is not None:
            with self._writing():
                self.metrics.sync()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise MetaplError(
                f"the records in {self.out and self.out.path} could not be written: {reason_of(error)}"
            ) from error

    @contextmanager
    def _copying(self) -> Iterator[None]:
        """Write to TensorBoard's file; metrics.jsonl is the record, so a failure is said once and ends the copy."""
        try:
            yield
        except Exception as error:
            self._events = None
            self.say(f"note: no more curves for TensorBoard ({type(error).__name__}: {error}); metrics.jsonl goes on")
