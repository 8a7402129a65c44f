"""`metapl train images` on folders of real pictures, through the real command."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command import metapl, process
from PIL import Image

from metapl.apps.commands import main

FLAGS = (
    *("--image-size", "16", "--grey", "True", "--network", "small_cnn", "--precision", "float32"),
    *("--labeled-batch", "16", "--unlabeled-batch", "16", "--steps", "8", "--finetune-steps", "4"),
    *("--validate-every", "4", "--log-every", "4", "--save-every", "4"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from sklearn.datasets import load_digits

    root, digits = tmp_path_factory.mktemp("pictures"), load_digits()
    for number in range(160):
        label = digits.target[number]
        picture = Image.fromarray((digits.images[number] * 255 / 16).round().astype(np.uint8)).resize((16, 16))
        for part in (("labeled", "test")[number % 2] if number < 100 else "unlabeled",):
            folder = root / part if part == "unlabeled" else root / part / str(label)
            folder.mkdir(parents=True, exist_ok=True)
            picture.save(folder / f"{number:03}.png")
    (root / "unlabeled" / "broken.png").write_bytes(b"\x89PNG\r\n\x1a\n broken")
    return root


@pytest.fixture(scope="module")
def run(pictures: Path) -> tuple[Path, subprocess.CompletedProcess[str]]:
    out = pictures / "run"
    folders = [part for name in ("labeled", "unlabeled", "test") for part in (f"--{name}", pictures / name)]
    return out, process("train", "images", *folders, "--out", out, *FLAGS)


def test_it_trains_and_says_what_it_found_and_left_out(run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    out, done = run
    assert "unlabeled: 1 of 61 files are left out" in done.stdout
    assert "60 unlabeled" in done.stdout
    result = json.loads((out / "result.json").read_text())
    assert 0 <= result["test_accuracy"] <= 1
    data = json.loads((out / "data.json").read_text())
    assert (len(data["labeled"]), data["validation"]) == (50, [])  # few labels are for training
    assert "none for validation" in done.stdout
    assert (out / "report.png").read_bytes().startswith(b"\x89PNG")


def test_the_run_is_evaluated_and_predicts_by_class_name(
    run: tuple[Path, subprocess.CompletedProcess[str]], pictures: Path
) -> None:
    out, _ = run
    again = metapl("evaluate", out, "--json")
    assert json.loads(again.stdout)["accuracy"] == json.loads((out / "result.json").read_text())["test_accuracy"]
    labelled = metapl("predict", out, pictures / "test" / "3")
    rows = list(csv.DictReader(labelled.stdout.splitlines()))
    assert len(rows) == len(list((pictures / "test" / "3").iterdir()))
    assert {row["class"] for row in rows} <= set("0123456789")


def test_a_test_picture_among_the_training_ones_is_refused(pictures: Path, tmp_path: Path) -> None:
    leak = next((pictures / "test" / "3").iterdir())
    seen = tmp_path / "unlabeled"
    seen.mkdir()
    (seen / "same.png").write_bytes(leak.read_bytes())
    folders = ["--labeled", pictures / "labeled", "--unlabeled", seen, "--test", pictures / "test"]
    done = metapl("train", "images", *folders, "--out", tmp_path / "run", *FLAGS, code=2)
    assert leak.name in done.stderr
    assert not (tmp_path / "run").exists()
    # In this process: in folders that are to be made, in one that is there, and before any job of a comparison starts.
    mine = tmp_path / "mine"
    (mine / "notes").mkdir(parents=True)
    (mine / "data.json").write_text("mine")
    for out, more in ((tmp_path / "a" / "b" / "c", ["--compare"]), (mine, [])):
        assert main(list(map(str, ["train", "images", *folders, "--out", out, *FLAGS, *more]))) == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "unlabeled"]
    assert sorted(path.name for path in mine.iterdir()) == ["data.json", "notes"]
    assert (mine / "data.json").read_text() == "mine"


def test_a_run_that_has_begun_to_train_stays_when_it_fails(pictures: Path, tmp_path: Path) -> None:
    folders = ["--labeled", pictures / "labeled", "--unlabeled", pictures / "unlabeled", "--test", pictures / "test"]
    wild = ["--teacher.lr", "1e30"]
    done = main(list(map(str, ["train", "images", *folders, "--out", tmp_path / "run", *FLAGS, *wild])))
    assert done == 2
    assert {"recipe.json", "data.json", "metrics.jsonl"} <= {path.name for path in (tmp_path / "run").iterdir()}


def test_a_missing_folder_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "many").mkdir()
    folders = ("--labeled", tmp_path / "none", "--unlabeled", tmp_path / "many")
    done = metapl("train", "images", *folders, "--out", tmp_path / "run", code=2)
    assert len(done.stderr.strip().splitlines()) == 1
    assert str(tmp_path / "none") in done.stderr


def test_a_worker_that_dies_is_reported_with_its_file(pictures: Path) -> None:
    """A picture on which decoding kills the process, as a bug in a decoder would."""
    code = f"""
import os, metapl.apps.pictures.store as sets
from metapl.apps.pictures import Identity
from metapl.data import StepSampler
from metapl.data.feed import feed
from metapl.apps.pictures.folders import scan_unlabeled
from metapl.apps.pictures.batches import UnlabeledBatches

files = scan_unlabeled({str(pictures / "test")!r})
images = sets.FileImages(files.paths(), size=(16, 16))
deadly, read = str(images.path(3)), sets.read_image
sets.read_image = lambda path, *a, **k: os._exit(9) if str(path) == deadly else read(path, *a, **k)
batches = UnlabeledBatches(images, StepSampler(len(images), len(images), seed=0), Identity(), None, 0)
try:
    feed(batches, name="unlabeled", stop=2, num_workers=1).next()
except RuntimeError:
    print(batches.explain())
    print(deadly)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    said, deadly = done.stdout.strip().splitlines()
    assert deadly in said, done.stdout + done.stderr


def test_a_comparison_needs_pictures_that_nothing_was_selected_on(pictures: Path, tmp_path: Path) -> None:
    folders = ["--labeled", pictures / "labeled", "--unlabeled", pictures / "unlabeled"]
    done = metapl("train", "images", *folders, "--out", tmp_path / "run", "--compare", *FLAGS, code=2)
    assert "--test" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_weights_that_it_was_started_from_are_not_needed_afterwards(pictures: Path, tmp_path: Path) -> None:
    import torch

    from metapl.apps import networks

    start = tmp_path / "start.pt"
    torch.save(networks.create("small_cnn", 10, in_channels=1).state_dict(), start)
    folders = [part for name in ("labeled", "unlabeled", "test") for part in (f"--{name}", pictures / name)]
    out = tmp_path / "run"
    metapl("train", "images", *folders, "--out", out, *FLAGS, "--weights", start)
    start.unlink()
    again = metapl("evaluate", out, "--json")
    assert json.loads(again.stdout)["accuracy"] == json.loads((out / "result.json").read_text())["test_accuracy"]
