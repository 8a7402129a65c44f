"""What a fit leaves in its folder: rows, TensorBoard events and checkpoints."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError, few
from metapl.runs.checkpoint import CheckpointError, Found
from metapl.runs.ownership import Folder
from metapl.runs.rows import Events, Metrics, digest_of, line_of
from metapl.training.contract import Say
from metapl.training.options import FitOptions


class Records:
    """The records of one phase, in the run's folder ``out``; None: nothing is kept.

    Attributes:
        history: the rows so far.
        digest: of these as they are in the file; each checkpoint has it, so that rows of another run are noticed.
        saved_at: the last checkpoint.
        begun: whether a step was taken.
    """

    def __init__(self, out: Folder | None, options: FitOptions) -> None:
        self.out, self.phase, self.kept = out, options.phase, out is not None
        self.checkpoints = None if out is None else out.checkpoints(options.phase, options.keep)
        self.metrics = None if out is None else Metrics(out.path / "metrics.jsonl")
        self.events: Events | None = None
        self.history: list[dict[str, float]] = []
        self.digest = digest_of(())
        self.saved_at: Path | None = None
        self.begun = False

    def held(self) -> AbstractContextManager[None]:
        return nullcontext() if self.out is None else self.out.held()

    @contextmanager
    def opened(self, start: int, say: Say) -> Iterator[None]:
        """Record from step ``start`` on; rows and events after it belong to work that was lost, and are removed."""
        if self.out is None or self.metrics is None:
            yield
            return
        made = [path for path in (self.metrics.file, self.out.path / "tensorboard") if not path.exists()]
        with self._writing():
            damaged = self.metrics.damaged()
            if damaged:
                say(f"{self.metrics.file}: lines that are damaged are left out: {few(damaged)}")
            if start and not self.metrics.file.exists():
                say(f"{self.metrics.file} is missing: it begins again after step {start:,}, without earlier rows")
            self.metrics.cut(self.phase, start)
            rows = self.metrics.rows(self.phase)
            self.digest = digest_of(rows)
            self.history = [
                {name: math.nan if value is None else value for name, value in row.items() if name != "phase"}
                for row in rows
            ]
            try:
                # A folder per phase: TensorBoard drops the steps after a restart from every curve in a folder.
                events = Events(self.out.path / "tensorboard" / self.phase, start)
            except ImportError:
                events = None
                say("TensorBoard is not installed: the rows are in metrics.jsonl alone")
        try:
            with events or nullcontext() as self.events:
                yield
        except Exception:
            if not self.begun and self.saved_at is None:  # refused at its first step: nothing is worth keeping
                for path in made:
                    shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink(missing_ok=True)
            raise

    def row(self, row: dict[str, float]) -> None:
        self.history.append(row)
        if self.metrics is not None:
            with self._writing():
                # JSON knows no NaN.
                plain = {name: value if math.isfinite(value) else None for name, value in row.items()}
                self.metrics.add({"phase": self.phase, **plain})
                self.digest.update(line_of({"phase": self.phase, **plain}))
                if self.events is not None:
                    self.events.scalars(int(row["step"]), {k: value for k, value in row.items() if k != "step"})

    def counts(self, step: int, counts: dict[str, list[int]]) -> None:
        if self.events is not None:
            with self._writing():
                self.events.counts(step, counts)

    def save(self, step: int, state: dict[str, Any]) -> Path | None:
        """Write a checkpoint, after the rows and events before it; its path, or None without a folder."""
        if self.checkpoints is not None:
            self.flush()
            try:
                self.saved_at = self.checkpoints.write(step, state)
            except CheckpointError as error:
                raise CheckpointError(f"{error} ({self.last_good()})") from error
        return self.saved_at

    def flush(self) -> None:
        """Bring rows and events to the disk: what is older than a checkpoint is not written again."""
        if self.metrics is not None:
            with self._writing():
                if self.events is not None:
                    self.events.flush()
                self.metrics.sync()

    def newest(self, say: Say, read: Callable[[Path], dict[str, Any]]) -> Found | None:
        """The newest whole checkpoint, as :meth:`~metapl.runs.checkpoint.CheckpointFolder.newest`; None is said."""
        if self.checkpoints is None:
            raise MetaplError("resume=True was given without out; expected the folder of the run to go on with.")
        newest = self.checkpoints.newest(read)
        if newest is None:
            say(f"no checkpoint of phase {self.phase} yet: it begins at its first step")
        for path, reason in newest.skipped if newest else ():
            say(f"passed over {path.name}: {reason}")
        return newest

    def refuse_other_rows(self, file: Path, state: Mapping[str, Any]) -> None:
        """Stop where the rows before a checkpoint are not those that it was written after. Rows that are missing, or
        damaged lines, are told when the records are opened."""
        metrics, told = self.metrics, state.get("rows")  # checkpoints of earlier versions do not say
        if metrics is None or told is None or not metrics.file.exists() or metrics.damaged():
            return
        rows = [row for row in metrics.rows(self.phase) if row["step"] <= state["step"]]
        if rows and digest_of(rows).hexdigest() != told:
            raise MetaplError(
                f"{metrics.file} is of another run than {file}, or was changed: its rows have another SHA-256 than was "
                "noted. Put it back as it was; or remove it, and it begins again after that step."
            )

    def refuse_another_run(self) -> None:
        """Stop where checkpoints of this phase are in the folder already, or rows that are not a run's."""
        if self.checkpoints is not None and self.checkpoints.paths():
            raise MetaplError(
                f"{self.out and self.out.path} holds checkpoints of a phase {self.phase!r} already; go on with it by "
                "resume=True, or give another out or phase."
            )
        if self.metrics is not None and self.metrics.damaged():
            raise MetaplError(f"{self.metrics.file} is not a run's; expected a folder without it: give another out.")

    def last_good(self) -> str:
        return f"the last good checkpoint is {self.saved_at}" if self.saved_at else "no checkpoint was written before"

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Say which checkpoint is left when the records cannot be written."""
        try:
            yield
        except OSError as error:
            raise MetaplError(
                f"the records in {self.out and self.out.path} could not be written: {error.strerror or error}; "
                f"{self.last_good()}. Mend that (is the disk full?), then resume the run."
            ) from error
