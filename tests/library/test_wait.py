"""The student's wait: at first the teacher trains alone, and the student begins as if nothing had been before."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from fits import VALIDATION, batches, bilevel, copied, network, rows, same
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import UDA, CrossEntropy, MetaplError
from metapl.execution import checks
from metapl.feedback import LossDifference, Reinforce
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training import FitOptions
from metapl.training.loss_trainer import LossTrainer

LOSSES = (CrossEntropy(label_smoothing=0.1), UDA(temperature=0.7, threshold=0.3, weight=2.0, ramp=5))


def pairs(number: int, seed: int = 0) -> list[tuple[Any, tuple[Tensor, Tensor]]]:
    """Labelled batches, and unlabelled ones in two views."""
    labeled, weak = batches(number, seed)
    return [(one, (x, x + 0.1 * x.roll(1, 0))) for one, x in zip(labeled, weak, strict=True)]


def alone(teacher: nn.Module, **options: Any) -> LossTrainer:
    """The same teacher in a trainer that has nothing else."""
    twin = network()
    twin.load_state_dict(copied(teacher))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    return LossTrainer(twin, LOSSES, optimizer=optimizer, **options)


def moving(trainer: metapl.BilevelTrainer) -> Any:
    """All that a step may move but the teacher and its optimiser."""
    state = trainer.state_dict()
    kept = {name: state[name] for name in ("student", "inner", "mode_state", "generator")}
    return pytree.tree_map_only(Tensor, torch.clone, kept)


# ------------------------------------------------------------------------------------------------ the teacher's step


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.2}, {"precision": "bfloat16"}], ids=str)
def test_the_teacher_learns_as_it_would_without_a_student(options: dict[str, Any]) -> None:
    """Bit for bit, its dropout and its ramp included; the student and the generator for labels stand still."""
    drawing = torch.Generator().manual_seed(1)
    trainer = bilevel(Reinforce(baseline=0.9), teacher_losses=LOSSES, generator=drawing, **options)
    lonely, before = alone(trainer.teacher, **options), moving(trainer)
    reports, ends = [], []
    for one in (trainer, lonely):
        torch.manual_seed(3)
        step = one.teacher_step if isinstance(one, metapl.BilevelTrainer) else one.step
        reports.append([list(step(*data).as_dict().values()) for data in pairs(8)])
        ends.append(torch.get_rng_state())
    assert same(copied(trainer.teacher), copied(lonely.student))
    assert same(trainer.outer_optimizer.state_dict(), lonely.optimizer.state_dict())
    assert same(*ends)
    assert [sorted(values) for values in reports[0]] == [sorted(values) for values in reports[1]]
    assert same(moving(trainer), before)
    assert all(p.grad is None for module in (trainer.teacher, trainer.student) for p in module.parameters())
    assert trainer.steps_done == 8


def test_a_report_tells_the_teachers_losses() -> None:
    report = bilevel(teacher_losses=LOSSES).teacher_step(*pairs(1)[0])
    told = report.as_dict()
    assert report.step == 0
    assert told["teacher_uda"] == 0  # the ramp's first step
    assert told == {
        "teacher_cross_entropy": told["teacher_loss"],
        "teacher_uda": 0.0,
        "teacher_loss": pytest.approx(told["teacher_cross_entropy"]),
    }


def test_one_view_and_the_default_losses_do() -> None:
    labeled, unlabeled = batches(1)
    assert set(bilevel().teacher_step(labeled[0], unlabeled[0]).as_dict()) == {"teacher_cross_entropy", "teacher_loss"}
    assert "teacher_uda" in bilevel().teacher_step(*pairs(1)[0]).as_dict()


def test_the_weak_views_pass_leaves_no_graph() -> None:
    """Under autocast too, where casts of weights are remembered, the passes after it have their gradients."""
    trainer = bilevel(teacher_losses=(UDA(), CrossEntropy()), precision="bfloat16")
    with_graph = []
    trainer.teacher.register_forward_hook(lambda module, given, logits: with_graph.append(logits.requires_grad))
    before = copied(trainer.teacher)
    trainer.teacher_step(*pairs(1)[0])
    assert with_graph == [False, True, True]
    assert all(not torch.equal(before[name], p) for name, p in trainer.teacher.named_parameters())


@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing_but_memory(accumulate: int) -> None:
    ends = []
    for parts in (1, accumulate):
        torch.manual_seed(0)
        teacher, student = (nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2))
        trainer = metapl.BilevelTrainer(
            teacher, student, "forward", teacher_losses=LOSSES, clip_norm=0.5, accumulate=parts
        )
        labeled, unlabeled = batches(3, rows=8)
        for (x, y), weak in zip(labeled, unlabeled, strict=True):
            report = trainer.teacher_step((x.double(), y), (weak[:8].double(), weak[:8].flip(1).double()))
        ends.append((copied(teacher), report.as_dict()))
    (whole, told), (split, same_told) = ends
    for name, value in whole.items():
        torch.testing.assert_close(split[name], value, rtol=1e-9, atol=1e-12)
    assert same_told == pytest.approx(told, rel=1e-9)


def with_label(label: int) -> Any:
    (x, y), unlabeled = pairs(1)[0]
    return (x, torch.full_like(y, label)), unlabeled


def with_nan() -> Any:
    labeled, (weak, strong) = pairs(1)[0]
    return labeled, (weak, strong * math.nan)


WRONG: dict[str, Callable[[], Any]] = {
    "label too large": lambda: with_label(3),
    "negative label": lambda: with_label(-1),
    "nan": with_nan,
    "one view": lambda: (pairs(1)[0][0], pairs(1)[0][1][0]),
    "no unlabelled ones": lambda: (pairs(1)[0][0], None),
}


def everything(trainer: metapl.BilevelTrainer) -> Any:
    state = pytree.tree_map_only(Tensor, torch.clone, trainer.state_dict())
    return state, torch.get_rng_state()


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_batch_is_refused_and_nothing_moves(kind: str) -> None:
    trainer = bilevel(teacher_losses=(*LOSSES[:1], UDA(threshold=0.3)))
    trainer.teacher_step(*pairs(1)[0])
    before = everything(trainer)
    with pytest.raises((MetaplError, IndexError, ValueError, TypeError)):
        trainer.teacher_step(*WRONG[kind]())
    assert same(everything(trainer), before)


# ---------------------------------------------------------------------------------------------------- the loop's wait


def sources(number: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    both = pairs(number, seed)
    return [labeled for labeled, _ in both], [unlabeled for _, unlabeled in both]


@pytest.mark.parametrize("mode", ["forward", Reinforce(baseline=0.9), LossDifference(baseline=0.5)], ids=str)
def test_after_the_wait_steps_are_those_of_a_trainer_that_begins_with_this_teacher(mode: Any) -> None:
    """Which was trained by itself; bit for bit, with the ramp of the teacher's losses going on."""
    data, wait = pairs(9), 4

    def drawing() -> torch.Generator:
        return torch.Generator().manual_seed(2)

    waited = bilevel(mode, teacher_losses=LOSSES, generator=drawing())
    lonely = alone(waited.teacher)
    torch.manual_seed(3)
    waited.fit(*sources(9), steps=9, wait=wait, schedule="constant")

    plain = bilevel(mode, teacher_losses=LOSSES, generator=drawing())
    torch.manual_seed(3)
    for one in data[:wait]:
        lonely.step(*one)
    plain.teacher.load_state_dict(lonely.student.state_dict())
    plain.outer_optimizer.load_state_dict(lonely.optimizer.state_dict())
    plain.steps_done = wait
    for one in data[wait:]:
        plain.step(*one)
    assert same(waited.state_dict(), plain.state_dict())


