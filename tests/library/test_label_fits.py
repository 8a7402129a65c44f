"""All label methods in a fit: what is recorded, what the checkpoints hold, and going on in the middle."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from problems_zoo import toy
from test_label_problems import METHODS, stop_after
from test_learning_to_reweight import X as REWEIGHTED_X
from test_learning_to_reweight import Y as REWEIGHTED_Y
from torch import Tensor, nn

import metapl
from metapl.problems import LearningToReweight, Table
from metapl.runs import checkpoint
from metapl.training import FitResult

NAMES = [*METHODS, "learning_to_reweight"]
STEPS, STOPPED = 6, 3


def built(name: str) -> tuple[metapl.BilevelTrainer, dict[str, Any]]:
    """A trainer of a method with Adam for its teacher, and its sources of batches."""
    case = toy("batch_norm", dtype=torch.float32)
    torch.manual_seed(4)
    if name == "learning_to_reweight":
        teacher, problem, batch = None, LearningToReweight(), (REWEIGHTED_X, REWEIGHTED_Y)
        options = {}
    else:
        method = METHODS[name]
        teacher, problem, batch = method.teacher(), method.problem, method.batch
        options = {"outer_optimizer": torch.optim.Adam(teacher.parameters(), lr=0.1)}
    batch = tuple(t.float() if t.is_floating_point() else t for t in batch)
    trainer = metapl.BilevelTrainer(teacher, case.student, "forward", problem=problem, **options)
    return trainer, {"labeled": [case.labeled] * 2, "unlabeled": [batch] * 3, "validation": case.labeled}


def fit(name: str, steps: int = STEPS, **options: Any) -> tuple[metapl.BilevelTrainer, FitResult]:
    trainer, sources = built(name)
    callbacks: list[Callable[..., None]] = [] if steps == STEPS else [stop_after(steps)]
    how: dict[str, Any] = {"validate_every": 2, "log_every": 1, "save_every": 1, "ema_decay": 0.9, "progress": False}
    return trainer, trainer.fit(**sources, steps=STEPS, callbacks=callbacks, **how, **options)


def weights(trainer: metapl.BilevelTrainer, found: FitResult) -> dict[str, Tensor]:
    nets: dict[str, nn.Module | None] = {"student": trainer.student, "teacher": trainer.teacher}
    live = {f"{role}.{n}": t for role, net in nets.items() if net is not None for n, t in net.state_dict().items()}
    return live | {f"kept.{n}": t for n, t in found.weights.items()}


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_goes_on_in_its_middle_with_the_same_rows_and_weights(name: str, tmp_path: Path) -> None:
    whole = fit(name)
    with pytest.raises(KeyboardInterrupt):
        fit(name, STOPPED, out=tmp_path / "run")
    resumed = fit(name, out=tmp_path / "run", resume=True)
    expected, got = weights(*whole), weights(*resumed)
    assert expected.keys() == got.keys()
    assert all(torch.equal(t, got[n]) for n, t in expected.items())
    rows = [json.dumps(row) for row in whole[1].history]  # a NaN is itself
    assert rows == [json.dumps(row) for row in resumed[1].history]
    assert [row["step"] for row in whole[1].history] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("name", NAMES)
def test_a_fit_records_losses_feedback_and_validation(name: str, tmp_path: Path) -> None:
    trainer, found = fit(name, out=tmp_path / "run")
    columns = {"inner_loss", "outer_loss", "feedback_mean", "feedback_std", "student_lr"}
    columns |= set() if trainer.teacher is None else {"teacher_lr"}
    assert all(columns <= row.keys() for row in found.history)
    accuracies = {row["step"]: row.get("student_validation_accuracy") for row in found.history}
    assert [step for step, accuracy in accuracies.items() if accuracy is not None] == [2, 4, 6]
    assert found.validation_accuracy == max(accuracies[step] or 0 for step in (2, 4, 6))
    assert found.validation_accuracy == trainer.evaluate(built(name)[1]["validation"]).accuracy
    written = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["inner_loss"] for row in written if "inner_loss" in row] == [row["inner_loss"] for row in found.history]


@pytest.mark.parametrize("name", NAMES)
def test_what_is_learned_about_labels_is_in_the_checkpoints(name: str, tmp_path: Path) -> None:
    first = built(name)[0].teacher
    with pytest.raises(KeyboardInterrupt):
        fit(name, STOPPED, out=tmp_path / "run")
    kept = sorted((tmp_path / "run").rglob("*.ckpt"))[-1]
    state = checkpoint.load(kept)["trainer"]
    assert state["steps_done"] == STOPPED - 1  # callbacks come before the checkpoint of their step
    if first is None:
        assert state["teacher"] is None
        return
    assert state["teacher"].keys() == first.state_dict().keys()
    moved = {n: not torch.equal(t, state["teacher"][n]) for n, t in first.state_dict().items()}
    assert any(moved.values())
    if isinstance(first, Table):
        change = (state["teacher"]["values"] - first.values).reshape(len(first.values), -1).abs().amax(1) > 0
        drawn = METHODS[name].batch[-1].unique().tolist() if name.startswith("example") else range(len(change))
        assert change.nonzero().flatten().tolist() == sorted(drawn)  # the rows of the batches, and no other
