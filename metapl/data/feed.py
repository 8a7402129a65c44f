"""Endless streams of batches that know their position, made of whatever a user has batches in.

A feed that is restored goes on with the very batches that an uninterrupted run would have seen. For a
:class:`~metapl.data.StepBatches` or a list, the position is a number. For a ``DataLoader``, it is where the random
number generators were at the start of the epoch, and how many batches were taken since: the epoch is drawn again up to
there. That is exact only if nothing else draws from those generators, so each feed has states of its own for them,
which are in place while it makes a batch and at no other time.
"""

from __future__ import annotations

import copy
import hashlib
import random
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, default_convert

from metapl import checks
from metapl.batch import inputs_of
from metapl.checks import described
from metapl.data import draws
from metapl.data.batches import StepBatches, loader
from metapl.data.unlabeled import WithoutLabels
from metapl.device import to_device
from metapl.errors import MetaplError

_END: Any = object()

# Where a source keeps the parts that may hold generators of their own or be told the epoch.
_PARTS = ("loader", "batch_sampler", "sampler", "dataset", "datasets", "transform", "transforms")

_RESUMABLE = (
    "a torch DataLoader, a metapl.data.StepBatches, a list of batches, or an object with state_dict and load_state_dict"
)


class Feed(Protocol):
    """An endless stream of batches that knows its position; :func:`feed` makes one."""

    def next(self) -> Any:
        """The next batch; where an epoch is exhausted, the first of the next one."""

    def state(self) -> dict[str, Any]:
        """The position, as a tree of tensors and plain Python values that a checkpoint takes."""

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was asked for; before the first :meth:`next`."""

    def close(self) -> None:
        """Stop the workers; ask for the state before."""


def feed(
    source: Any,
    *,
    name: str,
    stop: int,
    num_workers: int = 0,
    seed: int = 0,
    device: torch.device | str | None = None,
) -> Feed:
    """Serve the batches of a source without end, resumably.

    Args:
        source: one of

            - :class:`~metapl.data.StepBatches`: batch t is ``source[t]``.
            - an object with ``state_dict`` and ``load_state_dict``, such as torchdata's ``StatefulDataLoader``: these
              hold the position.
            - a list or tuple of batches: batch t is ``source[t % len(source)]``.
            - a torch ``DataLoader``, or anything else that ``iter`` begins anew each time: its epochs follow each
              other, and ``set_epoch(epoch)`` is called on samplers and data sets that have it.
            - :func:`~metapl.data.without_labels` of one of these: its batches without their labels.
            - an iterator or generator: served once, and it cannot be restored.
        name: what messages call the source, such as "labeled"; feeds of different names draw differently.
        stop: number of batches that the run needs, 0 or more. Batches beyond it are not promised.
        num_workers: processes that prepare batches of a ``StepBatches`` ahead. A ``DataLoader`` has its own number.
        seed: of what the source draws, any integer.
        device: where the batches are wanted; None: wherever the source has them. Away from the CPU, what a
            ``StepBatches`` leaves to :meth:`~metapl.data.StepBatches.augment`, such as the views of pictures, is done
            there, and workers fetch no more than :meth:`~metapl.data.StepBatches.raw` batches.

    Returns:
        A feed at batch 0. Workers start with the first batch.

    Cost: to restore a ``DataLoader`` takes as long as the batches of the epoch so far; everything else is immediate.
    Swapping generators takes about 0.2 ms per batch on one CPU core, most of it numpy's; ``StepBatches`` and lists do
    without. Copies to CUDA are queued and not waited for, see :func:`~metapl.data.to_device`.

    Exactness: what is drawn from torch's CPU generator, ``random`` and numpy's global generator while a batch is made
    comes from a stream of (seed, name) and leaves those generators alone. Generators that a loader, its samplers, its
    data set or their transforms hold as attributes go on from where they were when the feed was made, also out of sight
    of their owner; so one generator may serve two loaders. Not seen are generators held elsewhere (in a closure, on
    CUDA). ``persistent_workers`` is not used: such workers carry draws from epoch to epoch that cannot be read back, so
    they start anew with each epoch. An object with ``state_dict`` is as exact as that; torchdata's loader leaves out
    what its workers draw from, so for random transforms in workers a ``DataLoader`` is the better source.

    Raises:
        MetaplError: the source is none of these or has no batch; a ``StepBatches`` has fewer than ``stop``. Later, from
            ``next``: making a batch failed (the cause is chained), or an iterator ran out; from ``restore``: the state
            is not one of such a source, or the source has no position. After a failure the same batch comes next,
            except from iterators and from objects with ``state_dict``, which go on as they please.

    >>> from torch.utils.data import DataLoader
    >>> digits = DataLoader(range(10), batch_size=4, shuffle=True)
    >>> first = feed(digits, name="labeled", stop=100)
    >>> _ = [first.next() for _ in range(5)]  # the second epoch has begun
    >>> second = feed(digits, name="labeled", stop=100)
    >>> second.restore(first.state())
    >>> torch.equal(first.next(), second.next())
    True
    """
    _refuse_numbers(name, stop, num_workers)
    place = None if device is None else torch.device(device)
    if isinstance(source, WithoutLabels):
        whole = feed(source.source, name=name, stop=stop, num_workers=num_workers, seed=seed, device=device)
        return _InputsFeed(whole)
    if isinstance(source, StepBatches):
        return _StepFeed(source, name, stop, num_workers, place)
    _refuse_source(source, name)
    served = _served(source, name, stop, seed)
    return served if place is None else _PlacedFeed(served, place)


def _served(source: Any, name: str, stop: int, seed: int) -> Feed:
    """The feed for a kind of source, wherever its batches are."""
    if hasattr(source, "state_dict") and hasattr(source, "load_state_dict"):
        return _StatefulFeed(source, name, stop, seed)
    if isinstance(source, Sequence):
        return _SequenceFeed(source, name)
    if isinstance(source, Iterator):
        return _IteratorFeed(source, name, stop, seed)
    return _EpochFeed(source, name, seed)


class _Stream:
    """States of their own for the generators that a source draws from: the default ones on the CPU, and its own."""

    def __init__(self, seed: int, name: str, own: Sequence[Any] = ()) -> None:
        self.generators: tuple[Any, ...] = (torch.default_generator, random, np.random, *own)
        self.states: list[Any] = [*_seeded(seed, name), *map(_get, own)]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Draw from this stream; afterwards the generators are as they were."""
        outside = self.read()
        try:
            self.write(self.states)
            yield
        finally:
            self.states = self.read()
            self.write(outside)

    def read(self) -> list[Any]:
        return [_get(generator) for generator in self.generators]

    def write(self, states: Sequence[Any]) -> None:
        for generator, state in zip(self.generators, states, strict=True):
            _set(generator, state)

    def check(self, states: Any, name: str) -> list[Any]:
        """Refuse states that these generators do not take."""
        before = self.read()
        try:
            self.write(states)
        except (TypeError, ValueError, RuntimeError, LookupError, AttributeError) as error:
            raise MetaplError(
                f"{name} cannot take up the saved states of its {len(self.generators)} random number generators "
                f"({_words(error)}); expected the source that the checkpoint was written with, with the same generators"
            ) from error
        finally:
            self.write(before)
        return list(states)


