"""Feeds: whatever the source, a restored one goes on with the batches of the uninterrupted run, and disturbs nobody."""

from __future__ import annotations

import io
import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.multiprocessing import active_children
from torch.utils import _pytree as pytree
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Subset,
    TensorDataset,
    WeightedRandomSampler,
    get_worker_info,
)

from metapl.data import (
    Chain,
    Feed,
    Identity,
    LabeledBatches,
    MemoryImages,
    RandAugment,
    ShiftNoiseCutout,
    StepBatches,
    StepSampler,
    UnlabeledBatches,
    Weak,
    feed,
    loader,
    to_device,
)
from metapl.errors import MetaplError
from metapl.runs import generators

MODULE = sys.modules[feed.__module__]  # metapl.data.feed is the function

# --- sources ----------------------------------------------------------------------------------------------------------


class Noisy(Dataset[Tensor]):
    """Examples whose transform draws from all three default generators."""

    def __init__(self, size: int = 10) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, index: int) -> Tensor:
        numpy = np.random.random()  # noqa: NPY002
        return torch.tensor([index, torch.rand(()), random.random(), numpy], dtype=torch.float64)


class OwnGenerators(Noisy):
    """Examples whose transform draws from generators of the data set."""

    def __init__(self) -> None:
        super().__init__()
        self.torch = torch.Generator().manual_seed(1)
        self.python = random.Random(2)
        self.numpy = np.random.default_rng(3)
        self.legacy = np.random.RandomState(4)

    def __getitem__(self, index: int) -> Tensor:
        numpy = self.numpy.random() + self.legacy.rand()
        return torch.tensor(
            [index, torch.rand((), generator=self.torch), self.python.random(), numpy], dtype=torch.float64
        )


class Stream(IterableDataset[Tensor]):
    """Examples without indices, dealt out among the workers."""

    def __iter__(self) -> Iterator[Tensor]:
        worker = get_worker_info()
        first, every = (0, 1) if worker is None else (worker.id, worker.num_workers)
        for index in range(first, 10, every):
            yield torch.tensor([index, torch.rand(()), random.random()], dtype=torch.float64)


class Reiterable:
    """No loader at all: batches in another order each time."""

    def __iter__(self) -> Iterator[Tensor]:
        for index in torch.randperm(4):
            yield torch.stack([index, torch.randint(100, ())])


class Doubles(StepBatches[Tensor]):
    """Batch t is [2t]; with `bad`, that step fails."""

    def __init__(self, steps: int | None = None, bad: int | None = None) -> None:
        self.steps, self.bad = steps, bad

    def batch(self, step: int) -> Tensor:
        if step == self.bad:
            raise KeyError("no such file")
        return torch.tensor([2 * step])


class Countdown:
    """A source that keeps its own position, but not what it draws from."""

    def __init__(self) -> None:
        self.generator = seeded(8)
        self.left: list[int] | None = None

    def __iter__(self) -> Iterator[Tensor]:
        self.begin()
        self.salt = torch.randint(100, ())  # like the seed that a loader draws for its workers, and then has no use for
        return self.batches()

    def begin(self) -> None:
        if self.left is None:
            self.left = torch.randperm(4, generator=self.generator).tolist()
            random.shuffle(self.left)

    def batches(self) -> Iterator[Tensor]:
        while self.left:
            yield torch.stack([torch.tensor(self.left.pop()), torch.randint(100, ())])
        self.left = None

    def state_dict(self) -> dict[str, Any]:
        self.begin()  # as torchdata's loader does when it is asked before it is iterated
        return {"left": self.left}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.left = state["left"]


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def step_batches() -> UnlabeledBatches:
    return UnlabeledBatches(
        torch.rand(10, 2, generator=seeded(0)), StepSampler(10, 4, seed=0), Identity(), None, seed=0
    )


def shuffled_by_its_sampler() -> DataLoader[Tensor]:
    return DataLoader(Noisy(), batch_size=3, sampler=RandomSampler(Noisy(), generator=seeded(5)))


def nested() -> DataLoader[Tensor]:
    own: Subset[Tensor] = Subset(ConcatDataset([OwnGenerators(), Noisy(3)]), list(range(2, 12)))
    return DataLoader(own, batch_sampler=BatchSampler(RandomSampler(own, generator=seeded(7)), 3, drop_last=True))


def weighted(generator: torch.Generator | None) -> DataLoader[Tensor]:
    sampler = WeightedRandomSampler([0.1 * (i + 1) for i in range(10)], num_samples=9, generator=generator)
    return DataLoader(Noisy(), batch_size=3, sampler=sampler)


