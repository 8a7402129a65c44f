"""Recipes as they are run: what stays on disk, what is selected on what, and that they come back as they were."""

from __future__ import annotations

import dataclasses
import json
import math
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest
import torch
from flat import made
from safetensors.torch import load_file
from test_methods import TINY

import metapl
from metapl import LossTrainer, MetaplError
from metapl.apps.commands import main
from metapl.apps.experiments.experiment import Experiment
from metapl.apps.experiments.folder import FORMAT, WEIGHTS, RunFolder, describe, stored, stored_result
from metapl.apps.machine.misfit import from_dict
from metapl.apps.recipes import RECIPES, Digits, Feedback, ImageFolders, Optimizer
from metapl.apps.recipes.methods import CONTROLS, METHODS
from metapl.metrics import evaluate_logits
from metapl.runs.rows import Metrics
from metapl.training import FitResult


def run(folder: Path, method: str = "mpl", recipe: Digits = TINY) -> dict[str, Any]:
    where = RunFolder(folder)
    with where.claimed(describe(recipe.by(method)), resume=False):
        return Experiment(recipe, where, progress=False, say=lambda _: None).run(method)


def read(folder: Path, name: str) -> Any:
    return json.loads((folder / name).read_text())


@pytest.mark.usefixtures("drawn")
def test_a_run_leaves_behind_what_it_says(tmp_path: Path) -> None:
    result = run(tmp_path)
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.iterdir()}
    assert left - {".lock"} == {
        "recipe.json",
        "data.json",
        "metrics.jsonl",
        "tensorboard",
        "checkpoints",
        "student.safetensors",
        "finetuned_student.safetensors",
        "teacher.safetensors",
        "report.html",
        "report.png",
        "network.json",
        "result.json",
    }
    assert stored_result(RunFolder(tmp_path)) == result
    assert result.keys() >= {
        "recipe",
        "method",
        "seed",
        "steps",
        "best_step",
        "validation_size",
        "delivered",
        "delivered_by",
        "validation_accuracy",
        "test_accuracy",
        "evaluation",
        *(f"{name}_{part}_accuracy" for name in WEIGHTS for part in ("validation", "test")),
    }
    delivered = result["delivered"]
    assert result["delivered_by"] == "validation"
    assert result["test_accuracy"] == result[f"{delivered}_test_accuracy"]
    assert result["validation_accuracy"] == result[f"{delivered}_validation_accuracy"]
    assert result["validation_accuracy"] == max(result[f"{name}_validation_accuracy"] for name in WEIGHTS)
    assert (result["recipe"], result["method"], result["seed"], result["steps"]) == ("digits", "mpl", 0, 6)
    assert result["evaluation"]["accuracy"] == result["test_accuracy"]
    assert result["evaluation"]["n"] == 400
    assert (tmp_path / "report.png").stat().st_size > 1000


def test_a_run_says_with_what_it_was_made(tmp_path: Path) -> None:
    run(tmp_path)
    content = read(tmp_path, "recipe.json")
    made = content["made_with"]
    assert content["format"] == FORMAT
    assert (made["metapl"], made["torch"]) == (version("metapl"), torch.__version__)
    assert made.keys() >= {"torchvision", "torchopt", "python", "machine", "processor", "cpus", "gpu"}
    assert made["processor"]
    assert made["cpus"] >= 1


@pytest.mark.parametrize("method", METHODS)
def test_the_numbers_are_those_of_the_weights_on_disk(method: str, tmp_path: Path) -> None:
    """Selected on validation data, measured on the test set."""
    result, task = run(tmp_path, method), TINY.task()
    names = [name for name, file in WEIGHTS.items() if (tmp_path / file).exists()]
    assert ("teacher" in names) == (method in ("mpl", "none", *CONTROLS))
    for name in names:
        network = TINY.network().eval()
        network.load_state_dict(load_file(tmp_path / WEIGHTS[name]))
        for split in ("validation", "test"):
            inputs, labels = getattr(task, split)
            with torch.inference_mode():
                accuracy = evaluate_logits(network(inputs), labels).accuracy
            assert accuracy == result[f"{name}_{split}_accuracy"]
    rows = Metrics(tmp_path / "metrics.jsonl").rows("fit")
    validated = {
        row["step"]: row["student_validation_accuracy"] for row in rows if "student_validation_accuracy" in row
    }
    assert result["student_validation_accuracy"] == max(validated.values())
    assert result["best_step"] == max(step for step, found in validated.items() if found == max(validated.values()))


