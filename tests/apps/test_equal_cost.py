"""Methods of a comparison with Noisy Student take as many steps as cost the same, whatever their phases are."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from command import result
from flat import made
from tiny_runs import color_folders
from torch import nn

from metapl.apps import reports as report
from metapl.apps.commands import main
from metapl.apps.experiments.accuracies import Comparison
from metapl.apps.experiments.folder import load_run
from metapl.apps.experiments.rounds import FOLDER, LABELS
from metapl.apps.experiments.settle import settled
from metapl.apps.experiments.side_by_side import _by_phase, _draw, at_equal_cost, operations, with_steps
from metapl.apps.recipes import Digits, ImageFolders
from metapl.apps.recipes.methods.noisy_student import first_teacher
from metapl.apps.recipes.settings import FirstTeacher, OpenOptimizer, SelfTraining
from metapl.apps.reports.page import draw_rounds
from metapl.runs.rows import Metrics
from metapl.training.loss_trainer import LossTrainer

PER_EXAMPLE = 2 * (2 * 64 * 16) + 3 * (2 * 16 * 10)
"""Operations of a step of a network of width 16 on a digit: three passes, but one less in the first layer."""


def digits(settings: SelfTraining) -> Digits:
    fields = {"steps": 10, "labeled_batch": 8, "hidden": (16,), "schedule": "exponential"}
    return made(Digits, "noisy_student", **fields, self_training=settings)


def test_steps_before_uda_begins_are_counted_as_they_are(tmp_path: Path) -> None:
    """They are steps of supervised training; a share of the steps of any recipe for folders of pictures."""
    root = color_folders(tmp_path)
    folders: dict[str, Any] = {name: str(root / name) for name in ("labeled", "unlabeled", "test")}
    given: dict[str, Any] = {
        "steps": 100,
        "precision": "float32",
        "image_size": 8,
        "network_name": "small_cnn",
        "device": "cpu",
    }
    recipe = settled(ImageFolders(**folders, **given, labeled_batch=4, unlabeled_batch=8))
    task, at_once = recipe.task(), recipe.with_method(uda_start=0)
    assert isinstance(at_once, ImageFolders)
    start = recipe.method.uda_start
    early = start / recipe.steps
    assert 0.2 < early < 0.8
    plain, dear = operations(recipe, "supervised", task), operations(at_once, "uda", task)
    assert dear > 2 * plain
    assert operations(recipe, "uda", task) == pytest.approx(early * plain + (1 - early) * dear, rel=1e-9)
    # A teacher of Meta Pseudo Labels has UDA too, and its student waits longer than UDA does.
    assert recipe.by("none").method.wait > start
    assert operations(recipe, "none", task) < operations(at_once, "none", task)
    sized = at_equal_cost(recipe, ["supervised", "uda"], task)
    assert sized["supervised"] == recipe.by("supervised")
    assert operations(sized["uda"], "uda", task) == pytest.approx(plain, rel=0.05)


def test_the_steps_of_a_warm_start_follow_those_of_the_method() -> None:
    recipe = digits(SelfTraining(rounds=3, ratio=3, warm_start=True, warm_steps=5))
    task = recipe.task()
    assert operations(recipe, "noisy_student", task) == 8 * PER_EXAMPLE * (10 + 3 * 5 * 4)
    assert with_steps(recipe, 40).method.self_training.warm_steps == 20
    sized = at_equal_cost(recipe, ["noisy_student", "noisy_student_once", "supervised"], task)
    for method, own in sized.items():
        cost = operations(own, method, task)
        assert cost == pytest.approx(operations(recipe, "noisy_student", task), rel=0.02)


def test_finetuning_is_not_counted() -> None:
    """It takes as many steps whatever those of a method are, so it cannot be brought to a cost by them."""
    recipe = digits(SelfTraining(rounds=2, ratio=3, training="pretrain_finetune"))
    assert recipe.finetune_steps > 0
    assert operations(recipe, "noisy_student", recipe.task()) == 10 * 8 * PER_EXAMPLE * (1 + 2 * 3)


def test_the_other_methods_train_noisy_students_last_network(tmp_path: Path) -> None:
    """Of three networks, a single round has two; a method without rounds has the last, at its cost."""
    out, names = tmp_path / "compared", ("4", "8", "8x8")
    methods = ("noisy_student", "noisy_student_once", "mpl_filtered", "supervised")
    flags = ("--rounds", "2", "--steps", "2", "--labeled-batch", "8", "--hidden", "4", "--jobs", "1")
    flags += ("--finetune-steps", "1", "--compare", "--methods", *methods, "--networks", *names)
    assert main(["noisy-student", "digits", *flags, "--out", str(out)]) == 0
    found = {name: load_run(out / name / "seed-0").network("student") for name in methods}
    widths = {name: [layer.out_features for layer in linears(network)] for name, network in found.items()}
    last = [8, 8, 10]
    assert widths == {name: [8, 10] if name == "noisy_student_once" else last for name in methods}
    (first,) = {result(out / name / "seed-0")["rounds"][0]["store_sha256"] for name in methods[:3]}
    assert result(out)["stores"] == {name: [first] for name in methods[:3]}
    steps = {name: result(out / name / "seed-0")["steps"] for name in methods}
    settings = SelfTraining(rounds=2, networks=names)
    recipe = made(Digits, "noisy_student", steps=2, labeled_batch=8, hidden=(4,), self_training=settings)
    cost = operations(recipe, "noisy_student", recipe.task())
    per_step = 8 * (2 * 2 * 64 * 8 + 3 * (2 * 8 * 8 + 2 * 8 * 10))
    assert steps["supervised"] == round(cost / per_step)
    assert steps["noisy_student_once"] > steps["noisy_student"] == 2


TEACHING = ("noisy_student", "mpl_filtered", "none_filtered", "noisy_student_once", "noisy_student_uneven")
COMPARED = (
    *("noisy-student", "digits", "--compare", "--methods", "supervised", *TEACHING[:2], "--jobs", "1"),
    *("--steps", "60", "--validate-every", "7", "--warmup", "5", "--rounds", "1", "--hidden", "4"),
    *("--labeled-batch", "2", "--finetune-steps", "1", "--save-every", "3"),
)
"""A comparison whose first method has no first teacher; those of the others then take fewer steps than 60."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("compared") / "whole"
    assert main([*COMPARED, "--out", str(out)]) == 0
    return out


