"""What the study of when feedback helps is made with: a seed of a stack is a trainer of the library's."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import metapl
from metapl.ablation import Altered
from metapl.apps.pictures.views import base
from metapl.feedback import Forward
from metapl.models import mlp
from metapl.problems.losses import UDA, CrossEntropy
from metapl.training.loss_trainer import LossTrainer

pytestmark = pytest.mark.docs

ROOT = Path(__file__).parents[2]
SEEDS, STEPS, BATCH = (3, 4), 3, 6
PRIOR = tuple((torch.linspace(5, 1, 10, dtype=torch.float64) / 30).tolist())


@pytest.fixture
def when(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import when

    monkeypatch.setattr(when, "BATCH", BATCH)
    yield when
    sys.modules.pop("when", None)


def networks(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [mlp([64, 7, 5, 10]).double() for _ in range(count)]


def batches(lookahead: int = 1) -> list[tuple[Any, list[Any]]]:
    """For two seeds at once, each step's labeled batch and pairs of unlabeled ones."""
    g = torch.Generator().manual_seed(1)

    def drawn() -> torch.Tensor:
        return torch.rand(len(SEEDS), BATCH, 64, generator=g, dtype=torch.float64)

    def labels() -> torch.Tensor:
        return torch.randint(10, (len(SEEDS), BATCH), generator=g)

    return [((drawn(), labels()), [(drawn(), drawn()) for _ in range(lookahead)]) for _ in range(STEPS)]


def of_seed(s: int, batch: Any) -> Any:
    return tuple(part[s] for part in batch)


def difference(network: nn.Module, weights: dict[str, torch.Tensor], seed: int) -> float:
    """The greatest one between a network's weights and those of one of a stack."""
    own = dict(network.named_parameters())
    return max(float((own[name] - t[seed]).detach().abs().max()) for name, t in weights.items())


CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
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
    "uda": ({"uda": 1.0, "size": 3.0}, Forward(), {"teacher_losses": (CrossEntropy(), UDA()), "feedback_weight": 3.0}),
    "uda, sharpened and aligned": (
        {"uda": 2.0, "temperature": 0.5, "align": 0.5, "feedback": "ratio", "size": 0.5},
        Forward(),
        {"teacher_losses": (CrossEntropy(), UDA(0.5, weight=2.0, align=0.5, prior=PRIOR)), "feedback_ratio": 0.5},
    ),
    "fixmatch": (
        {"uda": 1.0, "temperature": 0.0, "threshold": 0.1, "feedback": "none"},
        "none",
        {"teacher_losses": (CrossEntropy(), UDA(0.0, 0.1))},
    ),
    "zero": ({"alteration": "zero"}, "none", {}),
    **{
        how: ({"alteration": how, "size": 3.0}, Altered(Forward(), how), {"feedback_weight": 3.0})  # type: ignore[arg-type]
        for how in ("permuted", "class_means", "random_sign")
    },
}


def together(when: ModuleType, case: str) -> Any:
    """The stack after the steps of a case."""
    rule, first = when.Rule(student_lr=0.7, teacher_lr=0.3, **CASES[case][0]), networks(4)
    stack = when.Stack(rule, first[:2], first[2:], PRIOR)
    with torch.no_grad():
        for t, (labeled, pairs) in enumerate(batches(rule.lookahead)):
            extra = when.drawn_to_alter(rule.alteration, SEEDS, t)
            inner = tuple((*pair, *extra) for pair in pairs)
            stack.step(labeled, inner if len(inner) > 1 else inner[0], when.cosine(t, STEPS))
    return stack


def separately(case: str, s: int, ema_decay: float | None = None) -> metapl.BilevelTrainer:
    """A trainer after the same steps of one seed, from the same weights."""
    settings, mode, options = CASES[case]
    lookahead = settings.get("lookahead", 1)
    given, first = batches(lookahead), networks(4)
    teacher, student = first[s], first[2 + s]
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        dataclasses.replace(mode, seed=SEEDS[s]) if isinstance(mode, Altered) else mode,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.7),
        outer_optimizer=torch.optim.SGD(teacher.parameters(), lr=0.3, momentum=0.9),
        lookahead=lookahead,
        **{"teacher_losses": (CrossEntropy(),), **options},
    )
    trainer.fit(
        [of_seed(s, labeled) for labeled, _ in given],
        [of_seed(s, pair) for _, pairs in given for pair in pairs],
        steps=STEPS,
        ema_decay=ema_decay,
        log_every=STEPS,
        progress=False,
    )
    return trainer