@dataclass(frozen=True)
class _Place:
    """A place in an epoch: the stream's states where the epoch began, and the batches taken since."""

    epoch: int
    batches: int
    start: list[Any]


class _EpochFeed:
    """The epochs of a re-iterable, one after the other."""

    kind = "epochs"

    def __init__(self, source: Iterable[Any], name: str, seed: int) -> None:
        self._source, self._name = _with_mortal_workers(source), name
        self._parts = _parts(source)
        self._stream = _Stream(seed, name, _own_generators(self._parts))
        self._place = _Place(0, 0, self._stream.states)
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        try:
            with self._stream.in_place():
                iterator = self._opened(self._place) if self._iterator is None else self._iterator
                batch = self._take(iterator, self._place.batches)
                while batch is _END:
                    batch = self._take(self._next_epoch(), 0)
        except BaseException:
            # Nobody knows what an interrupted iterator gives next. Without it, the next call draws the epoch again.
            self.close()
            raise
        self._place = replace(self._place, batches=self._place.batches + 1)
        return batch

    def state(self) -> dict[str, Any]:
        place = self._place
        return {"kind": self.kind, "epoch": place.epoch, "batches": place.batches, "stream": _plain(place.start)}

    def restore(self, state: dict[str, Any]) -> None:
        epoch, batches, start = _entries(state, self, self._name, epoch=int, batches=int, stream=list)
        if batches and getattr(self._source, "num_workers", 0) > 1 and not getattr(self._source, "in_order", True):
            raise MetaplError(
                f"{self._name} is a DataLoader with in_order=False: its batches come as its workers finish them, so it "
                "cannot be resumed by position; expected in_order=True, the default"
            )
        place = _Place(epoch, batches, self._stream.check(start, self._name))
        self.close()
        try:
            with self._stream.in_place():
                self._opened(place)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        _stop_workers(self._iterator)
        self._iterator = None

    def _next_epoch(self) -> Iterator[Any]:
        if not self._place.batches:
            raise MetaplError(
                f"{self._name} gave no batch in epoch {self._place.epoch} ({described(self._source)}); expected at "
                "least one: is its data set empty, smaller than a batch with drop_last=True, or used up after one pass?"
            )
        return self._opened(_Place(self._place.epoch + 1, 0, self._stream.read()))

    def _opened(self, place: _Place) -> Iterator[Any]:
        """Begin the epoch of a place as it began, and go there."""
        self._place = place
        self._stream.write(place.start)
        with _blamed(f"{self._name} could not begin epoch {place.epoch}", self._source):
            for part in self._parts:
                if hasattr(part, "set_epoch"):
                    part.set_epoch(place.epoch)
            self._iterator = iter(self._source)
        for number in range(place.batches):
            if self._take(self._iterator, number) is _END:
                raise MetaplError(
                    f"{self._name} has {number} batches in an epoch, and the run to resume had taken {place.batches} "
                    f"of epoch {place.epoch}; expected the same data, batch size and seeds as then"
                )
        return self._iterator

    def _take(self, iterator: Iterator[Any], number: int) -> Any:
        with _blamed(f"{self._name} failed at batch {number} of epoch {self._place.epoch}", self._source):
            return next(iterator, _END)


