"""``metapl noisy-student`` on folders of pictures, and on small data in the formats of CIFAR and ImageNet."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import IMAGES, color_run

from metapl.apps.commands import main
from metapl.apps.experiments.run import EndedRun
from metapl.training.loss_trainer import LossTrainer

NOISY = ("--rounds", "2", "--ratio", "2", "--threshold", "0", "--label-smoothing", "0.1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_run(tmp_path_factory)


def rounds_of(run: Path) -> list[dict[str, Any]]:
    return list(json.loads((run / "result.json").read_text())["rounds"])


def command(root: Path, run: Path, *more: str) -> list[str]:
    folders = [f"--{part}={root / part}" for part in ("labeled", "unlabeled", "test")]
    flags = list(IMAGES)
    for name in ("--finetune-steps", "--unlabeled-batch"):  # flags of other methods
        place = flags.index(name)
        del flags[place : place + 2]
    return ["noisy-student", "images", *folders, *flags, *NOISY, *more, "--out", str(run)]


def test_folders_of_pictures_with_a_network_for_each_round(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    networks = ("--networks", "pooled_cnn", "small_cnn", "--image-size", "16", "--allow-smaller")
    assert main(command(pictures, run, *networks)) == 0
    first, last = rounds_of(run)
    assert [each["kept"] for each in (first, last)] == [24, 24]
    loaded = EndedRun.load(run)
    architecture = loaded.cards["student"].architecture
    assert architecture is not None
    assert architecture.name == "small_cnn"
    sizes = [sum(p.numel() for p in loaded.network(name).parameters()) for name in ("student", "teacher")]
    assert sizes == [last["parameters"], first["parameters"]]
    assert main(["predict", str(run), str(pictures / "test" / "red")]) == 0
    assert "red-0.png" in capsys.readouterr().out
    assert main(["evaluate", str(run)]) == 0
    assert "as in result.json" in " ".join(capsys.readouterr().out.split())


def test_a_student_that_is_smaller_than_its_teacher_is_refused(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(pictures, tmp_path / "run", "--networks", "wide_resnet28_2", "small_cnn")) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert "the student of round 1 is small_cnn with" in said
    assert "--allow-smaller" in said


def test_the_last_student_is_finetuned_at_a_larger_size_with_its_first_layers_frozen(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is measured and used at that size, and a run that was stopped there ends as one that was not."""
    larger = ("--finetune-size", "16", "--finetune-steps", "4", "--finetune.lr", "0.05", "--rounds", "1")
    runs = tmp_path / "whole", tmp_path / "stopped"
    assert main(command(pictures, runs[0], *larger)) == 0
    step, steps = LossTrainer.step, []

    def stopped(*given: Any) -> Any:
        steps.append(1)
        if len(steps) == 10:  # two rounds of four, and the second step after them
            os.kill(os.getpid(), signal.SIGINT)
        return step(*given)

    with monkeypatch.context() as patch:
        patch.setattr(LossTrainer, "step", stopped)
        assert main(command(pictures, runs[1], *larger)) == 130
    assert main([*command(pictures, runs[1], *larger), "--resume"]) == 0
    for name in ("finetuned_student.safetensors", "result.json"):
        assert (runs[0] / name).read_bytes() == (runs[1] / name).read_bytes()
    result = json.loads((runs[0] / "result.json").read_text())
    before, after = (load_file(runs[0] / f"{name}.safetensors") for name in ("student", "finetuned_student"))
    moved = [name for name in before if not torch.equal(before[name], after[name])]
    assert moved
    assert len(moved) < len(before)
    assert next(iter(before)) not in moved
    assert result["delivered"] == "finetuned"
    assert EndedRun.load(runs[0]).cards["finetuned"].input.shape == (3, 16, 16)
    capsys.readouterr()
    assert main(["evaluate", str(runs[0]), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["accuracy"] == found["recorded_accuracy"]
    assert main(["evaluate", str(runs[0]), "--network", "student", "--json"]) == 0  # at its own size
    assert json.loads(capsys.readouterr().out)["recorded_accuracy"] == result["student_test_accuracy"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--finetune-size", "8"), "expected more pixels than the 8 of --image-size"),
        (("--finetune-size", "16", "--finetune-steps", "0"), "expected 1 step or more"),
        (
            ("--finetune-size", "32", "--network", "pooled_cnn", "--image-size", "16"),
            "is built for pictures of one size",
        ),
        (("--frozen", "0.2"), "--frozen 0.2: expected a finetune_size beside it."),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_a_larger_size_that_cannot_be_is_refused(
    flags: tuple[str, ...], words: str, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(command(pictures, tmp_path / "run", *flags)) == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run" / "recipe.json").exists()
