"""The stacked steps that the study of when feedback helps is made with are those of the library."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

import metapl
from metapl.ablation import Altered
from metapl.apps.pictures.views import base
from metapl.feedback import Estimator, Forward
from metapl.models import mlp
from metapl.problems.losses import UDA, CrossEntropy
from metapl.training.loss_trainer import LossTrainer

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
SEEDS, STEPS, BATCH = (3, 4), 4, 6


@pytest.fixture
def stack(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import when_stack

    yield when_stack
    sys.modules.pop("when_stack", None)


def networks(count: int) -> list[nn.Sequential]:
    torch.manual_seed(0)
    return [mlp([64, 7, 5, 10]).double() for _ in range(count)]


def batches(stack: ModuleType, lookahead: int = 1) -> list[Any]:
    """Four steps' batches for two seeds."""
    g = torch.Generator().manual_seed(1)

    def drawn() -> torch.Tensor:
        return torch.rand(len(SEEDS), BATCH, 64, generator=g, dtype=torch.float64)

    def step(t: int) -> Any:
        targets = torch.eye(10, dtype=torch.float64)[torch.randint(10, (len(SEEDS), BATCH), generator=g)]
        unlabeled = [[drawn() for _ in range(lookahead)] for _ in range(2)]
        return stack.Batch(drawn(), targets, *unlabeled, *stack.drawn_for_controls(SEEDS, t, BATCH))

    return [step(t) for t in range(STEPS)]


def difference(network: nn.Module, weights: list[torch.Tensor], seed: int) -> float:
    """The greatest one between a network's weights and those of one of a stack."""
    own = [p.T if p.ndim == 2 else p[None] for p in network.parameters()]
    return max(float((a - b[seed]).detach().abs().max()) for a, b in zip(own, weights, strict=True))


CASES: dict[str, tuple[dict[str, Any], Estimator | str, dict[str, Any]]] = {
    "weight": ({"size": 3.0}, Forward(), {"feedback_weight": 3.0}),
    "learning rate": (
        {"feedback": "learning_rate", "size": 2.0},
        Forward(normalization="learning_rate"),
        {"feedback_weight": 2.0},
    ),
    "ratio": ({"feedback": "ratio", "size": 0.5}, Forward(), {"feedback_ratio": 0.5}),
    "none": ({"feedback": "none"}, "none", {}),
    "feedback alone": ({"own_loss": False, "size": 3.0}, Forward(), {"teacher_losses": (), "feedback_weight": 3.0}),
    "lookahead": ({"lookahead": 3, "size": 3.0}, Forward(), {"feedback_weight": 3.0}),
    "lookahead, learning rate": (
        {"lookahead": 3, "feedback": "learning_rate"},
        Forward(normalization="learning_rate"),
        {},
    ),
    "uda": ({"uda": 1.0, "size": 3.0}, Forward(), {"teacher_losses": (CrossEntropy(), UDA()), "feedback_weight": 3.0}),
    "uda, sharpened and aligned": (
        {"uda": 2.0, "temperature": 0.5, "align": 0.5, "feedback": "ratio", "size": 0.5},
        Forward(),
        {"teacher_losses": (CrossEntropy(), UDA(0.5, weight=2.0, align=0.5)), "feedback_ratio": 0.5},
    ),
    "fixmatch": (
        {"uda": 1.0, "temperature": 0.0, "threshold": 0.1, "feedback": "none"},
        "none",
        {"teacher_losses": (CrossEntropy(), UDA(0.0, 0.1))},
    ),
    **{
        alteration: ({"alteration": alteration, "size": 3.0}, Altered(Forward(), alteration), {"feedback_weight": 3.0})
        for alteration in ("permuted", "class_means", "random_sign")
    },
}


def together(stack: ModuleType, case: str, ema_decay: float = 0.0) -> Any:
    """The stack after the steps of a case."""
    rule = stack.Rule(student_lr=0.7, teacher_lr=0.3, **CASES[case][0])
    first = networks(4)
    stacked = stack.Stack(rule, stack.stacked(first[:2]), stack.stacked(first[2:]), ema_decay)
    for t, batch in enumerate(batches(stack, rule.lookahead)):
        stacked.step(batch, stack.cosine(t, STEPS))
    return stacked


