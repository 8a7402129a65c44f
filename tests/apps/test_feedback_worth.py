"""A step of a stack of convolutional networks is that of the library, and its batches are what they are called."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import metapl
from metapl.problems.losses import UDA, CrossEntropy
from metapl.training.loss_trainer import LossTrainer

pytestmark = pytest.mark.docs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
SEEDS, STEPS, BATCH, CLASSES = (3, 4), 3, 5, 12


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import feedback_worth_pictures

    yield feedback_worth_pictures
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def networks(pictures: ModuleType, count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [pictures.network(pictures.named("letters")).double() for _ in range(count)]


def batches(pictures: ModuleType, lookahead: int) -> list[Any]:
    g = torch.Generator().manual_seed(1)

    def drawn() -> torch.Tensor:
        return torch.rand(len(SEEDS), BATCH, 1, 12, 12, generator=g, dtype=torch.float64)

    def step() -> Any:
        targets = torch.eye(CLASSES, dtype=torch.float64)[torch.randint(CLASSES, (len(SEEDS), BATCH), generator=g)]
        unlabeled = [[drawn() for _ in range(lookahead)] for _ in range(2)]
        return pictures.Batch(drawn(), targets, *unlabeled, torch.empty(0), torch.empty(0))

    return [step() for _ in range(STEPS)]


def difference(network: nn.Module, weights: list[torch.Tensor], seed: int) -> float:
    """The greatest one between a network's weights and those of one of a stack."""
    both = zip(network.parameters(), weights, strict=True)
    return max(float((own - of_stack[seed]).detach().abs().max()) for own, of_stack in both)


@pytest.mark.parametrize("lookahead", [1, 2])
def test_a_seed_of_the_stack_takes_the_steps_of_the_trainer(pictures: ModuleType, lookahead: int) -> None:
    from when_stack import Rule, Stack, cosine

    given, models = batches(pictures, lookahead), networks(pictures, 4)
    uda = lookahead == 1
    rule = Rule(student_lr=0.2, teacher_lr=0.05, uda=float(uda), temperature=0.5, size=3.0, lookahead=lookahead)
    passes = pictures.passes_of(pictures.outputs_of(models[0]))
    both = Stack(rule, pictures.stacked(models[:2]), pictures.stacked(models[2:]), 0.5, passes=passes)
    with torch.no_grad():
        for t, batch in enumerate(given):
            both.step(batch, cosine(t, STEPS))
    assert both.ratio.min() > 0.001
    for s in (0, 1):
        teacher, student = models[s], models[2 + s]
        trainer = metapl.BilevelTrainer(
            teacher,
            student,
            "forward",
            inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.2),
            outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.05, momentum=0.9),
            lookahead=lookahead,
            teacher_losses=(CrossEntropy(), UDA(0.5)) if uda else (CrossEntropy(),),
            feedback_weight=3.0,
        )
        trainer.fit(
            [(b.labeled[s], b.targets[s].argmax(-1)) for b in given],
            [(weak[s], strong[s]) for b in given for weak, strong in zip(b.weak, b.strong, strict=True)],
            steps=STEPS,
            log_every=STEPS,
            progress=False,
        )
        assert difference(student, both.student, s) < 1e-9
        assert difference(teacher, both.teacher, s) < 1e-9
        assert difference(teacher, both.teacher, 1 - s) > 1e-3


def test_a_teacher_alone_is_a_network_that_learns_from_both_kinds_of_pictures(pictures: ModuleType) -> None:
    from when_stack import Rule, Stack, cosine

    given, models = batches(pictures, 1), networks(pictures, 2)
    rule = Rule(teacher_lr=0.3, feedback="none", uda=1.0, temperature=0.0, threshold=0.1)
    passes = pictures.passes_of(pictures.outputs_of(models[0]))
    alone = Stack(rule, pictures.stacked(models), None, 0.5, passes=passes)
    with torch.no_grad():
        for t, batch in enumerate(given):
            alone.step(batch, cosine(t, STEPS))
    for s, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        LossTrainer(model, (CrossEntropy(), UDA(0.0, 0.1)), optimizer=optimizer).fit(
            [(b.labeled[s], b.targets[s].argmax(-1)) for b in given],
            [(b.weak[0][s], b.strong[0][s]) for b in given],
            steps=STEPS,
            log_every=STEPS,
            progress=False,
        )
        assert difference(model, alone.teacher, s) < 1e-9


def test_what_is_read_of_a_picture_depends_on_no_other(pictures: ModuleType, tmp_path: Path) -> None:
    place = pictures.Generated("letters", 30, 30, batch=16)
    task = pictures.GeneratedTask(place, SEEDS, torch.device("cpu"), tmp_path, 1)
    weights, (x, truth) = task.first_weights()[0], task.parts["test"]
    called, told = task.called(weights, "test")
    task.parts["few"] = x[3:5], truth[3:5]
    assert torch.equal(task.called(weights, "few")[0], called[:, 3:5])
    assert torch.equal(told, truth.expand(2, -1))
    # With as many known pictures as there are, it is what a pass of training says.
    known = task._known.expand(2, *[-1] * 4)
    assert torch.allclose(task._read(weights, known), task.passes.forward(weights, known)[1], atol=1e-4)


def test_the_batches_of_a_seed_do_not_depend_on_the_seeds_beside_it(pictures: ModuleType, tmp_path: Path) -> None:
    place = pictures.Generated("letters", 30, 30, batch=16)
    both = pictures.GeneratedTask(place, SEEDS, torch.device("cpu"), tmp_path, 1)
    alone = pictures.GeneratedTask(place, SEEDS[1:], torch.device("cpu"), tmp_path, 1)
    for name in ("unlabeled", "mean", "std"):  # unlabeled pictures come in a part for each seed
        setattr(alone, name, getattr(both, name))
    alone.labeled = tuple(part[1:] for part in both.labeled)
    steps = pictures.CHUNK + 1
    first, second = [*both.batches(steps)], [*alone.batches(steps)]
    for mine, beside in zip(second, first, strict=True):
        for own, of_both in ((mine.labeled, beside.labeled), (mine.weak[0], beside.weak[0])):
            assert torch.equal(own[0], of_both[1])
            assert not torch.equal(own[0], of_both[0])
    assert not torch.equal(first[0].weak[0], first[pictures.CHUNK].weak[0])
    # Without a picture twice, and of fewer pictures none more than once more than another.
    which = both._which(pictures.LABELED, 0, 24, 16)
    assert (which.sort(-1).values.diff(dim=-1) > 0).all()
    rounds = both._which(pictures.LABELED, 0, 5, 16)
    counts = torch.nn.functional.one_hot(rounds, 5).sum(-2)
    assert set(counts.unique().tolist()) == {3, 4}
