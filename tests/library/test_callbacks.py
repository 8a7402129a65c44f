"""What is called after each recorded row: what it sees, how it stops a fit, and what is left of it on resuming."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fits import VALIDATION, Counting, batches, bilevel, copied, rows, same, single

import metapl
from metapl import MetaplError, StopFit
from metapl.runs.checkpoint import CheckpointFolder

QUIET: dict[str, Any] = {"say": lambda _: None, "schedule": "constant", "log_every": 2}


def stop_at(step: int, reason: str = "enough") -> Callable[..., None]:
    def stop(at: int, row: Any, trainer: Any) -> None:
        if at == step:
            raise StopFit(reason)

    return stop


class Patience:
    """Stops when its count is reached; the count is saved."""

    def __init__(self, most: int) -> None:
        self.most, self.count = most, 0

    def __call__(self, step: int, row: Any, trainer: Any) -> None:
        self.count += 1
        if self.count == self.most:
            raise StopFit

    def state_dict(self) -> dict[str, int]:
        return {"count": self.count}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.count = state["count"]


def breaking(labeled: list[Any], at: int) -> list[Any]:
    return Counting(labeled, at, lambda: (_ for _ in ()).throw(KeyError("killed")))


@pytest.mark.parametrize("trainer", [single, bilevel])
def test_each_callback_sees_every_recorded_row_in_turn(trainer: Callable[[], Any], tmp_path: Path) -> None:
    one, seen = trainer(), []
    calls = [lambda *given, name=name: seen.append((name, *given)) for name in "ab"]
    found = one.fit(
        *batches(4), steps=7, log_every=2, validation=VALIDATION, validate_every=3, out=tmp_path, callbacks=calls
    )
    assert [(name, step) for name, step, _, _ in seen] == [(n, step) for step in (2, 3, 4, 6, 7) for n in "ab"]
    assert all(who is one for *_, who in seen)
    logged = [{name: value for name, value in row.items() if name != "phase"} for row in rows(tmp_path)]
    assert [row for name, _, row, _ in seen if name == "a"] == logged == found.history
    assert "student_validation_accuracy" in found.history[1]
    assert "loss_cross_entropy" in found.history[0] or "outer_loss" in found.history[0]


def test_without_a_folder_the_history_is_there_too() -> None:
    assert [row["step"] for row in single().fit(batches(4)[0], steps=5, log_every=2).history] == [2, 4, 5]


def test_a_callback_sees_the_student_of_its_step_and_disturbs_nothing() -> None:
    """Not by what it draws, nor by writing to its row or predicting."""
    ends, losses = [], []

    def look(step: int, row: dict[str, float], trainer: Any) -> None:
        losses.append((step, trainer.predict(VALIDATION[0])))
        torch.rand(step)
        row.clear()

    for calls in ([look], []):
        trainer = bilevel("reinforce")
        torch.manual_seed(1)
        found = trainer.fit(*batches(4), steps=6, callbacks=calls, **QUIET)
        ends.append((trainer.state_dict(), torch.get_rng_state(), found.history))
    assert same(*ends)
    assert torch.equal(losses[-1][1], trainer.predict(VALIDATION[0]))
    assert not torch.equal(losses[0][1], losses[-1][1])


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_fit_that_is_stopped_is_one_of_so_many_steps(ema: float | None, tmp_path: Path) -> None:
    """The steps that were done are kept, and saved; the other callbacks see the last row too."""
    ends, seen, said = [], [], []
    for steps, calls in ((20, [stop_at(6), lambda step, *_: seen.append(step)]), (6, [])):
        trainer = bilevel()
        torch.manual_seed(1)
        out = tmp_path / str(steps)
        how = QUIET | {"say": said.append, "save_every": 5, "ema_decay": ema}
        found = trainer.fit(*batches(4), steps=steps, out=out, callbacks=calls, **how)
        last = CheckpointFolder(out / "checkpoints/fit").newest()
        assert last is not None
        assert (found.step, last.state["step"]) == (6, 6)
        ends.append((trainer.state_dict(), found.weights, last.state["trainer"]))
    assert same(*ends)
    assert (seen, said) == ([2, 4, 6], ["stopped after step 6 by a callback: enough"])


def test_a_fit_that_is_stopped_keeps_the_best_student_by_validation() -> None:
    ends = []
    for steps, calls in ((60, [stop_at(40)]), (40, [])):
        trainer = single()
        found = trainer.fit(
            batches(4)[0], steps=steps, validation=VALIDATION, validate_every=4, callbacks=calls, **QUIET
        )
        ends.append((found.validation_accuracy, found.step, found.weights, copied(trainer.student)))
    assert same(*ends)


@pytest.mark.parametrize("select", [True, False])
def test_the_step_at_which_a_fit_is_stopped_is_validated(select: bool, tmp_path: Path) -> None:
    """Between two validations too: the accuracy is that of the weights that are kept."""
    trainer = bilevel()
    how = QUIET | {"validation": VALIDATION, "validate_every": 50, "select": select, "out": tmp_path}
    found = trainer.fit(*batches(4), steps=60, callbacks=[stop_at(6)], **how)
    assert (found.step, found.validation_accuracy) == (6, trainer.evaluate(VALIDATION).accuracy)
    accuracies = [row["student_validation_accuracy"] for row in found.history if "student_validation_accuracy" in row]
    assert accuracies == [found.validation_accuracy]
    assert [{"phase": "fit", **row} for row in found.history] == rows(tmp_path)
    assert [row["step"] for row in found.history] == [2, 4, 6], "each step once"
    assert found.history[-1].keys() > found.history[0].keys()


def test_a_fit_that_is_stopped_while_the_student_waits_says_that_it_is_untrained() -> None:
    """The teacher that was trained is returned beside it."""
    trainer, said = bilevel(), []
    before = copied(trainer.student)
    how = QUIET | {"say": said.append, "wait": 8, "validation": VALIDATION, "validate_every": 50}
    found = trainer.fit(*batches(4), steps=20, callbacks=[stop_at(6)], **how)
    assert len(said) == 1
    assert "untrained" in said[0]
    assert same(found.weights, before)
    assert found.teacher_weights is not None
    assert not same(found.teacher_weights, copied(bilevel().teacher))
    assert (found.step, found.validation_accuracy) == (6, None)
    assert "teacher_validation_accuracy" in found.history[-1]


def test_a_stopped_fit_that_is_resumed_is_finished(tmp_path: Path) -> None:
    labeled, _ = batches(4)
    how = {"steps": 20, "out": tmp_path, **QUIET}
    stopped = single().fit(labeled, callbacks=[stop_at(6)], **how)
    trainer, seen = single(seed=3), []
    found = trainer.fit(labeled, resume=True, callbacks=[lambda *given: seen.append(given)], **how)
    assert (found.step, found.history, seen) == (6, stopped.history, [])
    assert same(found.weights, stopped.weights)
    assert same(copied(trainer.student), stopped.weights)


@pytest.mark.parametrize("killed", [3, 8, 11])
def test_the_history_of_a_resumed_fit_has_its_earlier_parts(killed: int, tmp_path: Path) -> None:
    """Each row once, those of lost work made anew, and what JSON has no number for too."""
    ends = []
    for at in (killed, 999):
        out = tmp_path / str(at)
        how = {"steps": 13, "out": out, "save_every": 5, **QUIET}
        labeled, unlabeled = batches(4)
        torch.manual_seed(1)
        if at == killed:
            with pytest.raises(KeyError, match="killed"):
                bilevel(teacher_losses=()).fit(breaking(labeled, at), unlabeled, **how)
        ends.append(bilevel(teacher_losses=()).fit(labeled, unlabeled, resume=True, **how).history)
    assert [row["step"] for row in ends[0]] == [2, 4, 6, 8, 10, 12, 13]
    for a, b in zip(*ends, strict=True):
        assert repr(a) == repr(b)


def test_a_callback_with_a_state_goes_on_where_it_was(tmp_path: Path) -> None:
    """Killed after step 7, it had counted two rows at the checkpoint of step 5; anew it would stop at step 18."""
    labeled, _ = batches(4)
    how: dict[str, Any] = {"steps": 30, "out": tmp_path, "save_every": 5, **QUIET}
    with pytest.raises(KeyError, match="killed"):
        single().fit(breaking(labeled, 8), callbacks=[print, Patience(7)], **how)
    assert single().fit(labeled, resume=True, callbacks=[Patience(7), print], **how).step == 14


def test_other_callbacks_than_before_are_refused(tmp_path: Path) -> None:
    how: dict[str, Any] = {"out": tmp_path, **QUIET}
    single().fit(batches(4)[0], steps=4, callbacks=[Patience(9)], **how)
    with pytest.raises(MetaplError, match="callbacks"):
        single().fit(batches(4)[0], steps=8, resume=True, **how)


def test_numbers_that_a_callback_returns_join_the_row(tmp_path: Path) -> None:
    """Also those of two, and not what is no dict."""
    calls = [lambda *_: {"a": 1.5}, lambda step, row, trainer: {"b": row["step"]}, lambda *_: True]
    found = single().fit(batches(3)[0], steps=3, log_every=1, callbacks=calls, out=tmp_path)
    assert [(row["a"], row["b"]) for row in found.history] == [(1.5, 1), (1.5, 2), (1.5, 3)]
    assert [{"phase": "fit", **row} for row in found.history] == rows(tmp_path)


def test_what_a_callback_raises_comes_out_as_it_is(tmp_path: Path) -> None:
    """And the learning rates are back where they were."""
    trainer = single()

    def fail(*_: Any) -> None:
        raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match=r"^mine$"):
        trainer.fit(batches(4)[0], steps=8, log_every=2, callbacks=[fail], out=tmp_path)
    assert trainer.optimizer.param_groups[0]["lr"] == 0.1
    assert [row["step"] for row in rows(tmp_path)] == [2]


def test_finetuning_takes_callbacks_and_has_a_history() -> None:
    found = bilevel().finetune(batches(4)[0], steps=9, callbacks=[stop_at(4, "")], **QUIET)
    assert (found.step, [row["step"] for row in found.history]) == (4, [2, 4])
    assert issubclass(metapl.StopFit, Exception)
