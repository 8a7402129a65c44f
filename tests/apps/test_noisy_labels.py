"""``metapl train noisy``: pictures some of which are in the folder of a wrong class."""

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import metapl, result, rows
from PIL import Image
from test_methods import Phase, phases_of
from tiny_runs import built_once

from metapl.apps.methods import Data
from metapl.apps.noisy_labels import METHODS, RATES, Noisy
from metapl.apps.settings import with_flags
from metapl.problems import ExampleWeights, LabelCorrection, MetaWeightNet, NoiseTransition

SIZES = (
    "--image-size 8 --network small_cnn --precision float32 --labeled-batch 12 --clean-batch 6 "
    "--finetune-steps 4"
)
FLAGS = f"{SIZES} --steps 24 --warm-steps 6 --log-every 2 --validate-every 6 --save-every 4"
SHAPES = ("bar", "beam")


def picture(shape: str, seed: int) -> Image.Image:
    """Return a picture of a bar, which stands, or of a beam, which lies."""
    draw = np.random.default_rng(seed)
    levels = draw.integers(0, 60, (8, 8)).astype(np.uint8)
    place = int(draw.integers(1, 6))
    levels[:, place : place + 2] = 255
    return Image.fromarray(levels if shape == "bar" else np.ascontiguousarray(levels.T))


def write(root: Path, each: int, seed: int, wrong: int = 0) -> set[str]:
    """Write ``each`` pictures a class, the first ``wrong`` of them in the other folder.

    Return the paths of these.
    """
    misplaced = set()
    for number, shape in enumerate(SHAPES):
        for index in range(each):
            folder = SHAPES[1 - number] if index < wrong else shape
            path = root / folder / f"{shape}-{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            picture(shape, seed + 100 * number + index).save(path)
            misplaced |= {str(path)} if index < wrong else set()
    return misplaced


def given(root: Path) -> list[str]:
    return ["--labeled", str(root / "noisy"), "--clean", str(root / "clean")]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return noisy, clean and test; wrong.json says which of noisy are in the wrong folder."""

    def build(folder: Path) -> None:
        wrong = write(folder / "noisy", 20, 0, wrong=3)
        write(folder / "clean", 4, 1000)
        write(folder / "test", 10, 2000)
        (folder / "wrong.json").write_text(json.dumps(sorted(wrong)))

    return built_once(tmp_path_factory, "shapes", build)


@pytest.fixture(scope="module")
def noisy_run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a run of the default method, long enough to tell a bar from a beam."""
    flags = (
        f"{SIZES} --steps 60 --warm-steps 6 --log-every 30 --validate-every 30 --save-every 60"
    ).split()
    command = ("train", "noisy", *given(root), "--test", str(root / "test"), *flags)
    return built_once(
        tmp_path_factory, "shapes-run", lambda out: metapl(*command, "--out", str(out))
    )


def test_the_misplaced_pictures_are_listed_first_and_weigh_less(
    noisy_run: Path, root: Path
) -> None:
    wrong = {*json.loads((root / "wrong.json").read_text())}
    listed = rows((noisy_run / "suspects.csv").read_text())
    assert len(listed) == len({row["file"] for row in listed}) == 40
    assert all(Path(row["file"]).parent.name == row["given"] for row in listed)
    of_given = [float(row["p_given"]) for row in listed]
    assert of_given == sorted(of_given)
    first = [row for row in listed[: len(wrong)] if row["file"] in wrong]
    assert len(first) >= 5
    assert all(row["probably"] != row["given"] for row in first)
    assert all(0 < float(row["weight"]) < 1 for row in listed)
    of = [
        [float(row["weight"]) for row in listed if (row["file"] in wrong) == one]
        for one in (True, False)
    ]
    assert np.mean(of[0]) < np.mean(of[1])
    page = (noisy_run / "report.html").read_text()
    assert page[page.index("Labels that may be wrong") :].count("<figure>") >= 40