SOURCES: dict[str, Callable[[], Any]] = {
    "steps": step_batches,
    "list": lambda: [torch.tensor([i]) for i in range(3)],
    "tuple": lambda: tuple((torch.tensor([i]), torch.tensor([-i])) for i in range(4)),
    "shuffled": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True),
    "in order": lambda: DataLoader(Noisy(), batch_size=3),
    "own generator": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, generator=seeded(5)),
    "sampler's generator": lambda: DataLoader(
        Noisy(), batch_size=3, sampler=RandomSampler(Noisy(), generator=seeded(5))
    ),
    "batch sampler": lambda: DataLoader(Noisy(), batch_sampler=BatchSampler(RandomSampler(Noisy()), 3, drop_last=True)),
    "weighted": lambda: weighted(None),
    "weighted, own generator": lambda: weighted(seeded(6)),
    "data set's generators": lambda: DataLoader(OwnGenerators(), batch_size=3, shuffle=True),
    # Where batches fill the epoch, the sampler draws once more as it ends.
    "full batches": lambda: DataLoader(Noisy(12), batch_size=3, shuffle=True, generator=seeded(5)),
    "nested": nested,
    "iterable": lambda: DataLoader(Stream(), batch_size=3),
    "re-iterable": Reiterable,
    "state_dict": Countdown,
}

WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "shuffled": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2),
    "own generators": lambda: DataLoader(
        OwnGenerators(), batch_size=3, shuffle=True, num_workers=2, generator=seeded(5), persistent_workers=True
    ),
    "persistent": lambda: DataLoader(Noisy(), batch_size=3, shuffle=True, num_workers=2, persistent_workers=True),
    "iterable": lambda: DataLoader(Stream(), batch_size=3, num_workers=2),
}


def made(source: Any, **options: Any) -> Feed:
    return feed(source, **{"name": "labeled", "stop": 100, **options})


def take(stream: Feed, number: int) -> list[Any]:
    return [stream.next() for _ in range(number)]


def through_a_file(state: dict[str, Any]) -> dict[str, Any]:
    file = io.BytesIO()
    torch.save(state, file)
    assert file.tell() < 50_000
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert isinstance(loaded, dict)
    return loaded


def same(a: Any, b: Any) -> bool:
    leaves_a, tree_a = pytree.tree_flatten(a)
    leaves_b, tree_b = pytree.tree_flatten(b)
    equal = (torch.equal(x, y) if isinstance(x, Tensor) else x == y for x, y in zip(leaves_a, leaves_b, strict=True))
    return tree_a == tree_b and all(equal)


def disturb() -> None:
    """What a training does to the default generators meanwhile."""
    torch.manual_seed(time.time_ns())
    random.seed()
    np.random.seed()  # noqa: NPY002


# --- going on ---------------------------------------------------------------------------------------------------------


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
    check_going_on(source, range(10))


@pytest.mark.parametrize("source", WITH_WORKERS.values(), ids=WITH_WORKERS.keys())
def test_goes_on_exactly_with_workers(source: Callable[[], Any]) -> None:
    check_going_on(source, range(3, 6))


def test_steps_go_on_exactly_with_workers() -> None:
    batches = take(made(step_batches()), 8)
    resumed = made(step_batches(), stop=8, num_workers=2)
    resumed.restore({"kind": "steps", "position": 5})
    assert same(take(resumed, 3), batches[5:])
    resumed.close()


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_leaves_the_default_generators_alone(source: Callable[[], Any]) -> None:
    before = generators.rng_state()
    stream = made(source())
    take(stream, 6)
    again = made(source())
    again.restore(stream.state())
    again.next()
    assert same(generators.rng_state(), before)


@pytest.mark.parametrize("source", [SOURCES["shuffled"], SOURCES["re-iterable"], SOURCES["state_dict"]])
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


@pytest.mark.parametrize(
    ("source", "epochs"),
    [
        (SOURCES["shuffled"], 3),
        (SOURCES["own generator"], 3),
        (SOURCES["full batches"], 3),
        (WITH_WORKERS["persistent"], 1),
    ],
    ids=["shuffled", "own generator", "full batches", "persistent workers"],
)
def test_batches_are_those_of_the_loader_alone(source: Callable[[], Any], epochs: int) -> None:
    stream, alone = made(source()), source()
    torch.default_generator.set_state(stream.state()["stream"][0])
    expected = [batch[:, :2] for _ in range(epochs) for batch in alone]
    assert same([batch[:, :2] for batch in take(stream, 4 * epochs)], expected)
    stream.close()


