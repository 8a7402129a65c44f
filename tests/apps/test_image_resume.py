"""Runs on folders of pictures, read by worker processes: killed or stopped at whatever moment, resumed bit for bit.

Everything here happens to real processes of the command line, see test_resume.py.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import unprompted
from PIL import Image
from test_resume import (
    INTERRUPT,
    KILL,
    TERMINATE,
    Nursery,
    Point,
    alive,
    assert_equal,
    assert_resumed,
    newest,
    pasted,
    said,
)

import metapl.apps.pictures.store
from metapl.apps.commands import main
from metapl.apps.experiments.folder import FORMAT, RunFolder
from metapl.errors import MetaplError

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and /proc as Linux has them")

FLAGS = (
    "--image-size 8 --network small_cnn --precision float32 --randaugment --pad 1 --strong.cutout 2 "
    "--labeled-batch 8 --unlabeled-batch 8 --method mpl --mode loss_difference "
    "--steps 16 --wait 4 --finetune-steps 6 --log-every 2 --validate-every 4 --save-every 4"
)
STEP, WAITING, TUNING = (
    ("metapl.training.trainer:BilevelTrainer", "step"),
    ("metapl.training.trainer:BilevelTrainer", "teacher_step"),
    ("metapl.training.loss_trainer:LossTrainer", "step"),
)
MOMENTS = [
    ("metapl.apps.pictures.folders", "_pictures", 3),  # listing
    ("metapl.apps.pictures.check", "read_image", 20),  # looking which files are sound
    ("metapl.apps.recipes.image_folders", "hash_files", 2),
    (*WAITING, 3),
    ("os", "replace", 2),  # a checkpoint is written and has no name yet
    ("metapl.runs.atomic", "sync_folder", 2),  # it has
    (*STEP, 7),
    ("metapl.training.selection", "predict_logits", 1),
    (*TUNING, 3),
    ("metapl.apps.experiments.folder:RunFolder", "write_weights", 1),
]


@pytest.fixture(scope="module")
def nurseries() -> list[Nursery]:
    return [Nursery(), Nursery()]


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, seed = tmp_path_factory.mktemp("pictures"), 0
    for name, count in {"labeled/a": 8, "labeled/b": 8, "val/a": 3, "val/b": 3, "unlabeled/any": 24}.items():
        for number in range(count):
            seed += 1
            noise(root / name / f"{number}.png", seed)
    (root / "unlabeled/broken.png").write_bytes(b"no picture")
    return root


def command(pictures: Path, workers: int = 2) -> str:
    folders = " ".join(f"--{name} {pictures / name}" for name in ("labeled", "unlabeled", "val"))
    return f"train images {folders} {FLAGS} --num-workers {workers}"


@pytest.fixture(scope="module")
def whole(nurseries: list[Nursery], pictures: Path) -> Path:
    """A run that was left alone, without workers."""
    out = pictures / "whole"
    code, words = nurseries[0].run(command(pictures, workers=0), out)
    assert code == 0, words
    return out


def left(group: int) -> list[int]:
    """The processes that live in a group."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [number for number in numbers if alive(number) and _group(number) == group]


def _group(number: int) -> int | None:
    try:
        return os.getpgid(number)
    except OSError:
        return None


