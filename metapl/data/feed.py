"""Endless streams of batches that know their position, made of whatever a user has batches in.

The position in a :class:`~metapl.data.StepBatches` or a list is a number. In a ``DataLoader`` it is
where the random number generators were at the start of the epoch, and how many batches were taken
since: the epoch is drawn again up to there. Each feed has states of its own for these generators,
in place while it makes a batch and at no other time.
"""

from __future__ import annotations

import copy
import hashlib
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, Sampler, default_convert

from metapl.data import draws
from metapl.data.steps import StepBatches, loader
from metapl.errors import MetaplError
from metapl.execution.batch import Batch, inputs_of, to_device
from metapl.execution.checks import unexpected
from metapl.runs.checkpoint import plain_states

Source = Any
"""Where batches come from: a list, a data set, a loader, or what else :func:`feed` serves."""

# What ``next`` returns of an iterator that has no more batches.
_END: Any = object()

# Attributes of a source with parts that may hold generators or have ``set_epoch``.
_PART_NAMES = (
    "loader",
    "base_dataloader",
    "collate_fn",
    "batch_sampler",
    "sampler",
    "dataset",
    "datasets",
    "transform",
    "transforms",
)

# Attributes that may be a list or tuple of parts; each entry is then a part.
_LIST_NAMES = ("datasets", "transforms")

# Objects of classes in these modules are a user's own, wherever their files are.
USERS_OWN = ("__main__", "__mp_main__")
# The most entries of a list that are looked at, and the most parts of a source.
MOST_ENTRIES = 100
MOST_PARTS = 1000

# What the draws of the sources of a fit depend on, in the place of their names. The sources were
# called so when the committed rows of benchmarks were measured.
_STREAMS = {"outer": "labeled", "inner": "unlabeled"}

