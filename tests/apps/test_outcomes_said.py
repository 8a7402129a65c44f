"""What the command says of a training that went wrong.

By its lines, in the listing, on the page, in the result.
"""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command import metapl, result
from sklearn.linear_model import LogisticRegression

from metapl.apps.digits import METHODS
from metapl.apps.model_card import sections_of
from metapl.apps.report_picture import panels_of
from metapl.apps.run_summary import linear_baseline, next_try, summary
from metapl.apps.settings import with_flags, with_settings_of
from metapl.apps.train import Measured, delivered
from metapl.feedback import estimator, prepare
from metapl.pictures import load_digits_split
from metapl.run_folder import EndedRun, guessing

DIGITS = ("train", "digits", "--finetune-steps", "20")
SHORT = (*DIGITS, "--steps", "200", "--validate-every", "50")


def text_of(*words: str) -> str:
    """Return what a command prints, without its line ends."""
    return " ".join(metapl(*words).stdout.split())


@pytest.fixture(scope="module")
def dead(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Return a run whose student died, beside a teacher that is well."""
    out = tmp_path_factory.mktemp("runs") / "dead"
    return out, text_of(*SHORT, "--student-lr", "30", "--out", str(out))


@pytest.fixture(scope="module")
def alive(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    out = tmp_path_factory.mktemp("runs") / "alive"
    return out, text_of(*DIGITS, "--steps", "400", "--out", str(out))


def test_a_dead_student_behind_a_healthy_teacher_is_said_everywhere(dead: tuple[Path, str]) -> None:
    out, said = dead
    assert "warning: the student is at chance on the validation data" in said
    assert re.search(
        r"Not shown to be better than guessing on test: the student \(\d+\.\d %\)", said
    )
    page = html.unescape((out / "report.html").read_text())
    warnings = result(out)["warnings"]
    assert any(warning.startswith("the student is at chance") for warning in warnings)
    for warning in warnings:
        assert f"Warning of the training: {warning}." in page
        assert f"Warning of the training: {warning}." in said
    assert "the teacher (" not in said.partition("Not shown to be")[2].partition(". ")[0]
    listed = text_of("runs", str(out))
    assert re.search(r"not better than guessing: .*student \d+\.\d %", listed)
    (entry,) = json.loads(metapl("runs", str(out), "--json").stdout)
    # The student has not learned the labels, though the teacher has.
    assert "other learning rates (--lr, and --student-lr" in said
    reached = result(out)
    assert reached["student_labeled_accuracy"] < 0.5 < reached["teacher_labeled_accuracy"]
    assert "student" in entry["guessing"]
    assert "teacher" not in entry["guessing"]
    assert "Not shown to be better than guessing" in (out / "report.html").read_text()


def test_a_training_that_comes_out_has_no_such_line(alive: tuple[Path, str]) -> None:
    out, said = alive
    listed = text_of("runs", str(out))
    for text in (said, listed):
        assert "warning" not in text
        assert "guessing" not in text


def test_digits_have_the_linear_baseline_of_their_labeled_pixels(alive: tuple[Path, str]) -> None:
    out, said = alive
    split = load_digits_split(2, 0)
    (x, y), (x_test, y_test) = split.labeled, split.test
    right = LogisticRegression(max_iter=1000).fit(x.flatten(1).double().numpy(), y.numpy())
    expected = float(np.mean(right.predict(x_test.flatten(1).double().numpy()) == y_test.numpy()))
    result = json.loads((out / "result.json").read_text())
    assert result["control_accuracy"] == pytest.approx(expected)
    assert f"of the labeled digits alone: {100 * expected:.1f} % on test" in said
    assert result["test_accuracy"] < expected
    assert "This run is behind its linear baseline. The labeled examples are memorized" in said
    assert "Try more steps (it took 400: --steps), more labels" in said
    ahead = {**result, "test_accuracy": 0.99}
    assert not [line for line in linear_baseline(ahead) if "behind" in line]


@pytest.mark.parametrize(
    ("recipe", "control_of", "ways"),
    [
        ("images", "pixels", ("--minutes", "--backbone NAME")),
        ("images", "features of the backbone", ("--minutes", "--tuning head")),
        # Methods without a teacher have no --student-lr.
        ("digits", "pixels", ("--lr, and --student-lr where a teacher labels", "--compare")),
    ],
)
def test_a_run_behind_its_baseline_says_what_to_do_next(
    recipe: str, control_of: str, ways: tuple[str, ...]
) -> None:
    content = {
        "recipe": recipe,
        "steps": 300,
        "control_accuracy": 0.8,
        "control_of": control_of,
        "test_accuracy": 0.7,
    }
    assert linear_baseline(content)[-1] == "This run is behind its linear baseline."
    said = next_try(content, ["student"])
    assert all(way in said for way in ways)
    assert "memorized" not in said
    # Lower rates do not help a network that has all labeled examples right.
    said = next_try({**content, "student_labeled_accuracy": 0.975}, ["student"])
    assert said.startswith("The labeled examples are memorized: 98 % of them are right. Try more ")
    assert "--lr" not in said
    assert ("--labels-per-class" if recipe == "digits" else "labeled ones or not") in said


@pytest.mark.parametrize("learned", [0.5, 0.975])
def test_noisy_student_is_told_flags_of_its_own_command(learned: float) -> None:
    content = {"recipe": "digits", "method": "noisy_student", "steps": 300}
    said = next_try({**content, "student_labeled_accuracy": learned}, ["student"])
    told = metapl("noisy-student", "digits", "--help").stdout
    flags = re.findall(r"--[a-z-]+", said)
    assert len(flags) == 2
    assert all(flag in told for flag in flags)


def test_what_was_skipped_and_not_chosen_is_said_wherever_a_run_is_described(
    alive: tuple[Path, str],
) -> None:
    out, _ = alive
    run = EndedRun.load(out)
    run.result["skipped_steps"] = 3
    run.result["steps_by_phase"] = {
        "finetune": {"taken": 9, "skipped": 0},
        "fit": {"taken": 397, "skipped": 3},
    }
    run.result["delivered_by"] = "rule"
    said = " ".join(summary(run.result))
    assert "To end in time not all steps were taken: fit 397 of 400." in said
    assert "validation cannot tell them apart." in said
    run.result["validation_accuracy"] = None
    assert "no examples are set aside to choose by." in " ".join(summary(run.result))
    notes = sections_of(run, "student")["Notes"]
    assert "(to end in time, not all were taken: fit 397 of 400)" in notes


def reaching(accuracy: float) -> Measured:
    return Measured({}, accuracy, None)


def test_what_is_delivered_is_never_far_behind_what_was_seen() -> None:
    well, dead = reaching(0.9), reaching(0.1)
    kept = {"student": dead, "teacher": well, "finetuned": dead}
    assert delivered(kept, select=True, last=False) == "teacher"
    # Of several rounds the teacher is delivered in no other case.
    assert delivered(kept, select=True, last=True) == "teacher"
    assert delivered({**kept, "student": reaching(0.7)}, select=True, last=True) == "student"
    assert delivered(kept, select=False, last=False) == "finetuned"  # too few examples to tell


def test_a_fixed_teacher_is_delivered_where_its_student_dies(tmp_path: Path) -> None:
    words = ("--method", "pseudo_labels", "--student-lr", "30", "--out", str(tmp_path / "run"))
    said = text_of(*SHORT, *words)
    assert "The network to use is the teacher: validation chose it" in said
    assert (tmp_path / "run/teacher.safetensors").is_file()
    again = text_of(*SHORT, *words[:2], "--student-lr", "1", "--out", str(tmp_path / "other"))
    assert "is the teacher" not in again
    assert not (tmp_path / "other/teacher.safetensors").exists()


COLLAPSES = (
    "--mode",
    "reinforce",
    "--reduction",
    "sum",
    "--feedback-weight",
    "3000",
    "--baseline",
    "0.9",
)


def test_a_collapsed_run_warns_by_flags_and_delivers_what_it_was(tmp_path: Path) -> None:
    """A teacher that has learned for a while forgets it when the feedback comes."""
    words = (*DIGITS, "--steps", "200", *COLLAPSES, "--wait", "100", "--validate-every", "10")
    said = text_of(*words, "--out", str(tmp_path / "whole"))
    assert "warning: the teacher's labels have collapsed onto few classes" in said
    assert (
        "leave out --feedback-weight, give --feedback-bound 0.1, or lower its learning rate" in said
    )
    assert "the teacher is kept as it was after step" in said
    result = json.loads((tmp_path / "whole/result.json").read_text())
    rows = [
        json.loads(line) for line in (tmp_path / "whole/metrics.jsonl").read_text().splitlines()
    ]
    seen = max(
        value
        for row in rows
        for name, value in row.items()
        if "validation_accuracy" in name and value
    )
    assert seen - result["validation_accuracy"] < 0.3
    assert result["delivered"] == "teacher"


def test_networks_that_guess_are_named_by_test_or_validation() -> None:
    result: dict[str, Any] = {
        "networks": {"student": "student", "teacher": "teacher"},
        "validation_size": 100,
    }
    result |= {
        "student_validation_accuracy": 0.12,
        "teacher_validation_accuracy": 0.6,
        "validation_chance": 0.1,
    }
    assert guessing(result) == {"student": 0.12}
    assert guessing({**result, "validation_chance": None}) == {}
    known = {"delivered": "teacher", "delivered_by": "validation", "validation_accuracy": 0.6}
    lines = " ".join(summary({**result, **known}))
    assert "Not shown to be better than guessing on validation: the student (12.0 %)" in lines
    assert lines.endswith(next_try(result, ["student"]))


# ------------------------------------------------------------------------- the size of the feedback


@pytest.mark.parametrize(
    "mode", ["reinforce", "loss_difference", "reinforce_per_example", "forward"]
)
def test_the_size_of_the_feedback_is_recorded_and_drawn_in_every_mode(
    mode: str, tmp_path: Path
) -> None:
    """A mode that sends back one number has no deviation in a batch, and is drawn all the same."""
    out = tmp_path / "run"
    metapl(*DIGITS, "--steps", "40", "--mode", mode, "--out", str(out))
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    taught = [row for row in rows if "feedback_mean" in row]
    assert len(taught) == 2
    assert all(
        row["feedback_rms"] > 0 and row["feedback_ratio"] > 0 and row["feedback_weight"] > 0
        for row in taught
    )
    panels = panels_of(taught, "network")
    (curve,) = panels["Size of the feedback"]
    assert curve.points == [(row["step"], row["feedback_ratio"]) for row in taught]
    drawn = [curve.name for curve in panels["Feedback to the teacher"]]
    is_scalar = mode in ("reinforce", "loss_difference")
    assert ("standard deviation in a batch" in drawn) == (not is_scalar)
    assert "root mean square in a batch" in drawn


# -------------------------------------------------------------------------- what is refused or said


@pytest.mark.parametrize("method", ["mpl", "none", "reduced_mpl"])
def test_a_mode_that_no_training_can_take_is_refused_before_anything_is_written(
    method: str, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    found = metapl(*DIGITS, "--method", method, "--mode", "implicit", "--out", str(out), code=2)
    assert "--mode implicit: expected one of " in found.stderr
    assert not out.exists()


def test_the_help_has_the_defaults_of_digits() -> None:
    text = " ".join(metapl("train", "digits", "--help").stdout.split())
    for flag, said in (("wait", "75 %"), ("uda-start", "40 %"), ("uda-ramp", "10 %")):
        expected = rf"--{flag} INT [^-]*By default it is {said} of the steps, and 0 for digits\."
        assert re.search(expected, text), flag
    mpl = METHODS["mpl"]
    assert (mpl.wait, mpl.uda.uda_start, mpl.uda.uda_ramp) == (0, 0, 0)


@pytest.mark.parametrize("mode", ["forward", "reinforce", "loss_difference"])
def test_controls_have_labels_of_the_kind_of_the_mode(mode: str) -> None:
    """Of ``--method none --mode``, of the methods of a comparison, and of stored labels."""
    expected = "soft" if mode == "forward" else "hard"
    asked = with_flags(METHODS["mpl"], mode=mode)
    for name in ("none", "reduced_none"):
        control = with_settings_of(METHODS[name], asked, METHODS["mpl"])
        assert control.feedback.problem().kind == expected
    assert prepare(asked.feedback.problem(), estimator(mode)).kind == expected
