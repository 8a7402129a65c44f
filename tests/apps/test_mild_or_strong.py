"""How ``metapl train noisy`` augments pictures: what was asked for, or what a trial finds."""

from __future__ import annotations

import json
import shutil
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import metapl
from PIL import Image
from sklearn.datasets import load_digits
from tiny_runs import built_once

from metapl.apps import look, mild_or_strong
from metapl.apps.look import choose_settings
from metapl.apps.noisy_labels import METHODS, Noisy
from metapl.apps.settings import with_flags
from metapl.errors import MetaplError


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return handwritten digits as pictures: 200 clean ones, and 500 of which 100 are misplaced."""

    def build(folder: Path) -> None:
        data = load_digits()
        for number in range(700):
            label = int(data.target[number])
            part = "clean" if number < 200 else "labeled"
            if part == "labeled" and number % 5 == 0:
                label = (label + 1) % 10
            file = folder / part / str(label) / f"{number:03}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            levels = (data.images[number] * 15.9).astype(np.uint8)
            Image.fromarray(levels).resize((16, 16)).save(file)

    return built_once(tmp_path_factory, "digits-as-pictures", build)


def settings(root: Path, said: list[str], **flags: Any) -> Noisy:
    """Return the settings of a training with these flags; ``said`` gets what is told."""
    folders = Noisy(labeled=str(root / "labeled"), clean=str(root / "clean"))
    config = with_flags(folders, device="cpu", **flags)
    chosen: Noisy = choose_settings(config, METHODS["plain"], said.append)[0]
    return chosen


def test_digits_which_strong_changes_hide_are_augmented_mildly(digits: Path) -> None:
    said: list[str] = []
    chosen = settings(digits, said, steps=640)
    assert chosen.pictures.augment == "mild"
    assert chosen.pictures.network == "strided_cnn"
    assert chosen.fitting.steps == 640
    # A sixteenth of the steps for each of the two.
    assert said[0].startswith(
        "augmentation: mild; of the 200 clean pictures, which a trial does not learn, mild is right"
    )
    assert said[0].count("after 40 steps") == 2


def test_no_trial_is_held_where_an_augmentation_was_asked_for(digits: Path) -> None:
    said: list[str] = []
    chosen = settings(digits, said, steps=640, augment="strong")
    assert (chosen.pictures.augment, chosen.pictures.network) == ("strong", "pooled_cnn")
    assert not [line for line in said if line.startswith("augmentation")]


def test_a_network_that_was_asked_for_stays(digits: Path) -> None:
    assert settings(digits, [], steps=160, network="small_cnn").pictures.network == "small_cnn"


def test_other_phases_and_patience_are_no_matter_of_the_trial(digits: Path, tmp_path: Path) -> None:
    """A warmup longer than the trial, and patience, which needs validation pictures."""
    validation = shutil.copytree(digits / "clean", tmp_path / "val")
    for file in validation.rglob("*.png"):
        # Other pictures than the clean ones, which would be refused.
        Image.open(file).transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(file)
    chosen = settings(digits, [], steps=160, warmup=100, patience=2, val=str(validation))
    assert (chosen.fitting.warmup, chosen.fitting.patience) == (100, 2)


def test_patience_without_validation_pictures_is_refused_before_the_trial(digits: Path) -> None:
    said: list[str] = []
    with pytest.raises(MetaplError, match="--patience 2 was given, and there are no validation"):
        settings(digits, said, steps=160, patience=2)
    assert not said


def test_where_neither_trial_has_learned_the_pixels_decide(digits: Path) -> None:
    """Two steps each, after which both networks guess. A linear layer tells digits apart."""
    assert settings(digits, [], steps=32).pictures.augment == "mild"


def test_the_trial_takes_an_eighth_of_the_minutes(
    digits: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each look at the clock moves it on by a tenth of a second, which is what a step takes."""
    ticks = count()
    tried: list[int] = []
    trials = mild_or_strong.trials

    def counted(configs: Any) -> Any:
        tried.extend(config.fitting.chosen_steps for config in configs)
        # What they would reach is of no interest here.
        return trials([with_flags(config, steps=2, warmup=0) for config in configs])

    monkeypatch.setattr(mild_or_strong, "trials", counted)
    folders = Noisy(labeled=str(digits / "labeled"), clean=str(digits / "clean"))
    config = with_flags(folders, device="cpu", minutes=4.0)
    chosen, _ = choose_settings(
        config, METHODS["plain"], lambda text: None, clock=lambda: 0.1 * next(ticks)
    )
    minute = look.SHARE * 60 / 0.1
    assert tried == [pytest.approx(minute / 4, rel=0.05)] * 2
    assert chosen.fitting.steps == pytest.approx(3.5 * minute, rel=0.05)
    assert chosen.minutes == 4.0


def test_what_was_found_is_stored_and_repeated(digits: Path, tmp_path: Path) -> None:
    folders = ("--labeled", str(digits / "labeled"), "--clean", str(digits / "clean"))
    lengths = ("--steps", "32", "--finetune-steps", "2", "--warm-steps", "4")
    first = tmp_path / "first"
    said = metapl("train", "noisy", *folders, *lengths, "--out", first)
    assert "augmentation: " in said.stdout + said.stderr
    fields = json.loads((first / "recipe.json").read_text())["recipe"]["fields"]
    again = metapl("train", "--config", first / "recipe.json", "--out", tmp_path / "again")
    assert "augmentation: " not in again.stdout + again.stderr
    repeated = json.loads((tmp_path / "again" / "recipe.json").read_text())["recipe"]["fields"]
    assert repeated["augment"] == fields["augment"] is not None
    weights = "student.safetensors"
    assert (first / weights).read_bytes() == (tmp_path / "again" / weights).read_bytes()