def assert_gone(groups: list[int]) -> None:
    """Workers look every 5 seconds whether their parent lives."""
    patience = time.monotonic() + 15
    while any(map(left, groups)):
        assert time.monotonic() < patience, "a worker goes on without its parent"
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.long
def test_killed_and_resumed(nurseries: list[Nursery], pictures: Path, whole: Path) -> None:
    """Alone, when its workers live on for a while, or with its workers; resumed at once, with more or fewer workers."""

    def one(nursery: Nursery, name: str) -> list[int]:
        out, groups, resumed, checkpoints = pictures / f"killed-{name}", [], "", dict[str, int]()
        for number, moment in enumerate([*MOMENTS, None]):
            point: Point | None = None if moment is None else (*moment, KILL if name == "alone" else -KILL)
            groups.append(nursery.start(command(pictures, workers=(2, 1, 0)[number % 3]) + resumed, out, point))
            code, words = nursery.wait(), said(out)
            assert code == (0 if moment is None else -KILL), (moment, words)
            if moment is not None:
                checkpoints, resumed = newest(out), " --resume"
        assert_resumed(said(out), checkpoints)
        assert_equal(out, whole)
        return groups

    with ThreadPoolExecutor(2) as pool:
        assert_gone([group for groups in pool.map(one, nurseries, ("alone", "together")) for group in groups])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "signals", "saved"),
    [
        (MOMENTS[0], [-TERMINATE], "stopped; go on"),
        ((*WAITING, 2), [-INTERRUPT], "stopped after step 2; saved to .*fit/step-00000002.ckpt"),
        (
            (*STEP, 5),
            [-INTERRUPT, TERMINATE],
            "stopped after step 9; saved to .*fit/step-00000009.ckpt",
        ),
        (
            ("metapl.runs.checkpoint:CheckpointFolder", "write", 2),
            [-INTERRUPT],
            "stopped after step 8; saved to .*step-00000008.ckpt",
        ),
        # The teacher takes the four steps of the wait by a LossTrainer too.
        ((*TUNING, 4 + 3), [-TERMINATE], "stopped after step 3; saved to .*finetune/step-00000003.ckpt"),
    ],
    ids=["listing", "waiting", "training", "writing", "finetuning"],
)
def test_stopped_and_resumed(
    moment: Any,
    signals: list[int],
    saved: str,
    nurseries: list[Nursery],
    pictures: Path,
    whole: Path,
    request: pytest.FixtureRequest,
) -> None:
    """By Ctrl-C, which a terminal sends to the workers too; by a SIGTERM to all, or to the parent."""
    nursery = nurseries[0]
    for signum in signals:
        out = pictures / f"stopped {signum} {request.node.callspec.id}"
        group = nursery.start(command(pictures) + f" --out '{out}'", out, (*moment, signum))
        code, words = nursery.wait(), said(out)
        assert code == 128 + abs(signum), words
        assert re.search(saved, words), words
        assert "Traceback" not in words
        assert not left(group)
        checkpoints = newest(out)
        code, words = nursery.run(pasted(words), out)
        assert code == 0, words
        assert_resumed(words, checkpoints)
        assert_equal(out, whole)


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
def test_a_run_is_not_gone_on_with_on_other_pictures(nurseries: list[Nursery], pictures: Path, whole: Path) -> None:
    def one(nursery: Nursery, changes: Any) -> None:
        root = pictures / f"changed-{changes[0].__name__}"
        for name in ("labeled", "unlabeled", "val"):
            shutil.copytree(pictures / name, root / name)
        out = root / "run"
        assert nursery.run(command(root), out, (*STEP, 6, -KILL))[0] == -KILL
        before, kept = snapshot(out), {path: path.read_bytes() for path in root.rglob("*.png")}
        for change in changes:
            change(root)
            code, words = nursery.run(command(root) + " --resume", out)
            assert (code, "the data have changed since the run" in words) == (2, True), words
            assert "Traceback" not in words
            assert snapshot(out) == before
            for path in root.rglob("*.png"):  # the bytes count, not the times
                path.write_bytes(kept[path]) if path in kept else path.unlink()
        code, words = nursery.run(command(root) + " --resume", out)
        assert code == 0, words
        assert_resumed(words, {"fit": 8})
        assert_equal(out, whole)

    changes = ([another_picture, other_bytes_of_the_same_size], [a_broken_picture])
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, nurseries, changes))


@pytest.mark.slow
def test_a_resumed_run_says_which_option_is_another(nurseries: list[Nursery], pictures: Path) -> None:
    out, nursery = pictures / "other-options", nurseries[0]
    assert nursery.run(command(pictures), out, (*WAITING, 2, KILL))[0] == -KILL
    code, words = nursery.run(command(pictures).replace("--pad 1", "--pad 2 --student.lr 0.5") + " --resume", out)
    assert code == 2
    assert re.search(r"another recipe \(pad was 1, now 2, student\.lr was 0\.0\d+, now 0\.5\)", words), words


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
    given = command(pictures)
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
