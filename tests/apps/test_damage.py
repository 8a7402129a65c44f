"""Damaged, exchanged and missing files of a run, two writers in a folder, a full disk: a line, and nothing is lost."""

from __future__ import annotations

import json
import random
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import metapl
from test_resume import files
from tiny_runs import TINY, built_once, trained

from metapl.apps.run import WEIGHTS, RunFolder
from metapl.errors import MetaplError

# What a command reads of a run; other files it does not look at.
COMMON = {"recipe.json", "result.json", "network.json"}
READ = {
    "predict": COMMON,
    "report": COMMON | {"data.json", "metrics.jsonl"},
    "runs": {"recipe.json", "result.json", "data.json", "metrics.jsonl"},
}
PARTS = ("recipe.json", "result.json", "network.json", "data.json", "metrics.jsonl", *WEIGHTS.values())
UNREAD = ("report.html", "report.png", "checkpoints", "tensorboard")


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that differs in its seed."""
    return built_once(tmp_path_factory, "other", lambda out: trained(*TINY, "--seed", "1", "--out", str(out)))


def commands(run: Path, digit: Path, weights: str = "") -> dict[str, list[str]]:
    networks = {file: name for name, file in WEIGHTS.items()}
    predicted = ["predict", str(run), str(digit), "--probabilities", "--network", networks.get(weights, "student")]
    return {"predict": predicted, "report": ["report", str(run)], "runs": ["runs", str(run.parent)]}


def flipped(content: bytes, own: random.Random) -> bytes:
    changed = bytearray(content)
    changed[own.randrange(len(changed))] ^= 1 << own.randrange(7)
    return bytes(changed)


DAMAGES: dict[str, Callable[[bytes, random.Random], bytes]] = {
    "flipped": flipped,
    "cut": lambda content, own: content[: own.randrange(len(content))],
    "emptied": lambda content, own: b"",
}


def told(run: Path, digit: Path, name: str) -> dict[str, tuple[int, str, str]]:
    found = {}
    for command, words in commands(run, digit, name).items():
        done = metapl(*words, code=None)
        assert "Traceback" not in done.stderr
        found[command] = done.returncode, done.stdout, " ".join(done.stderr.split())
    return found


def refused(run: Path, name: str, found: dict[str, tuple[int, str, str]], whole: dict[str, Any]) -> None:
    """Every command that reads the file says that it is not as it was; the others are as before."""
    for command, (code, out, err) in found.items():
        if command == "runs":  # lists what it can, and says of the others what is wrong
            assert code == 0 or not (run / "recipe.json").exists()
            assert (out == whole[command][1]) == (name not in READ["runs"]), out
        elif command == "report" and not (run / "result.json").exists():
            assert code == 0  # of a run that is not finished
        elif name in READ[command] or (command == "predict" and name in WEIGHTS.values()):
            assert code == 2, (command, out)
            assert name in err or run.name in err
            assert err.startswith("metapl: ")
        elif command == "predict":
            assert (code, out) == whole[command][:2]


WAYS = (*DAMAGES, "exchanged", "removed")


@pytest.mark.parametrize(
    ("name", "how"),
    [
        pytest.param(name, how, marks=[pytest.mark.long] * ((i + 2 * j) % 5 > 1))  # two of the ways by default
        for i, name in enumerate(PARTS)
        for j, how in enumerate(WAYS)
    ],
)
def test_a_file_that_is_not_as_it_was_written_is_refused(
    name: str, how: str, run: Path, digit: Path, other: Path
) -> None:
    whole, content, own = told(run, digit, name), (run / name).read_bytes(), random.Random(f"{name} {how}")
    for _ in range(3 if how == "flipped" else 1):
        if how == "removed":
            (run / name).unlink()
        elif how == "exchanged":
            shutil.copy(other / name, run / name)
        else:
            (run / name).write_bytes(DAMAGES[how](content, own))
        found = told(run, digit, name)
        refused(run, name, found, whole)
        (run / name).write_bytes(content)
    assert told(run, digit, name) == whole


@pytest.mark.parametrize("name", UNREAD)
def test_what_no_command_reads_may_be_gone(name: str, run: Path, digit: Path) -> None:
    whole = told(run, digit, "")
    place = run / name
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    assert told(run, digit, "") == whole
    assert "is finished already" in " ".join(metapl(*TINY, "--out", run, "--resume").stdout.split())


def test_a_run_may_be_moved(run: Path, digit: Path, tmp_path: Path) -> None:
    whole = told(run, digit, "")["predict"]
    run.rename(tmp_path / "elsewhere")
    assert told(tmp_path / "elsewhere", digit, "")["predict"] == whole


def test_two_writers_in_a_folder(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metapl.runs.folder.PATIENCE", 0.1)
    (run / "result.json").unlink()
    with RunFolder(run).held():
        before = files(run)
        for more in ((), ("--resume",)):
            assert "metapl: " in metapl(*TINY, "--out", run, *more, code=2).stderr
        assert files(run) == before
        with pytest.raises(MetaplError, match="another process"), RunFolder(run).held():
            pass
    metapl(*TINY, "--out", run, "--resume")


FOREIGN = {"recipe.json": "{}", "notes.txt": "mine"}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_with_files_of_somebody_else_is_left_as_it_is(name: str, tmp_path: Path) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / name).write_text(FOREIGN[name])
    for more in ((), ("--resume",)):
        assert metapl(*TINY, "--out", out, *more, code=2).stderr.startswith("metapl: ")
        assert {path: content for path, (_, content) in files(out).items()} == {out / name: FOREIGN[name].encode()}


@pytest.mark.parametrize("room", [1, 900, 2_500, 6_000, 12_000])
def test_a_full_disk_loses_nothing(room: int, tiny: Path, tmp_path: Path) -> None:
    """No file may have more bytes, as if there were no room for more; with room the run goes on to the same end."""
    out, (soft, hard) = tmp_path / "run", resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
    try:
        done = metapl(*TINY, "--out", out, code=None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert done.returncode in (1, 2), room
    assert "Traceback" not in done.stderr
    assert "too large" in " ".join(done.stderr.split())
    metapl(*TINY, "--out", out, *(["--resume"] if (out / "recipe.json").exists() else []))
    for name in (*WEIGHTS.values(), "metrics.jsonl", "result.json", "network.json"):
        assert (out / name).read_bytes() == (tiny / name).read_bytes(), name
    assert not [*out.rglob("*.tmp")]


def test_a_result_notes_all_that_is_read_beside_it(tiny: Path) -> None:
    noted = json.loads((tiny / "result.json").read_text())["sha256"]
    assert noted.keys() == {*PARTS} - {"recipe.json"}