def stored_parts(run: Path) -> list[bytes]:
    return [part.read_bytes() for part in sorted((run / FOLDER / "1" / LABELS).glob("*.parquet"))]


def test_methods_with_a_first_teacher_learn_from_the_same_labels(whole: Path) -> None:
    """Byte for byte, from a teacher of the same weights, whatever the steps of the rest are."""
    runs = [whole / name / "seed-0" for name in TEACHING[:2]]
    parts, others = map(stored_parts, runs)
    assert parts
    assert others == parts
    told = [result(run)["rounds"][0] for run in runs]
    assert len({each["teacher"]["weights_fingerprint"] for each in told}) == 1
    stores = {name: [each["store_sha256"]] for name, each in zip(TEACHING[:2], told, strict=True)}
    assert result(whole)["stores"] == stores
    assert len({each["store_sha256"] for each in told}) == 1
    rows, same = (Metrics(run / "metrics.jsonl").rows("round-0") for run in runs)
    assert rows == same
    assert 1 < rows[-1]["step"] < 60
    assert len({result(run)["steps"] for run in runs}) == 2


def test_a_comparison_that_is_stopped_and_moved_ends_as_one_that_was_not(whole: Path, tmp_path: Path) -> None:
    """Stopped within the first teacher of the second method that has one."""
    begun, moved = tmp_path / "begun", tmp_path / "moved"
    fit, step = LossTrainer.fit, LossTrainer.step
    phases: list[str] = []
    with pytest.MonkeyPatch.context() as patch:

        @functools.wraps(fit)
        def fitted(self: Any, *given: Any, **named: Any) -> Any:
            phases.append(named["phase"])
            if phases.count("round-0") == 2:
                patch.setattr(LossTrainer, "step", stopped)
            return fit(self, *given, **named)

        def stopped(self: Any, *batches: Any) -> Any:
            if self.steps_done == 4:
                os.kill(os.getpid(), signal.SIGINT)
            return step(self, *batches)

        patch.setattr(LossTrainer, "fit", fitted)
        assert main([*COMPARED, "--out", str(begun)]) == 130
    assert phases[-1] == "round-0"
    begun.rename(moved)
    assert main([*COMPARED, "--out", str(moved), "--resume"]) == 0
    assert result(moved) == result(whole)
    assert stored_parts(moved / TEACHING[1] / "seed-0") == stored_parts(whole / TEACHING[1] / "seed-0")