@pytest.mark.parametrize("inner", ["sgd", "torchopt"])
@pytest.mark.parametrize(("schedule", "warmup"), [("cosine", 0), ("cosine", 3), ("constant", 2)])
def test_the_students_schedule_counts_from_the_end_of_its_wait(inner: str, schedule: Any, warmup: int) -> None:
    transform = {"inner": lambda _: torchopt.sgd(0.1, momentum=0.9)} if inner == "torchopt" else {}
    trainer, steps, wait, seen = bilevel(**transform), 12, 4, []

    def noted(name: str, step: Callable[..., Any]) -> Callable[..., Any]:
        def stepping(*data: Any) -> Any:
            seen.append((name, *(o.param_groups[0]["lr"] for o in trainer.schedulable)))
            return step(*data)

        return stepping

    trainer.step = noted("both", trainer.step)  # type: ignore[method-assign]
    trainer.teacher_step = noted("teacher", trainer.teacher_step)  # type: ignore[method-assign]
    trainer.fit(*batches(3), steps=steps, wait=wait, schedule=schedule, warmup=warmup)

    def factor(t: int, steps: int) -> float:
        if t < warmup:
            return (t + 1) / warmup
        return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2

    for t, (name, *rates) in enumerate(seen):
        student = 0.0 if t < wait else 0.1 * factor(t - wait, steps - wait)
        expected = [student, 0.05 * factor(t, steps)][-len(rates) :]
        assert name == ("teacher" if t < wait else "both")
        assert rates == pytest.approx(expected, rel=1e-12), t
    assert [len(seen), len(seen[0])] == [steps, 2 if transform else 3]
    assert [o.param_groups[0]["lr"] for o in trainer.schedulable] == ([0.05] if transform else [0.1, 0.05])