def test_one_generator_serves_two_loaders_and_its_owner() -> None:
    def run(states: list[dict[str, Any]] | None) -> tuple[list[dict[str, Any]], list[Any]]:
        generator = seeded(0)
        feeds = [made(DataLoader(Noisy(n), batch_size=3, shuffle=True, generator=generator)) for n in (7, 10)]
        for stream, state in zip(feeds, states or [], strict=False):
            stream.restore(state)
        if states is None:
            for _ in range(5):
                take(feeds[0], 1), take(feeds[1], 1)
        states = [stream.state() for stream in feeds]
        batches = [stream.next() for _ in range(5) for stream in feeds]
        assert torch.equal(generator.get_state(), seeded(0).get_state())
        return states, batches

    states, batches = run(None)
    assert same(run(states)[1], batches)


def test_tells_samplers_and_data_sets_the_epoch() -> None:
    class Told(RandomSampler):
        told: list[int]

        def set_epoch(self, epoch: int) -> None:
            self.told.append(epoch)

    sampler = Told(range(4))
    sampler.told = []
    stream = made(DataLoader(range(4), batch_sampler=BatchSampler(sampler, 2, drop_last=False)))  # type: ignore[arg-type]
    take(stream, 5)
    assert sampler.told == [0, 1, 2]
    made_again = made(DataLoader(range(4), batch_size=2, sampler=sampler))  # type: ignore[arg-type]
    made_again.restore(stream.state())
    assert sampler.told == [0, 1, 2, 2]


def test_leaves_persistent_workers_to_their_loader() -> None:
    source = WITH_WORKERS["persistent"]()
    stream = made(source)
    stream.next()
    stream.close()
    assert source.persistent_workers
    assert source._iterator is None


def test_workers_start_with_the_first_batch_and_stop_on_close() -> None:
    for stream in (made(Doubles(), num_workers=1), made(DataLoader(Noisy(), batch_size=3, num_workers=1))):
        stream.state()
        assert not active_children()
        stream.next()
        assert len(active_children()) == 1
        stream.close()
        assert not active_children()
        stream.close()


def test_an_iterator_is_served_once() -> None:
    stream = made((torch.tensor([i]) for i in range(3)), stop=5)
    assert [int(x) for x in take(stream, 3)] == [0, 1, 2]
    state = through_a_file(stream.state())
    with pytest.raises(MetaplError, match=r"labeled ran out at batch 3 .* needs 5; .* DataLoader"):
        stream.next()
    with pytest.raises(MetaplError, match=r"labeled is an iterator .*list_iterator.*cannot be resumed.*state_dict"):
        made(iter([1, 2, 3])).restore(state)


def test_a_stateful_iterator_runs_out() -> None:
    class Once(Countdown):
        def __next__(self) -> Tensor:
            raise StopIteration

        def __iter__(self) -> Iterator[Tensor]:
            return self

    with pytest.raises(MetaplError, match="labeled ran out at batch 0"):
        made(Once()).next()


# --- what cannot be served --------------------------------------------------------------------------------------------


def generator_function() -> Iterator[int]:
    yield 1


@pytest.mark.parametrize(
    ("source", "text"),
    [
        (3, r"labeled is of type int; expected a torch DataLoader, .*: give one of these"),
        (None, "of type NoneType"),
        ("path", "of type str"),
        ({"x": torch.ones(2)}, "a dict of"),
        ({1, 2}, "of type set"),
        (torch.ones(2, 3), r"tensor of shape \(2, 3\).*wrap it in a data set"),
        (np.ones(2), r"ndarray.*wrap it in a data set"),
        (TensorDataset(torch.ones(2)), "TensorDataset.*wrap it in a DataLoader"),
        (Stream(), "Stream.*wrap it in a DataLoader"),
        (nn.Sequential(nn.ReLU()), "of type Sequential.*give one of these"),
        (generator_function, "of type function.*call it"),
        (DataLoader, "of type type"),
        ([], "labeled is an empty list"),
    ],
)
def test_refuses_what_has_no_batches(source: Any, text: str) -> None:
    with pytest.raises(MetaplError, match=text):
        made(source)


def test_refuses_an_object_with_items_alone() -> None:
    class Items:
        def __getitem__(self, index: int) -> int:
            return index

    with pytest.raises(MetaplError, match=r"Items.*wrap it in a DataLoader"):
        made(Items())


