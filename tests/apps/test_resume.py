"""A run that is killed, at whatever moment, and resumed ends bit for bit as one that was left alone.

Everything here happens to real processes of the command line.
"""

from __future__ import annotations

import os
import random
import re
import resource
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from fits import events, rows
from forked import Forked, Point

from metapl.apps.experiments.folder import WEIGHTS
from metapl.runs.checkpoint import CheckpointFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, limits and /proc as Linux has them")

TINY = (
    "--hidden 16 --labeled-batch 32 --unlabeled-batch 32 --finetune-steps 16 "
    "--log-every 2 --validate-every 4 --save-every 4"
)
RECIPES = {
    "soft": f"train digits {TINY} --steps 48 --dropout 0.2 --teacher.lr 0.05 --student.momentum 0.5",
    "hard": f"train digits {TINY} --steps 48 --mode reinforce --baseline 0.99 --ema-decay 0.9 "
    "--dropout 0.1 --uda-weight 0.5 --warmup 4 --exact-every 16",
}
Moment = float | Point
KILL, INTERRUPT, TERMINATE = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)

COMPARISON = f"train digits {TINY} --steps 60 --compare --seeds 0-1 --jobs 2 --methods mpl none"


POINTS: list[Point] = [
    ("metapl.apps.experiments.folder:RunFolder", "write_json", 1, KILL),  # before there is a recipe
    ("metapl.runs.rows:Metrics", "add", 5, KILL),
    ("metapl.training.selection", "predict_logits", 4, KILL),  # while validating
    ("os", "fsync", 6, KILL),  # before the rows or a checkpoint are on the disk
    ("os", "fsync", 7, KILL),
    ("os", "replace", 3, KILL),  # before a checkpoint has its name
    ("metapl.runs.atomic", "sync_folder", 3, KILL),  # after it has
    ("metapl.runs.checkpoint:CheckpointFolder", "remove_oldest", 2, KILL),  # before the oldest one goes
    ("metapl.runs.rows:Metrics", "cut", 2, KILL),  # between training and finetuning
    ("metapl.training.loss_trainer:LossTrainer", "step", 9, KILL),  # while finetuning
    ("metapl.apps.experiments.folder:RunFolder", "write_weights", 1, KILL),
    ("metapl.apps.experiments.folder:RunFolder", "write_weights", 3, KILL),
    ("metapl.apps.reports", "draw_report", 1, KILL),
    ("metapl.apps.experiments.folder:RunFolder", "write_json", 1, KILL),  # before there is a result
]


class Nursery:
    """Where command lines are run, one at a time."""

    born: Forked

    def start(self, arguments: str, out: Path, point: Point | None = None) -> int:
        """The process's number; what it says goes to ``out``.txt."""
        argv = [*shlex.split(arguments), *([] if "--out" in arguments else ["--out", str(out)])]
        self.born = Forked(argv, said=Path(f"{out}.txt"), point=point, alone=True)
        return self.born.pid

    def wait(self) -> int:
        """The exit code; minus the number of the signal that killed it."""
        return self.born.wait()

    def run(self, arguments: str, out: Path, point: Point | None = None) -> tuple[int, str]:
        self.start(arguments, out, point)
        return self.wait(), said(out)


@pytest.fixture(scope="module")
def nurseries() -> list[Nursery]:
    return [Nursery(), Nursery()]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


@pytest.fixture(scope="module")
def whole(nurseries: list[Nursery], folder: Path) -> dict[str, tuple[Path, float]]:
    """Runs that were left alone, and how long they took."""

    def one(nursery: Nursery, name: str) -> tuple[Path, float]:
        out, since = folder / f"whole-{name}", time.monotonic()
        code, words = nursery.run(RECIPES[name], out)
        assert code == 0, words
        return out, time.monotonic() - since

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(RECIPES, pool.map(one, nurseries, RECIPES), strict=True))


def said(out: Path) -> str:
    return Path(f"{out}.txt").read_text()