# The kinds of generators that a part may hold; read_state and write_state know each of them.
_GENERATOR_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Feed(ABC):
    """An endless stream of batches that knows its position; :func:`feed` makes one.

    Args:
        source: what the batches are taken from.
        name: what messages call the source.
        stop: number of batches that the run needs.
        device: where the batches are wanted; None: wherever the source has them.
        keeps_labels: whether the labels stay in the batches.
        num_workers: processes that prepare batches by their numbers.
        seed: of the draws of a source with epochs.
    """

    kind: str

    without_position = ""
    """What the source is, where it cannot be put where it was; "" elsewhere."""

    # The number of batches so far; of a source with epochs, of those in this epoch.
    _position = 0

    # None: it begins with the next batch that is asked for, at the position.
    _iterator: Iterator[Batch] | None = None

    def __init__(
        self,
        source: Any,
        *,
        name: str,
        stop: int,
        device: torch.device | None,
        keeps_labels: bool,
        num_workers: int,
        seed: int,
    ) -> None:
        self._source = source
        self._name = name
        self._stop = stop
        self._device = device
        self._keeps_labels = keeps_labels
        self._num_workers = num_workers
        self._seed = seed
        self._prepare()

    @abstractmethod
    def _prepare(self) -> None:
        """Read of the source what stays the same, and refuse one that does not serve."""

    def next(self) -> Batch:
        """Return the next batch; where an epoch is exhausted, the first of the next one."""
        try:
            batch = self._next()
            if self._device is not None:
                batch = to_device(batch, self._device)
        except BaseException:
            # An interrupted iterator may skip the batch that it was at; a new one begins with it.
            self.close()
            raise
        self._position += 1
        return batch if self._keeps_labels else inputs_of(batch)

    def skip(self) -> None:
        """Leave the next batch out.

        A source that draws has to make it, and one that knows its batches by their number has not.
        """
        self.next()

    @abstractmethod
    def _next(self) -> Batch:
        """Return the batch at the position, as the source has it."""

    def state(self) -> dict[str, Any]:
        """Return the position, as a tree of tensors and plain Python values for a checkpoint."""
        return {"kind": self.kind, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was asked for."""
        if state["kind"] != self.kind:
            raise MetaplError(f"{self._name} is {self.kind!r}; expected the kind {state['kind']!r}")
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Stop the workers.

        The position stays, and :meth:`state` with it: the next :meth:`next` begins the workers
        again, at the same batch. An iterator that the user gave belongs to its owner, and may go
        on elsewhere; nothing is done to it.
        """
        if self.kind == "iterator":
            return
        # torch stops workers when the iterator is collected, but a traceback may hold on to it
        # for long.
        shut_down_workers = getattr(self._iterator, "_shutdown_workers", None)
        if shut_down_workers is not None:
            shut_down_workers()
        self._iterator = None


def feed(
    source: Source,
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
            - a list or tuple of batches: batch t is ``source[t % len(source)]``.
            - a torch ``DataLoader``, or anything else that ``iter`` begins anew each time: its
              epochs follow each other, and ``set_epoch(epoch)`` is called on samplers and data sets
              that have it.
            - :func:`~metapl.data.without_labels` of one of these: its batches without their labels.
            - an iterator or generator: served once, and it cannot be restored.
        name: what messages call the source, such as "outer"; feeds of different names draw
            differently.
        stop: number of batches that the run needs, 0 or more. Batches beyond it are not promised.
        num_workers: processes that prepare batches of a ``StepBatches`` ahead. A ``DataLoader`` has
            its own number.
        seed: of what the source draws, any integer.
        device: where the batches are wanted; None: wherever the source has them.

    Returns: a feed at batch 0. Workers start with the first batch.

    Cost: to restore a ``DataLoader`` takes as long as the batches of the epoch so far; swapping
    generators takes about 0.2 ms a batch. ``StepBatches`` and lists do without both.

    Exactness: what is drawn on the CPU while a batch is made comes from generators seeded by (seed,
    name), and from generators that the loader, its samplers, its data set or their transforms hold
    as attributes (docs/runs.md).

    Raises: :class:`metapl.MetaplError` for a source that is none of these, or has no batch or fewer
    than ``stop``.

    >>> from torch.utils.data import DataLoader
    >>> digits = DataLoader(range(10), batch_size=4, shuffle=True)
    >>> first = feed(digits, name="outer", stop=100)
    >>> _ = [first.next() for _ in range(5)]  # the second epoch has begun
    >>> second = feed(digits, name="outer", stop=100)
    >>> second.restore(first.state())
    >>> torch.equal(first.next(), second.next())
    True
    """
    keeps_labels = True
    while isinstance(source, WithoutLabels):
        source = source.source
        keeps_labels = False
    # These are iterable, but what they iterate over is no batches.
    is_no_source = isinstance(source, str | bytes | Mapping | Set | nn.Module | Tensor | np.ndarray)
    if is_no_source or not isinstance(source, StepBatches | Iterable):
        raise unexpected(f"{name} is", source, "a DataLoader, or a list or iterable of batches")
    kind = _NumberedFeed if isinstance(source, StepBatches | Sequence) else _EpochFeed
    return kind(
        source,
        name=name,
        stop=stop,
        device=None if device is None else torch.device(device),
        keeps_labels=keeps_labels,
        num_workers=num_workers,
        seed=seed,
    )


@dataclass(frozen=True, eq=False)
class WithoutLabels:
    """The batches of another source without their labels; see :func:`without_labels`."""

    source: Source

    def __iter__(self) -> Iterator[Batch]:
        return map(inputs_of, self.source)

    def __len__(self) -> int:
        return len(self.source)


def without_labels(source: Source) -> WithoutLabels:
    """Leave out the labels of a source of batches, so that ``fit`` can take it as ``inner``.

    Args:
        source: a DataLoader, or anything else that :func:`feed` takes. Of a batch that is a tuple
            or list the first element stays, of a dict all but ``labels`` and ``label``, and a
            tensor stays as it is.

    Returns: a source that ``fit`` takes, resumable as the one it was made of, and that can be
    iterated over by itself.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.rand(6, 2), torch.arange(6)), batch_size=3)
    >>> [x.shape for x in without_labels(loader)]
    [torch.Size([3, 2]), torch.Size([3, 2])]
    """
    return WithoutLabels(source)


class _NumberedFeed(Feed):
    """The batches of a `StepBatches` by their step, or those of a list over and over.

    Of a `StepBatches` with ``raw()`` and ``augment(step, fetched)``, workers fetch the first half
    of a batch, and the second half is made on the device.
    """

    def _prepare(self) -> None:
        self.kind = "steps" if isinstance(self._source, StepBatches) else "sequence"
        # A list is served over and over, so that one batch is enough.
        least = self._stop if self.kind == "steps" else min(self._stop, 1)
        batches = len(self._source)
        if batches < least:
            raise MetaplError(f"{self._name} has {batches} batches; expected {least} or more.")
        # Where the device is a CPU, workers make the whole of a batch.
        on_accelerator = self._device is not None and self._device.type != "cpu"
        self._is_made_in_halves = on_accelerator and hasattr(self._source, "raw")

    def _next(self) -> Batch:
        if self.kind == "sequence":
            return self._source[self._position % len(self._source)]
        if self._position >= self._stop:
            raise MetaplError(f"{self._name} has {self._stop} batches; expected a larger stop")
        if self._iterator is None:
            self._iterator = self._begin()
        batch = next(self._iterator)
        if not self._is_made_in_halves:
            return batch
        assert self._device is not None, "halves are for a device"
        batch = self._source.augment(self._position, to_device(batch, self._device))
        # Converted as loaders do, which turn tuples into lists.
        return default_convert(batch)

    def skip(self) -> None:
        # A loader that has begun would serve the batch that is left out.
        self.close()
        self._position += 1

    def _begin(self) -> Iterator[Batch]:
        """Return the batches from the position on."""
        # Workers have their batches pinned in the background, for CUDA.
        is_for_cuda = self._device is not None and self._device.type == "cuda"
        source = self._source.raw() if self._is_made_in_halves else self._source
        return iter(
            loader(
                source,
                start=self._position,
                stop=self._stop,
                num_workers=self._num_workers,
                pin_memory=self._num_workers > 0 and is_for_cuda,
            )
        )


class _EpochFeed(Feed):
    """The epochs of a `DataLoader`, or of anything else that begins anew each time.

    It draws from generators of its own.
    """

    def _prepare(self) -> None:
        source = self._source
        self.kind = "iterator" if isinstance(source, Iterator) else "epochs"
        is_in_order = getattr(source, "in_order", True) or source.num_workers < 2
        if self.kind == "iterator":
            self.without_position = "an iterator"
        elif not is_in_order:
            self.without_position = "a loader with in_order=False"
        self._parts = parts_of(source)
        self._generators = Generators(self._seed, self._name, self._parts)
        # The states of the generators at the start of the epoch.
        self._start = self._generators.states
        self._epoch = 0
        # Workers that persist would go on with their generators, and not begin as the epoch did.
        if isinstance(source, DataLoader) and source.persistent_workers:
            self._source = copy.copy(source)
            # A loader guards this attribute against being set; the user's own loader stays as it
            # is.
            vars(self._source).update(persistent_workers=False, _iterator=None)

    def _next(self) -> Batch:
        with self._generators.in_place():
            if self._iterator is None:
                batch = next(self._begin(), _END)
            else:
                batch = next(self._iterator, _END)
            # The epoch is exhausted: begin the next ones until one has a batch.
            while batch is _END:
                # An iterator that is used up, an empty data set, or one smaller than a batch with
                # drop_last.
                if self.kind == "iterator" or self._position == 0:
                    if self.kind == "epochs" and self._epoch == 0:
                        raise MetaplError(
                            f"{self._name} has no batch; expected some: it is empty, or smaller "
                            "than a batch with drop_last=True"
                        )
                    lacks = f"no batch {self._position} in epoch {self._epoch} of {self._name}"
                    raise MetaplError(f"{lacks}; expected a source that begins anew")
                self._epoch += 1
                self._position = 0
                self._start = self._generators.read()
                batch = next(self._begin(), _END)
        return batch

    def _begin(self) -> Iterator[Batch]:
        """Begin the epoch again, and return its iterator at the position.

        The generators are put where they were at the start of the epoch, and the batches before the
        position are drawn and dropped. Of an iterator nothing is begun or dropped: it is returned
        where it is.
        """
        begins_anew = self.kind == "epochs"
        if begins_anew:
            self._generators.write(self._start)
        for part in self._parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        # Let go of the iterator of the last epoch first, so that its workers end before those of
        # the next begin.
        self._iterator = None
        self._iterator = iter(self._source)
        batches_to_skip = self._position if begins_anew else 0
        for skipped in range(batches_to_skip):
            if next(self._iterator, _END) is _END:
                had = f"{self._name} has {skipped} batches in an epoch, and had {self._position}"
                raise MetaplError(f"{had} or more; expected the same data as then")
        return self._iterator

    def state(self) -> dict[str, Any]:
        """Return the position, the epoch, and the generators' states at its start."""
        return super().state() | {"epoch": self._epoch, "stream": plain_states(self._start)}

    def restore(self, state: dict[str, Any]) -> None:
        """Draw the epoch again up to the position."""
        if self.without_position and (state["position"] or self.kind == "iterator"):
            raise MetaplError(
                f"{self._name} is {self.without_position}, which has no position; expected a "
                "DataLoader or a list, or resume='anyway', which goes on where it is"
            )
        super().restore(state)
        self._epoch = state["epoch"]
        self._start = state["stream"]
        try:
            with self._generators.in_place():
                self._begin()
        except BaseException:
            self.close()
            raise


