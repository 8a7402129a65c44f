"""Feeds: whatever the source, a restored one goes on as the uninterrupted run, and disturbs nobody.

Batches are served on a device; and draws hash their position.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from feed_sources import SOURCES, Noisy, OwnGenerators, Stream, feed_from, same, seeded, take
from torch import Tensor
from torch.multiprocessing import active_children
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from metapl.data import StepBatches, StepSampler, draws, to_device
from metapl.data.steps import _begin_worker
from metapl.errors import MetaplError
from metapl.runs import checkpoint


class Doubles(StepBatches[Tensor]):
    """Batch t is [2t]; with `bad`, that step fails."""

    def __init__(self, steps: int | None = None, bad: int | None = None) -> None:
        self.steps = steps
        self.bad = bad

    def batch(self, step: int) -> Tensor:
        if step == self.bad:
            raise KeyError("no such file")
        return torch.tensor([2 * step])


WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2),
    "own generators, persistent": lambda: DataLoader(
        OwnGenerators(),
        batch_size=3,
        shuffle=True,
        num_workers=2,
        generator=seeded(5),
        persistent_workers=True,
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
    """Move the default generators, as a training does meanwhile."""
    torch.manual_seed(time.time_ns())
    random.seed()
    np.random.seed()  # noqa: NPY002


def check_going_on(source: Callable[[], Any], cuts: range) -> None:
    disturb()
    whole_run = feed_from(source())
    states = []
    batches = []
    for _ in range(max(cuts) + 6):
        states.append(whole_run.state())
        batches.append(whole_run.next())
    whole_run.close()
    for cut in cuts:
        disturb()
        resumed = feed_from(source())
        resumed.restore(through_a_file(states[cut]))
        assert same(resumed.state(), states[cut])
        for number in range(cut, cut + 6):
            disturb()
            assert same(resumed.next(), batches[number]), (cut, number)
        if cut + 6 < len(states):
            assert same(resumed.state(), states[cut + 6])
        resumed.close()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_goes_on_exactly_and_leaves_the_default_generators_alone(source: Callable[[], Any]) -> None:
    # An epoch has three or four batches.
    check_going_on(source, range(6))
    outside_state = checkpoint.rng_state()
    stream = feed_from(source())
    uninterrupted = feed_from(source())
    take(stream, 6)
    uninterrupted.restore(stream.state())
    uninterrupted.next()
    assert same(checkpoint.rng_state(), outside_state)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_a_batch_that_is_skipped_changes_no_other_one(source: Callable[[], Any]) -> None:
    whole_run = feed_from(source())
    batches = take(whole_run, 8)
    stream = feed_from(source())
    served = take(stream, 2)
    for _ in range(3):
        stream.skip()
    served += take(stream, 3)
    assert same(served, batches[:2] + batches[5:])
    assert same(stream.state(), whole_run.state())


@pytest.mark.parametrize(
    "source",
    [pytest.param(s, marks=[pytest.mark.long] * ("persistent" not in s)) for s in WITH_WORKERS],
)
def test_goes_on_exactly_with_workers(source: str) -> None:
    check_going_on(WITH_WORKERS[source], range(4, 5))


@pytest.mark.parametrize("source", [SOURCES["shuffled"], SOURCES["re-iterable"]])
def test_draws_by_seed_and_name(source: Callable[[], Any]) -> None:
    batches = take(feed_from(source()), 8)
    assert same(take(feed_from(source()), 8), batches)
    assert not same(take(feed_from(source(), seed=1), 8), batches)
    assert not same(take(feed_from(source(), name="unlabeled"), 8), batches)


def test_every_epoch_is_whole_and_shuffled_anew() -> None:
    stream = feed_from(DataLoader(Noisy(9), batch_size=3, shuffle=True))
    epochs = [torch.cat(take(stream, 3)) for _ in range(3)]
    orders = [epoch[:, 0].tolist() for epoch in epochs]
    assert all(sorted(order) == list(range(9)) for order in orders)
    assert len({tuple(order) for order in orders}) == 3
    assert len(torch.cat(epochs)[:, 1:].unique()) == 3 * 27


def test_an_iterator_is_served_once() -> None:
    stream = feed_from((torch.tensor([i]) for i in range(3)), stop=5)
    assert [int(x) for x in take(stream, 3)] == [0, 1, 2]
    state = through_a_file(stream.state())
    with pytest.raises(MetaplError):
        stream.next()
    with pytest.raises(MetaplError):
        feed_from(iter([1, 2, 3])).restore(state)


class UsedUp:
    def __init__(self) -> None:
        self.inside = iter([1, 2])

    def __iter__(self) -> Iterator[int]:
        return self.inside


def served(source: Any, batches: int, **options: Any) -> Any:
    """Return a feed that has served so many batches."""
    stream = feed_from(source, **options)
    take(stream, batches)
    return stream


def restored(
    source: Any, change: Callable[[dict[str, Any]], Any] | None = None, other_feed: Any = None
) -> None:
    """Restore a feed of a source from the state of another feed, or from its own with a change."""
    feed = feed_from(source)
    state = feed.state() if other_feed is None else other_feed.state()
    feed.restore(state if change is None else change(state))


OWN: Callable[[], Any] = SOURCES["own generator"]
UNORDERED = {"batch_size": 2, "num_workers": 2, "in_order": False}

REFUSED: dict[str, Callable[[], object]] = {
    "a number": lambda: feed_from(3),
    "a data set": lambda: feed_from(TensorDataset(torch.ones(2))),
    "an empty list": lambda: feed_from([]),
    "too few steps": lambda: feed_from(Doubles(5), stop=6),
    "beyond its end": lambda: served(Doubles(5), 2, stop=2).next(),
    "an empty epoch": lambda: feed_from(DataLoader([])).next(),  # type: ignore[arg-type]
    "an epoch smaller than a batch": lambda: feed_from(
        DataLoader(Noisy(2), batch_size=3, drop_last=True)
    ).next(),
    "a used-up epoch": lambda: served(UsedUp(), 2).next(),
    "a state of another kind": lambda: restored([1, 2], other_feed=feed_from(OWN())),
    "a source that has shrunk": lambda: restored(
        DataLoader(Noisy(6), batch_size=2),
        other_feed=served(DataLoader(Noisy(10), batch_size=2), 5),
    ),
    "no order to resume in": lambda: restored(
        DataLoader(Noisy(), **UNORDERED), lambda state: {**state, "position": 2}
    ),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_what_cannot_be_served_is_refused_and_no_generator_moves(reason: str) -> None:
    outside_state = checkpoint.rng_state()
    with pytest.raises(MetaplError, match="labeled"):
        REFUSED[reason]()
    assert same(checkpoint.rng_state(), outside_state)


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
    stream = feed_from(Doubles(bad=3), num_workers=num_workers)
    take(stream, 3)
    for _ in range(2):
        with pytest.raises(KeyError):
            stream.next()
    assert not active_children()


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt(), OSError("for a moment")], ids=["Ctrl-C", "error"]
)
def test_goes_on_exactly_after_an_interruption(error: BaseException) -> None:
    expected = take(feed_from(DataLoader(Failing(), batch_size=2, shuffle=True)), 8)
    stream = feed_from(DataLoader(Failing(error), batch_size=2, shuffle=True))
    outside_state = checkpoint.rng_state()
    batches: list[Any] = []
    with pytest.raises(type(error)):
        batches.extend(iter(stream.next, None))
    assert same(checkpoint.rng_state(), outside_state)
    state = stream.state()
    batches += take(stream, 8 - len(batches))
    assert same(batches, expected)
    resumed = feed_from(DataLoader(Failing(), batch_size=2, shuffle=True))
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


# ----------------------------------------------------------------------------------------- a device


class Halves(StepBatches[Tensor]):
    """What is fetched is bytes on the CPU, and finished wherever it is."""

    steps = None

    def __init__(self, bad: int | None = None) -> None:
        self.bad = bad
        self.seen: list[tuple[int, str]] = []

    def batch(self, step: int) -> Tensor:
        raise AssertionError("made whole")

    def raw(self) -> StepBatches[Any]:
        return Bytes()

    def augment(self, step: int, fetched: Any) -> Tensor:
        self.seen.append((step, fetched.device.type))
        if step == self.bad:
            raise RuntimeError("out of memory")
        return fetched.float()


class Bytes(StepBatches[Tensor]):
    steps = None

    def batch(self, step: int) -> Tensor:
        return torch.full((3,), step, dtype=torch.uint8)


@pytest.mark.parametrize("workers", [0, 1])
def test_bytes_cross_to_the_device_and_are_finished_there_by_their_step(workers: int) -> None:
    source = Halves()
    stream = feed_from(source, num_workers=workers, device="meta")
    stream.restore({"kind": "steps", "position": 5})
    batch = take(stream, 2)[-1]
    stream.close()
    assert source.seen == [(5, "meta"), (6, "meta")]
    assert (batch.device.type, batch.dtype) == ("meta", torch.float32)


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_is_served_on_the_device(source: Callable[[], Any]) -> None:
    plain = feed_from(source())
    on_device = feed_from(source(), device="meta")
    on_cpu = feed_from(source(), device="cpu")
    for _ in range(3):
        batch = plain.next()
        assert same(on_cpu.next(), batch)
        moved = pytree.tree_leaves(on_device.next())
        assert [(x.device.type, x.shape) for x in moved] == [
            ("meta", x.shape) for x in pytree.tree_leaves(batch)
        ]
    assert same(on_device.state(), plain.state())
    on_device.restore(plain.state())
    for stream in (plain, on_device, on_cpu):
        stream.close()


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_to_device_moves_tensors_alone() -> None:
    on_cpu = torch.ones(2)
    batch = {"pair": Pair(on_cpu, torch.zeros(3)), "list": [on_cpu, "name", None, 3]}
    moved = to_device(batch, "meta")
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].y.shape == (3,)
    assert {moved["pair"].x.device.type, moved["list"][0].device.type} == {"meta"}
    assert moved["list"][1:] == ["name", None, 3]
    stayed = to_device(batch, torch.device("cpu"))
    assert stayed["pair"].x is on_cpu
    assert stayed["list"][0] is on_cpu


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize(
    "make", [lambda x: x.pin_memory(), lambda x: x, lambda x: x[:, None].expand(-1, 3)]
)
def test_to_device_moves_pinned_tensors_and_others(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.arange(1000))
    on_device = to_device((x,), "cuda")[0]
    assert torch.equal(on_device.cpu(), x)
    assert to_device(on_device, "cuda") is on_device
    assert torch.equal(to_device(on_device, "cpu"), x)


# ------------------------------------------------------------------------------- draws and samplers


def test_hash_is_splitmix64() -> None:
    # Its published outputs, from the seeds 0 and 1234567.
    assert [draws.fold_in(0, i) for i in range(3)] == [
        0xE220A8397B1DCDAF,
        0x6E789E6AA1B965F4,
        0x06C45D188009454F,
    ]
    assert [draws.fold_in(1234567, i) for i in range(2)] == [
        6457827717110365317,
        3203168211198807973,
    ]


@pytest.mark.parametrize("seed", [0, 1, -1, 2**31, 2**63, 2**64 - 1])
def test_bits_are_the_nested_hash(seed: int) -> None:
    examples = [0, 1, 12345, 2**40, -3, 2**63 - 1, -(2**63)]
    got = draws.bits(seed, step=17, examples=torch.tensor(examples), n=3, stream=2)
    key = draws.fold_in(draws.fold_in(seed, 2), 17)
    for (row, example), draw in product(enumerate(examples), range(3)):
        assert int(got[row, draw]) % 2**64 == draws.fold_in(draws.fold_in(key, example), draw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_on_the_host_are_those_on_a_device(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the operations that a device takes, here taken on the CPU."""
    examples = draws.bits(5, 0, torch.arange(30), n=1)[:, 0]
    for chosen in (examples, examples[::3], examples[:0], torch.arange(30, dtype=torch.int32)):
        on_host = draws.uniform(-7, 3, chosen, n=4, stream=2, dtype=dtype)
        bits_on_host = draws.bits(-7, 3, chosen, n=4, stream=2)
        with monkeypatch.context() as patch:
            patch.setattr(draws, "_is_on_host", lambda examples: False)
            as_on_device = draws.uniform(-7, 3, chosen.long(), n=4, stream=2, dtype=dtype)
            bits_as_on_device = draws.bits(-7, 3, chosen.long(), n=4, stream=2)
        assert on_host.dtype == as_on_device.dtype
        assert torch.equal(on_host, as_on_device)
        assert torch.equal(bits_on_host, bits_as_on_device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_ignore_the_rest_of_the_batch(dtype: torch.dtype) -> None:
    draw = draws.uniform
    examples = torch.arange(1003)
    all_draws = draw(3, 5, examples, 7, dtype=dtype)
    assert all_draws.dtype == dtype
    order = torch.randperm(1003, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(3, 5, examples[order], 7, dtype=dtype), all_draws[order])
    for size in (1, 2, 3, 5, 17):
        assert torch.equal(
            draw(3, 5, examples[40 : 40 + size], 7, dtype=dtype), all_draws[40 : 40 + size]
        )
    # More draws continue fewer.
    assert torch.equal(draw(3, 5, examples, 11, dtype=dtype)[:, :7], all_draws)


@pytest.mark.parametrize(("size", "batch_size"), [(10, 3), (7, 7), (5, 12), (1, 4), (64, 1)])
def test_each_epoch_is_a_permutation(size: int, batch_size: int) -> None:
    sampler = StepSampler(size, batch_size, seed=1)
    steps = math.ceil(6 * size / batch_size)
    stream = torch.cat([sampler.indices(t) for t in range(steps)])
    epochs = torch.cat([sampler.epochs(t) for t in range(steps)])
    assert all(sampler.indices(t).shape == (batch_size,) for t in range(steps))
    for epoch in range(6):
        members = stream[epoch * size : (epoch + 1) * size]
        assert members.sort().values.tolist() == list(range(size))
        assert epochs[epoch * size : (epoch + 1) * size].tolist() == [epoch] * size


def test_orders_differ_by_epoch_seed_and_stream() -> None:
    orders = [
        StepSampler(30, 30, seed, stream).indices(epoch)
        for seed, stream, epoch in product(range(3), repeat=3)
    ]
    assert len({tuple(order.tolist()) for order in orders}) == 27


def test_orders_are_uniform() -> None:
    sampler = StepSampler(4, 4, seed=0)
    counts: dict[tuple[int, ...], int] = {}
    for epoch in range(1200):
        order = tuple(sampler.indices(epoch).tolist())
        counts[order] = counts.get(order, 0) + 1
    assert len(counts) == 24
    chi_square = sum((c - 50) ** 2 / 50 for c in counts.values())
    assert chi_square < 23 + 4 * math.sqrt(2 * 23)


def test_sampler_refuses_what_it_cannot_draw() -> None:
    with pytest.raises(MetaplError):
        StepSampler(0, 4, seed=0)
    with pytest.raises(MetaplError):
        StepSampler(4, 0, seed=0)
    with pytest.raises(MetaplError):
        StepSampler(4, 4, seed=0).indices(-1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        # This mistake is what is tested.
        StepSampler(4, 4, seed=0).seed = 1  # type: ignore[misc]