def files(out: Path) -> dict[str, bytes]:
    """What two runs must have in common to the byte."""
    names = (*WEIGHTS.values(), "metrics.jsonl", "result.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in sorted(out.rglob("*")) if path.name in names}


def assert_equal(out: Path, whole: Path) -> None:
    found, wanted = files(out), files(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    left = [path.name for path in out.rglob("*") if path.name.endswith(".tmp")]
    assert [name for name in left if name.startswith("step-")] == []


def newest(out: Path) -> dict[str, int]:
    """The newest checkpoint of each phase that has one."""
    found = {phase: CheckpointFolder(out / "checkpoints" / phase).paths() for phase in ("fit", "finetune")}
    return {phase: int(paths[0].stem[5:]) for phase, paths in found.items() if paths}


def assert_resumed(words: str, checkpoints: dict[str, int]) -> None:
    """Every phase that had a checkpoint went on from it, and without any the run said that it starts anew."""
    if not checkpoints:
        assert "starting anew" in words
    for phase, step in checkpoints.items():
        assert f"resumed at step {step}{'' if phase == 'fit' else ' of phase finetune'}\n" in words


def lived(nursery: Nursery, recipe: str, out: Path, moments: Iterator[Moment]) -> int:
    """A run, killed at one moment after the other and resumed, until it ends; how many kills hit."""
    hits, resumed, checkpoints = 0, "", dict[str, int]()
    while True:
        moment = next(moments, None)
        point = moment if isinstance(moment, tuple) else None
        pid = nursery.start(recipe + resumed, out, point)
        if isinstance(moment, float):
            time.sleep(moment)
            with suppress(ProcessLookupError):  # it was faster
                os.kill(pid, signal.SIGKILL)
        code = nursery.wait()
        if resumed and code == 0 and "is finished already" not in said(out):  # else killed after its result was written
            assert_resumed(said(out), checkpoints)
        if code == 0:
            assert point is None, f"{point} was not reached"
            return hits
        assert code == -signal.SIGKILL, said(out)
        hits, checkpoints = hits + 1, newest(out)
        resumed = " --resume" if (out / "recipe.json").exists() else ""


@pytest.mark.slow
@pytest.mark.long
def test_killed_at_random_moments(nurseries: list[Nursery], whole: dict[str, tuple[Path, float]]) -> None:
    """At least 24 kills -9 anywhere between the first line and the report."""

    def some(nursery: Nursery, name: str) -> int:
        (reference, duration), draw, hits, lives = whole[name], random.Random(name), 0, 0
        span = 0.5 * duration
        while hits < 12:
            out, lives = reference.with_name(f"random-{name}-{lives}"), lives + 1
            new = lived(nursery, RECIPES[name], out, iter([draw.uniform(0, span) for _ in range(12 - hits)]))
            assert_equal(out, reference)
            hits, span = hits + new, span if new > 1 else 0.7 * span  # the machine may have become faster
        return hits

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(some, nurseries, RECIPES)) >= 24


@pytest.mark.slow
def test_killed_at_the_moments_that_matter(nurseries: list[Nursery], whole: dict[str, tuple[Path, float]]) -> None:
    """Each of :data:`POINTS`, one after the other in the life of one run, and every second of them in another's."""

    def one(nursery: Nursery, name: str) -> int:
        reference, out = whole[name][0], whole[name][0].with_name(f"points-{name}")
        hits = lived(nursery, RECIPES[name], out, iter(POINTS if name == "soft" else POINTS[1::2]))
        assert_equal(out, reference)
        return hits

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(one, nurseries, RECIPES)) == [len(POINTS), len(POINTS) // 2]

    # The event files of a life in so many pieces show every step once.
    for name, (reference, _) in whole.items():
        out = reference.with_name(f"points-{name}")
        for phase in ("fit", "finetune"):
            logged, shown = rows(out, phase), events(out / "tensorboard" / phase)
            assert set(shown.Tags()["scalars"]) == {key for row in logged for key in row} - {"phase", "step"}
            for key in shown.Tags()["scalars"]:
                steps = [event.step for event in shown.Scalars(key)]
                assert steps == [row["step"] for row in logged if key in row], (phase, key)


def pasted(words: str) -> str:
    """The line that the run said to go on with, without the command's name."""
    command, line = words.rstrip().splitlines()[-1].split(None, 1)
    assert command == "metapl"
    assert "go on with:" in words
    return line


@pytest.mark.slow
@pytest.mark.parametrize(
    ("owner", "name", "number", "signum", "step"),
    [
        ("metapl.training.trainer:BilevelTrainer", "step", 15, INTERRUPT, "after step 15; .*fit/step-00000015.ckpt"),
        ("metapl.training.trainer:BilevelTrainer", "step", 48, TERMINATE, "after step 48; .*fit/step-00000048.ckpt"),
        ("metapl.runs.checkpoint:CheckpointFolder", "write", 4, TERMINATE, "after step 16; .*step-00000016.ckpt"),
        ("metapl.training.loss_trainer:LossTrainer", "step", 3, INTERRUPT, "after step 3; .*finetune/step-0+3.ckpt"),
        ("metapl.apps.reports", "draw_report", 1, INTERRUPT, ""),
    ],
)
def test_asked_to_stop_a_run_saves_and_says_how_to_go_on(
    owner: str,
    name: str,
    number: int,
    signum: int,
    step: str,
    nurseries: list[Nursery],
    whole: dict[str, tuple[Path, float]],
) -> None:
    nursery, recipe = nurseries[0], "soft" if signum == INTERRUPT else "hard"
    reference = whole[recipe][0]
    out = reference.with_name(f"{signum} {name} {number}")  # with blanks, which the line must quote
    code, words = nursery.run(RECIPES[recipe] + f" --out '{out}'", out, (owner, name, number, signum))
    assert code == 128 + signum, words
    assert re.search(f"stopped {step.replace('; ', '; saved to ')}".strip(), words)
    checkpoints = newest(out)
    code, words = nursery.run(pasted(words), out)
    assert code == 0, words
    assert_resumed(words, checkpoints)
    assert_equal(out, reference)


@pytest.mark.slow
def test_a_damaged_newest_checkpoint_costs_a_few_steps(
    nurseries: list[Nursery], whole: dict[str, tuple[Path, float]]
) -> None:
    """In either phase, also when the phase after it had begun."""

    def one(nursery: Nursery, name: str) -> None:
        reference, out = whole[name][0], whole[name][0].with_name(f"damaged-{name}")
        assert (
            nursery.run(RECIPES[name], out, ("metapl.training.loss_trainer:LossTrainer", "step", 13, KILL))[0] == -KILL
        )
        damaged = ("fit", "finetune") if name == "soft" else ("fit",)
        for phase in damaged:
            path = CheckpointFolder(out / "checkpoints" / phase).paths()[0]
            content = bytearray(path.read_bytes())
            content[len(content) // 2] ^= 1
            path.write_bytes(content)
        code, words = nursery.run(RECIPES[name] + " --resume", out)
        assert code == 0, words
        assert "passed over step-00000048.ckpt" in words
        assert "resumed at step 44\n" in words
        assert f"resumed at step {8 if name == 'soft' else 12} of phase finetune\n" in words
        assert_equal(out, reference)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, nurseries, RECIPES))


