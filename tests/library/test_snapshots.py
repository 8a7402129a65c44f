"""What a trainer hands out is a snapshot; an evaluation leaves a network as it was; threads do not meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import everything, same, toy, trainer_for
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


def in_threads(*runs: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def guarded(run: Callable[[], Any]) -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_threads_take_turns() -> None:
    """Two trainers as well: dropout masks are replayed by generators that the whole process shares."""
    under_way: list[int] = []

    class Watching(metapl.PseudoLabels):
        def signal(self, *given: Any, **options: Any) -> metapl.Signal:
            assert under_way == []
            under_way.append(threading.get_ident())
            time.sleep(0.002)
            return super().signal(*given, **options)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            assert under_way == [threading.get_ident()]
            under_way.clear()
            return super().outer_loss(outputs, batch)

    cases = [toy("dropout", seed=seed) for seed in range(2)]
    trainers = [trainer_for(case, problem=Watching()) for case in cases]
    inner = torch.optim.SGD(cases[1].student.parameters(), lr=0.1)
    in_threads(
        lambda: [trainers[0].step(**cases[0].data()) for _ in range(10)],
        lambda: [
            metapl.hypergradient(**cases[1].networks(), **cases[1].data(), problem=Watching(), inner_optimizer=inner)
            for _ in range(10)
        ],
    )
