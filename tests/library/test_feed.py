"""Feeds: whatever the source, a restored one goes on with the batches of the uninterrupted run, and disturbs nobody."""

from __future__ import annotations

import io
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from feed_sources import SOURCES, Noisy, OwnGenerators, Stream, made, same, seeded, take
from torch import Tensor
from torch.multiprocessing import active_children
from torch.utils.data import DataLoader, TensorDataset

from metapl.data import StepBatches
from metapl.data.steps import _begin_worker
from metapl.errors import MetaplError
from metapl.runs import generators


class Doubles(StepBatches[Tensor]):
    """Batch t is [2t]; with `bad`, that step fails."""

    def __init__(self, steps: int | None = None, bad: int | None = None) -> None:
        self.steps, self.bad = steps, bad

    def batch(self, step: int) -> Tensor:
        if step == self.bad:
            raise KeyError("no such file")
        return torch.tensor([2 * step])


WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2),
    "own generators, persistent": lambda: DataLoader(
        OwnGenerators(), batch_size=3, shuffle=True, num_workers=2, generator=seeded(5), persistent_workers=True
    ),
    "iterable": lambda: DataLoader(Stream(), batch_size=3, num_workers=2),
}


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 50_000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


def disturb() -> None:
    """What a training does to the default generators meanwhile."""
    torch.manual_seed(time.time_ns())
    random.seed()
    np.random.seed()  # noqa: NPY002


def check_going_on(source: Callable[[], Any], cuts: range) -> None:
    disturb()
    whole_run = made(source())
    states, batches = [], []
    for _ in range(max(cuts) + 6):
        states.append(whole_run.state())
        batches.append(whole_run.next())
    whole_run.close()
    for cut in cuts:
        disturb()
        resumed = made(source())
        resumed.restore(through_a_file(states[cut]))
        assert same(resumed.state(), states[cut])
        for number in range(cut, cut + 6):
            disturb()
            assert same(resumed.next(), batches[number]), (cut, number)
        assert same(resumed.state(), states[cut + 6]) if cut + 6 < len(states) else True
        resumed.close()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_goes_on_exactly(source: Callable[[], Any]) -> None:
    check_going_on(source, range(6))  # an epoch is of three or four batches


@pytest.mark.parametrize("source", WITH_WORKERS.values(), ids=WITH_WORKERS.keys())
def test_goes_on_exactly_with_workers(source: Callable[[], Any]) -> None:
    check_going_on(source, range(4, 5))


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_leaves_the_default_generators_alone(source: Callable[[], Any]) -> None:
    before = generators.rng_state()
    stream = made(source())
    take(stream, 6)
    again = made(source())
    again.restore(stream.state())
    again.next()
    assert same(generators.rng_state(), before)


@pytest.mark.parametrize("source", [SOURCES["shuffled"], SOURCES["re-iterable"]])
def test_draws_by_seed_and_name(source: Callable[[], Any]) -> None:
    first = take(made(source()), 8)
    assert same(take(made(source()), 8), first)
    assert not same(take(made(source(), seed=1), 8), first)
    assert not same(take(made(source(), name="unlabeled"), 8), first)


def test_every_epoch_is_whole_and_shuffled_anew() -> None:
    stream = made(DataLoader(Noisy(9), batch_size=3, shuffle=True))
    epochs = [torch.cat(take(stream, 3)) for _ in range(3)]
    orders = [epoch[:, 0].tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len(torch.cat(epochs)[:, 1:].unique()) == 3 * 27


def test_an_iterator_is_served_once() -> None:
    stream = made((torch.tensor([i]) for i in range(3)), stop=5)
    assert [int(x) for x in take(stream, 3)] == [0, 1, 2]
    state = through_a_file(stream.state())
    with pytest.raises(MetaplError):
        stream.next()
    with pytest.raises(MetaplError):
        made(iter([1, 2, 3])).restore(state)


class UsedUp:
    def __init__(self) -> None:
        self.inside = iter([1, 2])

    def __iter__(self) -> Iterator[int]:
        return self.inside


def served(source: Any, batches: int, **options: Any) -> Any:
    """A feed that has served so many batches."""
    stream = made(source, **options)
    take(stream, batches)
    return stream


def restored(source: Any, state: Callable[[dict[str, Any]], Any] = lambda own: own, of: Any = None) -> None:
    """A feed of ``source`` gets what ``state`` makes of the state of one of ``of``, or of itself."""
    stream = made(source)
    stream.restore(state((stream if of is None else of).state()))


OWN: Callable[[], Any] = SOURCES["own generator"]
UNORDERED = {"batch_size": 2, "num_workers": 2, "in_order": False}

REFUSED: dict[str, Callable[[], object]] = {
    "a number": lambda: made(3),
    "a data set": lambda: made(TensorDataset(torch.ones(2))),
    "an empty list": lambda: made([]),
    "too few steps": lambda: made(Doubles(5), stop=6),
    "beyond its end": lambda: served(Doubles(5), 2, stop=2).next(),
    "an empty epoch": lambda: made(DataLoader([])).next(),  # type: ignore[arg-type]
    "an epoch smaller than a batch": lambda: made(DataLoader(Noisy(2), batch_size=3, drop_last=True)).next(),
    "a used-up epoch": lambda: served(UsedUp(), 2).next(),
    "a state of another kind": lambda: restored([1, 2], of=made(OWN())),
    "a source that has shrunk": lambda: restored(
        DataLoader(Noisy(6), batch_size=2), of=served(DataLoader(Noisy(10), batch_size=2), 5)
    ),
    "no order to resume in": lambda: restored(DataLoader(Noisy(), **UNORDERED), lambda own: {**own, "position": 2}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_served_is_refused_and_no_generator_moves(what: str) -> None:
    before = generators.rng_state()
    with pytest.raises(MetaplError, match="labeled"):
        REFUSED[what]()
    assert same(generators.rng_state(), before)


class Failing(Noisy):
    """Example 5 cannot be read, as often as `errors` has entries."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__()
        self.errors = list(errors)

    def __getitem__(self, index: int) -> Tensor:
        if index == 5 and self.errors:
            raise self.errors.pop()
        return super().__getitem__(index)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_failed_step_is_not_skipped(num_workers: int) -> None:
    stream = made(Doubles(bad=3), num_workers=num_workers)
    take(stream, 3)
    for _ in range(2):
        with pytest.raises(KeyError):
            stream.next()
    assert not active_children()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("for a moment")], ids=["Ctrl-C", "error"])
def test_goes_on_exactly_after_an_interruption(error: BaseException) -> None:
    expected = take(made(DataLoader(Failing(), batch_size=2, shuffle=True)), 8)
    stream = made(DataLoader(Failing(error), batch_size=2, shuffle=True))
    before = generators.rng_state()
    batches: list[Any] = []
    with pytest.raises(type(error)):
        batches.extend(iter(stream.next, None))
    assert same(generators.rng_state(), before)
    state = stream.state()
    batches += take(stream, 8 - len(batches))
    assert same(batches, expected)
    resumed = made(DataLoader(Failing(), batch_size=2, shuffle=True))
    resumed.restore(state)
    assert same(resumed.next(), expected[state["position"]])


def test_a_worker_outlives_any_number_of_sigterms_for_a_while() -> None:
    worker = os.fork()
    if not worker:
        try:
            _begin_worker(0)
            for _ in range(5):
                os.kill(os.getpid(), signal.SIGTERM)
            os._exit(7 if signal.alarm(0) > 0 else 8)
        finally:
            os._exit(9)
    assert os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1]) == 7
