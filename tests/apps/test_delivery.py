"""Which of a run's networks is delivered, with and without validation and test pictures, and what is said of it."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from command import refused, result, rows, said, unsealed
from PIL import Image

from metapl.apps.commands import main
from metapl.apps.commands.compare import MEASURED, _fields
from metapl.apps.experiments import settle
from metapl.apps.experiments.accuracies import summary
from metapl.apps.experiments.experiment import Experiment, Network, delivered
from metapl.apps.experiments.folder import WEIGHTS, RunFolder
from metapl.apps.recipes import Digits, ImageFolders
from metapl.apps.recipes.base import SELECTED_ON
from metapl.metrics import evaluate_logits

SMALL = (
    *("--image-size", "8", "--network", "small_cnn", "--labeled-batch", "4"),
    *("--finetune-steps", "2", "--log-every", "2", "--validate-every", "2", "--save-every", "2"),
)
FIXED = (*SMALL, "--steps", "6", "--precision", "float32")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise, which is darker in class a, in folders to train on, to select on (many or few) and to report on."""
    root, draw = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    counts = {"labeled": 4, "many": SELECTED_ON // 2, "few": 3, "test": 5, "unlabeled": 8}
    for part, each in counts.items():
        for number in range(each):
            for label, brightest in (("a", 120), ("b", 255)):
                file = root / part / label / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(draw.integers(0, brightest, (8, 8, 3), dtype=np.uint8)).save(file)
    return root


def command(root: Path, out: Path, *more: str, **folders: str) -> list[str]:
    """``metapl train images``; ``val="few"`` is --val ROOT/few."""
    named = {"labeled": "labeled", "unlabeled": "unlabeled", **folders}
    places = [part for flag, name in named.items() for part in (f"--{flag}", str(root / name))]
    return ["train", "images", *places, "--out", str(out), *more]


def train(capsys: pytest.CaptureFixture[str], *given: Any, **folders: str) -> str:
    """What the command said, on one line."""
    return " ".join(said(capsys, *command(*given, **folders)).split())


def accuracies(found: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in found.items() if key.endswith("_accuracy")}


# ---------------------------------------------------------------------------------------------------------- the choice


def networks(**accuracies: float | None) -> dict[str, Network]:
    return {name: Network(name, {}, accuracy, None) for name, accuracy in accuracies.items()}


def test_the_best_by_validation_is_delivered_and_of_equals_the_first() -> None:
    assert delivered("mpl", networks(student=0.5, teacher=0.7, finetuned=0.6), select=True) == "teacher"
    assert delivered("uda", networks(student=0.5, teacher=0.5, finetuned=0.5), select=True) == "student"
    assert delivered("mpl", networks(student=0.4, teacher=0.5, finetuned=0.5), select=True) == "teacher"
    assert delivered("mpl", networks(student=0.0, finetuned=0.0), select=True) == "student"


def test_of_noisy_students_equals_the_finetuned_one_is_delivered() -> None:
    """The student before it only if validation shows that to be better; the teacher never."""
    assert delivered("noisy_student", networks(student=0.9, teacher=0.95, finetuned=0.9), select=True) == "finetuned"
    assert delivered("noisy_student", networks(student=0.9, teacher=0.95, finetuned=0.8), select=True) == "student"


def test_where_validation_cannot_tell_a_rule_of_the_method_does() -> None:
    told = networks(student=0.1, teacher=0.9, finetuned=0.2)
    assert delivered("mpl", told, select=False) == "finetuned"
    assert delivered("supervised", told, select=False) == "finetuned"
    assert delivered("pseudo_labels", networks(student=None, finetuned=None), select=False) == "finetuned"
    assert delivered("supervised_everything", told, select=False) == "student"


def test_the_test_set_chooses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of three networks the best by validation is the worst on the test set."""
    reached = {"student": 0.3, "teacher": 0.6, "finetuned": 0.5}
    real = Experiment.network

    def network(self: Experiment, name: str, *given: Any) -> Network:
        found = real(self, name, *given)
        assert found.evaluation is not None
        tested = replace(found.evaluation, accuracy=1 - reached[name])
        return replace(found, validation_accuracy=reached[name], evaluation=tested)

    monkeypatch.setattr(Experiment, "network", network)
    recipe = Digits(steps=2, hidden=(4,), labeled_batch=8, unlabeled_batch=8, finetune_steps=1)
    found = Experiment(recipe, RunFolder(tmp_path / "run"), progress=False, say=lambda _: None).run()
    assert (found["delivered_by"], found["delivered"], found["validation_accuracy"]) == ("validation", "teacher", 0.6)
    assert found["test_accuracy"] == pytest.approx(0.4)


# --------------------------------------------------------------------------------------------- with and without folders


@pytest.mark.parametrize(("right", "guessing"), [(62, True), (110, True), (130, False), (300, False)])
def test_an_accuracy_that_guessing_may_reach_is_called_so(right: int, guessing: bool) -> None:
    examples = torch.arange(1000)
    labels = examples % 10
    taken = torch.where(examples < right, labels, (labels + 1) % 10)
    evaluation = evaluate_logits(torch.eye(10)[taken], labels).to_json()
    content = {"delivered": "student", "evaluation": evaluation, "validation_size": 0, "delivered_by": "rule"}
    content["method"] = "mpl"
    assert any("not shown to be better than guessing" in line for line in summary(content)) == guessing


def test_a_result_of_before_chance_was_stored_is_said_without_it() -> None:
    content = {"delivered": "student", "delivered_by": "validation", "validation_size": 80, "validation_accuracy": 0.75}
    content["method"] = "mpl"
    assert summary(content)[0] == "Validation accuracy: 75.0 % (n = 80, 95 % interval 64.5-83.2)."
    content["validation_chance"] = 0.1
    assert summary(content)[0].endswith("chance 10.0 %).")


@pytest.mark.usefixtures("drawn")
def test_without_validation_and_test_pictures_nothing_says_how_good_it_is(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    text = train(capsys, pictures, run, *FIXED, "--method", "uda")
    assert "The finetuned network is delivered; without --test and --val nothing says how good it is." in text
    found = result(run)
    assert accuracies(found) == {}
    assert "evaluation" not in found
    assert (found["delivered"], found["delivered_by"], found["validation_size"]) == ("finetuned", "rule", 0)
    assert found["best_step"] == found["steps"] == 6
    assert (run / "report.png").stat().st_size > 5_000

    line = refused(capsys, "evaluate", run)
    assert f"{run} has no test set; give --test DIR" in line
    assert "no validation set either" in line
    told = json.loads(said(capsys, "evaluate", run, "--json", "--test", pictures / "test"))
    assert (told["network"], told["n"], told["measured_on"]) == ("finetuned", 10, "test")
    assert "expected one of its networks: student, finetuned." in refused(
        capsys, "evaluate", run, "--test", pictures / "test", "--network", "teacher"
    )
    assert len(rows(said(capsys, "predict", run, pictures / "test"))) == 10
    assert "has no test accuracy: train was given no --test" in refused(capsys, "compare", run)


@pytest.mark.usefixtures("blank_programs")
def test_a_model_card_without_accuracies_says_why(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(capsys, pictures, tmp_path / "run", *FIXED, "--method", "supervised")
    said(capsys, "export", tmp_path / "run", "--out", tmp_path / "out")
    card = (tmp_path / "out" / "MODEL_CARD.md").read_text()
    assert "- No test set was given." in card
    assert "- The weights are those of the last network: step 6 of 6." in card
    assert "(network, finetuned network) it delivers this one, by a rule of its method." in card
    assert "accuracy |" not in card
    assert "| validation | none |" in card
    assert "| test | none |" in card


def test_few_validation_pictures_are_reported_on_and_choose_nothing(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    text = train(capsys, pictures, run, *FIXED, "--method", "mpl", val="few")
    found = result(run)
    assert (found["delivered"], found["delivered_by"], found["validation_size"]) == ("finetuned", "rule", 6)
    assert found["best_step"] == 6
    names = {f"{prefix}validation_accuracy" for prefix in ("", "student_", "finetuned_", "teacher_")}
    assert found["validation_chance"] == 0.5
    assert accuracies(found).keys() == names
    assert found["validation_accuracy"] == found["finetuned_validation_accuracy"]
    assert "the rule where validation cannot tell" in text
    assert "% (n = 6, " in text.replace(" %", "%")
    shown = said(capsys, "evaluate", run)
    assert "\nvalidation accuracy " in shown
    assert "as in result.json\n" in shown
    assert "was selected on" not in shown


def test_chance_on_validation_pictures_is_the_share_of_their_largest_class(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of classes that are uneven among them alone."""
    run, uneven = tmp_path / "run", tmp_path / "uneven"
    shutil.copytree(pictures / "few", uneven)
    for name in ("0.png", "1.png"):
        (uneven / "b" / name).unlink()
    text = train(capsys, pictures, run, *FIXED, "--val", str(uneven))
    assert "(n = 4, " in text
    assert "chance 75.0 %)" in text
    assert result(run)["validation_chance"] == 0.75


def test_enough_validation_pictures_choose_the_step_and_the_network(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    train(capsys, pictures, run, *FIXED, "--method", "mpl", val="many", test="test")
    found = result(run)
    assert (found["delivered_by"], found["validation_size"]) == ("validation", SELECTED_ON)
    by_name = {name: found[f"{name}_validation_accuracy"] for name in ("student", "teacher", "finetuned")}
    assert found["delivered"] == max(by_name, key=lambda name: by_name[name])
    assert found["validation_accuracy"] == max(by_name.values())
    assert found["test_accuracy"] == found[f"{found['delivered']}_test_accuracy"] == found["evaluation"]["accuracy"]
    logged = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seen = {row["step"]: row.get("student_validation_accuracy") for row in logged if row["phase"] == "fit"}
    assert found["best_step"] == max(
        step for step, right in seen.items() if right == found["student_validation_accuracy"]
    )
    assert "\ntest accuracy " in said(capsys, "evaluate", run)


def test_a_selected_network_without_a_test_set_is_measured_on_what_selected_it(
    pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(capsys, pictures, tmp_path / "run", *FIXED, "--method", "supervised", val="many")
    shown = said(capsys, "evaluate", tmp_path / "run")
    assert f"of {SELECTED_ON}, as in result.json\n  the network was selected on these examples" in shown


# ---------------------------------------------------------------------------------------------------- measured steps


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is measured from now on; a machine on which 8 steps fit into the time."""
    asked: list[str] = []

    def steps_within(recipe: Any, minutes: float) -> int:
        asked.append(f"steps of {recipe.method.name} in {minutes:g} minutes")
        return 8

    monkeypatch.setattr(settle, "steps_within", steps_within)
    return asked


def test_a_resumed_run_takes_the_steps_that_were_measured_when_it_began(
    pictures: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bit for bit, and nothing is measured again."""
    from metapl.training.loss_trainer import LossTrainer

    whole, pieces = tmp_path / "whole", tmp_path / "pieces"
    flags = (*SMALL, "--method", "uda", "--minutes", "0.5")
    assert main(command(pictures, whole, *flags)) == 0
    assert measured == ["steps of uda in 0.5 minutes"]
    assert result(whole)["steps"] == 8
    step, calls = LossTrainer.step, []

    def stopping(self: LossTrainer, *given: Any) -> Any:
        calls.append(1)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return step(self, *given)

    with monkeypatch.context() as patched:
        patched.setattr(LossTrainer, "step", stopping)
        assert main(command(pictures, pieces, *flags)) == 130
    measured.clear()
    monkeypatch.setattr(settle, "steps_within", lambda *given: pytest.fail("measured again"))
    assert main(command(pictures, pieces, *flags, "--resume")) == 0
    for name in ("result.json", "metrics.jsonl", WEIGHTS["student"], WEIGHTS["finetuned"]):
        assert (pieces / name).read_bytes() == (whole / name).read_bytes(), name
    # A finished run is left alone, and another number of steps is another recipe.
    assert main(command(pictures, pieces, *flags, "--resume")) == 0
    assert main(command(pictures, pieces, *flags, "--resume", "--steps", "9")) == 2


def test_a_comparison_runs_each_method_with_the_same_settled_steps(
    pictures: Path, tmp_path: Path, measured: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    out, methods = tmp_path / "all", ("mpl", "uda", "fixmatch", "supervised")
    train(capsys, pictures, out, *SMALL, "--compare", "--methods", *methods, "--jobs", "1", test="test")
    assert len(measured) == 1
    stored = [json.loads((out / one / "seed-0" / "recipe.json").read_text())["recipe"] for one in methods]
    assert [one["method"] for one in stored] == list(methods)
    recipes = [one["fields"] for one in stored]
    assert [fields.pop("steps") for fields in recipes] == [8] * len(methods)
    shared = set.intersection(*(set(fields) for fields in recipes))
    assert {"changes", "schedule", "validate_every"} <= shared
    assert all(fields[name] == recipes[0][name] for fields in recipes for name in shared)
    assert recipes[0]["wait"] == 6  # which those without a student leave out
    teachers = [sorted(path.name for path in (out / one / "seed-0").glob("*.safetensors")) for one in methods]
    assert [WEIGHTS["teacher"] in names for names in teachers] == [True, False, False, False]

    found, first = unsealed(out), unsealed(out / "mpl" / "seed-0")
    assert {name: found[name] for name in first} == first
    assert found["delivery"].startswith("delivered: Meta Pseudo Labels, seed 0, the first one named")
    for name, file in WEIGHTS.items():
        assert (out / file).read_bytes() == (out / "mpl" / "seed-0" / file).read_bytes()
        told = json.loads(said(capsys, "evaluate", out, "--json", "--network", name))
        assert told["accuracy"] == told["recorded_accuracy"] == found[f"{name}_test_accuracy"]
    singles = said(capsys, "compare", *(out / one / "seed-0" for one in methods))
    assert "against those of mpl" in singles or "MPL's student" in singles


def test_runs_with_the_same_minutes_are_paired_whatever_the_steps_they_had(
    pictures: Path, tmp_path: Path, measured: list[str], monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    runs = []
    for seed, method, steps in ((0, "uda", 8), (1, "uda", 20), (0, "mpl", 9), (1, "mpl", 8)):
        monkeypatch.setattr(settle, "steps_within", lambda recipe, minutes, steps=steps: steps)
        runs.append(tmp_path / f"{method}-{seed}")
        flags = ("--seed", str(seed), "--method", method, "--minutes", "0.5")
        train(capsys, pictures, runs[-1], *SMALL, *flags, test="test")
    told = said(capsys, "compare", *runs)
    table, paired = told.split("\n\n")[1], told.split("\n\n")[-1]
    assert [line.split()[1:4] for line in table.splitlines()] == [
        ["method", "seeds", "steps"], ["uda", "0", "8"], ["uda", "1", "20"], ["mpl", "0", "9"], ["mpl", "1", "8"]
    ]  # fmt: skip
    assert "The numbers of steps differ: each run took as many as fitted into its minutes." in " ".join(told.split())
    assert "The students by seed (0-1), against those of uda:" in paired
    assert re.search(r"points  mpl \(", paired)
    assert "steps" not in said(capsys, "compare", runs[0], runs[3])  # both took 8


def test_what_follows_from_the_minutes_does_not_tell_runs_apart() -> None:
    """The shares of the steps neither, but for those that were given; steps that were given stay as they are."""
    fitted = {"network_name": "small_cnn", "image_size": 8, "grey": False, "precision": "float32", "val_fraction": 0.0}
    fitted |= {"mean": (0.5,) * 3, "std": (0.25,) * 3, "class_names": ("a", "b")}

    def fields(steps: int, minutes: float | None, **given: Any) -> dict[str, Any]:
        recipe = ImageFolders(labeled="a", unlabeled="b", minutes=minutes, **fitted, **{"method": "mpl"} | given)
        return _fields(recipe.scheduled(steps))

    shares = ("steps", "wait", "warmup", "uda_ramp", "uda_start", "validate_every")
    few, many = fields(80, 0.5), fields(200, 0.5)
    assert few == many
    assert [few[name] for name in shares] == [MEASURED] * len(shares)
    assert fields(80, 0.5) == {**fields(80, 0.7), "minutes": 0.5}
    assert fields(80, 0.5, warmup=7) == {**few, "warmup": 7}
    of_uda = fields(80, 0.5, method="uda")
    assert of_uda == {name: few[name] for name in of_uda}, "the method is looked at apart"
    asked = fields(80, None)
    assert [asked[name] for name in shares] == [80, 60, 4, 8, 32, 4]
