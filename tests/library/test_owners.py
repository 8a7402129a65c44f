"""One fit at a time writes to a folder."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from fits import batches, rows, single
from forked import context

from metapl import MetaplError
from metapl.runs import folder as module


def held(out: Path, begun: Any) -> None:
    with module.Folder(out).held():
        begun.set()
        time.sleep(60)


def test_a_folder_that_another_process_writes_to_is_refused_until_that_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "PATIENCE", 0.2)
    begun = context().Event()
    other = context().Process(target=held, args=(tmp_path, begun))
    other.start()
    begun.wait(60)
    with pytest.raises(MetaplError, match="process"):
        single().fit(batches(3)[0], steps=3, out=tmp_path)
    other.kill()
    other.join()
    single().fit(batches(3)[0], steps=3, out=tmp_path)
    folder = module.Folder(tmp_path)
    with folder.held():  # which may be held again, as several phases in one folder do
        single().fit(batches(3)[0], steps=3, out=folder, phase="finetune")
    assert [row["step"] for row in rows(tmp_path, "finetune")] == [3]
