"""The record of files that could not be read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from metapl.runs.locks import lock
from metapl.runs.sealed import read_plain, refuse_irregular


def record_files(log: Path, reasons: Mapping[str, str]) -> None:
    """Add files that cannot be read to a record, each with the reason; a file is recorded once."""
    if not reasons:
        return
    refuse_irregular(log)
    with log.open("a+", encoding="utf-8", errors="surrogateescape") as file:
        lock(file, wait=True)  # workers add to it too
        file.seek(0)
        before = file.read()
        known = _recorded(before)
        new = [{"file": path, "reason": reason} for path, reason in reasons.items() if path not in known]
        torn = before and not before.endswith("\n")  # by a process that was killed
        file.write(("\n" if torn else "") + "".join(json.dumps(entry) + "\n" for entry in new))


def replaced_files(log: Path) -> dict[str, str]:
    """The files that :class:`FileImages` recorded, each with the reason; empty where there is no such record."""
    return _recorded(read_plain(log).decode("utf-8", "replace")) if log.exists() else {}


def _recorded(lines: str) -> dict[str, str]:
    reasons = {}
    for line in lines.splitlines():
        try:
            entry = json.loads(line)
            reasons[str(entry["file"])] = str(entry["reason"])
        except (ValueError, LookupError, TypeError, RecursionError):
            continue  # torn or damaged
    return reasons
