"""``metapl train ... --config FILE`` repeats a run from the recipe that it left, bit for bit.

Flags override the file. A file that is no recipe of this version ends in one line.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from command import edited, metapl
from test_bits import one_thread
from tiny_runs import IMAGES, NOISY_STUDENT, TINY, color_folders

from metapl.networks.architectures import create
from metapl.run_folder import WEIGHTS, RunFolder

__all__ = ["one_thread"]
pytestmark = pytest.mark.usefixtures("one_thread")


def fields(run: Path) -> dict[str, Any]:
    """Return the settings that a run notes."""
    settings: dict[str, Any] = RunFolder(run).recipe()["fields"]
    return settings


def assert_same_run(run: Path, other: Path) -> None:
    """Check that two runs have the same recipe, and the same bits in all weights."""
    assert RunFolder(run).recipe() == RunFolder(other).recipe()
    names = [name for name in WEIGHTS.values() if (run / name).exists()]
    assert "student.safetensors" in names
    for name in WEIGHTS.values():
        assert (run / name).exists() == (other / name).exists()
    for name in names:
        assert (run / name).read_bytes() == (other / name).read_bytes(), name


def test_a_run_is_repeated_bit_for_bit(tiny: Path, tmp_path: Path) -> None:
    repeated = tmp_path / "repeated"
    said = metapl("train", "digits", "--config", tiny / "recipe.json", "--out", repeated)
    assert "note:" not in said.stdout
    assert_same_run(tiny, repeated)
    noted = RunFolder(repeated).description()["command"]
    assert f"--config {tiny / 'recipe.json'}" in noted
    # It is resumed as any other, and the folder of the first run is not written to.
    repeat = ("train", "digits", "--config", tiny / "recipe.json")
    said = metapl(*repeat, "--out", repeated, "--resume")
    assert "is finished already" in " ".join(said.stdout.split())
    said = metapl(*repeat, "--out", tiny, code=2)
    assert "holds a run already" in said.stderr


def test_flags_override_the_file(tiny: Path, tmp_path: Path) -> None:
    by_flags = tmp_path / "by flags"
    by_file = tmp_path / "by file"
    more = ("--seed", "1", "--steps", "5", "--mode", "difference")
    metapl(*TINY, *more, "--out", by_flags)
    metapl("train", "digits", f"--config={tiny / 'recipe.json'}", *more, "--out", by_file)
    assert_same_run(by_flags, by_file)
    assert (by_file / "student.safetensors").read_bytes() != (
        tiny / "student.safetensors"
    ).read_bytes()


def test_another_method_has_the_settings_that_it_shares(tiny: Path, tmp_path: Path) -> None:
    run = tmp_path / "supervised"
    of_file = tmp_path / "smoothed.json"
    shutil.copy(tiny / "recipe.json", of_file)
    edited(of_file, "recipe", "fields", label_smoothing=0.25)
    metapl("train", "digits", "--config", of_file, "--method", "supervised", "--out", run)
    assert RunFolder(run).recipe()["method"] == "supervised"
    assert fields(run)["label_smoothing"] == 0.25
    assert fields(run)["hidden"] == [4]


def test_an_edited_copy_is_a_recipe_too(tiny: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.json"
    shutil.copy(tiny / "recipe.json", copy)
    content = json.loads(copy.read_text())
    content["recipe"]["fields"]["steps"] = 4
    content["made_with"]["torch"] = "1.0"
    copy.write_text(json.dumps(content))
    said = metapl("train", "digits", "--config", copy, "--out", tmp_path / "run")
    text = " ".join(said.stdout.split())
    assert "torch 1.0, here" in text
    assert fields(tmp_path / "run")["steps"] == 4


def test_it_takes_the_threads_of_the_run(colors: Path, tmp_path: Path) -> None:
    copy = tmp_path / "recipe.json"
    shutil.copy(colors / "run" / "recipe.json", copy)
    edited(copy, "made_with", threads=2)
    assert torch.get_num_threads() == 1
    metapl("train", "images", "--config", copy, "--out", tmp_path / "run")
    assert RunFolder(tmp_path / "run").description()["made_with"]["threads"] == 2


def test_a_run_on_pictures_is_repeated_without_their_folders_being_named(
    colors: Path, tmp_path: Path
) -> None:
    """Its normalization and the prior of its classes are not measured again, but of other ones."""
    metapl("train", "images", "--config", colors / "run" / "recipe.json", "--out", tmp_path / "run")
    assert_same_run(colors / "run", tmp_path / "run")
    # Fewer pictures of one class have another prior and another mean.
    shutil.copytree(colors / "labeled", tmp_path / "labeled")
    for path in sorted((tmp_path / "labeled" / "red").iterdir())[:2]:
        path.unlink()
    other = ("--labeled", tmp_path / "labeled", "--out", tmp_path / "other")
    metapl("train", "images", "--config", colors / "run" / "recipe.json", *other)
    for name in ("uda_prior", "mean"):
        assert fields(tmp_path / "other")[name] != fields(tmp_path / "run")[name]


def test_pretrained_weights_have_to_be_the_ones_of_the_run(colors: Path, tmp_path: Path) -> None:
    begun = tmp_path / "begun.safetensors"
    folders = [f"--{part}={colors / part}" for part in ("labeled", "unlabeled", "test")]
    shutil.copy(colors / "run" / "student.safetensors", begun)
    metapl(
        *("train", "images", *folders, *IMAGES, "--method", "uda"),
        *("--weights", begun, "--out", tmp_path / "second"),
    )
    repeat = ("train", "images", "--config", tmp_path / "second" / "recipe.json")
    metapl(*repeat, "--out", tmp_path / "third")
    assert_same_run(tmp_path / "second", tmp_path / "third")
    shutil.copy(tmp_path / "third" / "student.safetensors", begun)
    said = metapl(*repeat, "--out", tmp_path / "fourth", code=2)
    assert "are another file now" in " ".join(said.stderr.split())
    assert not (tmp_path / "fourth").exists()


def test_a_backbone_is_looked_for_again_and_has_to_be_the_same(
    tmp_path: Path,
) -> None:
    root = color_folders(tmp_path / "pictures", few=4, many=4, side=32)
    file = tmp_path / "weights.pt"
    torch.manual_seed(3)
    torch.save(create("pooled_cnn", 10, image_size=32).state_dict(), file)
    folders = [f"--{part}={root / part}" for part in ("labeled", "unlabeled", "test")]
    flags = (*folders, *IMAGES, "--image-size", "32", "--network", "pooled_cnn")
    named = ("--method", "uda", "--backbone", file)
    metapl("train", "images", *flags, *named, "--out", tmp_path / "run")
    repeat = ("train", "images", "--config", tmp_path / "run" / "recipe.json")
    metapl(*repeat, "--out", tmp_path / "again")
    assert_same_run(tmp_path / "run", tmp_path / "again")
    torch.save(create("pooled_cnn", 10, image_size=32).state_dict(), file)
    said = metapl(*repeat, "--out", tmp_path / "other", code=2)
    assert "are another file now" in " ".join(said.stderr.split())


def test_noisy_student_is_repeated_by_its_own_command(tmp_path: Path) -> None:
    metapl(*NOISY_STUDENT, "--out", tmp_path / "run")
    recipe = tmp_path / "run" / "recipe.json"
    said = metapl("train", "digits", "--config", recipe, code=2)
    assert f"repeat it by metapl noisy-student digits --config {recipe}" in said.stderr
    metapl("noisy-student", "digits", "--config", recipe, "--out", tmp_path / "repeated")
    assert_same_run(tmp_path / "run", tmp_path / "repeated")


def with_key(content: dict[str, Any], old: str, new: str) -> None:
    settings = content["recipe"]["fields"]
    settings[new] = settings.pop(old)


REFUSED: dict[str, tuple[Any, str]] = {
    "a wrong key": (
        lambda content: with_key(content, "labeled_batch", "label_batch"),
        "there is no setting 'label_batch'; did you mean labeled_batch?",
    ),
    "a key too many": (
        lambda content: content["recipe"]["fields"].update(color="red"),
        "there is no setting 'color'; expected labels_per_class, unlabeled_batch",
    ),
    "a key too few": (
        lambda content: content["recipe"]["fields"].pop("lr"),
        "has no setting lr; expected all of them",
    ),
    "a wrong value": (
        lambda content: content["recipe"]["fields"].update(steps="many"),
        "steps 'many': expected a whole number",
    ),
    "a value out of its range": (
        lambda content: content["recipe"]["fields"].update(dropout=2.0),
        "dropout 2.0: expected a number >= 0 and < 1",
    ),
    "values that do not go together": (
        lambda content: content["recipe"]["fields"].update(feedback_ratio=0.1, feedback_bound=0.1),
        "expected one of them",
    ),
    "another version": (
        lambda content: content.update(format=3),
        "was written in run format 3; this metapl",
    ),
    "another version, of other keys": (
        lambda content: content.update(format=5, settings=content.pop("recipe")),
        "was written in run format 5; this metapl",
    ),
    "another recipe": (
        lambda content: content["recipe"].update(name="digit"),
        "is the recipe of a training on digit; expected one on digits.",
    ),
    "another method": (
        lambda content: content["recipe"].update(method="supervise"),
        "there is no method 'supervise' of digits; did you mean supervised?",
    ),
    "settings of another method": (
        lambda content: content["recipe"]["fields"].update(learns_from_student=False),
        "its method is 'mpl', and its settings are those of 'none'",
    ),
    "another file": (
        lambda content: content.clear(),
        "is not as a run writes it; expected the recipe.json",
    ),
    "settings that are none": (
        lambda content: content["recipe"].update(fields=[1]),
        "is not as a run writes it; expected the recipe.json",
    ),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_a_file_that_is_no_recipe_ends_in_one_line(fault: str, tiny: Path, tmp_path: Path) -> None:
    change, expected = REFUSED[fault]
    content = json.loads((tiny / "recipe.json").read_text())
    change(content)
    file = tmp_path / "changed.json"
    file.write_text(json.dumps(content))
    said = metapl("train", "digits", "--config", file, "--out", tmp_path / "run", code=2)
    assert expected in said.stderr
    assert str(file) in said.stderr
    assert said.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("digits", "--config", "{tmp}/none.json"), "cannot be read: No such file"),
        (("digits", "--config", "{tmp}"), "is a folder; expected the recipe.json of a run"),
        (
            ("images", "--config", "{run}/recipe.json"),
            "is of metapl train digits; repeat it by metapl train digits --config",
        ),
    ],
)
def test_a_wrong_call_ends_in_one_line(
    words: tuple[str, ...], expected: str, tiny: Path, tmp_path: Path
) -> None:
    said = metapl("train", *(word.format(tmp=tmp_path, run=tiny) for word in words), code=2)
    assert expected in said.stderr
    assert said.stderr.count("\n") == 1