def test_refuses_numbers() -> None:
    with pytest.raises(MetaplError, match="labeled got stop -1"):
        made([1], stop=-1)
    with pytest.raises(MetaplError, match="labeled got num_workers -1"):
        made(Doubles(), num_workers=-1)
    with pytest.raises(MetaplError, match="labeled has 5 steps, and the run needs 6"):
        made(Doubles(5), stop=6)
    stream = made(Doubles(5), stop=2)
    take(stream, 2)
    with pytest.raises(MetaplError, match="made for 2 batches and is at batch 2"):
        stream.next()


@pytest.mark.parametrize(
    "source",
    [DataLoader([]), DataLoader(Noisy(2), batch_size=3, drop_last=True)],  # type: ignore[arg-type]
    ids=["empty", "smaller than a batch"],
)
def test_refuses_an_empty_epoch(source: Any) -> None:
    with pytest.raises(MetaplError, match=r"labeled gave no batch in epoch 0 .*drop_last"):
        made(source).next()


def test_refuses_an_epoch_that_is_used_up() -> None:
    class UsedUp:
        def __init__(self) -> None:
            self.inside = iter([1, 2])

        def __iter__(self) -> Iterator[int]:
            return self.inside

    stream = made(UsedUp())
    take(stream, 2)
    with pytest.raises(MetaplError, match=r"labeled gave no batch in epoch 1 .*used up after one pass"):
        stream.next()


def test_refuses_an_empty_stateful_source() -> None:
    class Empty(Countdown):
        def __iter__(self) -> Iterator[Tensor]:
            return iter(())

    with pytest.raises(MetaplError, match="labeled gave no batch in epoch 0"):
        made(Empty()).next()


def test_refuses_states_of_others() -> None:
    loader = made(SOURCES["own generator"]())
    state = loader.state()
    with pytest.raises(MetaplError, match="labeled got a state of kind 'epochs'; expected kind 'sequence'"):
        made([1, 2]).restore(state)
    with pytest.raises(MetaplError, match="kind None"):
        loader.restore(None)  # type: ignore[arg-type]
    with pytest.raises(MetaplError, match="wrong entries: epoch, batches"):
        loader.restore({**state, "epoch": "1", "batches": -1})
    with pytest.raises(MetaplError, match="wrong entries: stream"):
        loader.restore({"kind": "epochs", "epoch": 0, "batches": 0})
    before = generators.rng_state()
    with pytest.raises(MetaplError, match="the saved states of its 3 random number generators"):
        made(SOURCES["shuffled"]()).restore(state)
    with pytest.raises(MetaplError, match="the saved states of its 4 random number generators"):
        loader.restore({**state, "stream": [*state["stream"][:3], (1, 2)]})
    assert same(generators.rng_state(), before)


def test_refuses_a_source_that_has_shrunk() -> None:
    stream = made(DataLoader(Noisy(10), batch_size=2))
    take(stream, 5)
    with pytest.raises(MetaplError, match="labeled has 3 batches in an epoch, and the run to resume had taken 5"):
        made(DataLoader(Noisy(6), batch_size=2)).restore(stream.state())


def test_refuses_to_resume_without_an_order() -> None:
    source = DataLoader(Noisy(), batch_size=2, num_workers=2, in_order=False)
    stream = made(source)
    stream.restore(stream.state())
    with pytest.raises(MetaplError, match="in_order=False"):
        stream.restore({**stream.state(), "batches": 2})


# --- failures ---------------------------------------------------------------------------------------------------------


class Failing(Noisy):
    """Example 5 cannot be read, as often as `errors` has entries."""

    def __init__(self, *errors: BaseException) -> None:
        super().__init__()
        self.errors = list(errors)

    def __getitem__(self, index: int) -> Tensor:
        if index == 5 and self.errors:
            raise self.errors.pop()
        return super().__getitem__(index)


def test_says_which_batch_failed() -> None:
    stream = made(DataLoader(Failing(OSError("disk gone")), batch_size=2))
    take(stream, 2)
    with pytest.raises(
        MetaplError, match=r"labeled failed at batch 2 of epoch 0 .*DataLoader.*OSError: disk gone"
    ) as info:
        stream.next()
    assert isinstance(info.value.__cause__, OSError)


