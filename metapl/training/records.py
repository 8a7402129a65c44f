"""What a fit leaves in its folder: rows, a copy of them for TensorBoard, and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError
from metapl.runs.checkpoint import CheckpointError
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
        # JSON knows no NaN, which is null there.
        rows = [dict.fromkeys(row, math.nan) | {k: v for k, v in row.items() if v is not None}
                for row in self.metrics.rows(self.phase)]  # fmt: skip
        self.history = [{name: value for name, value in row.items() if name != "phase"} for row in rows]
        folder = self.out.path / "tensorboard" / self.phase
        self._copied(lambda: setattr(self, "_events", _writer(folder, start)))
        try:
            yield
        finally:
            self._copied(lambda: self._events and self._events.close())

    def row(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.metrics is not None:
            with self._writing():
                plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
                self.metrics.add({"phase": self.phase, **plain})
            self._copied(lambda: self._add_scalars(row))

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Write a checkpoint, after the rows before it; its path, or None without a folder."""
        self.flush()
        if self.checkpoints is not None:
            try:
                self.saved_at = self.checkpoints.write(step, state)
            except CheckpointError as error:
                raise CheckpointError(f"{error} ({self.last_good()})") from error
        return self.saved_at

    def flush(self) -> None:
        """Bring the rows to the disk: those before a checkpoint are not written again."""
        if self.metrics is not None:
            with self._writing():
                self.metrics.sync()

    def last_good(self) -> str:
        return f"the last good checkpoint is {self.saved_at}" if self.saved_at else "no checkpoint was written before"

    def _add_scalars(self, row: dict[str, float]) -> None:
        for name in row.keys() - {"step"} if self._events is not None else ():
            self._events.add_scalar(name, row[name], int(row["step"]))

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            where = self.out and self.out.path
            raise MetaplError(
                f"the records in {where} could not be written: {error.strerror or error}; {self.last_good()}. Mend "
                "that (is the disk full?), then resume the run."
            ) from error

    def _copied(self, act: Any) -> None:
        """Write to TensorBoard's file; metrics.jsonl is the record, so a failure is said once and ends the copy."""
        try:
            act()
        except Exception as error:
            self._events = None
            self.say(f"note: no more curves for TensorBoard ({type(error).__name__}: {error}); metrics.jsonl goes on")


def _writer(folder: Path, start: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter  # takes a second

    return SummaryWriter(str(folder), purge_step=start + 1 if start else None)