def test_what_is_learned_about_labels_is_no_network_and_the_finetuned_student_is_delivered(
    noisy_run: Path, root: Path
) -> None:
    told = result(noisy_run)
    assert (told["recipe"], told["method"], told["delivered_by"]) == (
        "noisy",
        "example_weights",
        "rule",
    )
    assert told["delivered"] == "finetuned"
    assert told["test_accuracy"] == told["finetuned_test_accuracy"] >= 0.9
    assert sorted(told["networks"]) == ["finetuned", "student"]
    predicted = rows(metapl("predict", noisy_run, root / "test").stdout)
    right = sum(Path(row["file"]).name.startswith(f"{row['class']}-") for row in predicted)
    assert right / len(predicted) == told["test_accuracy"]


@pytest.mark.parametrize(
    ("flags", "method", "line"),
    [
        ("--steps 20", "plain", "method: plain; 20 steps of example_weights would pass 6 times"),
        ("--steps 80", "example_weights", "method: example_weights, whose 80 steps pass 24 times"),
        # Who asks for a setting of the weights gets weights.
        ("--steps 20 --warm-steps 6", "example_weights", "note: 20 steps pass 6 times over"),
    ],
)
def test_weights_are_learned_by_default_where_the_steps_pass_often_enough_over_the_pictures(
    root: Path, tmp_path: Path, flags: str, method: str, line: str
) -> None:
    """Steps of 12 of 40 pictures."""
    run = tmp_path / "run"
    command = ("train", "noisy", *given(root), *f"{flags} --augment mild {SIZES}".split())
    assert line in metapl(*command, "--out", run).stdout
    assert result(run)["method"] == method
    weighs = "weight" in rows((run / "suspects.csv").read_text())[0]
    assert weighs is (method == "example_weights")


def test_a_run_that_has_chosen_plain_training_is_resumed_and_repeated_so(
    root: Path, tmp_path: Path
) -> None:
    flags = f"--steps 20 --augment mild {SIZES}".split()
    run = tmp_path / "run"
    command = ("train", "noisy", *given(root), *flags)
    metapl(*command, "--out", run)
    weights = (run / "student.safetensors").read_bytes()
    # As a run that was stopped after its training.
    (run / "result.json").unlink()
    metapl(*command, "--out", run, "--resume")
    assert (run / "student.safetensors").read_bytes() == weights
    repeated = tmp_path / "repeated"
    metapl("train", "noisy", "--config", run / "recipe.json", "--out", repeated)
    assert result(repeated)["method"] == "plain"
    assert (repeated / "student.safetensors").read_bytes() == weights


def test_a_run_with_a_setting_of_the_weights_is_resumed_with_it(root: Path, tmp_path: Path) -> None:
    flags = f"--steps 20 --mode difference --augment mild {SIZES}".split()
    run = tmp_path / "run"
    command = ("train", "noisy", *given(root), *flags)
    metapl(*command, "--out", run)
    (run / "result.json").unlink()
    metapl(*command, "--out", run, "--resume")
    assert result(run)["method"] == "example_weights"
    # A run of its settings chooses anew, where the default is named.
    recipe = ("--config", run / "recipe.json", "--mode", "forward", "--method", "auto")
    printed = metapl("train", "noisy", *recipe, "--out", tmp_path / "chosen-anew").stdout
    assert "method: plain; 20 steps of example_weights would pass 6 times" in printed


def test_a_run_of_another_method_is_not_resumed_by_the_default(root: Path, tmp_path: Path) -> None:
    flags = f"--steps 20 --augment mild {SIZES}".split()
    run = tmp_path / "run"
    command = ("train", "noisy", *given(root), *flags, "--out", run)
    metapl(*command, "--method", "clean")
    (run / "result.json").unlink()
    assert "clean" in metapl(*command, "--resume", code=2).stderr


def test_a_comparison_has_the_methods_that_are_chosen_from(root: Path, tmp_path: Path) -> None:
    flags = f"--steps 4 --augment mild {SIZES} --compare".split()
    command = ("train", "noisy", *given(root), "--test", root / "test", *flags)
    refused = tmp_path / "refused"
    error = metapl(*command, "--methods", "auto,plain", "--out", refused, code=2).stderr
    assert error == (
        "metapl: --methods auto: it takes example_weights or plain; expected those themselves.\n"
    )
    # What an error proposes is what can be compared.
    error = metapl(*command, "--methods", "plane", "--out", refused, code=2).stderr
    assert "Expected some of example_weights, meta_weight_net" in error
    assert not refused.exists()
    metapl(*command, "--out", tmp_path / "run")
    runs = [path.parent for path in (tmp_path / "run").rglob("suspects.csv")]
    assert {result(run)["method"] for run in runs} == {"example_weights", "plain", "clean"}