def test_says_which_batch_failed_in_a_worker() -> None:
    stream = made(DataLoader(Failing(OSError("disk gone")), batch_size=2, num_workers=1))
    take(stream, 2)
    with pytest.raises(MetaplError, match="labeled failed at batch 2 of epoch 0") as info:
        stream.next()
    assert "disk gone" in str(info.value.__cause__)
    assert not active_children()  # although the traceback still holds the loader's iterator


@pytest.mark.parametrize("num_workers", [0, 1])
def test_says_which_step_failed(num_workers: int) -> None:
    stream = made(Doubles(bad=3), num_workers=num_workers)
    take(stream, 3)
    for _ in range(2):  # a failed step is not skipped
        with pytest.raises(MetaplError, match=r"labeled failed at batch 3 .*KeyError") as info:
            stream.next()
        assert isinstance(info.value.__cause__, KeyError)


def test_says_which_batch_of_other_sources_failed() -> None:
    class Bad(Countdown):
        def __iter__(self) -> Iterator[Tensor]:
            yield torch.zeros(1)
            raise OSError("disk gone")

    stateful, once = made(Bad()), made(iter(Bad()))
    for stream in (stateful, once):
        stream.next()
        with pytest.raises(MetaplError, match=r"labeled failed at batch 1.*OSError: disk gone"):
            stream.next()


def test_an_error_that_speaks_for_itself_passes() -> None:
    error = MetaplError("clean the inputs first")
    with pytest.raises(MetaplError) as info:
        take(made(DataLoader(Failing(error), batch_size=2)), 3)
    assert info.value is error


@pytest.mark.parametrize("error", [KeyboardInterrupt(), OSError("for a moment")], ids=["Ctrl-C", "error"])
def test_goes_on_exactly_after_an_interruption(error: BaseException) -> None:
    expected = take(made(DataLoader(Failing(), batch_size=2, shuffle=True)), 8)
    stream = made(DataLoader(Failing(error), batch_size=2, shuffle=True))
    before = generators.rng_state()
    batches: list[Any] = []
    with pytest.raises(MetaplError if isinstance(error, OSError) else KeyboardInterrupt):
        batches.extend(iter(stream.next, None))
    assert same(generators.rng_state(), before)
    state = stream.state()
    batches += take(stream, 8 - len(batches))
    assert same(batches, expected)
    resumed = made(DataLoader(Failing(), batch_size=2, shuffle=True))
    resumed.restore(state)
    assert same(resumed.next(), expected[state["batches"]])


def test_a_closed_stateful_feed_says_so() -> None:
    stream = made(Countdown())
    first = stream.next()
    stream.close()
    state = stream.state()
    with pytest.raises(MetaplError, match="the feed of labeled is closed"):
        stream.next()
    again = made(Countdown())
    again.restore(state)
    assert not same(again.next(), first)


# --- on a device ------------------------------------------------------------------------------------------------------