def test_the_same_seed_gives_the_same_bytes_and_another_one_others(tmp_path: Path) -> None:
    names = ("student.safetensors", "finetuned_student.safetensors", "metrics.jsonl", "result.json")
    ends = []
    for number, seed in enumerate((0, 0, 1)):
        torch.manual_seed(number)  # what was drawn before does not matter
        folder = tmp_path / str(number)
        run(folder, recipe=dataclasses.replace(TINY, seed=seed))
        ends.append([(folder / name).read_bytes() for name in names])
    assert ends[0] == ends[1]
    assert all(a != b for a, b in zip(ends[0], ends[2], strict=True))


def test_finetuning_that_does_not_help_is_not_kept() -> None:
    """The better by validation of what the student was and what it became."""
    for lr, kept in ((1e-9, False), (50.0, True)):
        recipe = dataclasses.replace(TINY, finetune=Optimizer(lr=lr))
        task, torch_state = recipe.task(), torch.get_rng_state()
        student = recipe.network()
        before = FitResult(1.0, 3, {name: t.clone() for name, t in student.state_dict().items()})
        found = _finetuned(recipe, task, student, before)
        assert found is before, (lr, kept)
        assert all(torch.equal(t, before.weights[name]) for name, t in student.state_dict().items())
        torch.set_rng_state(torch_state)
    before = FitResult(0.0, 3, before.weights)
    found = _finetuned(TINY, task, student, before)
    assert found is not before


def _finetuned(recipe: Digits, task: Any, student: Any, before: FitResult) -> Any:
    import tempfile

    with tempfile.TemporaryDirectory() as scratch:
        where = RunFolder(scratch)
        return Experiment(recipe, where, progress=False, say=lambda _: None).finetune(task, student, before)


def test_finetuning_does_not_depend_on_what_was_drawn_before() -> None:
    ends = []
    for seed in (0, 1):
        torch.manual_seed(5)
        student, task = TINY.network(), TINY.task()
        torch.manual_seed(seed)
        found = _finetuned(TINY, task, student, FitResult(0.0, 1, student.state_dict()))
        ends.append(found.weights)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])


def test_a_recipe_comes_back_as_it_was_stored(tmp_path: Path) -> None:
    recipe = dataclasses.replace(
        TINY.with_method(feedback=Feedback(mode="reinforce", baseline=0.9)), schedule="constant", ema_decay=0.5, seed=3
    )
    folder = RunFolder(tmp_path)
    for method in Digits.known:
        own = recipe.by(method)
        folder = RunFolder(tmp_path / method)
        with folder.claimed(describe(own), resume=False):
            pass
        found, description = stored(folder)
        assert found == own
        assert description["method"] == method


def test_a_folder_of_another_format_or_recipe_is_refused(tmp_path: Path) -> None:
    folder = RunFolder(tmp_path)

    def claim(method: str, resume: bool) -> None:
        with folder.claimed(describe(TINY.by(method)), resume=resume):
            pass

    claim("mpl", resume=False)
    with pytest.raises(MetaplError, match="holds a run already; give --resume"):
        claim("mpl", resume=False)
    with pytest.raises(MetaplError, match=r"holds a run of another recipe .*method was 'mpl', now 'none'"):
        claim("none", resume=True)
    claim("mpl", resume=True)
    folder.write_json("recipe.json", read(tmp_path, "recipe.json") | {"format": 99})
    with pytest.raises(MetaplError, match=r"written in run format 99; this metapl .* reads format 4"):
        folder.recipe()
    with pytest.raises(MetaplError, match=r"result\.json is missing in .*not a run folder"):
        folder.read_json("result.json")
    with pytest.raises(MetaplError, match=r"student\.safetensors is missing"):
        folder.read_weights("student.safetensors")