@pytest.mark.slow
def test_without_a_whole_checkpoint_it_is_refused_and_a_finished_run_is_left_alone(
    nurseries: list[Nursery], whole: dict[str, tuple[Path, float]]
) -> None:
    reference, nursery, recipe = whole["soft"][0], nurseries[0], RECIPES["soft"]
    out = reference.with_name("anew")
    assert nursery.run(recipe, out, ("metapl.training.trainer:BilevelTrainer", "step", 14, KILL))[0] == -KILL
    for path in (out / "checkpoints/fit").iterdir():
        path.write_bytes(b"not a checkpoint at all")
    code, words = nursery.run(recipe, out)
    assert (code, "holds a run already; give --resume" in words) == (2, True)
    code, words = nursery.run(recipe.replace("--dropout 0.2", "--dropout 0.3") + " --resume", out)
    assert (code, "run of another recipe" in words) == (2, True)
    code, words = nursery.run(recipe + " --resume", out)
    assert code == 2, words
    assert re.search("to start anew, move them away: .*step-00000012.ckpt is not a checkpoint of metapl", words)
    for path in (out / "checkpoints/fit").iterdir():
        assert path.read_bytes() == b"not a checkpoint at all"
        path.unlink()
    code, words = nursery.run(recipe + " --resume", out)
    assert code == 0, words
    assert "no checkpoint of phase fit yet: starting anew" in words
    assert_equal(out, reference)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file() and path.name != ".lock"}
    code, words = nursery.run(recipe + " --resume", out)
    assert (code, "is finished already" in words) == (0, True)
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.slow
@pytest.mark.parametrize(("name", "room"), [("soft", "for rows"), ("hard", "for nothing")])
def test_a_full_disk_leaves_the_last_checkpoint_whole_and_says_so(
    name: str, room: str, nurseries: list[Nursery], whole: dict[str, tuple[Path, float]]
) -> None:
    """A limit on the size of files, put on the running process, refuses what a full disk would."""
    nursery, reference, out = nurseries[0], whole[name][0], whole[name][0].with_name(f"full-{name}")
    pid = nursery.start(RECIPES[name], out)
    while not newest(out):
        time.sleep(0.002)
    limit = 900 if room == "for nothing" else CheckpointFolder(out / "checkpoints/fit").paths()[0].stat().st_size - 1
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (limit, limit))
    code, words = nursery.wait(), said(out)
    assert code == 2, words
    assert "Traceback" not in words
    last = max(CheckpointFolder(out / "checkpoints/fit").paths())
    assert re.search(f"could not be written: File too large.*{last.name}", words), words
    checkpoints = newest(out)
    code, words = nursery.run(RECIPES[name] + " --resume", out)
    assert code == 0, words
    assert_resumed(words, checkpoints)
    assert_equal(out, reference)


