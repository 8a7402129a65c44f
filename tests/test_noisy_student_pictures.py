"""``metapl noisy-student`` on folders of pictures, and on small data in the formats of CIFAR and ImageNet."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from small_data import write_cifar, write_imagenet
from tiny_runs import IMAGES, color_folders
from torchvision import datasets

from metapl.cli import main
from metapl.experiments.load_run import load_run
from metapl.labels import LabelStore

NOISY = ("--rounds", "2", "--ratio", "2", "--threshold", "0", "--label-smoothing", "0.1")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return color_folders(tmp_path_factory.mktemp("pictures"))


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
    loaded = load_run(run)
    assert loaded.recipe.network_name == "small_cnn"
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


def test_cifar_10_as_torchvision_keeps_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cifar(tmp_path / "data", monkeypatch, datasets.CIFAR10, each=20, test=20)
    flags = (
        *("--data", "cifar10", "--data-root", str(tmp_path / "data"), "--labels-per-class", "2", "--validation", "20"),
        *("--network", "small_cnn", "--image-size", "32", "--steps", "2", "--labeled-batch", "4", "--device", "cpu"),
    )
    run = tmp_path / "run"
    assert main(["noisy-student", "torchvision", *flags, *NOISY, "--labels", "hard", "--out", str(run)]) == 0
    assert rounds_of(run)[0]["unlabeled"] == 60
    assert len(LabelStore(run / "rounds" / "2" / "labels")) == 60


def test_imagenet_keeps_all_labels_beside_a_folder_of_other_pictures(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_imagenet(tmp_path / "data", monkeypatch, each=6, val=6)
    flags = (
        *("--data-root", str(tmp_path / "data"), "--unlabeled", str(pictures / "unlabeled"), "--validation", "3"),
        *("--network", "efficientnet_b0", "--image-size", "64", "--steps", "1", "--labeled-batch", "4"),
        *("--device", "cpu", "--num-workers", "0", "--rounds", "1", "--threshold", "0", "--per-class", "5"),
        *("--teacher.lr", "0.001"),
    )
    run = tmp_path / "run"
    assert main(["noisy-student", "imagenet", *flags, "--out", str(run)]) == 0
    counts = json.loads((run / "data.json").read_text())["counts"]
    assert counts == {"labeled": 15, "unlabeled": 24, "validation": 3, "test": 6}
    (only,) = rounds_of(run)
    assert {*only["copies_per_class"].values()} <= {0, 5}
    recipe = load_run(run).recipe
    assert (recipe.dropout, recipe.self_training.ratio) == (0.5, 1)