def test_two_processes_do_not_run_in_one_folder(tmp_path: Path) -> None:
    with (
        RunFolder(tmp_path).claimed(describe(TINY), resume=False),
        pytest.raises(MetaplError, match="another process is running"),
        RunFolder(tmp_path).claimed(describe(TINY), resume=True),
    ):
        pass


def test_rows_after_a_step_are_cut_off_and_phases_stay_in_order(tmp_path: Path) -> None:
    metrics = Metrics(tmp_path / "metrics.jsonl")
    for phase, steps in (("fit", (1, 2, 3)), ("finetune", (1, 2))):
        for step in steps:
            metrics.add({"phase": phase, "step": step})
    with metrics.file.open("a") as file:
        file.write('{"phase": "finetune", "st')  # torn
    metrics.cut("fit", 2)
    metrics.add({"phase": "fit", "step": 3})
    metrics.cut("finetune", 1)
    found = [(row["phase"], row["step"]) for row in metrics.rows()]
    assert found == [("fit", 1), ("fit", 2), ("fit", 3), ("finetune", 1)]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"steps": 0}, r"Digits\(steps=0\): expected a whole number from 1 to 1,000,000,000"),
        ({"dropout": 1.0}, r"dropout=1\.0"),
        ({"hidden": (0,)}, "hidden"),
        ({"seed": -1}, "seed=-1"),
        ({"finetune_steps": -1}, "finetune_steps=-1"),
        ({"uda_weight": -0.5}, r"uda_weight=-0\.5"),
        ({"label_smoothing": 2.0}, "label_smoothing"),
        ({"uda_weight": math.inf}, r"uda_weight=inf\): expected a finite number"),
        ({"uda_weight": math.nan}, r"uda_weight=nan\): expected a finite number"),
    ],
)
def test_a_recipe_that_makes_no_sense_is_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(MetaplError, match=words):
        made(Digits, **fields)


def test_fields_that_do_not_fit_together_are_refused() -> None:
    with pytest.raises(MetaplError, match="mode 'forward' has no baseline"):
        Feedback(mode="forward", baseline=0.9)
    with pytest.raises(MetaplError, match="mode 'unrolled' takes soft"):
        Feedback(mode="unrolled", labels="hard")
    with pytest.raises(MetaplError, match="momentum"):
        Optimizer(momentum=1.0)
    with pytest.raises(MetaplError, match=r"Optimizer\(lr=inf\): expected a finite number"):
        Optimizer(lr=math.inf)
    with pytest.raises(MetaplError, match="Optimizer has no speed"):
        from_dict(Optimizer, {"lr": 0.1, "speed": 3})


@pytest.mark.usefixtures("drawn")
def test_a_comparison_leaves_its_own_files_beside_its_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = (
        "train digits --compare --seeds 0-1 --methods mpl none --jobs 1 --steps 4 --hidden 8 --validate-every 2 "
        f"--finetune-steps 2 --out {tmp_path}/all"
    )
    assert main(command.split()) == 0
    said = capsys.readouterr().out
    assert "MPL's student reaches" in said
    folder, runs = tmp_path / "all", {}
    for method in ("mpl", "none"):
        runs[method] = [read(folder / method / f"seed-{seed}", "result.json") for seed in (0, 1)]
    result = read(folder, "result.json")
    assert result["seeds"] == [0, 1]
    for method, found in runs.items():
        for name in ("student_test_accuracy", "finetuned_test_accuracy"):
            assert result["methods"][method][name] == [one[name] for one in found]
    assert result["sentence"] in " ".join(said.split())
    assert "at least 5 seeds are needed" in result["sentence"]
    assert (result["test_examples"], 0.1 <= result["chance"] < 0.15) == (400, True)
    assert result["mpl_against_none"]["n"] == 2
    method = max(runs, key=lambda name: sum(one["validation_accuracy"] for one in runs[name]))
    best = max(runs[method], key=lambda one: one["validation_accuracy"])
    assert (result["seed"], result["method"], result["test_accuracy"]) == (best["seed"], method, best["test_accuracy"])
    assert f"delivered: {METHODS[method].title}, seed {best['seed']};" in " ".join(said.split())
    delivered = folder / method / f"seed-{best['seed']}"
    assert {name: result[name] for name in best.keys() - {"sha256"}} == {k: v for k, v in best.items() if k != "sha256"}
    for name in WEIGHTS.values():
        assert (folder / name).read_bytes() == (delivered / name).read_bytes()
    assert read(folder, "recipe.json")["recipe"]["compare"] == ["mpl", "none"]
    assert (folder / "report.png").stat().st_size > 1000
    assert main([*command.split(), "--resume"]) == 0
    assert read(folder, "result.json") == result