@pytest.mark.parametrize(
    ("method", "steps", "is_said"),
    [("example_weights", 20, True), ("example_weights", 80, False), ("plain", 20, False)],
)
def test_few_passes_over_the_pictures_are_told_where_something_is_learned_about_labels(
    root: Path, tmp_path: Path, method: str, steps: int, is_said: bool
) -> None:
    """Steps of 12 of 40 pictures: 20 of them pass 6 times over all, and 80 pass 24 times."""
    flags = f"--method {method} --steps {steps} --augment mild {SIZES}".split()
    text = metapl("train", "noisy", *given(root), *flags, "--out", str(tmp_path / "run")).stdout
    note = f"note: {steps} steps pass {12 * steps / 40:.0f} times over the pictures; in so few"
    assert (note in text) is is_said


def phases(method: Any, root: Path) -> tuple[Data, list[Phase]]:
    """Return the data, and what was fitted."""
    whole: dict[str, Any] = {
        "classes": ("bar", "beam"),
        "network": "small_cnn",
        "image_size": 8,
        "grey": True,
    }
    whole |= {
        "mean": (0.3,),
        "std": (0.3,),
        "recolor": False,
        "steps": 10,
        "warmup": 3,
        "labeled_batch": 12,
    }
    noisy, clean = given(root)[1::2]
    config = with_flags(Noisy(labeled=noisy, clean=clean), **whole, clean_batch=6, device="cpu")
    data = config.data(lambda text: None, progress=False, log=None)
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
    assert options == {"steps": 8, "warmup": 0, "first_steps": 0}, (
        "the warm phase stands for first steps"
    )
    assert isinstance(trainer.problem, problem)
    assert learned in (None, sum(p.numel() for p in trainer.teacher.parameters()))
    rates = [group["lr"] for group in trainer.outer_optimizer.param_groups]
    assert {*rates} == {RATES[kind]}
    assert len(unlabeled[0]) == (3 if kind == "example_weights" else 2)


def test_plain_methods_train_on_all_labels_or_on_the_clean_ones_and_a_control_alters_the_feedback(
    root: Path,
) -> None:
    for name, count in (("plain", 48), ("clean", 8)):
        _, (phase,) = phases(METHODS[name], root)
        assert (len(phase.labeled.images), phase.unlabeled, len(phase.trainer.losses)) == (
            count,
            None,
            1,
        )
    method = dataclasses.replace(
        METHODS["example_weights_permuted"], warm_steps=0, mode="difference"
    )
    _, (phase,) = phases(method, root)
    assert "permuted" in repr(phase.trainer.mode)
    assert "Difference" in repr(phase.trainer.mode)
    assert phase.options["warmup"] == 3


SPOILED: list[tuple[str, Callable[[Path], object]]] = [
    (
        "inside",
        lambda root: (root / "clean").symlink_to((root / "clean").rename(root / "noisy/clean")),
    ),
    ("x.png", lambda root: shutil.copy(root / "clean/bar/bar-00.png", root / "noisy/beam/x.png")),
    ("classes differ", lambda root: (root / "clean/beam").rename(root / "clean/Beam")),
    ("beam", lambda root: [file.unlink() for file in (root / "clean/beam").iterdir()]),
]


@pytest.mark.parametrize(("word", "spoil"), SPOILED)
def test_folders_that_would_spoil_it_are_refused_before_anything_is_written(
    word: str, spoil: Callable[[Path], object], root: Path, tmp_path: Path
) -> None:
    spoil(Path(shutil.copytree(root, tmp_path / "copy")))
    told = metapl(
        "train",
        "noisy",
        *given(tmp_path / "copy"),
        *FLAGS.split(),
        "--out",
        tmp_path / "out",
        code=2,
    )
    assert word in " ".join(told.stderr.split())
    assert not (tmp_path / "out").exists()
