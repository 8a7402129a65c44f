"""``metapl noisy-student``: rounds of labels, selection and training as phases of one run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_runs import NOISY_STUDENT, built_once, trained

from metapl.apps.experiments.folder import RunFolder, stored
from metapl.apps.experiments.rounds import FOLDER, LABELS, SELECTED
from metapl.apps.experiments.run import EndedRun
from metapl.apps.labels import LabelStore
from metapl.training.resuming import digest


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built_once(tmp_path_factory, "noisy student", lambda out: trained(*NOISY_STUDENT, "--out", str(out)))


def result_of(run: Path) -> dict[str, Any]:
    return dict(json.loads((run / "result.json").read_text()))


def test_a_round_learns_from_the_labels_of_the_network_before_it(whole: Path) -> None:
    """The last round's store holds what its teacher says of the pictures as they are, and result.json says so."""
    result, run = result_of(whole), EndedRun.load(whole)
    first, last = result["rounds"]
    assert result["method"] == "noisy_student"
    assert result["delivered"] == "student"
    assert result["test_accuracy"] == last["test_accuracy"]
    assert first["weights_fingerprint"] == last["teacher"]["weights_fingerprint"]
    assert first["test_accuracy"] == last["teacher"]["test_accuracy"]
    teacher = run.network("teacher")
    assert digest(dict(teacher.state_dict())) == last["teacher"]["weights_fingerprint"]
    assert digest(dict(run.network("student").state_dict())) == last["weights_fingerprint"]
    labels = LabelStore(whole / last["store"])
    assert labels.provenance["weights_fingerprint"] == last["teacher"]["weights_fingerprint"]
    images = stored(RunFolder(whole))[0].task().unlabeled.images
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
