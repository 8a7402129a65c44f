"""A run that is killed anywhere, whose files were damaged, or whose disk was full ends bit for bit as one left alone.

Everything here happens to real processes of the command line; test_stopped.py has the moments that matter.
"""

from __future__ import annotations

import os
import random
import re
import resource
import sys
import time
from pathlib import Path

import pytest
from forked import Point
from lives import (
    INTERRUPT,
    KILL,
    RECIPES,
    TERMINATE,
    TINY,
    alive,
    assert_equal,
    assert_resumed,
    left_alone,
    newest,
    pasted,
    run,
    said,
    start,
)

from metapl.runs.checkpoint import CheckpointFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, limits and /proc as Linux has them")

COMPARISON = f"train digits {TINY} --steps 60 --compare --seeds 0-1 --jobs 2 --methods mpl none"
STEP: Point = ("metapl.training.trainer:BilevelTrainer", "step", 14, KILL)
FINETUNING: Point = ("metapl.training.loss_trainer:LossTrainer", "step", 13, KILL)


@pytest.fixture(params=RECIPES)
def recipe(request: pytest.FixtureRequest) -> str:
    name: str = request.param
    return name


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments(recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    """At least 12 kills -9 anywhere between the first line and the report."""
    draw, hits, lives, since = random.Random(recipe), 0, 0, time.monotonic()
    code, words = run(RECIPES[recipe], tmp_path / "timed")
    assert code == 0, words
    span = 0.5 * (time.monotonic() - since)
    while hits < 12:
        out, lives, before, line, checkpoints = (
            tmp_path / str(lives),
            lives + 1,
            hits,
            RECIPES[recipe],
            dict[str, int](),
        )
        while True:
            process = start(line, out)
            if hits < 12:
                time.sleep(draw.uniform(0, span))
                process.kill()
            code, words = process.wait(), said(out)
            if code == 0:
                break
            assert code == -KILL, words
            hits, checkpoints = hits + 1, newest(out)
            line = RECIPES[recipe] + " --resume" * (out / "recipe.json").exists()
        if "--resume" in line and "is finished already" not in words:  # else killed after its result was written
            assert_resumed(words, checkpoints)
        assert_equal(out, left_alone(recipe, RECIPES[recipe], tmp_path_factory))
        span = span if hits > before + 1 else 0.7 * span  # the machine may have become faster


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_a_few_steps(
    recipe: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """In either phase, also when the phase after it had begun."""
    out = tmp_path / "run"
    assert run(RECIPES[recipe], out, FINETUNING)[0] == -KILL
    for phase in ("fit", "finetune") if recipe == "soft" else ("fit",):
        path = CheckpointFolder(out / "checkpoints" / phase).paths()[0]
        content = bytearray(path.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    code, words = run(RECIPES[recipe] + " --resume", out)
    assert code == 0, words
    assert "passed over step-00000048.ckpt" in words
    assert "resumed at step 44\n" in words
    assert f"resumed at step {8 if recipe == 'soft' else 12} of phase finetune\n" in words
    assert_equal(out, left_alone(recipe, RECIPES[recipe], tmp_path_factory))


@pytest.mark.slow
def test_without_a_whole_checkpoint_it_is_refused_and_a_finished_run_is_left_alone(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    out, recipe = tmp_path / "anew", RECIPES["soft"]
    assert run(recipe, out, STEP)[0] == -KILL
    for path in (out / "checkpoints/fit").iterdir():
        path.write_bytes(b"not a checkpoint at all")
    code, words = run(recipe, out)
    assert (code, "holds a run already; give --resume" in words) == (2, True)
    code, words = run(recipe.replace("--dropout 0.2", "--dropout 0.3") + " --resume", out)
    assert (code, "run of another recipe" in words) == (2, True)
    code, words = run(recipe + " --resume", out)
    assert code == 2, words
    assert re.search("to start anew, move them away: .*step-00000012.ckpt is damaged .* or is no checkpoint", words)
    for path in (out / "checkpoints/fit").iterdir():
        assert path.read_bytes() == b"not a checkpoint at all"
        path.unlink()
    code, words = run(recipe + " --resume", out)
    assert code == 0, words
    assert "no checkpoint of phase fit yet: it begins at its first step" in words
    assert_equal(out, left_alone("soft", recipe, tmp_path_factory))
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    code, words = run(recipe + " --resume", out)
    assert (code, "is finished already" in words) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "room"), [("soft", "for rows"), ("hard", "for nothing")])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(
    name: str, room: str, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    """A limit on the size of files, put on the running process, refuses what a full disk would."""
    out = tmp_path / "run"
    process = start(RECIPES[name], out)
    while not newest(out):
        time.sleep(0.002)
    limit = 900 if room == "for nothing" else CheckpointFolder(out / "checkpoints/fit").paths()[0].stat().st_size - 1
    resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (limit, limit))
    code, words = process.wait(), said(out)
    assert code == 2, words
    assert "Traceback" not in words
    last = max(CheckpointFolder(out / "checkpoints/fit").paths())
    assert re.search(f"could not be written: .*File too large.*{last.name}", words), words
    checkpoints = newest(out)
    code, words = run(RECIPES[name] + " --resume", out)
    assert code == 0, words
    assert_resumed(words, checkpoints)
    assert_equal(out, left_alone(name, RECIPES[name], tmp_path_factory))


# ------------------------------------------------------------------------------------------------------- comparisons


def children(pid: int) -> list[int]:
    """Of a process, and theirs."""
    own = [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]
    return own + [grandchild for child in own for grandchild in children(child)]


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_that_is_stopped_leaves_nobody_behind_and_goes_on(tmp_path: Path) -> None:
    """A kill of the parent alone while the first runs train; Ctrl-C, which a terminal sends to all, when one is
    finished; a SIGTERM to the parent alone before the last is."""
    whole, out = tmp_path / "whole", tmp_path / "compared"
    code, words = run(COMPARISON, whole)
    assert code == 0, words

    command = COMPARISON
    for signum, sign, number in (
        (KILL, "*/*/checkpoints/fit/step-00000028.ckpt", 1),
        (INTERRUPT, "*/*/result.json", 1),
        (TERMINATE, "*/*/result.json", 3),
    ):
        process = start(command, out)
        while len(list(out.glob(sign))) < number:
            assert process.poll() is None, said(out)
            time.sleep(0.002)
        workers = children(process.pid)
        assert len(workers) >= 2
        (os.killpg if signum == INTERRUPT else os.kill)(process.pid, signum)
        code = process.wait()
        assert code == (-KILL if signum == KILL else 128 + signum), said(out)
        gone_by = time.monotonic() + 5
        while any(map(alive, workers)):
            assert time.monotonic() < gone_by, "a worker goes on without its parent"
            time.sleep(0.01)
        assert "Traceback" not in said(out)
        command = COMPARISON + " --resume" if signum == KILL else pasted(said(out))
    code, words = run(command, out)
    assert code == 0, words
    assert_equal(out, whole)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_of_a_comparison_that_fails_is_named(tmp_path: Path) -> None:
    """And the other one, which would take minutes, goes."""
    poison = "--steps 100000 --student.lr 1e30 --methods none supervised --seeds 0 --save-every 1000000"
    code, words = run(f"{COMPARISON} {poison}", tmp_path / "failing")
    assert code == 2, words
    assert re.search(r"metapl: none, seed 0: .*NaN or infinite", words)
    assert "Traceback" not in words
