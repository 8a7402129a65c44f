"""The paper's protocols, by the command, on small files in the exact format of each data set."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flat import made
from PIL import Image
from small_data import write_cifar, write_imagenet, write_svhn
from torchvision import datasets

from metapl.apps.commands import main
from metapl.apps.pictures import Split
from metapl.apps.recipes import (
    PROTOCOL_RECIPES,
    RECIPES,
    Cifar10,
    Cifar10Paper,
    Imagenet10,
    Imagenet10Paper,
    Svhn,
    Vision,
)
from metapl.apps.recipes.base import as_dict, recipe_from_dict
from metapl.apps.recipes.protocols import _loaded
from metapl.errors import MetaplError

SHORT = (
    *("--labeled-batch", "4", "--unlabeled-batch", "6", "--steps", "4", "--wait", "1", "--warmup", "1"),
    *("--finetune-steps", "2", "--finetune-batch", "4", "--validate-every", "2", "--log-every", "1"),
    *("--save-every", "2", "--device", "cpu", "--student.lr", "0.01", "--teacher.lr", "0.01"),
)
FEW = ("--labels-per-class", "3", "--validation", "10")


@pytest.fixture(autouse=True)
def _nothing_remembered() -> None:
    _loaded.cache_clear()


def cifar10(root: Path, patch: pytest.MonkeyPatch) -> None:
    write_cifar(root, patch, datasets.CIFAR10, each=20, test=15)


def cifar100(root: Path, patch: pytest.MonkeyPatch) -> None:
    write_cifar(root, patch, datasets.CIFAR100, each=600, test=100)


def svhn(root: Path, patch: pytest.MonkeyPatch) -> None:
    write_svhn(root, patch, train=60, test=15, extra=40)


def imagenet(root: Path, patch: pytest.MonkeyPatch) -> None:
    # Pictures of one level alone have no variance, by which batch norm divides.
    write_imagenet(root, patch, each=12, val=9, noise=100)


def folders(root: Path, patch: pytest.MonkeyPatch) -> None:
    numbers = np.random.default_rng(0)
    for part, count in (("train", 15), ("test", 5)):
        for name in ("left", "right"):
            folder = root / part / name
            folder.mkdir(parents=True)
            for i in range(count):
                Image.fromarray(numbers.integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(folder / f"{i}.png")


AT_32 = ("--image-size", "32", "--num-workers", "0")
CASES: dict[str, tuple[Callable[..., None], str, tuple[str, ...]]] = {
    "cifar10-4k": (cifar10, "cifar10-4k", ("--network", "small_cnn")),
    "cifar10-4k-network": (cifar10, "cifar10-4k", ()),
    "cifar10-4k-paper": (cifar10, "cifar10-4k-paper", ()),
    "svhn-1k": (svhn, "svhn-1k", ("--network", "small_cnn")),
    "svhn-1k-network": (svhn, "svhn-1k", ()),
    "imagenet-10pct": (imagenet, "imagenet-10pct", (*AT_32, "--network", "small_cnn")),
    "imagenet-10pct-network": (imagenet, "imagenet-10pct", AT_32),
    "imagenet-10pct-paper": (imagenet, "imagenet-10pct-paper", AT_32),
    "cifar100": (cifar100, "torchvision", ("--data", "cifar100", "--network", "small_cnn")),
    "imagefolder": (folders, "torchvision", ("--data", "imagefolder", "--network", "small_cnn", "--resized-crop")),
    "grey": (folders, "torchvision", ("--data", "imagefolder", "--network", "small_cnn", "--grey")),
}


OWN_NETWORKS = ("-paper", "-network")
"""What else runs the network of its recipe, which takes ten seconds and more."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case", [pytest.param(name, marks=pytest.mark.long) if name.endswith(OWN_NETWORKS) else name for name in CASES]
)
def test_it_runs_from_end_to_end(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write, recipe, flags = CASES[case]
    write(tmp_path / "data", monkeypatch)
    out = tmp_path / "run"
    validation = ("--labels-per-class", "3", "--validation", "100") if case == "cifar100" else FEW
    command = ["train", recipe, "--data-root", str(tmp_path / "data"), *SHORT, *validation, *flags]
    assert main([*command, "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "labeled pictures" in said
    assert "Test accuracy of the" in said
    result = json.loads((out / "result.json").read_text())
    data = json.loads((out / "data.json").read_text())
    assert result["evaluation"]["n"] == data["counts"]["test"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    fitted = [row for row in rows if row["phase"] == "fit"]
    assert "inner_loss" not in fitted[0], "the student waits for a step"
    assert "inner_loss" in fitted[1]
    assert all(0 <= row["pseudo_label_accuracy"] <= 1 for row in fitted if "pseudo_label_accuracy" in row)
    assert (out / "report.png").exists()
    assert main(["evaluate", str(out), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["accuracy"] == result["test_accuracy"]


def test_the_split_is_stored_and_can_be_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path / "data", monkeypatch)
    command = ["train", "cifar10-4k", "--data-root", str(tmp_path / "data"), *SHORT, *FEW, "--network", "small_cnn"]
    command += ["--dropout", "0", "--steps", "1", "--wait", "0", "--warmup", "0", "--finetune-steps", "0"]
    assert main([*command, "--seed", "7", "--out", str(tmp_path / "a")]) == 0
    stored = tmp_path / "a" / "split.json"
    assert main([*command, "--seed", "8", "--split", str(stored), "--out", str(tmp_path / "b")]) == 0
    assert main([*command, "--seed", "8", "--out", str(tmp_path / "c")]) == 0
    first, same, other = (json.loads((tmp_path / run / "split.json").read_text()) for run in "abc")
    assert first["hash"] == same["hash"] != other["hash"]
    assert first["name"] == "cifar10-4k"
    assert len(first["labeled"]) == 30


def test_a_run_is_not_gone_on_with_on_other_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders(tmp_path / "data", monkeypatch)
    command = ["train", "torchvision", "--data", "imagefolder", "--data-root", str(tmp_path / "data"), *SHORT, *FEW]
    command += ["--network", "small_cnn", "--out", str(tmp_path / "run")]
    assert main(command) == 0
    (tmp_path / "run" / "result.json").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    next((tmp_path / "data" / "train" / "left").iterdir()).unlink()
    _loaded.cache_clear()
    assert main([*command, "--resume"]) == 2
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_everything_known_is_the_headroom(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path, monkeypatch)
    sizes = {"labels_per_class": 3, "validation": 10, "labeled_batch": 90, "steps": 9, "warmup": 0}
    recipe = made(Cifar10, data_root=str(tmp_path), wait=0, **sizes)
    task = recipe.task()
    images, labels = task.everything[0]
    data = datasets.CIFAR10(tmp_path)
    used = torch.cat([task.split.labeled, task.split.unlabeled])
    assert sorted(labels.tolist()) == sorted(data.targets[i] for i in used.tolist())
    assert len(used) == 90
    assert not set(used.tolist()) & set(task.split.validation.tolist())
    assert images.shape == (90, 3, 32, 32)


@pytest.mark.parametrize("kind", PROTOCOL_RECIPES, ids=lambda kind: kind.name)
def test_it_can_be_stored(kind: type[Vision]) -> None:
    fields: dict[str, Any] = {"data_root": "somewhere", "class_names": ("a", "b")}
    if kind is Vision:
        fields["data"] = "cifar10"
    recipe = kind(**fields)
    assert recipe_from_dict(RECIPES[kind.name], "mpl", json.loads(json.dumps(as_dict(recipe)))) == recipe


def test_the_settings_are_the_published_ones() -> None:
    """The two tables of settings, column by column."""

    def told(recipe: Vision) -> tuple[Any, ...]:
        method: Any = recipe.method
        rates = (method.student.lr, method.teacher.lr, method.student.weight_decay)
        drops = (recipe.dropout, recipe.dropout if recipe.teacher_dropout is None else recipe.teacher_dropout)
        uda = (method.uda_weight, method.uda_temperature, method.uda_threshold, method.uda_ramp)
        smoothing = (method.label_smoothing, method.feedback.pseudo_label_smoothing)
        return (recipe.steps, recipe.warmup, method.wait, *rates, *drops, *uda, *smoothing)

    root = "somewhere"
    code, smooth = (5_000, 3_000, 0.05 * 128 / 256, 0.05 * 128 / 256, 5e-4), (0.1, 0.1)
    assert told(Cifar10(data_root=root)) == (300_000, *code, 0.2, 0.2, 8.0, 0.7, 0.6, 5_000, 0.15, 0.15)
    table = (1_000_000, 2_000, 0, 0.3, 0.125, 5e-4, 0.35, 0.5, 1.0, 0.8, 0.0, 0, *smooth)
    assert told(Cifar10Paper(data_root=root)) == table
    table = (1_000_000, 2_000, 0, 0.15, 0.05, 5e-4, 0.45, 0.65, 2.5, 1.25, 0.0, 0, *smooth)
    assert told(Svhn(data_root=root)) == table
    code = (5_000, 20_000, 0.4 * 1024 / 256, 0.6 * 1024 / 256, 1e-4)
    assert told(Imagenet10(data_root=root)) == (700_000, *code, 0.1, 0.1, 20.0, 0.5, 0.6, 50_000, *smooth)
    table = (500_000, 1_000, 0, 0.8, 0.5, 2e-4, 0.1, 0.1, 16.0, 0.75, 0.0, 0, *smooth)
    assert told(Imagenet10Paper(data_root=root)) == table


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"labels_per_class": 0}, "labels_per_class=0.*1 or more"),
        ({"validation": 0}, "validation=0.*1 or more"),
        ({"resized_crop": True}, "resized_crop=True.*in memory"),
        ({"grey": True}, "grey=True.*in memory"),
        ({"image_size": 64}, "image_size=64.*32"),
        ({"wait": 300_000}, "wait"),
        ({"teacher_dropout": 1.5}, "dropout=1.5"),
        ({"network_name": "resnet5"}, "no network 'resnet5'"),
    ],
)
def test_wrong_fields_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        made(Cifar10, data_root="somewhere", **fields)


def test_missing_data_ends_with_the_command_that_gets_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "cifar10-4k", "--data-root", str(tmp_path), "--out", str(tmp_path / "run")]) == 2
    assert "download=True" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_split_of_other_data_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cifar10(tmp_path, monkeypatch)
    recipe = Cifar10(data_root=str(tmp_path), labels_per_class=3, validation=10)
    split = recipe.task().split
    assert isinstance(split, Split)
    dataclasses.replace(split, labels_hash="0" * 64).save(tmp_path / "split.json")
    with pytest.raises(MetaplError, match="of other data"):
        dataclasses.replace(recipe, split=str(tmp_path / "split.json")).task()