@pytest.mark.parametrize("case", CASES)
def test_a_seed_of_a_stack_takes_the_steps_of_a_trainer(when: ModuleType, case: str) -> None:
    both = together(when, case)
    for s in (0, 1):
        trainer = separately(case, s)
        assert difference(trainer.student, both.state.student.params, s) < 1e-12
        assert difference(trainer.teacher, both.state.teacher.params, s) < 1e-12
        assert difference(trainer.teacher, both.state.teacher.params, 1 - s) > 1e-3


def test_a_stack_keeps_the_average_that_a_fit_keeps(when: ModuleType) -> None:
    both, trainer = together(when, "weight"), separately("weight", 1, when.EMA_DECAY)
    assert difference(trainer.student, both.average, 1) < 1e-12
    assert difference(trainer.student, both.state.student.params, 1) > 1e-4


def test_the_cases_differ_in_the_teacher_by_more_than_rounding(when: ModuleType) -> None:
    teachers = [together(when, case).state.teacher.params for case in CASES if case not in ("lookahead", "zero")]
    for i, first in enumerate(teachers):
        for second in teachers[:i]:
            assert max(float((t - second[name]).abs().max()) for name, t in first.items()) > 1e-7


def test_a_compiled_stack_is_one_that_is_not(when: ModuleType) -> None:
    rule, first = when.Rule(alteration="permuted", size=3.0), networks(4)
    stacks = [when.Stack(rule, first[:2], first[2:], compiled=compiled) for compiled in (False, True)]
    with torch.no_grad():
        for t, (labeled, [pair]) in enumerate(batches()):
            for stack in stacks:
                stack.step(labeled, (*pair, *when.drawn_to_alter("permuted", SEEDS, t)), 1.0)
    for one, other in zip(*(stack.state.teacher.params.values() for stack in stacks), strict=True):
        assert torch.allclose(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("settings", [{"threshold": 0.1, "align": 1.0}, {"threshold": 0.1, "temperature": 0.0}])
def test_networks_without_teachers_are_those_of_a_loss_trainer(when: ModuleType, settings: dict[str, float]) -> None:
    """Their labels alone, or UDA too; and a pair goes on from them as their average and with their velocity."""
    given, models, pair = batches(), networks(2), networks(4)
    rule = when.Rule(teacher_lr=0.3, feedback="none", uda=1.0, **settings)
    uda, plain = (when.Stack(rule, None, models, PRIOR) for _ in "ab")
    with torch.no_grad():
        for t, (labeled, [views]) in enumerate(given):
            uda.step(labeled, (*labeled, *views), when.cosine(t, STEPS))
            plain.step(labeled, labeled, when.cosine(t, STEPS))
    for stack, losses in (
        (plain, (CrossEntropy(),)),
        (uda, (CrossEntropy(), UDA(**settings, prior=PRIOR))),
    ):
        for s, model in enumerate(networks(2)):
            optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
            LossTrainer(model, losses, optimizer=optimizer).fit(
                [of_seed(s, labeled) for labeled, _ in given],
                [of_seed(s, views) for _, [views] in given] if len(losses) == 2 else None,
                steps=STEPS,
                log_every=STEPS,
                progress=False,
            )
            assert difference(model, stack.state.student.params, s) < 1e-12
    late = when.Stack(rule, pair[:2], pair[2:], PRIOR).going_on_from(uda, averaged=True)
    before = {name: t.clone() for name, t in uda.average.items()}
    with torch.no_grad():
        labeled, [views] = given[0]
        late.step(labeled, views, 1.0, student_rate=0.0)  # a student that begins as the average, and rests
        uda.step(labeled, (*labeled, *views), 1.0)
    for name, t in late.state.teacher.params.items():
        assert torch.allclose(t, uda.state.student.params[name], rtol=0, atol=1e-12)
        assert torch.allclose(late.average[name], before[name], rtol=0, atol=1e-12)
        assert torch.equal(late.state.student.params[name], before[name])


def test_altered_feedback_is_what_it_is_called(when: ModuleType) -> None:
    """Of -h, as of h."""
    g = torch.Generator().manual_seed(0)
    h, q = torch.randn(9, 10, generator=g).double(), torch.randn(9, 10, generator=g).double().softmax(-1)

    def of(how: str) -> torch.Tensor:
        found: torch.Tensor = when.altered(h, q, how)
        return found

    assert torch.allclose(of("class_means") + of("rest"), h)
    assert torch.allclose(of("own_class_means") + of("within_class"), h)
    assert torch.allclose(of("negated"), -h)
    assert torch.equal(of("sign").sign(), h.sign())
    assert torch.allclose(of("sign").abs(), h.abs().mean().expand_as(h))
    own = q.argmax(1)
    for i in range(9):
        assert torch.allclose(of("own_class_means")[i], h[own == own[i]].mean(0))
        assert of("one_number")[i, own[i]] == h[i, own[i]]
        assert int(of("one_number")[i].count_nonzero()) == 1
    leaf = q.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(-(leaf.mean(0).log() / 10).sum(), leaf)
    assert torch.allclose(of("balance"), gradient)


def test_the_study_s_views_are_those_of_the_library(when: ModuleType) -> None:
    pictures = torch.rand(2, 20, 64, generator=torch.Generator().manual_seed(0))
    which, seen = map(torch.stack, zip(*when.views(pictures, SEEDS, 0, 50, 60), strict=True))
    assert seen.shape == (60, 2, 50, 64)
    for s in range(2):  # every epoch of 20 pictures has each of them once
        epochs = which[:, s].flatten().unflatten(0, (-1, 20)).sort(1).values
        assert torch.equal(epochs, torch.arange(20).expand_as(epochs))
    kept = seen != 0
    assert torch.equal(kept.sum(-1), torch.full(kept.shape[:-1], 60))  # the square takes 4 of the 64 values
    images = pictures[0].unflatten(-1, (1, 8, 8))
    moves = torch.tensor([[-1, 0]]).expand(20, 2)  # the second of nine
    assert torch.equal(when.shifted(pictures[0])[1], base.crop_flip(images, moves, None, 0.0).flatten(1))
    # What is left of a picture after the nearest of its nine shifts is the noise.
    noise = (seen[0, 0][:, None] - when.shifted(pictures[0])[:, which[0, 0]].transpose(0, 1)) * kept[0, 0][:, None]
    nearest = noise.square().sum(-1).min(1)
    assert abs(float((nearest.values.sum() / (50 * 60)).sqrt()) - 0.2) < 0.01
    assert len(nearest.indices.unique()) == 9


def test_the_batches_of_a_seed_depend_on_neither_the_other_seeds_nor_the_number_of_steps(when: ModuleType) -> None:
    pictures = torch.rand(2, 20, 64)
    both = [*when.views(pictures, SEEDS, 1, 5, 60)]
    alone = [*when.views(pictures[1:], SEEDS[1:], 1, 5, 30)]
    for (which, seen), (which_alone, seen_alone) in zip(both[:30], alone, strict=True):
        assert torch.equal(which[1:], which_alone)
        assert torch.equal(seen[1:], seen_alone)
    other, _ = next(when.views(pictures[1:], SEEDS[1:], 2, 5, 30))
    assert not torch.equal(other, alone[0][0])


def test_uneven_classes_have_their_shares_and_one_numbering(when: ModuleType) -> None:
    seeds = (300, 301)
    data, even = when.drawn(4, seeds, 5), when.drawn(4, seeds)
    few = torch.tensor(when.apportioned(torch.linspace(5, 1, 10).tolist(), 40))
    arm = when.Arm("worth", "uda", "", labels=4, uneven=5)
    assert when.prior_of(arm) == pytest.approx((few / 40).tolist())
    for s in range(2):
        assert torch.equal(data.labeled[1][s].bincount(minlength=10), few)
        counts = data.unlabeled[1][s].bincount(minlength=10).double()
        assert torch.allclose(counts / counts[0], torch.linspace(5, 1, 10).double() / 5, atol=0.01)
        # The same test pictures under other numbers: a class is one of the even numbering's.
        pairs = torch.stack([data.test[1][s], even.test[1][s]]).unique(dim=1)
        assert pairs.shape == (2, 10)
    assert when.accuracies(data.test[1], data.test[1], 5) == [1.0, 1.0]
    always = torch.zeros_like(data.test[1])  # the most frequent class: 5 / 30
    assert when.accuracies(always, data.test[1], 5) == pytest.approx([5 / 30] * 2, abs=1e-5)