def test_while_it_waits_the_student_is_neither_validated_nor_kept_nor_averaged(tmp_path: Path) -> None:
    trainer, wait = bilevel(teacher_losses=LOSSES), 5
    how: dict[str, Any] = {"validate_every": 2, "log_every": 1, "ema_decay": 0.99, "save_every": 4}
    found = trainer.fit(*sources(4), steps=11, wait=wait, validation=VALIDATION, out=tmp_path, keep=9, **how)
    logged = {row["step"]: row for row in rows(tmp_path)}
    validated = [step for step, row in logged.items() if "teacher_validation_accuracy" in row]
    assert validated == [2, 4, 6, 8, 10, 11]
    assert [step for step in validated if "student_validation_accuracy" in logged[step]] == [6, 8, 10, 11]
    assert found.step > wait
    assert [step for step, row in logged.items() if "inner_loss" in row] == list(range(6, 12))
    assert [row["student_lr"] for step, row in logged.items() if step <= wait] == [0.0] * wait
    assert all({"teacher_loss", "teacher_uda", "teacher_lr"} <= row.keys() for row in logged.values())
    _, begun, untouched = CheckpointFolder(tmp_path / "checkpoints/fit").paths()  # after steps 11, 8 and 4
    fresh = copied(bilevel().student)
    for path, moved in ((untouched, False), (begun, True)):
        state = metapl.runs.checkpoint.load(path)
        assert state["averages"]["student"]["steps"] == (3 if moved else 0)
        assert same(state["trainer"]["student"], fresh) != moved
        assert bool(state["best"]["weights"]) == moved


def test_the_averages_decay_counts_the_students_own_steps() -> None:
    fitted, twin, wait = bilevel(), bilevel(), 4
    torch.manual_seed(1)
    found = fitted.fit(*sources(9), steps=9, wait=wait, schedule="constant", ema_decay=0.9)
    torch.manual_seed(1)
    average: dict[str, Tensor] = copied(twin.student)
    for t, data in enumerate(pairs(9), start=-wait):
        if t < 0:
            twin.teacher_step(*data)
            continue
        twin.step(*data)
        d = min(0.9, (1 + t) / (10 + t))
        average = {name: d * average[name] + (1 - d) * p for name, p in copied(twin.student).items()}
    for name, _ in twin.student.named_parameters():
        torch.testing.assert_close(found.weights[name], average[name], rtol=1e-5, atol=1e-6)


def test_a_run_is_resumed_with_the_wait_that_it_began_with(tmp_path: Path) -> None:
    how: dict[str, Any] = {"steps": 6, "out": tmp_path, "say": lambda _: None}
    bilevel().fit(*batches(3), wait=2, **how)
    with pytest.raises(MetaplError, match="wait was 2, now 3"):
        bilevel().fit(*batches(3), wait=3, resume=True, **how)


def test_a_batch_gone_wrong_in_the_wait_is_told_with_its_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a device, where the numbers are read later, too."""
    labeled, unlabeled = sources(6)
    labeled[2] = (labeled[2][0] * math.nan, labeled[2][1])
    for log_every in (1, 5):
        with pytest.raises(MetaplError, match=r"step 3\b"):
            bilevel(teacher_losses=LOSSES).fit(labeled, unlabeled, steps=6, wait=5, log_every=log_every)
        monkeypatch.setattr(checks, "waits", lambda t: True)


# ------------------------------------------------------------------------------------------------------- what cannot be


def test_a_warm_up_may_take_all_of_the_students_time() -> None:
    FitOptions(steps=5, wait=3, warmup=2)


def test_a_teacher_without_losses_cannot_train_alone() -> None:
    trainer = bilevel(teacher_losses=())
    before = everything(trainer)
    with pytest.raises(MetaplError, match=r"teacher_losses=\(\)\), so it cannot train without feedback"):
        trainer.teacher_step(*pairs(1)[0])
    with pytest.raises(MetaplError, match=r"step 1: the teacher has no losses of its own"):
        trainer.fit(*sources(3), steps=5, wait=2)
    assert same(everything(trainer), before)