def pictures() -> dict[str, StepBatches[Any]]:
    """Every kind of batches whose views can wait for the device, and those whose cannot."""
    images = MemoryImages(torch.randint(0, 256, (20, 3, 8, 8), dtype=torch.uint8, generator=seeded(0)))
    sampler, weak, strong = StepSampler(20, 7, seed=1), Weak(pad=1), Chain((Weak(pad=1), RandAugment(cutout=2)))
    return {
        "labeled": LabeledBatches(images, torch.arange(20), sampler, weak, seed=0),
        "two views": UnlabeledBatches(images, sampler, weak, strong, seed=0),
        "one view": UnlabeledBatches(images, sampler, strong, None, seed=0),
        "others": LabeledBatches(torch.rand(20, 1, 8, 8), torch.arange(20), sampler, ShiftNoiseCutout(), seed=0),
    }


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", pictures())
def test_views_on_the_device_are_those_of_the_workers(kind: str, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bit for bit, in the same structure, and a run may go on with them where it was, in either direction."""
    source = pictures()[kind]

    def served(on_device: bool, at: int, stop: int) -> tuple[list[Any], dict[str, Any]]:
        monkeypatch.setattr(MODULE, "_finishes_batches", lambda device: on_device)
        stream = made(source, stop=stop, num_workers=workers, device="cpu")
        stream.restore({"kind": "steps", "position": at})
        batches = take(stream, stop - at)
        state = stream.state()
        stream.close()
        return batches, state

    direct, state = served(False, 0, 7)
    assert same(served(True, 0, 7), (direct, state))
    assert same(served(True, 4, 7), (direct[4:], state))
    assert same(made(source).next(), direct[0])
    assert state == {"kind": "steps", "position": 7}


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
    stream = made(source, num_workers=workers, device="meta")
    stream.restore({"kind": "steps", "position": 5})
    batch = take(stream, 2)[-1]
    stream.close()
    assert source.seen == [(5, "meta"), (6, "meta")]
    assert (batch.device.type, batch.dtype) == ("meta", torch.float32)


def test_says_which_batch_could_not_be_finished_and_gives_it_again() -> None:
    source = Halves(bad=1)
    stream = made(source, device="meta")
    stream.next()
    with pytest.raises(MetaplError, match=r"labeled failed at batch 1 .*RuntimeError: out of memory"):
        stream.next()
    source.bad = None
    take(stream, 2)
    assert [step for step, _ in source.seen] == [0, 1, 1, 2]


@pytest.mark.parametrize("source", SOURCES.values(), ids=SOURCES.keys())
def test_every_source_is_served_on_the_device(source: Callable[[], Any]) -> None:
    plain, there, here = made(source()), made(source(), device="meta"), made(source(), device="cpu")
    for _ in range(3):
        batch = plain.next()
        assert same(here.next(), batch)
        moved = pytree.tree_leaves(there.next())
        assert [(x.device.type, x.shape) for x in moved] == [("meta", x.shape) for x in pytree.tree_leaves(batch)]
    assert same(there.state(), plain.state())
    there.restore(plain.state())
    for stream in (plain, there, here):
        stream.close()


@pytest.mark.parametrize(("workers", "device", "pinned"), [(2, "cuda", True), (0, "cuda", False), (2, "cpu", False)])
def test_workers_pin_what_goes_to_cuda(
    workers: int, device: str, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without workers it is pinned on its way, where it is not on the device already."""
    asked: list[bool] = []

    def noted(batches: Any, start: int, stop: int, num_workers: int, *, pin_memory: bool) -> Any:
        asked.append(pin_memory)
        return loader(batches, start, stop)

    monkeypatch.setattr(MODULE, "loader", noted)
    monkeypatch.setattr(MODULE, "to_device", lambda batch, device: batch)
    made(step_batches(), num_workers=workers, device=device).next()
    assert asked == [pinned]


def test_views_are_told_the_examples_on_the_cpu() -> None:
    """Where they plan; wherever the images are."""
    told = []

    def view(images: Tensor, *, seed: int, step: int, examples: Tensor) -> Tensor:
        told.append((images.device.type, examples.device.type))
        return images

    images = torch.rand(10, 1, 8, 8, device="meta")
    x, _ = LabeledBatches(images, torch.arange(10), StepSampler(10, 4, seed=0), view, seed=0)[0]
    UnlabeledBatches(images, StepSampler(10, 4, seed=0), view, view, seed=0)[0]
    assert x.shape == (4, 1, 8, 8)
    assert told == [("meta", "cpu")] * 3


# --- to_device --------------------------------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Tensor
    y: Tensor


def test_to_device_moves_tensors_alone() -> None:
    here = torch.ones(2)
    batch = {"pair": Pair(here, torch.zeros(3)), "list": [here, "name", None, 3]}
    moved = to_device(batch, "meta")
    assert isinstance(moved["pair"], Pair)
    assert moved["pair"].y.shape == (3,)
    assert {moved["pair"].x.device.type, moved["list"][0].device.type} == {"meta"}
    assert moved["list"][1:] == ["name", None, 3]
    stayed = to_device(batch, torch.device("cpu"))
    assert stayed["pair"].x is here
    assert stayed["list"][0] is here


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("make", [lambda x: x.pin_memory(), lambda x: x, lambda x: x[:, None].expand(-1, 3)])
def test_to_device_moves_pinned_tensors_and_others(make: Callable[[Tensor], Tensor]) -> None:
    x = make(torch.arange(1000))
    there = to_device((x,), "cuda")[0]
    assert torch.equal(there.cpu(), x)
    assert to_device(there, "cuda") is there
    assert torch.equal(to_device(there, "cpu"), x)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("kind", pictures())
def test_batches_on_cuda_are_those_on_the_cpu(kind: str, workers: int) -> None:
    streams = [made(pictures()[kind], stop=4, num_workers=workers, device=device) for device in ("cpu", "cuda")]
    for here, there in zip(*(take(stream, 4) for stream in streams), strict=True):
        assert {leaf.device.type for leaf in pytree.tree_leaves(there)} == {"cuda"}
        assert same(to_device(there, "cpu"), here)
    for stream in streams:
        stream.close()