class _StatefulFeed:
    """The epochs of an object that keeps its own position."""

    kind = "state_dict"

    def __init__(self, source: Any, name: str, stop: int, seed: int) -> None:
        self._source, self._name, self._stop = source, name, stop
        self._stream = _Stream(seed, name, _own_generators(_parts(source)))
        self._epoch = self._batches = 0
        self._iterator: Iterator[Any] | None = None
        self._closed = False

    def next(self) -> Any:
        if self._closed:
            raise MetaplError(f"the feed of {self._name} is closed; make a new one and restore it to go on")
        with self._stream.in_place():
            batch = self._take(self._opened())
            while batch is _END:
                batch = self._take(self._next_epoch())
        self._batches += 1
        return batch

    def state(self) -> dict[str, Any]:
        with self._stream.in_place(), _blamed(f"{self._name} could not tell its state", self._source):
            # Asked before it is iterated, a loader may begin an epoch to answer. The draws of that are the first
            # batch's, and must not be made twice.
            if not self._closed:
                self._opened()
            source = copy.deepcopy(self._source.state_dict())
        stream = _plain(self._stream.states)
        return {"kind": self.kind, "epoch": self._epoch, "batches": self._batches, "stream": stream, "source": source}

    def restore(self, state: dict[str, Any]) -> None:
        epoch, batches, stream, source = _entries(
            state, self, self._name, epoch=int, batches=int, stream=list, source=object
        )
        states = self._stream.check(stream, self._name)
        self.close()
        with self._stream.in_place():
            self._stream.write(states)
            with _blamed(f"{self._name} could not load its state", self._source):
                self._source.load_state_dict(source)
                self._iterator = iter(self._source)
            # In the run to resume, the epoch had begun before.
            self._stream.write(states)
        self._epoch, self._batches, self._closed = epoch, batches, False

    def close(self) -> None:
        _stop_workers(self._iterator)
        self._iterator, self._closed = None, True

    def _opened(self) -> Iterator[Any]:
        if self._iterator is None:
            with _blamed(f"{self._name} could not begin epoch {self._epoch}", self._source):
                self._iterator = iter(self._source)
        return self._iterator

    def _next_epoch(self) -> Iterator[Any]:
        if isinstance(self._source, Iterator):
            raise _ran_out(self._name, self._batches, self._stop)
        if not self._batches:
            raise MetaplError(
                f"{self._name} gave no batch in epoch {self._epoch} ({described(self._source)}); expected at least one"
            )
        self._epoch, self._batches, self._iterator = self._epoch + 1, 0, None
        return self._opened()

    def _take(self, iterator: Iterator[Any]) -> Any:
        with _blamed(f"{self._name} failed at batch {self._batches} of epoch {self._epoch}", self._source):
            return next(iterator, _END)