@pytest.mark.parametrize("method", ["supervised", "uda", "pseudo_labels", "none", "mpl"])
def test_every_method_trains_under_the_same_clip_and_precision(method: str, tmp_path: Path) -> None:
    """The options of the recipe that have nothing to do with feedback reach the baselines too."""

    class Clipped(Digits):
        def trainer_options(self) -> dict[str, object]:
            return {**super().trainer_options(), "clip_norm": 0.25, "precision": "bfloat16"}

    recipe = Clipped(steps=2, hidden=(8,), validate_every=1, finetune_steps=0)
    run = Experiment(recipe, RunFolder(tmp_path), progress=False, say=lambda text: None)
    trained = dataclasses.replace(run, recipe=recipe.by(method)).train(recipe.task()).trainer
    assert (trained.clip_norm, trained.precision) == (0.25, "bfloat16")


EXECUTION = {"precision": "bfloat16", "accumulate": 2, "compile": True, "clip_norm": 0.25}


@pytest.fixture
def finetuned_with(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """What each finetuning was run with."""
    seen: list[dict[str, Any]] = []

    real = LossTrainer.__init__

    def init(self: LossTrainer, *given: Any, **options: Any) -> None:
        if type(self) is LossTrainer:  # and not of a teacher beside a student
            seen.append({name: options[name] for name in EXECUTION})
        real(self, *given, **options | {"compile": False})  # compiling takes long

    monkeypatch.setattr(LossTrainer, "__init__", init)
    return seen


def test_finetuning_runs_as_the_recipe_does(
    finetuned_with: list[dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In its precision, in as many parts, compiled and clipped."""
    monkeypatch.setattr(Digits, "trainer_options", lambda self: {**EXECUTION, "compile": False})
    command = f"train digits --steps 2 --hidden 8 --validate-every 2 --finetune-steps 2 --out {tmp_path / 'run'}"
    assert main(command.split()) == 0
    assert finetuned_with == [{**EXECUTION, "compile": False}]


def test_finetuning_runs_as_the_trainer_does(finetuned_with: list[dict[str, Any]]) -> None:
    given = {**EXECUTION, "compile": False}
    trainer = metapl.BilevelTrainer(TINY.network(), TINY.network(), **given)
    images, labels = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 3])
    trainer.finetune([(images, labels)], steps=1, progress=False)
    assert finetuned_with == [given]


def test_finetuning_in_parts_that_are_not_equal_is_refused_before_training() -> None:
    with pytest.raises(MetaplError, match=r"finetune_batch=6.*multiple of accumulate=4"):
        ImageFolders(labeled="few", unlabeled="many", accumulate=4, finetune_batch=6)


@pytest.mark.parametrize("name", ["digits", "images", "noisy"])
def test_the_settings_of_a_recipe_are_fields_of_its_methods(name: str) -> None:
    """One that is of none would change nothing."""
    kind = RECIPES[name]
    fields = {field.name for method in kind.known.values() for field in dataclasses.fields(method)}
    assert kind.settings.keys() <= fields
    of_recipe = {field.name for field in dataclasses.fields(kind)}
    assert fields & of_recipe == set(), "a flag is of the recipe or of the method"
