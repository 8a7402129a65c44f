"""Runs of every kind, killed and stopped at the moments that matter, end bit for bit as ones that were left alone.

Everything here happens to real processes of the command line. A row of a life is what the run is in the midst of when
the signal comes; the next process goes on, by the line that it was told or by ``--resume``.
"""

from __future__ import annotations

import re
import shlex
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from fits import events, rows
from lives import (
    INTERRUPT,
    KILL,
    RECIPES,
    TERMINATE,
    assert_equal,
    assert_resumed,
    left,
    left_alone,
    newest,
    noise_folders,
    on_pictures,
    pasted,
    said,
    start,
)
from test_noisy_folders import FLAGS, given, write
from tiny_runs import NOISY_STUDENT, REDUCED

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills and /proc as Linux has them")


class Hit(NamedTuple):
    """A signal, and the call that it comes in the midst of, counted from where the process goes on."""

    owner: str
    name: str
    call: int
    signum: int
    """Minus it: to the run's workers too."""
    said: str = "stopped"


BILEVEL = ("metapl.training.trainer:BilevelTrainer", "step")
WAITING = ("metapl.training.trainer:BilevelTrainer", "teacher_step")
LOSS = ("metapl.training.loss_trainer:LossTrainer", "step")
CHECKPOINT = ("metapl.runs.checkpoint:CheckpointFolder", "write")
VALIDATING = ("metapl.metrics.metric", "predict_logits")
NAMING = ("os", "replace")  # a file is written and has no name yet
NAMED = ("metapl.runs.atomic", "sync_folder")  # it has
WEIGHTS = ("metapl.apps.experiments.folder:RunFolder", "write_weights")
JSON = ("metapl.apps.experiments.folder:RunFolder", "write_json")
LISTING = ("metapl.apps.pictures.folders", "_pictures")
LOOKING = ("metapl.apps.pictures.check", "read_image")  # which files are sound
HASHING = ("metapl.apps.recipes.image_folders", "hash_files")
LABELING = ("metapl.apps.labels:LabelWriter", "add")
DESCRIBING = ("metapl.apps.labels:LabelWriter", "_describe")
DRAWING = ("metapl.apps.experiments.experiment", "draw_report")


def at_step(number: int, phase: str = "fit") -> str:
    return f"stopped after step {number}; saved to .*{phase}/step-{number:08}.ckpt"


DIGITS = [
    Hit(*JSON, 1, KILL),  # before there is a recipe
    Hit("metapl.runs.rows:Metrics", "add", 5, KILL),
    Hit(*VALIDATING, 4, KILL),
    Hit("os", "fsync", 6, KILL),  # before the rows or a checkpoint are on the disk
    Hit("os", "fsync", 7, KILL),
    Hit(*NAMING, 3, KILL),
    Hit(*NAMED, 3, KILL),
    Hit("metapl.runs.checkpoint:CheckpointFolder", "remove_oldest", 2, KILL),  # before the oldest one goes
]
FINETUNING = [
    Hit("metapl.runs.rows:Metrics", "cut", 2, KILL),  # between training and finetuning
    Hit(*LOSS, 3, INTERRUPT, at_step(3, "finetune")),
    Hit(*LOSS, 9, KILL),
    Hit(*WEIGHTS, 1, KILL),
    Hit(*WEIGHTS, 3, KILL),
    Hit(*DRAWING, 1, KILL),
    Hit(*DRAWING, 1, INTERRUPT),
    Hit(*JSON, 1, KILL),  # before there is a result
]
WORKERS = [  # of pictures, from the first listing to the last weights
    Hit(*LISTING, 3, KILL),
    Hit(*LOOKING, 20, KILL),
    Hit(*HASHING, 2, KILL),
    Hit(*WAITING, 3, KILL),
    Hit(*NAMING, 2, KILL),
    Hit(*NAMED, 2, KILL),
    Hit(*BILEVEL, 7, KILL),
    Hit(*VALIDATING, 1, KILL),
    Hit(*LOSS, 3, KILL),
    Hit(*WEIGHTS, 1, KILL),
]
NOISY = [Hit(*LOSS, 5, KILL), Hit(*BILEVEL, 7, KILL), Hit(*BILEVEL, 9, KILL)]