class _IteratorFeed:
    """An iterator, which can be gone through once."""

    kind = "iterator"

    def __init__(self, source: Iterator[Any], name: str, stop: int, seed: int) -> None:
        self._source, self._name, self._stop = source, name, stop
        self._stream = _Stream(seed, name)
        self._batches = 0

    def next(self) -> Any:
        with self._stream.in_place(), _blamed(f"{self._name} failed at batch {self._batches}", self._source):
            batch = next(self._source, _END)
        if batch is _END:
            raise _ran_out(self._name, self._batches, self._stop)
        self._batches += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "batches": self._batches}

    def restore(self, state: dict[str, Any]) -> None:
        raise MetaplError(
            f"{self._name} is an iterator ({described(self._source)}), which cannot be resumed by position: it can be "
            f"gone through once, and where it stands cannot be told; expected {_RESUMABLE}"
        )

    def close(self) -> None:
        """The iterator is its owner's, and may go on elsewhere."""


class _InputsFeed:
    """Another feed's batches without their labels."""

    def __init__(self, feed: Feed) -> None:
        self._feed = feed
        self.state, self.restore, self.close = feed.state, feed.restore, feed.close

    def next(self) -> Any:
        return inputs_of(self._feed.next())


class _PlacedFeed:
    """Another feed's batches, moved to a device."""

    def __init__(self, feed: Feed, device: torch.device) -> None:
        self._feed, self._device = feed, device

    def next(self) -> Any:
        return _placed(self._feed.next(), self._device)

    def state(self) -> dict[str, Any]:
        return self._feed.state()

    def restore(self, state: dict[str, Any]) -> None:
        self._feed.restore(state)

    def close(self) -> None:
        self._feed.close()


class _StepFeed:
    """The batches of a `StepBatches`, by their step: made whole by the loader, or on the device from what it fetches.

    Both ways give the same batches and have the same position, so a run may change from one to the other.
    """

    kind = "steps"

    def __init__(
        self, source: StepBatches[Any], name: str, stop: int, num_workers: int, device: torch.device | None
    ) -> None:
        if stop > len(source):
            raise MetaplError(
                f"{name} has {len(source)} steps, and the run needs {stop}; expected as many or more: a stream without "
                "an end has steps=None"
            )
        self._source, self._name, self._stop, self._num_workers = source, name, stop, num_workers
        self._device = device
        self._finished_there = device is not None and _finishes_batches(device)
        self._position = 0
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        if self._position >= self._stop:
            raise MetaplError(
                f"{self._name} was made for {self._stop} batches and is at batch {self._position}; make a feed with a "
                "larger stop to go on"
            )
        try:
            with _blamed(f"{self._name} failed at batch {self._position}", self._source):
                if self._iterator is None:
                    self._iterator = self._opened()
                batch = self._finished(next(self._iterator))
        except BaseException:
            # An interrupted loader may skip the batch that it was at; a new one begins with it.
            self.close()
            raise
        self._position += 1
        return batch

    def _opened(self) -> Iterator[Any]:
        """A loader from the position on. Workers have their batches pinned in the background, for CUDA."""
        source = self._source.raw() if self._finished_there else self._source
        pinned = self._num_workers > 0 and self._device is not None and self._device.type == "cuda"
        return iter(loader(source, self._position, self._stop, self._num_workers, pin_memory=pinned))

    def _finished(self, item: Any) -> Any:
        batch = item if self._device is None else _placed(item, self._device)
        # As loaders do, which turn tuples into lists.
        return default_convert(self._source.augment(self._position, batch)) if self._finished_there else batch

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        (position,) = _entries(state, self, self._name, position=int)
        self.close()
        self._position = position

    def close(self) -> None:
        _stop_workers(self._iterator)
        self._iterator = None


