"""What label methods, look-aheads and `Implicit` refuse, in words and before anything moves."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import metapl
from metapl import MetaplError
from metapl.feedback import Forward, Implicit, Unrolled
from metapl.models import Corrector
from metapl.problems import (
    ExampleLabels,
    ExampleWeights,
    LabelCorrection,
    LearningToReweight,
    MetaWeightNet,
    NoiseTransition,
    Table,
    WeightNet,
)

X, Y, INDEX = torch.randn(6, 4), torch.arange(6) % 3, torch.tensor([3, 0, 19, 7, 8, 5])

CASES: dict[str, tuple[Any, Callable[[], nn.Module | None], tuple[Tensor, ...]]] = {
    "weight_net": (MetaWeightNet(), lambda: WeightNet(4), (X, Y)),
    "reweight": (LearningToReweight(), lambda: None, (X, Y)),
    "weights": (ExampleWeights(), lambda: Table(torch.zeros(20)), (X, Y, INDEX)),
    "labels": (ExampleLabels(), lambda: Table(torch.zeros(20, 3)), (X, INDEX)),
    "correction": (LabelCorrection(), lambda: Corrector(nn.Linear(4, 3), classes=3), (X, Y)),
    "transition": (NoiseTransition(), lambda: Table(4 * torch.eye(3)), (X, Y)),
}


class Returns(nn.Module):
    """Returns one thing, whatever it is given."""

    def __init__(self, made: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.one, self.made = nn.Parameter(torch.ones(1)), made

    def forward(self, *given: Any) -> Any:
        return self.made(self.one)


def refused(trainer: metapl.BilevelTrainer, labeled: Any, unlabeled: Any, words: str) -> None:
    before, random = copy.deepcopy(trainer.state_dict()), torch.get_rng_state()
    with pytest.raises(MetaplError, match=words):
        trainer.step(labeled, unlabeled)
    for a, b in zip(pytree.tree_leaves(before), pytree.tree_leaves(trainer.state_dict()), strict=True):
        assert torch.equal(a, b) if isinstance(a, Tensor) else a == b
    assert torch.equal(random, torch.get_rng_state())


def trainer_of(name: str, teacher: nn.Module | None = None) -> metapl.BilevelTrainer:
    problem, made, _ = CASES[name]
    return metapl.BilevelTrainer(made() if teacher is None else teacher, nn.Linear(4, 3), "forward", problem=problem)


@pytest.mark.parametrize("mode", ["forward", "none"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_noise_matrix_that_is_not_finite_does_not_reach_the_student(value: float, mode: str) -> None:
    teacher = Table(torch.full((3, 3), value))
    trainer = metapl.BilevelTrainer(teacher, nn.Linear(4, 3), mode, problem=NoiseTransition(), teacher_losses=())
    before = copy.deepcopy(trainer.student.state_dict())
    with pytest.raises(
        MetaplError, match=r"signal, by NoiseTransition.signal, is NaN or infinite; .*lower its learning"
    ):
        trainer.step((X, Y), (X, Y))
    assert all(torch.equal(t, before[name]) for name, t in trainer.student.state_dict().items())


@pytest.mark.parametrize("name", ["weight_net", "weights", "labels", "correction"])
def test_a_teacher_that_diverged_is_named(name: str) -> None:
    shape = (6,) if name.startswith("weight") else (6, 3)
    refused(
        trainer_of(name, Returns(lambda one: math.nan * one * torch.ones(shape))),
        (X, Y),
        CASES[name][2],
        "the teacher's signal, .* is NaN or infinite",
    )


@pytest.mark.parametrize("name", ["weight_net", "weights", "labels", "correction", "transition"])
@pytest.mark.parametrize(
    ("made", "words"),
    [
        (lambda shape: torch.zeros(shape, dtype=torch.int64), r"returned a tensor .*int64.*expected .* floating point"),
        (lambda shape: torch.zeros(shape, dtype=torch.complex64), r"complex64.*expected .* floating point"),
        (lambda shape: torch.zeros(shape, device="meta"), r"on meta; expected .* on cpu"),
        (lambda shape: 1.0, r"the teacher returned float; expected"),
        (lambda shape: torch.zeros(5, 2), r"the teacher returned a tensor of shape \(5, 2\)"),
    ],
)
def test_a_teacher_of_other_numbers_is_refused(name: str, made: Callable[[Any], Any], words: str) -> None:
    shape = {"labels": (6, 3), "correction": (6, 3), "transition": (3, 3)}.get(name, (6,))
    refused(trainer_of(name, Returns(lambda one: made(shape))), (X, Y), CASES[name][2], words)


@pytest.mark.parametrize(
    ("name", "teacher", "words"),
    [
        ("labels", nn.Linear(4, 3), r"the teacher Linear cannot take .*expected a module that maps indices .*Table"),
        ("correction", Table(torch.zeros(6, 3)), r"Table cannot take .* and .*expected a module that maps inputs and"),
        (
            "transition",
            WeightNet(4),
            r"WeightNet cannot take a call without arguments.*maps nothing to logits \(C, C\)",
        ),
    ],
)
def test_a_teacher_that_is_called_otherwise_is_told_how(name: str, teacher: nn.Module, words: str) -> None:
    refused(trainer_of(name, teacher), (X, Y), CASES[name][2], f"(?i){words}")


@pytest.mark.parametrize("name", CASES)
def test_an_inner_batch_that_is_none_is_refused_before_the_student_reads_it(name: str) -> None:
    trainer, (x, *others) = trainer_of(name), CASES[name][2]
    for inputs in (None, x.numpy(), x.tolist(), "pictures"):
        words = "batch holds an array of NumPy|the inner batch of .* is a .* with inputs that are a tensor"
        refused(trainer, (X, Y), (inputs, *others), words)
    for batch in ({"x": x, "y": Y}, [(x, *others)] * 4):
        refused(trainer, (X, Y), batch, r"the inner batch of .* is .*; expected \(inputs, ")


def test_outer_outputs_of_another_shape_are_refused() -> None:
    refused(trainer_of("weights"), (X[:, None], Y), (X, Y, INDEX), r"outputs are a tensor of shape \(6, 1, 3\)")


def test_an_index_that_is_a_list_is_refused() -> None:
    refused(trainer_of("weights"), (X, Y), (X, Y, INDEX.tolist()), r"index of Table is a list .*expected integers")


@pytest.mark.parametrize("value", ["2", [], 2 + 1j, math.nan, math.inf, 10**400, torch.ones(2), object()])
def test_numbers_of_implicit_that_are_none_are_refused(value: Any) -> None:
    with pytest.raises(MetaplError, match=r"Implicit\(step_size=.*expected a (finite )?number above 0 or None"):
        Implicit(step_size=value)
    with pytest.raises(MetaplError, match=r"Implicit\(damping=.*expected a (finite )?number of 0 or more"):
        Implicit(damping=value)


def test_whole_numbers_of_any_size_are_numbers() -> None:
    for solver in ("neumann", "identity"):
        trainer = metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), Implicit(solver=solver, step_size=10**30))
        with pytest.raises(MetaplError, match=r"diverge|NaN or infinite"):
            trainer.step((X, Y), 1e20 * X)
    trainer = metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), Implicit(damping=10**9))
    assert trainer.step((X, Y), X).feedback.abs().max() < 1e-7


@pytest.mark.parametrize(
    "make",
    [
        lambda: Forward(keep_every=True),
        lambda: Forward(truncate=True),
        lambda: Unrolled(truncate=False),
        lambda: Implicit(iterations=True),
        lambda: Implicit(iterations=math.nan),
        lambda: WeightNet(0),
        lambda: WeightNet("10"),
        lambda: Corrector(nn.Linear(4, 3), classes=1),
        lambda: Corrector(nn.Linear(4, 3), classes=None),
        lambda: metapl.Lookahead(b"abc"),
        lambda: metapl.Lookahead(batch for batch in [X]),
    ],
)
def test_counts_and_lists_that_are_none_are_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(MetaplError, match=r"expected (a|the) "):
        make()