class Generators:
    """The generators that a source may draw from, with states of this feed.

    These are the default generators on the CPU (torch's, Python's, NumPy's), seeded by a seed and a
    name, and those that the parts of a source hold as attributes, which begin where they are.

    Attributes:
        states: the states of this feed, in which the generators are put by :meth:`in_place`. Within
            its block the generators go on from there, and these are still the states at its start.
    """

    def __init__(self, seed: int, name: str, parts: Sequence[Any]) -> None:
        held_by_parts = generators_held_by(parts)
        self._generators = [torch.default_generator, random, np.random, *held_by_parts]
        name_digest = hashlib.sha256(_STREAMS.get(name, name).encode()).digest()
        key = draws.fold_in(seed, int.from_bytes(name_digest[:8], "big"))
        # Generators that serve here alone, for the states that the seed gives. They stand in the
        # order of the three default generators in self._generators, since a state is written to the
        # generator at its place.
        seeded_generators = [
            torch.Generator().manual_seed(key),
            random.Random(key),
            np.random.RandomState(np.random.MT19937(key)),
        ]
        self.states = [read_state(generator) for generator in [*seeded_generators, *held_by_parts]]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Draw in this block with the states of this feed.

        Afterwards the generators are as they were, and :attr:`states` are where this feed has got
        to.
        """
        outside_states = self.read()
        try:
            self.write(self.states)
            yield
        finally:
            self.states = self.read()
            self.write(outside_states)

    def read(self) -> list[Any]:
        """Return the states that the generators are in now."""
        return [read_state(generator) for generator in self._generators]

    def write(self, states: Sequence[Any]) -> None:
        """Put the generators into these states."""
        for generator, state in zip(self._generators, states, strict=True):
            write_state(generator, state)


def read_state(generator: Any) -> Any:
    """Return the state of a generator of torch, Python or NumPy, or of one of their modules."""
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if hasattr(generator, "getstate"):
        return generator.getstate()
    if isinstance(generator, torch.Generator):
        return generator.get_state()
    return generator.get_state(legacy=False)


def write_state(generator: Any, state: Any) -> None:
    """Put a generator into a state that :func:`read_state` returned."""
    if isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif hasattr(generator, "setstate"):
        generator.setstate(state)
    elif isinstance(generator, torch.Generator):
        # A checkpoint that was loaded onto a device has moved the state there.
        generator.set_state(state.cpu())
    else:
        generator.set_state(state)


def generators_held_by(parts: Sequence[Any]) -> list[Any]:
    """Return the generators that parts of a source hold as attributes, each once."""
    generators: dict[int, Any] = {}
    for part in parts:
        for value in held_by(part):
            if isinstance(value, _GENERATOR_KINDS) and value is not torch.default_generator:
                generators[id(value)] = value
    return [*generators.values()]


@contextmanager
def generators_put_back(source: Source) -> Iterator[None]:
    """Put the generators that a source and its parts hold back to where they are now."""
    generators = generators_held_by(parts_of(source))
    states = [read_state(generator) for generator in generators]
    try:
        yield
    finally:
        for generator, state in zip(generators, states, strict=True):
            write_state(generator, state)


def held_by(part: Any) -> list[Any]:
    """Return the values of a part's attributes, and the entries of short lists and dicts there."""
    values = [*getattr(part, "__dict__", {}).values()]
    for value in [*values]:
        if isinstance(value, list | tuple | dict) and len(value) <= MOST_ENTRIES:
            values += value.values() if isinstance(value, dict) else value
    return values


