"""What the commands refuse before anything is read, written or measured."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import shlex
import shutil
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from command import edited, refused, said
from flat import known, made
from PIL import Image
from sklearn.datasets import load_digits

from metapl.apps.commands import main
from metapl.apps.experiments import settle
from metapl.apps.experiments.accuracies import parse_seeds
from metapl.apps.export.network import programs
from metapl.apps.recipes import ImageFolders
from metapl.apps.recipes.base import as_dict
from metapl.errors import MetaplError


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a few steps, which tests leave as it is."""
    folder = tmp_path_factory.mktemp("runs") / "one"
    with contextlib.redirect_stdout(io.StringIO()):
        assert main(["train", "digits", "--steps", "2", "--finetune-steps", "1", "--out", str(folder)]) == 0
    return folder


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    for index, image in enumerate(load_digits().images[:2]):
        Image.fromarray((image * 255 / 16).astype(numpy.uint8)).save(folder / f"{index}.png")
    return folder


def content(folder: Path) -> dict[str, str]:
    """Every file of a folder by its hash."""
    files = [file for file in folder.rglob("*") if file.is_file()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def test_predict_replaces_no_file_that_it_reads(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = pictures / "0.png"
    (tmp_path / "link.png").symlink_to(one)
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    os.mkfifo(tmp_path / "pipe.png")
    before = content(tmp_path), content(run)
    for source, file, words in (
        (one, one, "is one of the files to be read"),
        (pictures, one, "is one of the files to be read"),
        (one, run / "student.safetensors", f"lies in the run folder {run}"),
        (one, tmp_path / "link.png", "is one of the files to be read"),
        (one, tmp_path / "pipe.png", "it is a pipe"),
        (one, tmp_path / "loop.png", "Too many levels of symbolic links"),
    ):
        assert words in refused(capsys, "predict", run, source, "--out", file)
    assert (content(tmp_path), content(run)) == before
    assert (tmp_path / "link.png").is_symlink()
    assert (tmp_path / "pipe.png").is_fifo()


def test_predict_replaces_what_it_wrote_before(run: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = pictures / "table.csv"
    first = said(capsys, "predict", run, pictures, "--out", table)
    assert said(capsys, "predict", run, pictures, "--out", table) == first


# ---------------------------------------------------------------------------------------------- runs that are damaged


@pytest.fixture
def damaged(run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(run, tmp_path / "run"))


def test_weights_that_a_finished_run_has_lost(
    damaged: Path, pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (damaged / "finetuned_student.safetensors").unlink()
    words = refused(capsys, "predict", damaged, pictures / "0.png", "--network", "student", "--top", "11")
    assert "--top 11" in words  # the student is there
    edited(damaged / "result.json", delivered="finetuned")
    words = refused(capsys, "predict", damaged, pictures / "0.png")
    assert "finetuned_student.safetensors is missing" in words
    assert "train again with another --out. What is left: --network student or teacher." in words


def test_a_result_of_another_version(damaged: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    edited(damaged / "result.json", "evaluation", colour="blue")
    for command in (
        ("train", "digits", "--steps", "2", "--finetune-steps", "1", "--out", damaged, "--resume"),
        ("evaluate", damaged),
    ):
        words = refused(capsys, *command)
        assert "result.json is damaged or of another version: its evaluation got an unexpected keyword" in words
        assert "'colour'" in words


def test_a_recipe_without_a_network(damaged: Path, pictures: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields = {"labeled": "a", "unlabeled": "b", "network_name": None}
    recipe = ImageFolders(labeled="a", unlabeled="b", method=ImageFolders.by_name("uda"))
    whole = as_dict(recipe) | {"network_name": None}
    for stored, words in (
        (fields, "recipe.json is damaged or of another version: ImageFolders by uda has no value for label_smoo"),
        (whole, "recipe.json is damaged: it has no value for steps, image_size, grey, network_name, "),
    ):
        edited(damaged / "recipe.json", recipe={"name": "images", "method": "uda", "fields": stored})
        again = ("--labeled", pictures, "--unlabeled", pictures, "--out", damaged, "--resume")
        assert words in refused(capsys, "train", "images", *again)


# -------------------------------------------------------------------------------------------------------- wrong values


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, ...]:
    """Grey pictures of two classes; nothing may be measured."""
    monkeypatch.setattr(settle, "seconds_per_step", lambda *given: pytest.fail("measured"))
    digits = load_digits()
    for index, (image, label) in enumerate(zip(digits.images[:40], digits.target[:40], strict=True)):
        if label < 2:
            file = tmp_path / "few" / str(label) / f"{index}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray((image * 255 / 16).astype(numpy.uint8)).save(file)
    few = str(tmp_path / "few")
    return ("train", "images", "--labeled", few, "--unlabeled", few, "--test", few)


DIGITS = "train digits --steps 6 --finetune-steps 4 --out {new}"
REFUSED = {
    "train images": "Missing from metapl train images --method uda: --labeled DIR --unlabeled DIR. See metapl train",
    "predict": "metapl: Missing from metapl predict: RUN. See metapl predict",
    "evaluate": "metapl: Missing from metapl evaluate: RUN. See metapl evaluate",
    "finetune": "metapl: there is no metapl finetune: train again with --finetune-steps.",
    "export": "metapl: Missing from metapl export: RUN --out DIR. See metapl export",
    "export {run} --out ''": "--out: nothing was given",
    "runs {run} '' x ''": "Unrecognized options: '', x, ''. See metapl runs",
    "runs {run} --tyro-write-completion fsh x": "Unrecognized options: --tyro-write-completion",
    "runs {run} ..": "Unrecognized options: ... See metapl runs",
    "runs {run}/recipe.json": "recipe.json is a file; expected one that holds runs: metapl runs FOLDER.",
    "runs {new}": "new is not there; expected one that holds runs",
    "runs {run}/checkpoints": "there is no run in ",
    "report": "metapl: Missing from metapl report: RUN. See metapl report",
    "report {new}": "there is no folder ",
    "report {run}/recipe.json": "recipe.json is a file; expected the folder of a run",
    "report {run}/checkpoints": "checkpoints is not a run folder: there is no recipe.json in it.",
    "report {run} --out {new}/page.html": "cannot be written: there is no folder ",
    "report {run} --out {run}": "is to be a .html file; expected a name that ends with .html",
    "report {run} --out page.png": "--out page.png is to be a .html file",
    "report {run} --out {run}/report.html/page.html": "cannot be written",
    "predict {run} ''": "expected a value",
    "{images} --out {new} --minutes inf": "--minutes inf: expected a finite number",
    "{images} --out {new} --minutes 1e308": "--minutes 1e+308: expected",
    "{images} --out {new} --compare --seeds ²": "seeds='²': expected numbers and ranges",
    "{images} --out {new} --mean .5 .5 .5 --std .2 .2 .2": "expected 1 for grey pictures",
    "{images} --out {new} --grey False --mean .5 --std .2": "expected 3 for color pictures",
    "{images} --out ''": "--out: nothing was given; expected a value",
    "{images} --out=": "--out: nothing was given",
    "{images} --out {run}": "holds a run already",
    f"{DIGITS} --student.nesterov": "momentum",
    f"{DIGITS} --student.algorithm adamw --student.momentum 0.9": "momentum",
    f"{DIGITS} --wait 6": "wait",
    f"{DIGITS} --warmup 7": "warmup",
    f"{DIGITS} --mode none --baseline 0.9": "baseline",
    f"{DIGITS} --mode reinforce --pseudo-labels soft": "labels",
}


@pytest.mark.parametrize("command", REFUSED)
def test_a_command_is_refused_before_anything_is_measured_or_written(
    command: str, run: Path, folders: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = content(tmp_path), content(run)
    words = shlex.split(command.format(run=run, images=shlex.join(folders), new=tmp_path / "new"))
    assert REFUSED[command] in refused(capsys, *words)
    assert (content(tmp_path), content(run)) == before
    assert not (tmp_path / "new").exists()


def test_what_needs_no_measurement_is_checked_before_it(
    folders: tuple[str, ...], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = next((tmp_path / "few" / "0").iterdir())
    shutil.copy(one, tmp_path / "few" / "1" / "copy.png")
    assert one.name in refused(capsys, *folders, "--out", tmp_path / "new")
    inside = refused(capsys, *folders, "--val", tmp_path / "few" / "0", "--out", tmp_path / "new")
    assert "the validation folder" in inside
    assert "every subfolder of which is a class: 0, 1" in inside


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        *((text, "expected numbers and ranges") for text in ("²", "٣", "0-²", "", "-")),
        ("0,4-2", "--seeds='0,4-2': 4-2 ends before it begins; write 2-4."),
        ("3-5,4", "--seeds='3-5,4': .* none twice; 4 is named again."),
    ],
)
def test_seeds_that_are_none_or_reversed_or_named_again(text: str, expected: str) -> None:
    with pytest.raises(MetaplError, match=expected):
        parse_seeds(text)


def test_a_method_without_a_student_may_warm_up_for_longer_than_a_student_would_wait() -> None:
    one = ImageFolders(labeled="few", unlabeled="many", method="uda", warmup=3, steps=8).scheduled(8)
    assert (one.warmup, one.steps) == (3, 8)
    chosen = {"image_size": 8, "grey": True, "network_name": "small_cnn", "val_fraction": 0.0, "precision": "float32"}
    shares = {"mean": (0.5,), "std": (0.2,), "uda_prior": (0.5, 0.5)}
    for method in ("uda", "supervised", "mpl"):  # a student that waits warms up over its share of these steps
        made(ImageFolders, method, **known(ImageFolders, method, one_of(one) | chosen | shares)).scheduled(8)
    with pytest.raises(MetaplError, match="warmup=9"):
        made(ImageFolders, "uda", **one_of(one) | {"warmup": 9}, **chosen, **shares)


def one_of(recipe: ImageFolders) -> dict[str, Any]:
    """What of a recipe goes with its number of steps."""
    names = ("labeled", "unlabeled", "steps", "warmup", "uda_ramp", "uda_start", "validate_every")
    return {name: getattr(recipe, name, getattr(recipe.method, name, None)) for name in names}


# -------------------------------------------------------------------------------------------------------------- export


def test_an_export_runs_nothing_of_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "random.py").write_text("import pathlib\npathlib.Path('ran').touch()\n")
    monkeypatch.chdir(tmp_path)
    network = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, 2))
    assert "model.pt2" in programs(network, (1, 2, 2))
    assert [one.name for one in tmp_path.iterdir()] == ["random.py"]
