"""A run folder has one owner, and nobody else's files are touched."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from metapl import MetaplError
from metapl.apps.machine import ownership
from metapl.apps.machine.ownership import owned


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "PATIENCE", 0.3)


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_lock_that_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    out = tmp_path / "run"
    out.mkdir()
    {"pipe": os.mkfifo, "link": lambda at: at.symlink_to(target), "folder": Path.mkdir}[kind](out / ".lock")
    with pytest.raises(MetaplError, match=r"\.lock .*expected a plain file"):
        owned(out).__enter__()
    assert target.read_text() == "mine"


def test_a_new_folder_goes_where_no_memory_is_left_to_list_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def failing(*_: Any) -> list[str]:
        raise MemoryError

    def out_of_memory() -> None:
        with ownership.owned(tmp_path / "new" / "out", leaves_lock=False):
            monkeypatch.setattr(os, "listdir", failing)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        out_of_memory()
    assert not (tmp_path / "new").exists()
