"""The loop around the steps: what it schedules, averages and selects, against hand computations."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from feed_sources import same
from fits import (
    VALIDATION,
    _one_thread,  # noqa: F401  # used by every test
    batches,
    bilevel,
    copied,
    network,
    rows,
    single,
)
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from metapl import MetaplError
from metapl.metrics import evaluate_logits
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training import Trainer


@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0), ("cosine", 3), ("constant", 0), ("constant", 4)])
def test_every_step_runs_at_the_rates_of_the_schedule(schedule: Any, warmup: int) -> None:
    trainer, seen = bilevel(), []
    step = trainer.step

    def noted(*data: Any) -> Any:
        seen.append([o.param_groups[0]["lr"] for o in trainer.schedulable])
        return step(*data)

    trainer.step = noted  # type: ignore[method-assign]
    trainer.fit(*batches(3), steps=10, schedule=schedule, warmup=warmup)
    after = [1.0 if schedule == "constant" else (1 + math.cos(math.pi * t / (10 - warmup))) / 2 for t in range(10)]
    factors = [(t + 1) / warmup for t in range(warmup)] + after[: 10 - warmup]
    assert seen == [pytest.approx([0.1 * f, 0.05 * f], rel=1e-12) for f in factors]
    assert [o.param_groups[0]["lr"] for o in trainer.schedulable] == [0.1, 0.05]


@pytest.mark.parametrize(("decay", "validation"), [(0.3, None), (0.99, VALIDATION)])
def test_the_average_is_that_of_a_loop_by_hand(decay: float, validation: Any) -> None:
    fitted, twin, (labeled, unlabeled) = bilevel(), bilevel(), batches(8)
    torch.manual_seed(1)
    found = fitted.fit(labeled, unlabeled, steps=8, schedule="constant", ema_decay=decay, validation=validation)
    torch.manual_seed(1)
    average = copied(twin.student)
    for t, data in enumerate(zip(labeled, unlabeled, strict=True)):
        twin.step(*data)
        d = min(decay, (1 + t) / (10 + t))
        average = {n: d * average[n] + (1 - d) * p for n, p in copied(twin.student).items()}
    buffers = {n: b.clone() for n, b in twin.student.named_buffers()}  # statistics are the student's own
    for name, value in {**average, **buffers}.items():
        torch.testing.assert_close(found.weights[name], value, rtol=1e-5, atol=1e-6)
        assert torch.equal(fitted.student.state_dict()[name], found.weights[name])
    assert any(not torch.equal(found.weights[n], p) for n, p in twin.student.named_parameters())


def test_the_latest_best_by_validation_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    trainer, steps, wanted = single(), 5, iter([0.9, 0.2, 0.6, 0.4, 0.6, 0.5])  # the first before the first step
    seen: list[dict[str, Tensor]] = []

    def scripted(*_: Any) -> Any:
        seen.append(copied(trainer.student))
        accuracy = next(wanted)
        return type("Found", (), {"value": accuracy, "n": len(VALIDATION[1])})

    monkeypatch.setattr("metapl.metrics.metric.evaluate_logits", scripted)
    found = trainer.fit(batches(3)[0], steps=steps, validation=VALIDATION, validate_every=1)
    assert (found.validation_accuracy, found.step, len(seen)) == (0.6, 4, 1 + steps)
    assert same(found.weights, seen[4])
    assert same(copied(trainer.student), seen[4])
    assert not same(seen[2], seen[4])


@pytest.mark.parametrize("ema", [None, 0.9])
def test_what_was_validated_is_what_is_kept(ema: float | None) -> None:
    trainer = single()
    found = trainer.fit(batches(4)[0], steps=30, validation=VALIDATION, validate_every=7, ema_decay=ema)
    assert found.step in (7, 14, 21, 28, 30)
    assert found.validation_accuracy == trainer.evaluate(VALIDATION).accuracy
    model = network().eval()
    model.load_state_dict(found.weights)
    assert evaluate_logits(model(VALIDATION[0]), VALIDATION[1]).accuracy == found.validation_accuracy


def poisoned(number: int, at: int) -> list[Any]:
    """Inputs are finite throughout; the network of :func:`trapped` is not on batch ``at``."""
    labeled = batches(number)[0]
    labeled[at - 1][0][0, 0] = 1e6
    return labeled


def trapped(trainer: Any) -> Any:
    def trap(module: nn.Module, given: tuple[Tensor], logits: Tensor) -> Tensor:
        return logits * (math.nan if given[0].max() > 1e5 else 1.0)

    trainer.student.register_forward_hook(trap)
    return trainer


@pytest.mark.parametrize("trainer", [single, bilevel])
@pytest.mark.parametrize("bad", [1, 8, 10, 12, 20])
def test_a_nan_stops_the_run_at_its_step(trainer: Callable[[], Trainer], bad: int, tmp_path: Path) -> None:
    """Between the steps that are logged, validated or saved as well as on them."""
    labeled, unlabeled = poisoned(20, bad), batches(20)[1]
    saved = 4 * ((bad - 1) // 4)
    with pytest.raises(MetaplError, match=f"step {bad}\\b"):
        trapped(trainer()).fit(
            labeled,
            unlabeled,
            steps=20,
            log_every=5,
            save_every=4,
            validation=VALIDATION,
            validate_every=6,
            out=tmp_path,
        )
    kept = CheckpointFolder(tmp_path / "checkpoints/fit").newest()
    assert (kept.state["step"] if kept else 0) == saved
    if (tmp_path / "metrics.jsonl").exists():  # a first step that is refused leaves nothing
        assert all(row["step"] < bad for row in rows(tmp_path))
    if kept:
        assert all(torch.isfinite(t).all() for t in pytree.tree_leaves(kept.state) if isinstance(t, Tensor))


def test_weights_that_blow_up_are_not_saved_although_the_loss_is_finite(tmp_path: Path) -> None:
    trainer = single()
    trainer.student[0].weight.register_hook(lambda g: g * math.inf)
    with pytest.raises(MetaplError):
        trainer.fit(batches(4)[0], steps=5, save_every=1, log_every=5, out=tmp_path)
    assert not list(tmp_path.glob("checkpoints/**/*.ckpt"))
