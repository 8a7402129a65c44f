"""Methods of a comparison with Noisy Student take as many steps as cost the same, whatever their phases are."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from command import result
from tiny_runs import color_folders
from torch import nn

from metapl.cli import main
from metapl.experiments.equal_cost import equal_steps, operations, with_steps
from metapl.experiments.load_run import load_run
from metapl.experiments.settle import settled
from metapl.recipes import Digits, ImageFolders
from metapl.recipes.self_training import SelfTraining

PER_EXAMPLE = 2 * (2 * 64 * 16) + 3 * (2 * 16 * 10)
"""Operations of a step of a network of width 16 on a digit: three passes, but one less in the first layer."""


def digits(settings: SelfTraining) -> Digits:
    return Digits(steps=10, labeled_batch=8, hidden=(16,), schedule="exponential", self_training=settings)


def test_steps_before_uda_begins_are_counted_as_they_are(tmp_path: Path) -> None:
    """They are steps of supervised training; a share of the steps of any recipe for folders of pictures."""
    root = color_folders(tmp_path)
    folders = {name: str(root / name) for name in ("labeled", "unlabeled", "test")}
    given = {"steps": 100, "precision": "float32", "image_size": 8, "network_name": "small_cnn", "device": "cpu"}
    recipe = settled(ImageFolders(**folders, **given, labeled_batch=4, unlabeled_batch=8))  # type: ignore[arg-type]
    task, at_once = recipe.task(), dataclasses.replace(recipe, uda_start=0)
    assert isinstance(at_once, ImageFolders)
    early = recipe.uda_start / recipe.steps
    assert 0.2 < early < 0.8
    plain, dear = operations(recipe, "supervised", task), operations(at_once, "uda", task)
    assert dear > 2 * plain
    assert operations(recipe, "uda", task) == pytest.approx(early * plain + (1 - early) * dear, rel=1e-9)
    # A teacher of Meta Pseudo Labels has UDA too, and its student waits longer than UDA does.
    assert recipe.wait > recipe.uda_start
    assert operations(recipe, "none", task) < operations(at_once, "none", task)
    steps = equal_steps(recipe, ["supervised", "uda"], task)
    assert operations(with_steps(recipe, steps["uda"]), "uda", task) == pytest.approx(plain, rel=0.05)


def test_the_steps_of_a_warm_start_follow_those_of_the_method() -> None:
    recipe = digits(SelfTraining(rounds=3, ratio=3, warm_start=True, warm_steps=5))
    task = recipe.task()
    assert operations(recipe, "noisy_student", task) == 8 * PER_EXAMPLE * (10 + 3 * 5 * 4)
    assert with_steps(recipe, 40).self_training.warm_steps == 20
    steps = equal_steps(recipe, ["noisy_student", "noisy_student_once", "supervised"], task)
    for method, count in steps.items():
        cost = operations(with_steps(recipe, count), method, task)
        assert cost == pytest.approx(operations(recipe, "noisy_student", task), rel=0.1)


def test_finetuning_is_not_counted() -> None:
    """It takes as many steps whatever those of a method are, so it cannot be brought to a cost by them."""
    recipe = digits(SelfTraining(rounds=2, ratio=3, training="pretrain_finetune"))
    assert recipe.finetune_steps > 0
    assert operations(recipe, "noisy_student", recipe.task()) == 10 * 8 * PER_EXAMPLE * (1 + 2 * 3)


def test_the_other_methods_train_noisy_students_last_network(tmp_path: Path) -> None:
    """Of three networks, a single round has two; a method without rounds has the last, at its cost."""
    out, names = tmp_path / "compared", ("4", "8", "8x8")
    methods = ("noisy_student", "noisy_student_once", "supervised")
    flags = ("--rounds", "2", "--steps", "2", "--labeled-batch", "8", "--hidden", "4", "--jobs", "1")
    compared = ("--compare", "--methods", *methods, "--networks", *names)
    assert main(["noisy-student", "digits", *flags, *compared, "--out", str(out)]) == 0
    found = {name: load_run(out / name / "seed-0").network("student") for name in methods}
    widths = {name: [layer.out_features for layer in linears(network)] for name, network in found.items()}
    assert widths == {"noisy_student": [8, 8, 10], "noisy_student_once": [8, 10], "supervised": [8, 8, 10]}
    steps = {name: result(out / name / "seed-0")["steps"] for name in methods}
    recipe = Digits(steps=2, labeled_batch=8, hidden=(4,), self_training=SelfTraining(rounds=2, networks=names))
    cost = operations(recipe, "noisy_student", recipe.task())
    per_step = 8 * (2 * 2 * 64 * 8 + 3 * (2 * 8 * 8 + 2 * 8 * 10))
    assert steps["supervised"] == round(cost / per_step)
    assert steps["noisy_student_once"] > steps["noisy_student"] == 2


def linears(network: nn.Module) -> list[nn.Linear]:
    return [part for part in network.modules() if isinstance(part, nn.Linear)]
