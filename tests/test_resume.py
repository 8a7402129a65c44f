"""A run that is killed, at whatever moment, and resumed ends bit for bit as one that was left alone.

Everything here happens to real processes of the command line.
"""

from __future__ import annotations

import json
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from test_fit import events

from metapl.checkpoint import CheckpointFolder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="kills, limits and /proc as Linux has them")

TINY = "--hidden 16 --labeled-batch 32 --unlabeled-batch 32 --log-every 5 --validate-every 10 --save-every 10"
RECIPES = {
    "soft": f"{TINY} --steps 200 --finetune-steps 60 --dropout 0.2 --teacher.lr 0.05 --student.momentum 0.5",
    "hard": f"{TINY} --steps 200 --finetune-steps 60 --mode reinforce --baseline 0.99 --ema-decay 0.9 --dropout 0.1 "
    "--uda-weight 0.5 --warmup 20 --exact-every 40",
}
COMPARISON = f"{TINY} --steps 60 --finetune-steps 20 --compare --seeds 0-1 --jobs 2 --methods mpl none"

# Runs the command line, and kills itself at the n-th call of a function of the library or of the system.
DYING = """
import os, pkgutil, signal, sys
from metapl.cli import main
import metapl.fit, metapl.report, metapl.recipes.experiment
owner, name, number = sys.argv[1:4]
sys.argv = ["metapl", *sys.argv[4:]]
owner = pkgutil.resolve_name(owner)
real, calls = getattr(owner, name), []
def dying(*given, **named):
    calls.append(name)
    if len(calls) == int(number):
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*given, **named)
setattr(owner, name, dying)
sys.exit(main())
"""
POINTS = [
    ("metapl.run_folder:RunFolder", "write_json", 1),  # before there is a recipe
    ("metapl.fit", "predict_logits", 4),  # while validating
    ("os", "fsync", 9),  # before a file is on the disk: of the rows, of a checkpoint
    ("os", "fsync", 10),
    ("os", "replace", 6),  # before a checkpoint has its name
    ("metapl.atomic", "_sync_folder", 4),  # after it has
    ("metapl.checkpoint:CheckpointFolder", "_remove_oldest", 3),  # before the oldest one goes
    ("metapl.run_folder:Metrics", "add", 25),
    ("metapl.run_folder:Metrics", "cut", 2),  # between training and finetuning
    ("metapl.run_folder:RunFolder", "write_weights", 1),
    ("metapl.baselines:LossTrainer", "step", 33),  # while finetuning
    ("metapl.run_folder:RunFolder", "write_weights", 2),
    ("metapl.report", "draw_report", 1),
    ("metapl.run_folder:RunFolder", "write_json", 1),  # before there is a result
]


@dataclass
class Ended:
    code: int
    out: str
    err: str


def start(arguments: str, out: Path, before: Sequence[str] = ("-m", "metapl")) -> subprocess.Popen[str]:
    command = [sys.executable, *before, "train", "digits", *shlex.split(arguments), "--out", str(out)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait(process: subprocess.Popen[str], timeout: float = 120) -> Ended:
    out, err = process.communicate(timeout=timeout)
    return Ended(process.returncode, out, err)


def run(arguments: str, out: Path) -> Ended:
    return wait(start(arguments, out))


def files(out: Path) -> dict[str, Any]:
    """What two runs must have in common to the byte, but for where a result says it lies."""
    names = ("student.safetensors", "finetuned_student.safetensors", "metrics.jsonl", "result.json")
    return {
        str(path.relative_to(out)): path.read_bytes()
        for path in sorted(out.rglob("*"))
        if path.name in names and "checkpoints" not in path.parts
    }


def assert_equal(out: Path, reference: Path) -> None:
    found, wanted = files(out), files(reference)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []


def newest_step(out: Path, phase: str) -> int | None:
    numbers = [int(path.stem[5:]) for path in (out / "checkpoints" / phase).glob("step-*.ckpt")]
    return max(numbers, default=None)


def assert_resumed(said: str, steps: dict[str, int | None]) -> None:
    """Every phase that had a checkpoint went on from it."""
    if steps["fit"] is None:
        assert "starting anew" in said
        return
    assert f"resumed at step {steps['fit']}\n" in said
    if steps["finetune"] is not None:
        assert f"resumed at step {steps['finetune']} of phase finetune\n" in said


def steps_of(out: Path) -> dict[str, int | None]:
    return {phase: newest_step(out, phase) for phase in ("fit", "finetune")}


@cache
def reference(name: str, folder: Path) -> tuple[Path, float]:
    """A run that was left alone, and how long it took from its first words on."""
    out = folder / f"reference-{name}"
    process = start(RECIPES.get(name, COMPARISON), out)
    first = process.stdout.readline() if process.stdout else ""
    since = time.monotonic()
    done = wait(process)
    assert done.code == 0, done.err
    assert first
    return out, time.monotonic() - since


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("resume")


def killed_at_random(name: str, folder: Path, kills: int, seed: int) -> int:
    """Runs, each killed and resumed until it ends, until so many kills have hit; the number that hit a finished phase
    or no checkpoint yet does not matter."""
    whole, duration = reference(name, folder)
    draw, hits, number = random.Random(seed), 0, 0
    while hits < kills:
        out, number = folder / f"{name}-{seed}-{number}", number + 1
        steps: dict[str, int | None] | None = None
        while True:
            process = start(RECIPES[name] + " --resume" * (steps is not None), out)
            assert process.stdout is not None
            said = process.stdout.readline()
            time.sleep(draw.uniform(0, 0.7 * duration))
            process.kill()
            done = wait(process)
            said += done.out
            if steps is not None and len(said.splitlines()) > 1 and done.code != -signal.SIGKILL:
                assert_resumed(said, steps)
            if done.code == 0:
                break
            assert done.code == -signal.SIGKILL, done.err
            hits += 1
            steps = steps_of(out)
        assert_equal(out, whole)
    return hits


@pytest.mark.slow
def test_killed_at_random_moments(folder: Path) -> None:
    """At least 24 kills -9 over start, training, validation, saving, finetuning and reporting."""
    with ThreadPoolExecutor(2) as pool:
        hits = list(pool.map(lambda name: killed_at_random(name, folder, 12, seed=1), RECIPES))
    assert sum(hits) >= 24
