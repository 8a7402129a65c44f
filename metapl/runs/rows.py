"""The rows that a run leaves behind."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from metapl.runs.atomic import replacing
from metapl.runs.fields import misfit_entries
from metapl.runs.sealed import read_plain, refuse_irregular


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

    def cut(self, phase: str, step: int) -> None:
        """Forget damaged lines and rows of ``phase`` after ``step``, and go on behind the other phases' rows."""
        rows = sorted(self.rows(), key=lambda row: bool(row["phase"] == phase))
        kept = [row for row in rows if row["phase"] != phase or row["step"] <= step]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with replacing(self.file) as file:
            file.write("".join(json.dumps(row) + "\n" for row in kept).encode())

    def add(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        refuse_irregular(self.file)
        with self.file.open("a") as file:
            file.write(json.dumps(dict(row)) + "\n")

    def sync(self) -> None:
        """Put the rows on disk."""
        if self.file.exists():
            with self.file.open("rb") as file:
                os.fsync(file.fileno())

    def _lines(self) -> dict[int, dict[str, Any] | None]:
        """Each line by its number, as a row, or None where it is not one."""
        lines = read_plain(self.file).split(b"\n")[:-1] if self.file.exists() else []
        return {number: _row(line) for number, line in enumerate(lines, 1) if line}


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    hints = {"phase": str, "step": int}
    is_row = isinstance(row, dict) and row.keys() >= hints.keys()
    return row if is_row and misfit_entries(row, {**dict.fromkeys(row, float | None), **hints}) is None else None
