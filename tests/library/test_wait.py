"""The student's wait.

At first the teacher trains alone, and the student begins as if nothing had been before.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchopt
from feed_sources import same
from fits import VALIDATION, batches, bilevel, copied, network, rows
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import UDA, CrossEntropy
from metapl.feedback import LossDifference, Reinforce
from metapl.runs.checkpoint import CheckpointFolder
from metapl.training.loss_trainer import LossTrainer

LOSSES = (
    CrossEntropy(label_smoothing=0.1),
    UDA(temperature=0.7, threshold=0.3, weight=2.0, ramp=5),
)


def pairs(number: int, seed: int = 0) -> list[tuple[Any, tuple[Tensor, Tensor]]]:
    """Return labelled batches, and unlabelled ones in two views."""
    labeled, weak = batches(number, seed)
    data = []
    for outer, x in zip(labeled, weak, strict=True):
        strong = x + 0.1 * x.roll(1, 0)
        data.append((outer, (x, strong)))
    return data


def alone(teacher: nn.Module, **options: Any) -> LossTrainer:
    """Return a trainer of the same teacher that has nothing else."""
    twin = network()
    twin.load_state_dict(copied(teacher))
    optimizer = torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9)
    return LossTrainer(twin, LOSSES, optimizer=optimizer, **options)


def moving(trainer: metapl.BilevelTrainer) -> Any:
    """Return all that a step may move but the teacher and its optimiser."""
    state = trainer.state_dict()
    parts = {name: state[name] for name in ("student", "inner", "mode_state", "generator")}
    return pytree.tree_map_only(Tensor, torch.clone, parts)


@pytest.mark.parametrize("options", [{}, {"clip_norm": 0.2}, {"precision": "bfloat16"}], ids=str)
def test_the_teacher_learns_as_it_would_without_a_student(options: dict[str, Any]) -> None:
    """Bit for bit, its dropout and its ramp included.

    The student and the generator for labels stand still.
    """
    generator = torch.Generator().manual_seed(1)
    trainer = bilevel(
        Reinforce(baseline=0.9), teacher_losses=LOSSES, generator=generator, **options
    )
    lonely = alone(trainer.teacher, **options)
    state_before = moving(trainer)

    def numbers_of_steps(step: Callable[..., Any]) -> tuple[list[list[float]], Tensor]:
        """Return the sorted numbers of each report, and the default generator's state."""
        torch.manual_seed(3)
        numbers = [sorted(step(*data).as_dict().values()) for data in pairs(8)]
        return numbers, torch.get_rng_state()

    numbers, random_state = numbers_of_steps(trainer.teacher_step)
    lonely_numbers, lonely_random_state = numbers_of_steps(lonely.step)
    assert same(copied(trainer.teacher), copied(lonely.student))
    assert same(trainer.outer_optimizer.state_dict(), lonely.optimizer.state_dict())
    assert same(random_state, lonely_random_state)
    assert numbers == lonely_numbers
    assert same(moving(trainer), state_before)
    for module in (trainer.teacher, trainer.student):
        assert all(p.grad is None for p in module.parameters())
    assert trainer.steps_done == 8


def sources(number: int, seed: int = 0) -> tuple[list[Any], list[Any]]:
    data = pairs(number, seed)
    return [labeled for labeled, _ in data], [unlabeled for _, unlabeled in data]


@pytest.mark.parametrize(
    "mode", ["forward", Reinforce(baseline=0.9), LossDifference(baseline=0.5)], ids=str
)
def test_after_the_wait_steps_are_those_of_a_trainer_that_begins_with_this_teacher(
    mode: Any,
) -> None:
    """The other teacher was trained by itself.

    They are equal bit for bit, and the ramp of the teacher's losses goes on.
    """
    data = pairs(9)
    wait = 4

    def generator() -> torch.Generator:
        return torch.Generator().manual_seed(2)

    waited = bilevel(mode, teacher_losses=LOSSES, generator=generator())
    lonely = alone(waited.teacher)
    torch.manual_seed(3)
    waited.fit(*sources(9), steps=9, wait=wait, schedule="constant")

    plain = bilevel(mode, teacher_losses=LOSSES, generator=generator())
    torch.manual_seed(3)
    for outer, inner in data[:wait]:
        lonely.step(outer, inner)
    plain.teacher.load_state_dict(lonely.student.state_dict())
    plain.outer_optimizer.load_state_dict(lonely.optimizer.state_dict())
    plain.steps_done = wait
    for outer, inner in data[wait:]:
        plain.step(outer, inner)
    assert same(waited.state_dict(), plain.state_dict())


