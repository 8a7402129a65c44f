"""The rows that a run leaves behind: ``metrics.jsonl``, one for each logged step of a phase."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metapl.errors import MetaplError
from metapl.runs.atomic import replacing


class Metrics:
    """The rows of a run in their file; of a resumed run it equals the file of an uninterrupted one."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The rows written so far, damaged lines and a torn last one left out."""
        try:
            lines = self.file.read_bytes().split(b"\n")[:-1] if self.file.exists() else []
        except OSError as error:
            raise MetaplError(f"{self.file} cannot be read: {error.strerror}.") from error
        return [row for row in map(_row, lines) if row is not None and phase in (None, row["phase"])]

    def cut(self, phase: str, step: int) -> None:
        """Forget rows of ``phase`` after ``step``, and go on behind the other phases' rows."""
        rows = sorted(self.rows(), key=lambda row: bool(row["phase"] == phase))
        if not rows and self.file.exists() and self.file.stat().st_size:
            raise MetaplError(f"{self.file} has no rows of a run, and is another's; expected another folder.")
        with replacing(self.file) as file:
            file.writelines(_line(row) for row in rows if row["phase"] != phase or row["step"] <= step)

    def add(self, row: Mapping[str, Any]) -> None:
        with self.file.open("ab") as file:
            file.write(_line(row))

    def sync(self) -> None:
        with self.file.open("rb") as file:
            os.fsync(file.fileno())


def _line(row: Mapping[str, Any]) -> bytes:
    return json.dumps(dict(row)).encode() + b"\n"


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
        _ = [value + 0.0 for name, value in row.items() if name != "phase" and value is not None]
        return row if isinstance(row["phase"], str) and isinstance(row["step"], int) else None
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError, OverflowError):
        return None
