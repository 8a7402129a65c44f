"""``metapl train noisy``: pictures some of which are in the folder of a wrong class."""

from __future__ import annotations

import csv
import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from command import metapl, result, rows, said
from phases import Phase, phases_of
from shapes import FLAGS, given, write
from tiny_runs import built_once, trained

from metapl.apps.methods import Data
from metapl.apps.noisy_labels import METHODS, RATES, Noisy
from metapl.apps.settings import replaced
from metapl.problems import ExampleWeights, LabelCorrection, MetaWeightNet, NoiseTransition


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """noisy, clean and test; wrong.json says which of noisy are in the wrong folder."""

    def build(folder: Path) -> None:
        wrong = write(folder / "noisy", 20, 0, wrong=3)
        write(folder / "clean", 4, 1000)
        write(folder / "test", 10, 2000)
        (folder / "wrong.json").write_text(json.dumps(sorted(wrong)))

    return built_once(tmp_path_factory, "shapes", build)


@pytest.fixture(scope="module")
def noisy_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of the default method, long enough to tell a bar from a beam."""
    flags = FLAGS.replace("--steps 24", "--steps 60").split()
    command = ("train", "noisy", *given(root), "--test", str(root / "test"), *flags)
    return built_once(tmp_path_factory, "shapes-run", lambda out: trained(*command, "--out", str(out)))


def suspects(out: Path) -> list[dict[str, str]]:
    with (out / "suspects.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def mean(rows: list[dict[str, str]]) -> float:
    return sum(float(row["weight"]) for row in rows) / len(rows)


# ------------------------------------------------------------------------------------------------------------- the run


def test_the_misplaced_pictures_are_listed_first_and_weigh_less(noisy_run: Path, root: Path) -> None:
    wrong, listed = {*json.loads((root / "wrong.json").read_text())}, suspects(noisy_run)
    assert len(listed) == len({row["file"] for row in listed}) == 40
    assert all(Path(row["file"]).parent.name == row["given"] for row in listed)
    of_given = [float(row["p_given"]) for row in listed]
    assert of_given == sorted(of_given)
    first = [row for row in listed[: len(wrong)] if row["file"] in wrong]
    assert len(first) >= 5
    assert all(row["probably"] != row["given"] for row in first)
    assert all(0 < float(row["weight"]) < 1 for row in listed)
    of_wrong, of_right = ([row for row in listed if (row["file"] in wrong) == one] for one in (True, False))
    assert mean(of_wrong) < mean(of_right)
    page = (noisy_run / "report.html").read_text()
    assert page[page.index("Labels that may be wrong") :].count("<figure>") >= 40


def test_what_is_learned_about_labels_is_no_network_and_the_finetuned_student_is_delivered(
    noisy_run: Path, root: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    told = result(noisy_run)
    assert (told["recipe"], told["method"], told["delivered_by"]) == ("noisy", "example_weights", "rule")
    assert told["delivered"] == "finetuned"
    assert told["test_accuracy"] == told["finetuned_test_accuracy"] >= 0.9
    assert sorted(told["networks"]) == ["finetuned", "student"]
    predicted = rows(said(capsys, "predict", noisy_run, root / "test"))
    right = sum(Path(row["file"]).name.startswith(f"{row['class']}-") for row in predicted)
    assert right / len(predicted) == told["test_accuracy"]


# -------------------------------------------------------------------------------------------- what each method trains


def settings(root: Path, **fields: Any) -> Noisy:
    whole: dict[str, Any] = {"classes": ("bar", "beam"), "network": "small_cnn", "image_size": 8, "grey": True}
    whole |= {"mean": (0.3,), "std": (0.3,), "recolor": False, "steps": 10, "warmup": 3, "labeled_batch": 12}
    whole |= {"clean_batch": 6, "device": "cpu", **fields}
    noisy, clean = given(root)[1::2]
    found: Noisy = replaced(Noisy(labeled=noisy, clean=clean), **whole)
    return found


def phases(method: Any, root: Path) -> tuple[Data, list[Phase]]:
    """The data, and what was fitted."""
    config = settings(root)
    data = config.data(lambda text: None, False, None)
    return data, phases_of(config, method, data)


@pytest.mark.parametrize(
    ("kind", "problem", "learned"),
    [
        ("example_weights", ExampleWeights, 40),  # a number for each picture
        ("meta_weight_net", MetaWeightNet, None),
        ("label_correction", LabelCorrection, None),
        ("noise_transition", NoiseTransition, 4),  # of classes by classes
    ],
)
def test_something_about_labels_is_learned_from_clean_ones(
    kind: Any, problem: type, learned: int | None, root: Path
) -> None:
    data, (warm, main) = phases(METHODS[kind], root)
    assert warm.labeled is data.everything, "noisy and clean pictures together"
    assert warm.trainer.student is main.trainer.student
    how = warm.options
    assert (how["phase"], how["steps"], how["warmup"], how["select"]) == ("warm", 2, 2, False)
    trainer, labeled, unlabeled, options = main.trainer, main.labeled, main.unlabeled, main.options
    assert labeled is data.labeled
    assert (len(labeled.images), len(unlabeled.images), len(data.everything.images)) == (8, 40, 48)
    assert options == {"steps": 8, "warmup": 0}
    assert isinstance(trainer.problem, problem)
    assert learned in (None, sum(p.numel() for p in trainer.teacher.parameters()))
    rates = [group["lr"] for group in trainer.outer_optimizer.param_groups]
    assert {*rates} == {RATES[kind]}
    assert len(unlabeled[0]) == (3 if kind == "example_weights" else 2)


def test_a_control_alters_the_feedback_and_its_mode_is_the_one_asked_for(root: Path) -> None:
    method = dataclasses.replace(METHODS["example_weights_permuted"], warm_steps=0, mode="difference")
    _, (phase,) = phases(method, root)
    trainer, options = phase.trainer, phase.options
    assert "permuted" in repr(trainer.mode)
    assert "Difference" in repr(trainer.mode)
    assert options["warmup"] == 3


@pytest.mark.parametrize(("name", "count"), [("plain", 48), ("clean", 8)])
def test_plain_methods_train_on_all_labels_or_on_the_clean_ones(name: str, count: int, root: Path) -> None:
    _, (phase,) = phases(METHODS[name], root)
    assert (len(phase.labeled.images), phase.unlabeled, len(phase.trainer.losses)) == (count, None, 1)


# ------------------------------------------------------------------------------------------------------------- refused


def nested(root: Path) -> None:
    shutil.move(root / "clean", root / "noisy" / "clean")
    (root / "clean").symlink_to(root / "noisy" / "clean")


def shared(root: Path) -> None:
    shutil.copy(root / "clean" / "bar" / "bar-00.png", root / "noisy" / "beam" / "x.png")


def other_classes(root: Path) -> None:
    (root / "clean" / "beam").rename(root / "clean" / "Beam")


def without_pictures(root: Path) -> None:
    shutil.rmtree(root / "clean" / "beam")
    (root / "clean" / "beam").mkdir()


def without_given_ones(root: Path) -> None:
    shutil.rmtree(root / "noisy" / "bar")
    (root / "noisy" / "bar").mkdir()


@pytest.mark.parametrize(
    ("spoil", "word"),
    [
        *((nested, "inside"), (shared, "x.png"), (other_classes, "classes differ")),
        *((without_pictures, "beam"), (without_given_ones, "bar")),
    ],
)
def test_folders_that_would_spoil_it_are_refused_before_anything_is_written(
    spoil: Callable[[Path], None], word: str, root: Path, tmp_path: Path
) -> None:
    shutil.copytree(root, tmp_path / "copy")
    spoil(tmp_path / "copy")
    told = metapl("train", "noisy", *given(tmp_path / "copy"), *FLAGS.split(), "--out", tmp_path / "out", code=2)
    assert word in " ".join(told.stderr.split())
    assert not (tmp_path / "out").exists()