def _placed(batch: Any, device: torch.device) -> Any:
    """The batch on the device; values that are wrong are refused while they are on the host, where a look is free."""
    if device.type != "cpu":  # there the step itself looks
        checks.finite_on_host(batch)
    return to_device(batch, device)


def _finishes_batches(device: torch.device) -> bool:
    """Whether views are taken on the device itself: on the CPU, that is the workers' affair."""
    return device.type != "cpu"


class _SequenceFeed:
    """The batches of a list or tuple, over and over."""

    kind = "sequence"

    def __init__(self, source: Sequence[Any], name: str) -> None:
        if not len(source):
            raise MetaplError(f"{name} is an empty {type(source).__name__}; expected at least one batch")
        self._source, self._name = source, name
        self._position = 0

    def next(self) -> Any:
        place = self._position % len(self._source)
        with _blamed(f"{self._name} failed at batch {place}", self._source):
            batch = self._source[place]
        self._position += 1
        return batch

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        (self._position,) = _entries(state, self, self._name, position=int)

    def close(self) -> None:
        """There is nothing to stop."""


def _with_mortal_workers(source: Iterable[Any]) -> Iterable[Any]:
    """The same loader, with workers that start anew each epoch."""
    if not isinstance(source, DataLoader) or not source.persistent_workers:
        return source
    twin = copy.copy(source)
    # A loader guards this attribute against being set; the user's own loader stays as it is.
    vars(twin).update(persistent_workers=False, _iterator=None)
    return twin


def _stop_workers(iterator: Iterator[Any] | None) -> None:
    # torch stops workers when the iterator is collected, but a traceback may hold on to it for long.
    stop = getattr(iterator, "_shutdown_workers", None)
    if stop is not None:
        stop()


def _parts(source: Any) -> list[Any]:
    """A source, its samplers, data sets and their transforms."""
    found: dict[int, Any] = {}
    waiting = [source]
    while waiting:
        part = waiting.pop()
        if id(part) in found:
            continue
        found[id(part)] = part
        inside = getattr(part, "__dict__", {})
        for key in _PARTS:
            value = inside.get(key)
            if key in ("datasets", "transforms") and isinstance(value, list | tuple):
                waiting.extend(value)
            else:
                waiting.append(value)
    return [part for part in found.values() if part is not None]


def _own_generators(parts: Sequence[Any]) -> list[Any]:
    """The generators that parts of a source hold as attributes, each once, in an order that is always the same."""
    kinds = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)
    held = {
        id(value): value
        for part in parts
        for value in getattr(part, "__dict__", {}).values()
        if isinstance(value, kinds) and value is not torch.default_generator
    }
    return list(held.values())


def _get(generator: Any) -> Any:
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, random.Random) or generator is random:
        return generator.getstate()
    return generator.get_state(legacy=False)


def _set(generator: Any, state: Any) -> None:
    if isinstance(generator, torch.Generator):
        # A checkpoint that was loaded onto a device has moved the state there too.
        generator.set_state(state.cpu())
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, random.Random) or generator is random:
        generator.setstate(state)
    else:
        generator.set_state(state)


