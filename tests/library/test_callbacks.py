"""What is called after each recorded row: what it sees, and how it stops a fit."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from feed_sources import same
from fits import VALIDATION, batches, bilevel, rows, single

from metapl import StopFit
from metapl.runs.checkpoint import CheckpointFolder

QUIET: dict[str, Any] = {"say": lambda _: None, "schedule": "constant", "log_every": 2}


def stop_at(step: int, reason: str = "enough") -> Callable[..., None]:
    def stop(at: int, row: Any, trainer: Any) -> None:
        if at == step:
            raise StopFit(reason)

    return stop


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


@pytest.mark.parametrize("ema", [None, 0.9])
def test_a_fit_that_is_stopped_is_one_of_so_many_steps(ema: float | None, tmp_path: Path) -> None:
    """The steps that were done are kept, and saved; the other callbacks see the last row too."""
    ends, seen, said = [], [], []
    for steps, calls in ((20, [stop_at(6), lambda step, *_: seen.append(step)]), (6, [])):
        trainer = bilevel()
        torch.manual_seed(1)
        out = tmp_path / str(steps)
        how = QUIET | {"say": said.append, "save_every": 5, "ema_decay": ema, "validation": VALIDATION, "select": False}
        found = trainer.fit(*batches(4), steps=steps, out=out, callbacks=calls, **how)
        last = CheckpointFolder(out / "checkpoints/fit").newest()
        assert last is not None
        assert (found.step, last.state["step"]) == (6, 6)
        ends.append((trainer.state_dict(), found.weights, last.state["trainer"]))
        again = bilevel().fit(*batches(4), steps=steps, out=out, resume=True, **how | {"say": lambda _: None})
        assert (again.step, again.value) == (6, found.value), "it has ended"
    assert same(*ends)
    assert (seen, said) == ([2, 4, 6], ["stopped after step 6 by a callback: enough"])
