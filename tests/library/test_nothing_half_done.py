"""What is refused or fails has moved nothing; a state is a snapshot; threads do not meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import ANYWHERE, Toy, toy, unmoved
from torch import Tensor
from trainers import Supervised, trainer_for

import metapl
from metapl import MetaplError, Signal


def nan_in_the_student(case: Toy) -> dict[str, Any]:
    with torch.no_grad():
        case.student[3].weight.fill_(torch.nan)
    return {}


def an_infinite_rate(case: Toy) -> dict[str, Any]:
    return {"inner_optimizer": torch.optim.SGD(case.student.parameters(), lr=float("inf"))}


def nan_in_the_teachers_loss(case: Toy) -> dict[str, Any]:
    class Bad(Supervised):
        def __call__(self, teacher: Any, **given: Any) -> Tensor:
            return teacher(given["labeled"][0]).mean() * torch.nan

    return {"teacher_losses": (Bad(),)}


@pytest.mark.parametrize("mode", ANYWHERE)
@pytest.mark.parametrize("make", [nan_in_the_student, an_infinite_rate, nan_in_the_teachers_loss])
def test_what_is_not_finite_moves_nothing(make: Callable[[Toy], dict[str, Any]], mode: str) -> None:
    """Nor poisons the other network."""
    if (make, mode) == (an_infinite_rate, "none"):
        return  # which does not look at where the student goes
    case = toy("batch_norm" if make is nan_in_the_teachers_loss else "mlp")
    trainer = trainer_for(case, mode, **make(case))
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())


def test_nor_is_one_network_trained_on_it() -> None:
    case = toy("batch_norm")
    trainer = metapl.LossTrainer(case.student, optimizer=torch.optim.SGD(case.student.parameters(), lr=0.1))
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step((case.labeled[0] * torch.nan, case.labeled[1]))


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
        def signal(self, *given: Any, **options: Any) -> Signal:
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
