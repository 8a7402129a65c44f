"""A run folder has one owner, from its first byte on, and nobody else's files are touched."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from command import refused
from forked import Forked

from metapl import MetaplError
from metapl.apps.commands import main
from metapl.apps.commands.inputs import new_default_folder
from metapl.apps.experiments.folder import RunFolder
from metapl.apps.machine import ownership

QUICK = ("train", "digits", "--steps", "2", "--hidden", "4", "--finetune-steps", "0")
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


def test_the_default_name_is_claimed_by_making_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "digits-004").mkdir(parents=True)
    assert {str(path) for path in at_once(lambda _: new_default_folder("digits"))} == {
        f"runs/digits-{number:03d}" for number in range(5, 5 + TOGETHER)
    }


def test_who_waits_for_a_folder_that_goes_away_gets_the_new_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file without a name would lock nobody out."""
    monkeypatch.setattr(ownership, "PATIENCE", 20.0)
    for attempt in range(5):
        out = tmp_path / str(attempt) / "run"
        inside = []

        def start(index: int, out: Path = out, inside: list[int] = inside) -> None:
            with RunFolder(out).claimed({"name": index}, resume=False):
                inside.append(index)
                assert len(inside) == 1
                inside.remove(index)
                raise MetaplError("refused")

        assert {str(error) for error in at_once(start, 6)} == {"refused"}
        assert not out.exists() or list(out.iterdir()) == []  # who came late did not make it


@pytest.mark.parametrize("name", ["thesis.tex", "model", "metrics.jsonl", "student.safetensors", "result.json"])
def test_a_folder_with_other_files_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / name).write_text("mine")
    words = refused(capsys, *QUICK, "--out", tmp_path)
    assert f"holds files that are not a run's ({name})" in words
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert (tmp_path / name).read_text() == "mine"


@pytest.mark.parametrize(
    "flags",
    [
        ("--student.lr", "0"),
        ("--seed", "-1"),
        ("--labels-per-class", "1000"),
        ("--wait", "5"),
        ("--out", "{file}"),
        ("--compare", "--seeds", "x"),
    ],
)
def test_a_refused_command_leaves_no_folder(
    flags: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "file"
    file.write_text("mine")
    assert main([*QUICK, *(flag.format(file=file) for flag in flags)]) == 2
    assert capsys.readouterr().err.startswith("metapl: ")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("command", ["export RUN", "evaluate RUN", "ablate digits --hidden 4"])
def test_what_is_written_to_out_has_one_writer(
    command: str, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The second is refused before it does anything; the first leaves no lock in a folder that others get."""
    out = tmp_path / "out"
    given = [*command.replace("RUN", str(tiny)).split(), "--out", str(out)]
    with ownership.owned(out):
        assert main(given) == 2
        assert f"another process is running in {out}; wait for it, or stop it." in capsys.readouterr().err
        assert os.listdir(out) == [ownership.LOCK]
    if not command.startswith("ablate"):
        assert main(given) == 0
        assert ownership.LOCK not in os.listdir(out)
    out.rename(tmp_path / "folder")
    out.write_text("mine")
    assert main(given) == 2
    assert out.read_text() == "mine"


def test_starts_of_the_command_at_once(tmp_path: Path) -> None:
    """With one name, one of them trains; with the default name, each has a folder of its own."""
    with ThreadPoolExecutor(3) as pool:
        named = [
            pool.submit(_code, *QUICK, "--seed", str(seed), "--out", str(tmp_path / "one"), cwd=tmp_path)
            for seed in range(3)
        ]
        codes = [future.result() for future in named]
    # Who comes when the first has finished is told so; nobody's files are mixed.
    assert sorted(codes) == [0, 2, 2]
    recipe, result = (json.loads((tmp_path / "one" / f"{name}.json").read_text()) for name in ("recipe", "result"))
    assert recipe["recipe"]["fields"]["seed"] == result["seed"] == codes.index(0)
    with ThreadPoolExecutor(3) as pool:
        futures = [pool.submit(_code, *QUICK, "--seed", str(seed), cwd=tmp_path) for seed in range(3)]
        assert [future.result() for future in futures] == [0, 0, 0]
    runs = sorted((tmp_path / "runs").iterdir())
    assert [run.name for run in runs] == ["digits-001", "digits-002", "digits-003"]
    assert sorted(json.loads((run / "result.json").read_text())["seed"] for run in runs) == [0, 1, 2]


def _code(*arguments: str, cwd: Path) -> int:
    return Forked(arguments, cwd=cwd).wait()


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
