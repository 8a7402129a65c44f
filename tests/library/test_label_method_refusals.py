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
from metapl.feedback import Implicit
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
        MetaplError, match=r"signal, by the problem's signal\(\), is NaN or infinite; .*lower its learning"
    ):
        trainer.step((X, Y), (X, Y))
    assert all(torch.equal(t, before[name]) for name, t in trainer.student.state_dict().items())


TEACHING = ["weight_net", "weights", "labels", "correction", "transition"]
OTHER_NUMBERS: list[tuple[Callable[[Tensor, Any], Any], str]] = [
    (lambda one, shape: torch.zeros(shape, dtype=torch.int64), r"a tensor .*int64.*expected .* floating point"),
    (lambda one, shape: torch.zeros(shape, dtype=torch.complex64), r"complex64.*expected .* floating point"),
    (lambda one, shape: torch.zeros(shape, device="meta"), r"on meta; expected .* on cpu"),
    (lambda one, shape: 1.0, r"the teacher returned float; expected"),
    (lambda one, shape: torch.zeros(5, 2), r"the teacher returned a tensor of shape \(5, 2\)"),
]


def returning(name: str, made: Callable[[Tensor, Any], Any]) -> tuple[str, nn.Module, Any, Any]:
    """A method whose teacher returns what is made of the shape that it should have."""
    shape = {"labels": (6, 3), "correction": (6, 3), "transition": (3, 3)}.get(name, (6,))
    return name, Returns(lambda one: made(one, shape)), (X, Y), CASES[name][2]


DIVERGED = "the teacher's signal, .* is NaN or infinite"
NO_TENSOR = "batch holds an array of NumPy|the inner batch of .* is a .* with inputs that are a tensor"
STEPS: list[tuple[str, nn.Module | None, Any, Any, str]] = [
    # The method, its teacher where it is not the usual one, the labeled and the inner batch.
    *((*returning(name, lambda one, shape: math.nan * one * torch.ones(shape)), DIVERGED) for name in TEACHING[:-1]),
    *((*returning(name, made), words) for name in TEACHING for made, words in OTHER_NUMBERS),
    *(
        (name, teacher, (X, Y), CASES[name][2], f"(?i){words}")
        for name, teacher, words in (
            ("labels", nn.Linear(4, 3), r"the teacher Linear cannot take .*expected a module that maps ind.*Table"),
            ("correction", Table(torch.zeros(6, 3)), r"Table cannot take .* and .*expected a module that maps inputs"),
            ("transition", WeightNet(4), r"WeightNet cannot take a call without arguments.*maps nothing to logits \(C"),
        )
    ),
    *(
        (name, None, (X, Y), (inputs, *others), NO_TENSOR)
        for name, (*_, (x, *others)) in CASES.items()
        for inputs in (None, x.numpy(), x.tolist(), "pictures")
    ),
    *(
        (name, None, (X, Y), batch, r"the inner batch of .* is .*; expected \(inputs, ")
        for name, (*_, data) in CASES.items()
        for batch in ({"x": X, "y": Y}, [data] * 4)
    ),
    ("weights", None, (X[:, None], Y), (X, Y, INDEX), r"outputs are a tensor of shape \(6, 1, 3\)"),
    ("weights", None, (X, Y), (X, Y, INDEX.tolist()), r"index of Table is a list .*expected integers"),
]


@pytest.mark.parametrize(("name", "teacher", "labeled", "inner", "words"), STEPS)
def test_a_step_is_refused_and_nothing_moves(
    name: str, teacher: nn.Module | None, labeled: Any, inner: Any, words: str
) -> None:
    refused(trainer_of(name, teacher), labeled, inner, words)


def test_whole_numbers_of_any_size_are_numbers() -> None:
    for solver in ("neumann", "identity"):
        trainer = metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), Implicit(solver=solver, step_size=10**30))
        with pytest.raises(MetaplError, match=r"diverge|NaN or infinite"):
            trainer.step((X, Y), 1e20 * X)
    trainer = metapl.BilevelTrainer(nn.Linear(4, 3), nn.Linear(4, 3), Implicit(damping=10**9))
    assert trainer.step((X, Y), X).feedback.abs().max() < 1e-7
