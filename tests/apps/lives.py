"""Lives of runs: real processes of the command, each of which a signal ends at a moment, and what they leave behind."""

from __future__ import annotations

import os
import shlex
import signal
from pathlib import Path

import numpy as np
import pytest
from forked import Forked, Point
from PIL import Image
from tiny_runs import built_once

from metapl.runs.checkpoint import CheckpointFolder

KILL, INTERRUPT, TERMINATE = int(signal.SIGKILL), int(signal.SIGINT), int(signal.SIGTERM)

TINY = (
    "--hidden 16 --labeled-batch 32 --unlabeled-batch 32 --finetune-steps 16 "
    "--log-every 2 --validate-every 4 --save-every 4"
)
RECIPES = {
    "soft": f"train digits {TINY} --steps 48 --dropout 0.2 --teacher.lr 0.05 --student.momentum 0.5",
    "hard": f"train digits {TINY} --steps 48 --mode reinforce --baseline 0.99 --ema-decay 0.9 "
    "--dropout 0.1 --uda-weight 0.5 --warmup 4 --exact-every 16",
}
PICTURES = (
    "--image-size 8 --network small_cnn --precision float32 --randaugment --pad 1 --strong.cutout 2 "
    "--labeled-batch 8 --unlabeled-batch 8 --method mpl --mode loss_difference "
    "--steps 16 --wait 4 --finetune-steps 6 --log-every 2 --validate-every 4 --save-every 4"
)


def noise(path: Path, seed: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (12, 12, 3), dtype=np.uint8)).save(path)


def noise_folders(root: Path) -> Path:
    """Pictures of noise, and one that is broken."""
    seed = 0
    for name, count in {"labeled/a": 8, "labeled/b": 8, "val/a": 3, "val/b": 3, "unlabeled/any": 24}.items():
        for number in range(count):
            seed += 1
            noise(root / name / f"{number}.png", seed)
    (root / "unlabeled/broken.png").write_bytes(b"no picture")
    return root


def on_pictures(root: Path, workers: int = 2) -> str:
    """The command on such folders, whose pictures are read by worker processes."""
    folders = " ".join(f"--{name} {root / name}" for name in ("labeled", "unlabeled", "val"))
    return f"train images {folders} {PICTURES} --num-workers {workers}"


def start(arguments: str, out: Path, point: Point | None = None) -> Forked:
    """The command, in a group of its own; what it says goes to ``out``.txt."""
    argv = [*shlex.split(arguments), *([] if "--out" in arguments else ["--out", str(out)])]
    return Forked(argv, said=Path(f"{out}.txt"), point=point, alone=True)


def run(arguments: str, out: Path, point: Point | None = None) -> tuple[int, str]:
    """The exit code, minus the number of the signal that killed it; and what it said."""
    return start(arguments, out, point).wait(), said(out)


def left_alone(kind: str, arguments: str, factory: pytest.TempPathFactory) -> Path:
    """A run of some kind that nothing happened to."""

    def build(out: Path) -> None:
        code, words = run(arguments, out)
        assert code == 0, words

    return built_once(factory, kind, build)


def said(out: Path) -> str:
    return Path(f"{out}.txt").read_text()


def pasted(words: str) -> str:
    """The line that the run said to go on with, without the command's name."""
    command, line = words.rstrip().splitlines()[-1].split(None, 1)
    assert command == "metapl"
    assert "go on with:" in words
    return line


def contents(out: Path) -> dict[str, bytes]:
    """What two runs must have in common to the byte."""
    kinds = (".safetensors", ".parquet", ".jsonl", ".csv", ".png")
    found = (path for path in sorted(out.rglob("*")) if path.suffix in kinds or path.name == "result.json")
    return {str(path.relative_to(out)): path.read_bytes() for path in found}


def assert_equal(out: Path, whole: Path) -> None:
    found, wanted = contents(out), contents(whole)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if found[name] != wanted[name]] == []
    assert list(out.rglob("step-*.tmp")) == []


def newest(out: Path) -> dict[str, int]:
    """The newest checkpoint of each phase that has one."""
    found = {folder.name: CheckpointFolder(folder).paths() for folder in out.glob("checkpoints/*")}
    return {phase: int(paths[0].stem[5:]) for phase, paths in found.items() if paths}


def assert_resumed(words: str, checkpoints: dict[str, int]) -> None:
    """Every phase that had a checkpoint went on from it, and without any the run said that it starts anew."""
    if not checkpoints:
        assert "it begins at its first step" in words
    for phase, step in checkpoints.items():
        assert f"resumed at step {step}{'' if phase == 'fit' else f' of phase {phase}'}\n" in words


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def left(group: int) -> list[int]:
    """The processes that live in a group."""
    numbers = [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]
    return [number for number in numbers if alive(number) and _group(number) == group]


def _group(number: int) -> int | None:
    try:
        return os.getpgid(number)
    except OSError:
        return None
