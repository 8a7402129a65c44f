"""The rows that a run leaves behind, in a file and as curves of TensorBoard."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from metapl.runs.atomic import replacing
from metapl.runs.fields import misfit_entries
from metapl.runs.sealed import read_sealed, refuse_irregular


class Metrics:
    """``metrics.jsonl``, one row per logged step of a phase.

    Rows after the step that is resumed from belong to work that was lost: they are cut off before going on, so the file
    of a resumed run equals the file of an uninterrupted one.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The rows written so far, damaged lines and a torn last one left out."""
        return [row for row in self._lines().values() if row is not None and (phase is None or row["phase"] == phase)]

    def damaged(self) -> list[int]:
        """The numbers of the lines that are not rows, the first being 1; a torn last line is not counted."""
        return [number for number, row in self._lines().items() if row is None]

    def cut(self, phase: str, step: int, then: Iterable[Mapping[str, Any]] = ()) -> None:
        """Empty damaged lines, forget rows of ``phase`` after ``step``, and go on behind the other phases' rows, at
        once with the rows ``then``."""
        rows = sorted(self.rows(), key=lambda row: bool(row["phase"] == phase))
        self.file.parent.mkdir(parents=True, exist_ok=True)
        # Of damaged lines something stays: who resumes once more knows by it that rows are missing, not of another run.
        left = b"{}\n" * len(self.damaged())
        with replacing(self.file) as file:
            file.write(left)
            file.writelines(line_of(row) for row in rows if row["phase"] != phase or row["step"] <= step)
            file.writelines(map(line_of, then))

    def add(self, row: Mapping[str, Any]) -> None:
        refuse_irregular(self.file)
        with self.file.open("ab") as file:
            file.write(line_of(row))

    def sync(self) -> None:
        if self.file.exists():
            with self.file.open("rb") as file:
                os.fsync(file.fileno())

    def _lines(self) -> dict[int, dict[str, Any] | None]:
        lines = []
        if self.file.exists():
            lines = read_sealed(self.file, mend="Put it back from a copy, or train again.").split(b"\n")[:-1]
        return {number: _row(line) for number, line in enumerate(lines, 1) if line}


def line_of(row: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(row)).encode() + b"\n"


def digest_of(rows: Iterable[Mapping[str, Any]]) -> Any:
    """A SHA-256, which further rows may be added to by ``update(line_of(row))``."""
    return hashlib.sha256(b"".join(map(line_of, rows)))


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    hints = {"phase": str, "step": int}
    is_row = isinstance(row, dict) and row.keys() >= hints.keys()
    return row if is_row and misfit_entries(row, {**dict.fromkeys(row, float | None), **hints}) is None else None


class Events:
    """An event file for TensorBoard, in a folder that may hold those of earlier parts of the run; what these say of
    steps after ``start`` is void.

    torch's ``SummaryWriter`` writes from a thread of its own: what is on disk when a process is killed is up to that
    thread, and a full disk ends it with a traceback that nobody can catch.
    """

    def __init__(self, folder: Path, start: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog
        from tensorboard.summary.writer.record_writer import RecordWriter

        folder.mkdir(parents=True, exist_ok=True)
        # The files are read in the order of their names.
        self._file = (folder / f"events.out.tfevents.{time.time_ns():020d}.{platform.node()}").open("xb")
        self._records = RecordWriter(self._file)
        self.flush = self._file.flush
        self._write(0, file_version="brain.Event:2")
        self._write(start + 1, session_log=SessionLog(status=SessionLog.START))

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        from torch.utils.tensorboard.summary import scalar

        for name, value in values.items():
            self._write(step, summary=scalar(name, value))

    def counts(self, step: int, counts: Mapping[str, Sequence[int]]) -> None:
        from torch.utils.tensorboard.summary import histogram_raw

        for name, per_class in counts.items():
            total, first, second = (sum(n * k**power for k, n in enumerate(per_class)) for power in range(3))
            limits = [k + 0.5 for k in range(len(per_class))]
            summary = histogram_raw(name, 0, len(limits) - 1, total, first, second, limits, list(per_class))
            self._write(step, summary=summary)

    def __enter__(self) -> Events:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        try:
            self._file.close()
        except OSError:
            if error is None:  # the error under way says more
                raise

    def _write(self, step: int, **content: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())
