"""What is refused or fails has moved nothing; a state is a snapshot; threads do not meet."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from problems_zoo import toy
from torch import Tensor
from trainers import trainer_for

import metapl
from metapl import Signal


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