def alone(stack: ModuleType, case: str, s: int, ema_decay: float | None = None) -> metapl.BilevelTrainer:
    """A trainer after the same steps of one seed, from the same weights."""
    settings, mode, options = CASES[case]
    given, first = batches(stack, settings.get("lookahead", 1)), networks(4)
    teacher, student = first[s], first[2 + s]
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        dataclasses.replace(mode, seed=SEEDS[s]) if isinstance(mode, Altered) else mode,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.7),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.3, momentum=0.9),
        lookahead=settings.get("lookahead", 1),
        **{"teacher_losses": (CrossEntropy(),), **options},
    )
    trainer.fit(
        [(b.labeled[s], b.targets[s].argmax(-1)) for b in given],
        [(weak[s], strong[s]) for b in given for weak, strong in zip(b.weak, b.strong, strict=True)],
        steps=STEPS,
        ema_decay=ema_decay,
        log_every=STEPS,
        progress=False,
    )
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_seed_of_the_stack_takes_the_steps_of_the_trainer(stack: ModuleType, case: str) -> None:
    both = together(stack, case)
    for s in (0, 1):
        trainer = alone(stack, case, s)
        assert difference(trainer.student, both.student, s) < 1e-12
        assert difference(trainer.teacher, both.teacher, s) < 1e-12
        assert difference(trainer.teacher, both.teacher, 1 - s) > 1e-3


def test_the_cases_differ_in_the_teacher_by_more_than_rounding(stack: ModuleType) -> None:
    teachers = [together(stack, case).teacher[0] for case in CASES if "lookahead" not in case]
    for i, first in enumerate(teachers):
        for second in teachers[:i]:
            assert float((first - second).abs().max()) > 1e-7


def test_the_stack_keeps_the_average_that_a_fit_keeps(stack: ModuleType) -> None:
    both, trainer = together(stack, "weight", 0.5), alone(stack, "weight", 1, 0.5)
    assert difference(trainer.student, both.average, 1) < 1e-12
    assert difference(trainer.student, both.student, 1) > 1e-4


def test_supervised_steps_of_the_stack_are_those_of_the_library(stack: ModuleType) -> None:
    given, models = batches(stack), networks(2)
    weights, velocity = stack.stacked(models), None
    for t, batch in enumerate(given):
        rate = 0.3 * stack.cosine(t, STEPS)
        velocity = stack.descend(weights, batch.labeled, batch.targets, velocity, rate, 0.9)
    for s, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        labeled = [(b.labeled[s], b.targets[s].argmax(-1)) for b in given]
        LossTrainer(model, (CrossEntropy(),), optimizer=optimizer).fit(
            labeled, steps=STEPS, log_every=STEPS, progress=False
        )
        assert difference(model, weights, s) < 1e-12


def test_a_teacher_alone_is_a_network_that_learns_from_both_kinds_of_pictures(stack: ModuleType) -> None:
    given, models, prior = batches(stack), networks(2), torch.linspace(1, 5, 10, dtype=torch.float64) / 30
    rule = stack.Rule(teacher_lr=0.3, feedback="none", uda=1.0, threshold=0.1, align=1.0)
    alone = stack.Stack(rule, stack.stacked(models), None, 0.5, prior.expand(2, 10))
    for t, batch in enumerate(given):
        alone.step(batch, stack.cosine(t, STEPS))
    losses = CrossEntropy(), UDA(threshold=0.1, align=1.0, prior=tuple(prior.tolist()))
    for s, model in enumerate(models):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
        LossTrainer(model, losses, optimizer=optimizer).fit(
            [(b.labeled[s], b.targets[s].argmax(-1)) for b in given],
            [(b.weak[0][s], b.strong[0][s]) for b in given],
            steps=STEPS,
            log_every=STEPS,
            ema_decay=0.5,
            progress=False,
        )
        assert difference(model, alone.average, s) < 1e-12
    alone.begin()
    alone.step(given[0], 0.5, student_rate=0.0)  # a student that begins as the average, and rests
    assert difference(model, alone.student, 1) < 1e-12
    assert difference(model, alone.average, 1) < 1e-12


