"""What a trainer hands out is a snapshot that later steps leave as it is; an evaluation leaves a network as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import everything, same, toy
from torch import Tensor, nn

import metapl

INNER: dict[str, Callable[[nn.Module], Any]] = {
    "sgd": lambda student: torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9),
    "adam": lambda student: torch.optim.Adam(student.parameters()),
    "torchopt": lambda student: torchopt.sgd(0.1, momentum=0.9),
}


@pytest.mark.parametrize("inner", INNER)
def test_a_state_dict_is_a_snapshot(inner: str) -> None:
    """Also once it was loaded: what it brings back is the run from there, twice."""
    case = toy("batch_norm")
    mode = metapl.feedback.Reinforce(baseline=0.9)
    trainer = metapl.BilevelTrainer(**case.networks(), mode=mode, inner_optimizer=INNER[inner](case.student))
    trainer.step(**case.data())
    best, runs = trainer.state_dict(), []
    for _ in range(2):
        trainer.load_state_dict(best)
        torch.manual_seed(0)
        for _ in range(3):
            trainer.step(**case.data())
        runs.append(everything(case, generator=False))
    assert same(*runs)


class Caches(nn.Module):
    """A table that the first pass makes, and later ones read."""

    table: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        if self.table is None:
            self.table = torch.linspace(0.5, 1.5, x.shape[-1])
        return x * self.table


def test_what_a_first_evaluation_makes_is_trained_with_afterwards() -> None:
    """So evaluation is no inference mode, whose tensors autograd refuses."""
    student = nn.Sequential(Caches(), nn.Linear(5, 3))
    trainer = metapl.BilevelTrainer(nn.Linear(5, 3), student, "forward")
    trainer.predict(torch.randn(4, 5))
    before = student[1].weight.detach().clone()
    trainer.step((torch.randn(4, 5), torch.arange(4) % 3), torch.randn(6, 5))
    assert not torch.equal(student[1].weight, before)
