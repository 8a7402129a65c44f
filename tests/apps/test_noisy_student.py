"""``metapl noisy-student``: rounds of labels, selection and training as phases of one run."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from metapl.apps.commands import main
from metapl.apps.experiments import rounds
from metapl.apps.experiments.folder import load_run
from metapl.apps.experiments.rounds import FOLDER, LABELS, SELECTED
from metapl.apps.labels import LabelStore, LabelWriter
from metapl.runs.fingerprints import fingerprint
from metapl.training.loss_trainer import LossTrainer

TINY = (
    *("noisy-student", "digits", "--steps", "6", "--rounds", "2", "--hidden", "4", "--labeled-batch", "8"),
    *("--ratio", "2", "--threshold", "0.12", "--log-every", "1", "--validate-every", "3", "--save-every", "2"),
)
"""A run of two rounds that takes two seconds."""


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("noisy") / "whole"
    assert main([*TINY, "--out", str(run)]) == 0
    return run


def contents(run: Path) -> dict[str, bytes]:
    names = ("metrics.jsonl", "result.json", "student.safetensors", "teacher.safetensors")
    return {name: (run / name).read_bytes() for name in names}


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_text()))


def test_a_round_learns_from_the_labels_of_the_network_before_it(whole: Path) -> None:
    """The last round's store holds what its teacher says of the pictures as they are, and result.json says so."""
    result, run = result_of(whole), load_run(whole)
    first, last = result["rounds"]
    assert result["method"] == "noisy_student"
    assert result["delivered"] == "student"
    assert result["test_accuracy"] == last["test_accuracy"]
    assert first["weights_fingerprint"] == last["teacher"]["weights_fingerprint"]
    assert first["test_accuracy"] == last["teacher"]["test_accuracy"]
    teacher = run.network("teacher")
    assert fingerprint(dict(teacher.state_dict())) == last["teacher"]["weights_fingerprint"]
    assert fingerprint(dict(run.network("student").state_dict())) == last["weights_fingerprint"]
    labels = LabelStore(whole / last["store"])
    assert labels.provenance["weights_fingerprint"] == last["teacher"]["weights_fingerprint"]
    images = run.recipe.task().unlabeled.images
    with torch.no_grad():
        expected = teacher.eval()(images).softmax(1)
    assert torch.allclose(labels[range(len(images))], expected, atol=2e-3)


def test_examples_above_the_threshold_are_kept_and_balanced(whole: Path) -> None:
    for each in result_of(whole)["rounds"]:
        place = whole / FOLDER / str(each["round"])
        labels, chosen = LabelStore(place / LABELS), LabelStore(place / SELECTED)
        sure = labels[range(len(labels))].max(1).values > 0.12
        assert each["kept"] == sum(each["kept_per_class"].values()) == len(chosen)
        assert abs(int(sure.sum()) - each["kept"]) <= 2  # float16 rounds
        counts = {count for count in each["copies_per_class"].values() if count}
        assert counts == {max(each["kept_per_class"].values())}
        assert each["copies"] == len(chosen.rows_with_copies()) == sum(each["copies_per_class"].values())
        assert each["unlabeled"] == sum(each["labeled_per_class"].values()) == len(labels)


def stops(patch: pytest.MonkeyPatch, owner: Any, name: str, at: int) -> None:
    """Ctrl-C in the middle of a call."""
    real, calls = getattr(owner, name), []

    def stopped(*given: Any, **named: Any) -> Any:
        calls.append(name)
        if len(calls) == at:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*given, **named)

    patch.setattr(owner, name, stopped)


@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (LossTrainer, "step", 3),  # while the first teacher is trained
        (LabelWriter, "add", 2),  # while its labels are stored
        (LabelWriter, "_describe", 4),  # while the last of them are
        (rounds, "select", 1),  # between labels and selection
        (LabelWriter, "add_table", 1),  # while the selection is written
        (LossTrainer, "step", 9),  # while the first student is trained
        (LabelWriter, "add", 7),  # while the first student labels
        (LossTrainer, "step", 17),  # while the last student is trained
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_a_run_that_is_stopped_in_any_stage_ends_as_one_that_was_not(
    owner: Any, name: str, at: int, whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        stops(patch, owner, name, at)
        assert main([*TINY, "--out", str(run)]) == 130
    assert not (run / "result.json").exists()
    assert main([*TINY, "--out", str(run), "--resume"]) == 0
    assert contents(run) == contents(whole)


def test_a_run_that_is_stopped_while_a_student_is_finetuned_ends_as_one_that_was_not(tmp_path: Path) -> None:
    command = (*TINY, "--training", "pretrain_finetune", "--finetune-steps", "4", "--dropout", "0.1")
    runs = tmp_path / "whole", tmp_path / "stopped"
    assert main([*command, "--out", str(runs[0])]) == 0
    with pytest.MonkeyPatch.context() as patch:
        stops(patch, LossTrainer, "step", 15)  # of the first student's finetuning, after two trainings of six
        assert main([*command, "--out", str(runs[1])]) == 130
    assert main([*command, "--out", str(runs[1]), "--resume"]) == 0
    assert contents(runs[0]) == contents(runs[1])