def test_a_warm_start_takes_the_teachers_average_and_the_students_begins_there() -> None:
    options: dict[str, Any] = {"schedule": "constant", "ema_decay": 0.9}
    waited = bilevel(
        inner=lambda student: torch.optim.SGD(student.parameters(), lr=0.0), teacher_losses=LOSSES
    )
    lonely = alone(waited.teacher)
    torch.manual_seed(3)
    lonely.fit(*sources(4), steps=3, **options)
    torch.manual_seed(3)
    waited.fit(*sources(4), steps=4, wait=3, warm_start=True, **options)
    for p, expected in zip(waited.student.parameters(), lonely.student.parameters(), strict=True):
        torch.testing.assert_close(p, expected)


@pytest.mark.parametrize("inner", ["sgd", "torchopt"])
@pytest.mark.parametrize(
    ("schedule", "warmup", "wait"),
    [("cosine", 0, 4), ("cosine", 3, 4), ("constant", 2, 4), ("cosine", 3, 0), ("constant", 0, 0)],
)
def test_every_step_runs_at_the_rates_of_the_schedule(
    inner: str, schedule: Any, warmup: int, wait: int
) -> None:
    """Which counts for the student from the end of its wait."""
    transform = {"inner": lambda _: torchopt.sgd(0.1, momentum=0.9)} if inner == "torchopt" else {}
    trainer = bilevel(**transform)
    steps = 12
    seen = list[Any]()

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
        return (
            1.0
            if schedule == "constant"
            else (1 + math.cos(math.pi * (t - warmup) / (steps - warmup))) / 2
        )

    for t, (name, *rates) in enumerate(seen):
        student = 0.0 if t < wait else 0.1 * factor(t - wait, steps - wait)
        expected = [student, 0.05 * factor(t, steps)][-len(rates) :]
        assert name == ("teacher" if t < wait else "both")
        assert rates == pytest.approx(expected, rel=1e-12), t
    assert [len(seen), len(seen[0])] == [steps, 2 if transform else 3]
    assert [o.param_groups[0]["lr"] for o in trainer.schedulable] == (
        [0.05] if transform else [0.1, 0.05]
    )


def test_while_it_waits_the_student_is_neither_validated_nor_kept_nor_averaged(
    tmp_path: Path,
) -> None:
    trainer = bilevel(teacher_losses=LOSSES)
    wait = 5
    result = trainer.fit(
        *sources(4),
        steps=11,
        wait=wait,
        validation=VALIDATION,
        validate_every=2,
        log_every=1,
        ema_decay=0.99,
        save_every=4,
        keep=9,
        out=tmp_path,
    )
    logged = {row["step"]: row for row in rows(tmp_path)}
    validated = [step for step, row in logged.items() if "teacher_validation_accuracy" in row]
    assert validated == [2, 4, 6, 8, 10, 11]
    of_student = [step for step in validated if "student_validation_accuracy" in logged[step]]
    assert of_student == [6, 8, 10, 11]
    assert result.step > wait
    assert [step for step, row in logged.items() if "inner_loss" in row] == list(range(6, 12))
    assert [row["inner_lr"] for step, row in logged.items() if step <= wait] == [0.0] * wait
    assert all({"teacher_loss", "teacher_uda", "outer_lr"} <= row.keys() for row in logged.values())
    _, after_8_steps, after_4_steps = CheckpointFolder(tmp_path / "checkpoints/fit").paths()
    fresh = copied(bilevel().student)
    for path, has_moved in ((after_4_steps, False), (after_8_steps, True)):
        state = metapl.runs.checkpoint.load(path)
        assert state["averages"]["student"]["steps"] == (3 if has_moved else 0)
        assert same(dict(state["trainer"]["student"]), fresh) != has_moved
        assert bool(state["best"]["weights"]) == has_moved
