"""A run folder has one owner, from its first byte on, and nobody else's files are touched."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from forked import context

import metapl as library
from metapl import MetaplError
from metapl.runs import ownership
from metapl.runs.ownership import Folder


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "PATIENCE", 0.3)


def _fitted(out: str, answers: Any, go: Any) -> None:
    """A fit in a process of its own; its answer is the error, or nothing."""
    torch.set_num_threads(1)
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    trainer = library.LossTrainer(model := torch.nn.Linear(4, 2), optimizer=torch.optim.SGD(model.parameters(), lr=0.1))
    ownership.PATIENCE = 0.3

    def slowly(step: int, row: Any, trainer: Any) -> None:
        if step == 1:
            go.wait(60)

    try:
        source = [(x, (x[:, 0] > 0).long())]
        trainer.fit(source, steps=30, save_every=1, log_every=1, out=out, progress=False, callbacks=[slowly])
        answers.put("done")
    except MetaplError as error:
        go.set()
        answers.put(str(error))


def test_two_fits_in_one_folder(tmp_path: Path) -> None:
    """In processes of their own: one trains, the other is told why not, and the checkpoints are the one's."""
    answers, go, out = context().Queue(), context().Event(), tmp_path / "out"
    both = [context().Process(target=_fitted, args=(str(out), answers, go)) for _ in range(2)]
    for process in both:
        process.start()
    said = sorted([answers.get(timeout=120), answers.get(timeout=120)], key=len)
    for process in both:
        process.join()
    assert said[0] == "done"
    assert said[1].startswith(f"another process is running in {out}")
    steps = [json.loads(line)["step"] for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 31))


def test_a_fit_may_be_followed_by_another_phase_of_the_same_process(tmp_path: Path) -> None:
    x = torch.randn(16, 4, generator=torch.Generator().manual_seed(0))
    source = [(x, (x[:, 0] > 0).long())]
    for phase in ("fit", "finetune"):
        trainer = library.LossTrainer(
            model := torch.nn.Linear(4, 2), optimizer=torch.optim.SGD(model.parameters(), lr=0.1)
        )
        trainer.fit(source, steps=2, out=str(tmp_path), phase=phase, progress=False)
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"fit", "finetune"}


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_lock_that_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    out = tmp_path / "run"
    out.mkdir()
    {"pipe": os.mkfifo, "link": lambda at: at.symlink_to(target), "folder": Path.mkdir}[kind](out / ".lock")
    with pytest.raises(MetaplError, match=r"\.lock .*expected a plain file"):
        Folder(out).held().__enter__()
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