def _seeded(seed: int, name: str) -> list[Any]:
    """First states for torch's, Python's and numpy's default generators."""
    digest = hashlib.sha256(name.encode()).digest()
    key = draws.fold_in(seed, int.from_bytes(digest[:8], "big"))
    numpy = np.random.RandomState(np.random.MT19937(key))
    return [torch.Generator().manual_seed(key).get_state(), random.Random(key).getstate(), _get(numpy)]


def _plain(value: Any) -> Any:
    """numpy's arrays and numbers as lists and numbers, which `torch.load(weights_only=True)` brings back."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner) for inner in value]
    return value.tolist() if isinstance(value, np.ndarray | np.generic) else value


def _entries(state: Any, made_by: Any, name: str, **kinds: type) -> list[Any]:
    """The entries of a saved state, or what is wrong with it."""
    kind = state.get("kind") if isinstance(state, Mapping) else None
    if kind != made_by.kind:
        raise MetaplError(
            f"{name} got a state of kind {kind!r}; expected kind {made_by.kind!r}, from the same kind of source as in "
            "the run to resume"
        )
    wrong = [key for key, expected in kinds.items() if not _fits(state.get(key, _END), expected)]
    if wrong:
        raise MetaplError(
            f"{name} got a state with wrong entries: {', '.join(wrong)}; expected what state() of its feed returned"
        )
    return [state[key] for key in kinds]


def _fits(value: Any, kind: type) -> bool:
    return value is not _END and isinstance(value, kind) and not (isinstance(value, int) and value < 0)


@contextmanager
def _blamed(what: str, source: Any) -> Iterator[None]:
    """Say which source failed where; errors that say so themselves, and Ctrl-C, pass."""
    try:
        yield
    except MetaplError as error:
        raise _without_traceback(error) from error.__cause__
    except Exception as error:
        known = getattr(source, "explain", lambda: None)()  # which file a worker died of, where the source can tell
        if known is not None:
            raise MetaplError(f"{what}: {known}") from error
        raise MetaplError(
            f"{what} ({described(source)}): {_words(error)}; the error that caused this one says where to mend the data"
        ) from error


def _without_traceback(error: MetaplError) -> MetaplError:
    """An error from a worker process as it was raised there: the loader puts the worker's traceback into its text."""
    text = str(error)
    if "Original Traceback" not in text:
        return error
    return MetaplError(text.rsplit("MetaplError: ", 1)[-1].strip())


def _words(error: BaseException) -> str:
    first = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}" if first else type(error).__name__


def _ran_out(name: str, batches: int, stop: int) -> MetaplError:
    return MetaplError(
        f"{name} ran out at batch {batches} (counted from 0), and the run needs {stop}; an iterator can be gone "
        f"through once: expected one that is long enough, or {_RESUMABLE}"
    )


def _refuse_numbers(name: str, stop: int, num_workers: int) -> None:
    if stop < 0:
        raise MetaplError(f"the feed of {name} got stop {stop}; expected the number of batches that the run needs")
    if num_workers < 0:
        raise MetaplError(f"the feed of {name} got num_workers {num_workers}; expected 0 or more, 0 for no processes")


def _refuse_source(source: Any, name: str) -> None:
    """Refuse what has no batches, and what can be iterated over but does not give batches."""
    mend = None
    if isinstance(source, Dataset) or (hasattr(source, "__getitem__") and not isinstance(source, Iterable)):
        mend = "wrap it in a DataLoader, which makes batches of it: torch.utils.data.DataLoader(dataset, batch_size=…)"
    elif isinstance(source, Tensor | np.ndarray):
        mend = "wrap it in a data set and a DataLoader, or give [batch] to serve it whole each time"
    elif isinstance(source, str | bytes | Mapping | Set | nn.Module) or not isinstance(source, Iterable):
        mend = "call it" if callable(source) and not isinstance(source, nn.Module | type) else "give one of these"
    if mend is not None:
        raise MetaplError(f"{name} is {described(source)}; expected {_RESUMABLE}: {mend}.")