def may_hold_generators(value: Any) -> bool:
    """Return whether a value may hold a generator.

    That is an object of a user's own class, or a loader, a sampler or a data set of PyTorch.
    """
    if isinstance(value, DataLoader | Sampler | Dataset):
        return True
    if isinstance(value, (type, nn.Module, Tensor)) or not hasattr(value, "__dict__"):
        return False
    module = type(value).__module__.partition(".")[0]
    return module in USERS_OWN or not is_installed(module)


def is_installed(module: str) -> bool:
    """Return whether a module of Python is one of its own, or of a library."""
    if module in sys.stdlib_module_names:
        return True
    file = getattr(sys.modules.get(module), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


def parts_of(source: Source) -> list[Any]:
    """Return a source and its parts, each once.

    These are loaders, samplers, data sets, transforms, what makes batches of rows, and what else of
    a user's own classes they hold in attributes.
    """
    parts: dict[int, Any] = {}
    waiting = [source]
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in parts:
            continue
        parts[id(part)] = part
        attributes = getattr(part, "__dict__", {})
        for name in _PART_NAMES:
            value = attributes.get(name)
            if name in _LIST_NAMES and isinstance(value, list | tuple):
                waiting.extend(value)
            else:
                waiting.append(value)
    # In their order behind those that have these names, by which older checkpoints know theirs.
    waiting = [*parts.values()]
    while waiting and len(parts) < MOST_PARTS:
        for value in held_by(waiting.pop(0)):
            if id(value) not in parts and may_hold_generators(value):
                parts[id(value)] = value
                waiting.append(value)
    return list(parts.values())