def test_what_is_one_cost_is_drawn_in_one_place(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn: dict[str, Any] = {}
    monkeypatch.setattr(report, "draw_report", lambda path, **given: drawn.update(given))
    methods = ("supervised", *TEACHING[:2])
    results = {(name, 0): result(whole / name / "seed-0") for name in methods}
    _draw(whole, Comparison.of((0,), methods, results), results)
    assert drawn["along"] == "% of the steps"
    assert [rows[-1]["step"] for rows in drawn["curves"].values()] == [100.0] * 3
    _draw(whole, Comparison.of((0,), methods[:1], results), {("supervised", 0): results["supervised", 0]})
    assert drawn["along"] == "step"
    assert drawn["curves"]["supervised"][-1]["step"] == 60


def test_a_page_without_accuracies_by_round_has_no_panel_of_them(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As that of Meta Pseudo Labels on selected examples, of which the first teacher alone is measured."""
    of_student, of_mpl = (result(whole / name / "seed-0")["rounds"] for name in TEACHING[:2])
    pages: list[int] = []
    monkeypatch.setattr("metapl.apps.reports.canvas.png", lambda figure: pages.append(len(figure.axes)) or b"")
    for rounds in (of_student, of_mpl):
        draw_rounds(tmp_path / "page.png", rounds, title="", summary="")
    assert pages == [2, 1]


@pytest.mark.parametrize("first", ["noisy_student", "mpl_filtered", "supervised"])
def test_the_first_teacher_counts_at_its_own_steps(first: str) -> None:
    """All cost the same, and the first teacher takes the same part of it in each."""
    recipe = dataclasses.replace(digits(SelfTraining(rounds=2, ratio=3)), steps=300, unlabeled_batch=16)
    task = recipe.task()
    sized = at_equal_cost(recipe, [first, *(name for name in TEACHING if name != first)], task)
    assert sized[first].steps == 300
    for method, own in sized.items():
        cost = operations(own, method, task)
        assert cost == pytest.approx(operations(recipe, first, task), rel=0.02)
    assert len({sized[name].method.self_training.first for name in TEACHING}) == 1
    given = sized["mpl_filtered"].method.self_training.first
    assert given is not None
    assert _by_phase(sized["mpl_filtered"], "mpl_filtered", task)["round-0"] == given.steps * 8 * PER_EXAMPLE


def test_the_first_teacher_of_pictures_is_that_of_every_method(tmp_path: Path) -> None:
    """Its weights, rates and clipping are given for its network, of which a method with another one knows nothing."""
    root = color_folders(tmp_path)
    folders: dict[str, Any] = {name: str(root / name) for name in ("labeled", "unlabeled", "test")}
    settings = SelfTraining(rounds=1, networks=("small_cnn", "resnet18"))
    rate = ImageFolders(**folders).for_network("resnet18").method.teacher.lr
    assert rate is not None
    given: dict[str, Any] = {
        "network_name": "small_cnn",
        "weights": "file.safetensors",
        "teacher": OpenOptimizer(lr=rate),
    }
    shown: dict[str, Any] = {
        "image_size": 8,
        "mean": (0.5,) * 3,
        "std": (0.2,) * 3,
        "grey": False,
        "precision": "float32",
    }
    given |= {"steps": 200, "self_training": settings}
    recipe = settled(made(ImageFolders, "noisy_student", **folders, **given, **shown))
    assert recipe.warmup > 0
    own, first = first_teacher(recipe)
    assert (own.method.teacher.lr, own.network_name) == (rate, "small_cnn")
    assert first == FirstTeacher(
        steps=200,
        warmup=recipe.warmup,
        validate_every=recipe.validate_every,
        lr=rate,
        clip_norm=recipe.clip_norm,
        weights=str(Path("file.safetensors").resolve()),
    )
    shared = dataclasses.replace(settings, first=first)
    for method in TEACHING:
        for steps in (37, 200):
            of_method = with_steps(recipe, steps).with_method(self_training=shared)
            found, trained = first_teacher(of_method.compared(method, 0))
            assert trained == first
            for name in ("network_name", "clip_norm", "weights"):
                assert getattr(found, name) == getattr(own, name)
            for name in ("teacher", "label_smoothing"):
                assert getattr(found.method, name) == getattr(own.method, name)


def linears(network: nn.Module) -> list[nn.Linear]:
    return [part for part in network.modules() if isinstance(part, nn.Linear)]
