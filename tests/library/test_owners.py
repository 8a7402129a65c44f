"""A run folder has one owner, from its first byte on, and nobody else's files are touched."""

from __future__ import annotations

import json
import multiprocessing
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

import metapl as library
from metapl import MetaplError
from metapl.runs import ownership
from metapl.runs.folder import RunFolder

TOGETHER = 12


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ownership, "PATIENCE", 0.3)


def at_once(work: Callable[[int], Any], number: int = TOGETHER) -> list[Any]:
    """What ``work`` gives or raises, called from so many threads at the same moment."""
    ready = threading.Barrier(number)

    def one(index: int) -> Any:
        ready.wait()
        try:
            return work(index)
        except MetaplError as error:
            return error

    with ThreadPoolExecutor(number) as pool:
        return list(pool.map(one, range(number)))


@pytest.mark.parametrize("there", [True, False], ids=["an empty folder", "no folder"])
def test_of_many_that_start_at_once_one_gets_the_folder_and_its_recipe_is_the_one_on_disk(
    there: bool, tmp_path: Path
) -> None:
    for attempt in range(8):
        out, others = tmp_path / f"{attempt}" / "run", threading.Semaphore(0)
        if there:
            out.mkdir(parents=True)

        def start(index: int, out: Path = out, others: threading.Semaphore = others) -> int:
            try:
                with RunFolder(out).claimed({"name": index}, resume=False):
                    for _ in range(TOGETHER - 1):  # held until all others were refused
                        others.acquire(timeout=30)
                    return index
            except MetaplError:
                others.release()
                raise

        found = at_once(start)
        winners = [result for result in found if isinstance(result, int)]
        assert len(winners) == 1
        assert RunFolder(out).recipe() == {"name": winners[0]}
        refusals = {str(error) for error in found if isinstance(error, MetaplError)}
        assert all("another process is running in" in words for words in refusals)
        assert sorted(os.listdir(out)) == [".lock", "recipe.json"]


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
    context = multiprocessing.get_context("spawn")
    answers, go, out = context.Queue(), context.Event(), tmp_path / "out"
    both = [context.Process(target=_fitted, args=(str(out), answers, go)) for _ in range(2)]
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


def test_a_refused_start_leaves_nothing_and_the_next_may_have_the_folder(tmp_path: Path) -> None:
    out = tmp_path / "new" / "run"
    with pytest.raises(MetaplError, match="no data"), RunFolder(out).claimed({"name": "x"}, resume=False):
        raise MetaplError("no data")
    assert list(tmp_path.iterdir()) == []
    out.mkdir(parents=True)
    with pytest.raises(OSError, match="the disk"), RunFolder(out).claimed({"name": "x"}, resume=False):
        raise OSError("the disk")
    assert list(out.iterdir()) == []
    with RunFolder(out).claimed({"name": "y"}, resume=False):
        pass
    assert RunFolder(out).recipe() == {"name": "y"}


def test_what_a_killed_start_left_is_not_in_the_way(tmp_path: Path) -> None:
    for name in (".lock", "recipe.json.0123abcd.tmp", ".DS_Store"):
        (tmp_path / name).write_text("")
    with RunFolder(tmp_path).claimed({"name": "x"}, resume=False):
        pass
    assert RunFolder(tmp_path).recipe() == {"name": "x"}


@pytest.mark.parametrize("kind", ["pipe", "link", "folder"])
def test_a_lock_that_is_not_a_file_is_refused(kind: str, tmp_path: Path) -> None:
    target = tmp_path / "target"
    target.write_text("mine")
    out = tmp_path / "run"
    out.mkdir()
    {"pipe": os.mkfifo, "link": lambda at: at.symlink_to(target), "folder": Path.mkdir}[kind](out / ".lock")
    with pytest.raises(MetaplError, match=r"\.lock .*expected a plain file"):
        RunFolder(out).claimed({"name": "x"}, resume=False).__enter__()
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