LIVES: dict[tuple[str, str], list[Hit]] = {
    ("soft", "killed at every moment"): [*DIGITS, Hit(*BILEVEL, 15, INTERRUPT, at_step(43)), *FINETUNING],
    ("hard", "stopped"): [
        *DIGITS[1::2],
        Hit(*CHECKPOINT, 2, TERMINATE, at_step(24)),
        Hit(*BILEVEL, 24, TERMINATE, at_step(48)),
        *FINETUNING[::2],
    ],
    ("pictures", "by turns"): [
        Hit(*LISTING, 3, -TERMINATE, "stopped; go on"),
        Hit(*LOOKING, 20, -KILL),
        Hit(*HASHING, 2, KILL),
        Hit(*WAITING, 2, -INTERRUPT, at_step(2)),
        Hit(*BILEVEL, 3, -KILL),
        Hit(*BILEVEL, 3, -INTERRUPT, at_step(7)),
        Hit(*BILEVEL, 2, TERMINATE, at_step(9)),
        Hit(*VALIDATING, 1, -KILL),
        Hit(*NAMING, 3, KILL),
        Hit(*NAMED, 3, -KILL),
        Hit(*CHECKPOINT, 1, -INTERRUPT, at_step(16)),
        Hit(*LOSS, 3, KILL),
        Hit(*LOSS, 3, -TERMINATE, at_step(3, "finetune")),
        Hit(*WEIGHTS, 1, KILL),
    ],
    ("pictures", "killed with its workers"): [hit._replace(signum=-KILL) for hit in WORKERS],
    ("pictures", "killed alone"): WORKERS,
    ("noisy student", ""): [
        Hit(*LOSS, 3, INTERRUPT),  # while the first teacher is trained
        Hit(*LABELING, 2, KILL),  # while its labels are stored
        Hit(*DESCRIBING, 4, INTERRUPT),  # while the last of them are
        Hit("metapl.apps.experiments.rounds", "select", 1, KILL),  # between labels and selection
        Hit("metapl.apps.labels:LabelWriter", "add_table", 1, INTERRUPT),  # while the selection is written
        Hit(*LOSS, 3, KILL),  # while the first student is trained
        Hit(*LABELING, 3, INTERRUPT),  # while it labels
        Hit(*LOSS, 5, TERMINATE),  # while the last student is trained
    ],
    # The third step of the first student's finetuning, after two trainings of six.
    ("noisy student, finetuned", ""): [Hit(*LOSS, 15, INTERRUPT), Hit(*LOSS, 2, KILL)],
    ("reduced", ""): [
        Hit(*LOSS, 3, KILL),  # while the teacher is trained
        Hit(*LABELING, 2, INTERRUPT),  # while its labels are stored
        Hit(*DESCRIBING, 4, KILL),  # while the last of them are
        Hit(*BILEVEL, 3, TERMINATE),  # while the student is trained
        Hit(*LOSS, 2, KILL),  # while it is finetuned
    ],
    ("example_weights", ""): NOISY,
    ("label_correction", ""): NOISY,
}
LONG = {("pictures", "killed with its workers"), ("pictures", "killed alone"), ("example_weights", "")}
LONG |= {("label_correction", ""), ("soft", "killed at every moment"), ("noisy student, finetuned", "")}


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, int], str]:
    """What starts a run of some kind; ``number`` of its life says how many workers it has."""
    root = tmp_path_factory.mktemp("pictures")
    noise_folders(root / "noise")
    for seed, (name, each, wrong) in enumerate((("noisy", 20, 3), ("clean", 4, 0))):
        write(root / name, each, 1000 * seed, wrong)
    finetuned = (*NOISY_STUDENT, "--training", "pretrain_finetune", "--finetune-steps", "4", "--dropout", "0.1")
    fixed = {"noisy student": NOISY_STUDENT, "noisy student, finetuned": finetuned, "reduced": REDUCED}

    def one(kind: str, number: int = 2) -> str:
        if kind == "pictures":
            return on_pictures(root / "noise", workers=(2, 1, 0)[number % 3])
        if kind in RECIPES:
            return RECIPES[kind]
        return shlex.join(fixed.get(kind, ["train", "noisy", *given(root), "--method", kind, *FLAGS.split()]))

    return one


@pytest.mark.slow
@pytest.mark.parametrize("life", [pytest.param(life, marks=[pytest.mark.long] * (life in LONG)) for life in LIVES])
def test_a_run_that_is_hit_at_any_moment_ends_as_one_that_was_not(
    life: tuple[str, str],
    command: Callable[..., str],
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    kind, out, groups = life[0], tmp_path / "a run", []  # with a blank, which the line must quote
    whole = left_alone(kind, command(kind), tmp_path_factory)
    line, checkpoints = command(kind, 0), newest(out)
    for number, hit in enumerate([*LIVES[life], None]):
        process = start(line, out, None if hit is None else hit[:4])
        code, words = process.wait(), said(out)
        groups.append(process.pid)
        signum = 0 if hit is None else abs(hit.signum)
        assert code == (-KILL if signum == KILL else 128 + signum if signum else 0), (hit, words)
        assert "Traceback" not in words
        if signum != KILL and "--resume" in line:  # what a killed process says may be lost
            assert_resumed(words, checkpoints)
        checkpoints = newest(out)
        if signum == KILL:
            line = command(kind, number + 1) + " --resume" * (out / "recipe.json").exists()
        elif hit is not None:
            assert re.search(hit.said, words), words
            assert not left(process.pid)
            assert not (out / "result.json").exists()
            line = pasted(words)
    assert_equal(out, whole)
    patience = time.monotonic() + 15  # workers look every 5 seconds whether their parent lives
    while any(map(left, groups)):
        assert time.monotonic() < patience, "a worker goes on without its parent"
        time.sleep(0.05)
    for phase in ("fit", "finetune") if kind in RECIPES else ():  # event files in so many pieces show every step once
        logged, shown = rows(out, phase), events(out / "tensorboard" / phase)
        assert set(shown.Tags()["scalars"]) == {key for row in logged for key in row} - {"phase", "step"}
        for key in shown.Tags()["scalars"]:
            assert [event.step for event in shown.Scalars(key)] == [row["step"] for row in logged if key in row], key
