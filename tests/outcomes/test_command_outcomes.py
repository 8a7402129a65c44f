"""Trainings of the command come out, at the defaults.

``train digits``, ``train images``, and ``noisy-student images``.
"""

from __future__ import annotations

import io
import statistics
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import metapl, result
from PIL import Image
from sklearn.datasets import load_digits
from trainings import SEEDS, Comparison, above_chance, check_all, near

from metapl.apps import report

NETWORKS = ("student_test_accuracy", "teacher_test_accuracy", "test_accuracy")
"""What a run's result says: the accuracies of both networks, and of the one that it delivers."""

CHANCE = float(np.bincount(load_digits().target).max()) / len(load_digits().target)
"""The share of the most frequent digit."""

Train = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def no_figures() -> Iterator[None]:
    """Draw no ``report.png``, which takes longer than some of the trainings."""
    Image.new("RGB", (8, 8), "white").save(file := io.BytesIO(), format="png")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report, "draw", lambda **figures: file.getvalue())
        yield


@pytest.fixture(scope="module")
def train(no_figures: None, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """Return a function from the words of a command to its result; the same words are run once."""

    @cache
    def trained(*words: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("run") / "out"
        metapl(*words, "--out", str(out))
        return result(out)

    return trained


def means(train: Train, words: tuple[str, ...], seeds: tuple[int, ...]) -> dict[str, float]:
    """Return the accuracies that the result of a command names, each the mean of the seeds."""
    results = [train(*words, "--seed", str(seed)) for seed in seeds]
    return {
        name: statistics.fmean(found[name] for found in results)
        for name in NETWORKS
        if name in results[0]
    }


def digits_comparisons(
    train: Train, mode: str, steps: int, seeds: tuple[int, ...]
) -> list[Comparison]:
    """Compare MPL in a mode with the same loop without feedback, network by network."""
    length = ("--mode", mode, "--steps", str(steps))
    words = ("train", "digits", "--method", "mpl", *length)
    accuracies = means(train, words, seeds)
    control = means(train, ("train", "digits", "--method", "none", *length), seeds)
    compared: list[Comparison] = []
    for name, accuracy in accuracies.items():
        compared.append(above_chance(name, accuracy, CHANCE))
        compared.append(near(name, accuracy, control[name]))
    return compared


@pytest.mark.long
def test_a_short_training_on_the_digits_comes_out(train: Train) -> None:
    check_all(digits_comparisons(train, "reinforce", steps=300, seeds=(0,)))


@pytest.mark.long
@pytest.mark.parametrize("mode", ["reinforce", "loss_difference", "forward"])
def test_a_training_on_the_digits_comes_out(train: Train, mode: str) -> None:
    check_all(digits_comparisons(train, mode, steps=1500, seeds=SEEDS))


# ----------------------------------------------------------------------------------------- pictures


def write_digits(folder: Path, rows: np.ndarray, labels: np.ndarray | None) -> None:
    """Write digits as pictures, in the folder of their label where there are labels."""
    images = load_digits().images
    for index, row in enumerate(rows):
        path = folder / f"{row:04}.png"
        if labels is not None:
            path = folder / str(labels[index]) / f"{row:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((images[row] * 255 / 16).round().astype("uint8")).save(path)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return digits in folders.

    100 are ``labeled``, 800 ``unlabeled``, and 400 to ``test`` on.
    """
    root = tmp_path_factory.mktemp("digits")
    truth = load_digits().target
    draw = np.random.default_rng(0)
    order = draw.permutation(len(truth))
    labeled = np.concatenate([order[truth[order] == label][:10] for label in range(10)])
    others = order[~np.isin(order, labeled)]
    many = others[:800]
    test = others[800:1200]
    write_digits(root / "labeled", labeled, truth[labeled])
    write_digits(root / "unlabeled", many, None)
    write_digits(root / "test", test, truth[test])
    return root


SMALL = ("--image-size", "8", "--network", "small_cnn", "--device", "cpu")


def images_words(pictures: Path, method: tuple[str, ...]) -> tuple[str, ...]:
    folders = [f"--{part}={pictures / part}" for part in ("labeled", "unlabeled", "test")]
    return ("train", "images", *folders, *SMALL, "--steps", "200", "--method", *method)


@pytest.mark.long
@pytest.mark.parametrize(
    "method", [("uda",), ("mpl",), ("mpl", "--mode", "reinforce")], ids=" ".join
)
def test_a_training_on_pictures_comes_out(
    train: Train, pictures: Path, method: tuple[str, ...]
) -> None:
    words = images_words(pictures, method)
    accuracies = means(train, words, SEEDS)
    supervised = means(train, images_words(pictures, ("supervised",)), SEEDS)["test_accuracy"]
    compared = [
        near("what is delivered and supervised training", accuracies["test_accuracy"], supervised)
    ]
    compared += [above_chance(name, accuracy, CHANCE) for name, accuracy in accuracies.items()]
    if method[0] == "mpl":
        control = means(train, images_words(pictures, ("none", *method[1:])), SEEDS)
        compared += [near(name, accuracy, control[name]) for name, accuracy in accuracies.items()]
    check_all(compared)


@pytest.mark.long
def test_noisy_student_on_pictures_comes_out_with_its_noise(train: Train, pictures: Path) -> None:
    """Student and teacher, at the default dropout of 0.5, are near supervised training."""
    folders = [f"--{part}={pictures / part}" for part in ("labeled", "unlabeled", "test")]
    words = ("noisy-student", "images", *folders, *SMALL, "--steps", "400", "--rounds", "1")
    accuracies = means(train, words, SEEDS)
    supervised = means(train, images_words(pictures, ("supervised",)), SEEDS)["test_accuracy"]
    compared = [
        near("what is delivered and supervised training", accuracies["test_accuracy"], supervised)
    ]
    compared += [above_chance(name, accuracy, CHANCE) for name, accuracy in accuracies.items()]
    check_all(compared)