# ------------------------------------------------------------------------------------------------------- comparisons


def children(pid: int) -> list[int]:
    """Of a process, and theirs."""
    own = [int(one) for task in Path(f"/proc/{pid}/task").iterdir() for one in (task / "children").read_text().split()]
    return own + [grandchild for child in own for grandchild in children(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.slow
@pytest.mark.long
def test_a_comparison_that_is_stopped_leaves_nobody_behind_and_goes_on(nurseries: list[Nursery], folder: Path) -> None:
    """A kill of the parent alone while the first runs train; Ctrl-C, which a terminal sends to all, when one is
    finished; a SIGTERM to the parent alone before the last is."""
    whole, out, nursery = folder / "whole-comparison", folder / "compared", nurseries[0]
    code, words = nursery.run(COMPARISON, whole)
    assert code == 0, words

    command = COMPARISON
    for signum, sign, number in (
        (KILL, "*/*/checkpoints/fit/step-00000028.ckpt", 1),
        (INTERRUPT, "*/*/result.json", 1),
        (TERMINATE, "*/*/result.json", 3),
    ):
        pid = nursery.start(command, out)
        while len(list(out.glob(sign))) < number:
            assert alive(pid), said(out)
            time.sleep(0.002)
        workers = children(pid)
        assert len(workers) >= 2
        (os.killpg if signum == INTERRUPT else os.kill)(pid, signum)
        code = nursery.wait()
        assert code == (-KILL if signum == KILL else 128 + signum), said(out)
        gone_by = time.monotonic() + 5
        while any(map(alive, workers)):
            assert time.monotonic() < gone_by, "a worker goes on without its parent"
            time.sleep(0.01)
        assert "Traceback" not in said(out)
        command = COMPARISON + " --resume" if signum == KILL else pasted(said(out))
    code, words = nursery.run(command, out)
    assert code == 0, words
    assert_equal(out, whole)


@pytest.mark.long
@pytest.mark.slow
def test_a_run_of_a_comparison_that_fails_is_named(nurseries: list[Nursery], folder: Path) -> None:
    """And the other one, which would take minutes, goes."""
    out = folder / "failing"
    poison = "--steps 100000 --student.lr 1e30 --methods none supervised --seeds 0 --save-every 1000000"
    code, words = nurseries[0].run(f"{COMPARISON} {poison}", out)
    assert code == 2, words
    assert re.search(r"metapl: none, seed 0: .*NaN or infinite", words)
    assert "Traceback" not in words
