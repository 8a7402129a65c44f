"""Runs on folders of pictures, read by worker processes: data that change under them, and workers that die.

test_stopped.py kills and stops them and their workers at the moments that matter.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from command import unprompted
from lives import KILL, alive, assert_resumed, noise, noise_folders, on_pictures, run

import metapl.apps.pictures.store
from metapl.apps.commands import main
from metapl.apps.experiments.folder import FORMAT, RunFolder
from metapl.errors import MetaplError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and /proc as Linux has them")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return noise_folders(tmp_path_factory.mktemp("pictures"))


def snapshot(out: Path) -> dict[Path, tuple[int, bytes]]:
    files = [path for path in out.rglob("*") if path.is_file() and path.name != ".lock"]
    return {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


def another_picture(root: Path) -> None:
    noise(root / "unlabeled/any/new.png", 1000)


def a_broken_picture(root: Path) -> None:
    (root / "val/b/0.png").write_bytes(b"no picture any more")


def other_bytes_of_the_same_size(root: Path) -> None:
    path = root / "labeled/a/3.png"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1  # of no pixel
    path.write_bytes(content)


@pytest.mark.slow
def test_a_run_is_not_gone_on_with_on_other_pictures_or_with_other_options(tmp_path: Path) -> None:
    """Whatever is refused leaves it as it was, and it goes on when all is as before."""
    root, out = noise_folders(tmp_path / "noise"), tmp_path / "run"
    command = on_pictures(root)
    assert run(command, out, ("metapl.training.trainer:BilevelTrainer", "step", 6, -KILL))[0] == -KILL
    before, kept = snapshot(out), {path: path.read_bytes() for path in root.rglob("*.png")}
    for change in (another_picture, other_bytes_of_the_same_size, a_broken_picture):
        change(root)
        code, words = run(command + " --resume", out)
        assert (code, "the data have changed since the run" in words) == (2, True), words
        assert "Traceback" not in words
        assert snapshot(out) == before
        for path in root.rglob("*.png"):  # the bytes count, not the times
            path.write_bytes(kept[path]) if path in kept else path.unlink()
    code, words = run(command.replace("--pad 1", "--pad 2 --student.lr 0.5") + " --resume", out)
    assert code == 2
    assert re.search(r"another recipe \(pad was 1, now 2, student\.lr was 0\.0\d+, now 0\.5\)", words), words
    assert snapshot(out) == before
    code, words = run(command + " --resume", out)
    assert code == 0, words
    assert_resumed(words, {"fit": 8})


def test_workers_do_not_hold_the_folder(tmp_path: Path) -> None:
    """Not even when they live longer than who claimed it."""
    read, write = os.pipe()
    with RunFolder(tmp_path).claimed({}, resume=False):
        worker = os.fork()
        if not worker:
            os.close(write)
            os.read(read, 1)
            os._exit(0)
        with (
            pytest.raises(MetaplError, match="another process is running"),
            RunFolder(tmp_path).claimed({}, resume=True),
        ):
            pass
    try:
        before = time.monotonic()
        with RunFolder(tmp_path).claimed({}, resume=True):
            assert time.monotonic() - before < 2
        assert alive(worker)
    finally:
        os.close(write)
        os.waitpid(worker, 0)


# -------------------------------------------------------------------------------------------------- workers that die


# A connection that the error comes in the midst of stays open.
LEFT_OPEN = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


def killed() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # another thread may be the one that hears of it


def trained(pictures: Path, out: Path, *more: str) -> int:
    given = on_pictures(pictures)
    if "--resized-crop" in more:  # beside which a margin is refused
        given = given.replace("--pad 1 ", "")
    return main([*given.split(), "--out", str(out), *more])


@LEFT_OPEN
@pytest.mark.slow
@pytest.mark.parametrize("how", ["kept in memory", "read each time"])
def test_the_command_names_the_picture_that_killed_a_worker(
    how: str, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a decoder with a bug does: at the first reading, or later, which hits the parent in the midst of a step."""
    name = "read_image" if how == "kept in memory" else "read_crops"
    deadly, times = pictures / "unlabeled/any/5.png", []
    read = getattr(metapl.apps.pictures.store, name)

    def die(path: str, *given: Any, **named: Any) -> Any:
        if path == str(deadly):
            times.append(path)
            if name == "read_image" or len(times) == 4:
                killed()
        return read(path, *given, **named)

    monkeypatch.setattr(metapl.apps.pictures.store, name, die)  # forked workers have it too
    more = [] if name == "read_image" else ["--resized-crop", "--steps", "60"]
    assert trained(pictures, tmp_path / "run", *more) == 2
    words = capsys.readouterr().err
    assert f"a worker died while reading {deadly}; remove or replace it" in words
    assert unprompted(words).count("\n") == 1
    if more:
        assert re.search(r"the last good checkpoint is .*fit/step-\d+\.ckpt", words)
    if more or (tmp_path / "run").exists():  # it goes where the worker died before the first step
        assert json.loads((tmp_path / "run/recipe.json").read_text())["format"] == FORMAT


@LEFT_OPEN
@pytest.mark.slow
def test_a_worker_that_is_killed_while_it_reads_nothing_is_told_of(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """As the system does that has no memory left."""
    from metapl.apps.pictures.views.randaugment import RandAugment

    see, calls = RandAugment.__call__, []

    def die(self: RandAugment, *given: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            killed()
        return see(self, *given, **named)

    monkeypatch.setattr(RandAugment, "__call__", die)
    assert trained(pictures, tmp_path / "run") == 2
    words = capsys.readouterr().err
    assert re.search(r"a process that prepares batches died \(.*\): was there too little memory\?", words)
    assert unprompted(words).count("\n") == 1