def test_altered_feedback_is_what_it_is_called(stack: ModuleType) -> None:
    g = torch.Generator().manual_seed(0)
    h, q = torch.randn(2, 9, 10, generator=g).double(), torch.randn(2, 9, 10, generator=g).double().softmax(-1)
    rows, coins = stack.drawn_for_controls(SEEDS, 0, 9)

    def of(alteration: str) -> torch.Tensor:
        return stack.altered(h, q, alteration, rows, coins)

    assert torch.allclose(of("class_means") + of("rest"), h)
    assert torch.allclose(of("own_class_means") + of("within_class"), h)
    assert torch.allclose(of("negated"), -h)
    assert not of("zero").any()
    assert torch.equal(of("sign").sign(), h.sign())
    assert torch.allclose(of("sign").abs(), h.abs().mean((1, 2), keepdim=True).expand_as(h))
    for s in range(2):
        own = q[s].argmax(1)
        for i in range(9):
            assert torch.allclose(of("own_class_means")[s, i], h[s][own == own[i]].mean(0))
            assert of("one_number")[s, i, own[i]] == h[s, i, own[i]]
            assert int(of("one_number")[s, i].count_nonzero()) == 1
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(leaf.mean(1).log() / 10).sum(), leaf)
    assert torch.allclose(of("balance"), -gradient)


def test_the_stack_s_views_are_those_of_the_library(stack: ModuleType) -> None:
    pictures = torch.rand(2, 20, 64, generator=torch.Generator().manual_seed(0))
    views = stack.Views(pictures, SEEDS, stream=0, batch=50, steps=60)
    which, seen = (torch.cat(part) for part in zip(views.chunk(), views.chunk(), views.chunk(), strict=True))
    assert seen.shape == (60, 2, 50, 64)
    for s in range(2):  # every epoch of 20 pictures has each of them once
        epochs = which[:, s].flatten().unflatten(0, (-1, 20)).sort(1).values
        assert torch.equal(epochs, torch.arange(20).expand_as(epochs))
    kept = seen != 0
    assert torch.equal(kept.sum(-1), torch.full(kept.shape[:-1], 60))  # the square takes 4 of the 64 values
    images = pictures[0].unflatten(-1, (1, 8, 8))
    moves = torch.tensor([[-1, 0]]).expand(20, 2)  # the second of nine
    assert torch.equal(stack.shifted(pictures[0])[1], base.crop_flip(images, moves, None, 0.0).flatten(1))
    # What is left of a picture after the nearest of its nine shifts is the noise.
    noise = (seen[0, 0][:, None] - stack.shifted(pictures[0])[:, which[0, 0]].transpose(0, 1)) * kept[0, 0][:, None]
    nearest = noise.square().sum(-1).min(1)
    assert abs(float((nearest.values.sum() / (50 * 60)).sqrt()) - 0.2) < 0.01
    assert len(nearest.indices.unique()) == 9


def test_the_batches_of_a_seed_depend_on_neither_the_other_seeds_nor_the_number_of_steps(stack: ModuleType) -> None:
    pictures = torch.rand(2, 20, 64)
    together = stack.Views(pictures, SEEDS, stream=1, batch=5, steps=60)
    alone = stack.Views(pictures[1:], SEEDS[1:], stream=1, batch=5, steps=30)
    for _ in range(2):
        (which, seen), (which_alone, seen_alone) = together.chunk(), alone.chunk()
        assert torch.equal(which[: len(which_alone), 1:], which_alone)
        assert torch.equal(seen[: len(which_alone), 1:], seen_alone)
    other = stack.Views(pictures[1:], SEEDS[1:], stream=2, batch=5, steps=30).chunk()
    assert not torch.equal(other[0], alone.order[:, :25].transpose(0, 1))


@pytest.mark.docs
def test_without_uda_the_study_of_its_worth_trains_as_the_rows_of_when_were(stack: ModuleType) -> None:
    """By the rules of these rows, both here: another processor rounds otherwise, and 1,500 steps amplify that."""
    import feedback_worth as worth
    import when

    rows = [json.loads(line) for line in (ROOT / "benchmarks" / "results" / "when.jsonl").read_text().splitlines()[1:]]
    told = {"final": True, "part": "length", "labels": 2, "steps": 1500}
    seeds, size = (200, 201), when.Size((), (), None, 1, 1500, divisor=10)
    for method in ("none", "gradient"):
        (row,) = (row for row in rows if {**row, **told, "method": method} == row)
        (arm,) = (a for a in when.ARMS if (a.part, a.labels, a.steps, a.method) == ("length", 2, 1500, method))
        rule = stack.Rule(**row["rule"])
        (mine,), _ = worth.train(worth.Digits(worth.Place(2), seeds), worth.Arm("", ()), [rule], 150)
        (theirs,), _ = when.train(arm, [rule], seeds, size)
        for one, other in ((mine.average, theirs.average), (mine.teacher, theirs.teacher)):
            assert all(torch.equal(a, b) for a, b in zip(tree_leaves(one), tree_leaves(other), strict=True))
