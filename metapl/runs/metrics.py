"""The rows that a run leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metapl.runs.atomic import replacing


class Metrics:
    """``metrics.jsonl``, one row per logged step of a phase.

    Rows after the step that is resumed from belong to work that was lost: they are cut off before going on, so the file
    of a resumed run equals the file of an uninterrupted one.
    """

    def __init__(self, file: Path) -> None:
        self.file = file

    def rows(self, phase: str | None = None) -> list[dict[str, Any]]:
        """The rows written so far, a torn last line left out."""
        if not self.file.exists():
            return []
        lines = self.file.read_text().split("\n")[:-1]
        rows = [json.loads(line) for line in lines if line]
        return [row for row in rows if phase is None or row["phase"] == phase]

    def cut(self, phase: str, step: int) -> None:
        """Forget rows of ``phase`` after ``step``, and go on behind the other phases' rows."""
        rows = self.rows()
        others = [row for row in rows if row["phase"] != phase]
        kept = [row for row in rows if row["phase"] == phase and row["step"] <= step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as file:
            file.write("".join(json.dumps(row) + "\n" for row in others + kept).encode())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        with self.file.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def sync(self) -> None:
        """Put the rows on disk."""
        if self.file.exists():
            with self.file.open("rb") as file:
                os.fsync(file.fileno())
