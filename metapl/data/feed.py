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
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_convert

from metapl.data import draws
from metapl.data.steps import StepBatches, loader
from metapl.errors import MetaplError
from metapl.execution.batch import inputs_of, to_device
from metapl.execution.checks import described
from metapl.runs.checkpoint import plain_states

_END: Any = object()

# Attributes of a source with parts that may hold generators or have ``set_epoch``.
_PARTS = (
    "loader",
    "base_dataloader",
    "batch_sampler",
    "sampler",
    "dataset",
    "datasets",
    "transform",
    "transforms",
)
_KINDS = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState)


class Feed(ABC):
    """An endless stream of batches that knows its position; :func:`feed` makes one."""

    kind: str
    _position = 0  # the batches so far, of an epoch where there are some
    _iterator: Iterator[Any] | None = (
        None  # it begins with the next batch that is asked for, at the position
    )

    def __init__(
        self, source: Any, name: str, stop: int, device: torch.device | None, labeled: bool
    ) -> None:
        self._source, self._name, self._stop, self._labeled = source, name, stop, labeled
        self._device: Any = device

    def next(self) -> Any:
        """The next batch; where an epoch is exhausted, the first of the next one."""
        try:
            batch = self._next()
            batch = batch if self._device is None else to_device(batch, self._device)
        except BaseException:
            # An interrupted iterator may skip the batch that it was at; a new one begins with it.
            self.close()
            raise
        self._position += 1
        return batch if self._labeled else inputs_of(batch)

    @abstractmethod
    def _next(self) -> Any: ...

    def state(self) -> dict[str, Any]:
        """The position, as a tree of tensors and plain Python values that a checkpoint takes."""
        return {"kind": self.kind, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on exactly where :meth:`state` was asked for."""
        if (kind := state["kind"]) != self.kind:
            raise MetaplError(
                f"{self._name} was of kind {kind!r}, and is {self.kind!r} now; expected the same "
                "kind"
            )
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        """Stop the workers; ask for the state before."""
        if self.kind != "iterator":  # which belongs to its owner, and may go on elsewhere
            # torch stops workers when the iterator is collected, but a traceback may hold on to it
            # for long.
            getattr(self._iterator, "_shutdown_workers", lambda: None)()
            self._iterator = None


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
            - a list or tuple of batches: batch t is ``source[t % len(source)]``.
            - a torch ``DataLoader``, or anything else that ``iter`` begins anew each time: its
              epochs follow each other, and ``set_epoch(epoch)`` is called on samplers and data sets
              that have it.
            - :func:`~metapl.data.without_labels` of one of these: its batches without their labels.
            - an iterator or generator: served once, and it cannot be restored.
        name: what messages call the source, such as "labeled"; feeds of different names draw
        differently. stop: number of batches that the run needs, 0 or more. Batches beyond it are
        not promised. num_workers: processes that prepare batches of a ``StepBatches`` ahead. A
        ``DataLoader`` has its own number. seed: of what the source draws, any integer. device:
        where the batches are wanted; None: wherever the source has them.

    Returns: a feed at batch 0. Workers start with the first batch. Cost: to restore a
    ``DataLoader`` takes as long as the batches of the epoch so far; swapping generators takes about
    0.2 ms a batch. ``StepBatches`` and lists do without both. Exactness: what is drawn on the CPU
    while a batch is made comes from generators seeded by (seed, name), and from generators that the
    loader, its samplers, its data set or their transforms hold as attributes (docs/runs.md).
    Raises: :class:`metapl.MetaplError` for a source that is none of these, or has no batch or fewer
    than ``stop``.

    >>> from torch.utils.data import DataLoader
    >>> digits = DataLoader(range(10), batch_size=4, shuffle=True)
    >>> first = feed(digits, name="labeled", stop=100)
    >>> _ = [first.next() for _ in range(5)]  # the second epoch has begun
    >>> second = feed(digits, name="labeled", stop=100)
    >>> second.restore(first.state())
    >>> torch.equal(first.next(), second.next())
    True
    """
    target, labeled = None if device is None else torch.device(device), True
    while isinstance(source, WithoutLabels):
        source, labeled = source.source, False
    no_batches = isinstance(source, str | bytes | Mapping | Set | nn.Module | Tensor | np.ndarray)
    if no_batches or not isinstance(source, StepBatches | Iterable):
        raise MetaplError(
            f"{name} is {described(source)}; expected a DataLoader, or a list or iterable of "
            "batches."
        )
    if isinstance(source, StepBatches | Sequence):
        return _NumberedFeed(source, name, stop, target, labeled, num_workers)
    return _EpochFeed(source, name, stop, target, labeled, seed)


@dataclass(frozen=True, eq=False)
class WithoutLabels:
    """The batches of another source without their labels; see :func:`without_labels`."""

    source: Any

    def __iter__(self) -> Iterator[Any]:
        return map(inputs_of, self.source)

    def __len__(self) -> int:
        return len(self.source)


def without_labels(source: Any) -> WithoutLabels:
    """Leave out the labels of a source of batches, to be the unlabeled one.

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
    """The batches of a `StepBatches` by their step, or those of a list over and over. Of one with
    ``raw()`` and ``augment(step, fetched)``, workers fetch the first half of a batch and the second
    is made on the device."""

    def __init__(
        self, source: Any, name: str, stop: int, device: Any, labeled: bool, workers: int
    ) -> None:
        super().__init__(source, name, stop, device, labeled)
        self.kind = "steps" if isinstance(source, StepBatches) else "sequence"
        least = stop if self.kind == "steps" else min(stop, 1)
        if len(source) < least:
            raise MetaplError(f"{name} has {len(source)} batches; expected {least} or more.")
        self._workers = workers
        # Where the device is a CPU, workers make the whole of a batch.
        self._halves = device is not None and device.type != "cpu" and hasattr(source, "raw")

    def _next(self) -> Any:
        if self.kind == "sequence":
            return self._source[self._position % len(self._source)]
        if self._position >= self._stop:
            raise MetaplError(
                f"{self._name} was made for {self._stop} batches; make a feed with a larger stop"
            )
        if self._iterator is None:
            # Workers have their batches pinned in the background, for CUDA.
            pinned = self._workers > 0 and self._device is not None and self._device.type == "cuda"
            source = self._source.raw() if self._halves else self._source
            self._iterator = iter(
                loader(source, self._position, self._stop, self._workers, pin_memory=pinned)
            )
        batch = next(self._iterator)
        if not self._halves:
            return batch
        # Converted as loaders do, which turn tuples into lists.
        return default_convert(self._source.augment(self._position, to_device(batch, self._device)))


class _EpochFeed(Feed):
    """The epochs of a `DataLoader`, or of anything else that begins anew each time, with generators of its own."""

    def __init__(
        self, source: Any, name: str, stop: int, device: Any, labeled: bool, seed: int
    ) -> None:
        super().__init__(source, name, stop, device, labeled)
        self.kind = "iterator" if isinstance(source, Iterator) else "epochs"
        self._parts = parts_of(source)
        self._generators = Generators(seed, name, self._parts)
        self._start = self._generators.states  # at the start of the epoch
        self._epoch = 0
        if (
            isinstance(source, DataLoader) and source.persistent_workers
        ):  # else workers go on with their generators
            self._source = copy.copy(source)
            # A loader guards this attribute against being set; the user's own loader stays as it
            # is.
            vars(self._source).update(persistent_workers=False, _iterator=None)

    def _next(self) -> Any:
        with self._generators.in_place():
            while (
                batch := next(self._begun() if self._iterator is None else self._iterator, _END)
            ) is _END:
                if self.kind == "iterator" or not self._position:
                    # An iterator that is used up, an empty data set, or one smaller than a batch
                    # with drop_last.
                    where = f"{self._name} has no batch {self._position} in epoch {self._epoch}"
                    raise MetaplError(
                        f"{where}, and the run needs {self._stop}; expected a source that begins "
                        "anew"
                    )
                self._epoch, self._position, self._iterator = self._epoch + 1, 0, None
                self._start = self._generators.read()
        return batch

    def _begun(self) -> Iterator[Any]:
        again = self.kind == "epochs"
        if again:
            self._generators.write(self._start)
        for part in self._parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        self._iterator = iter(self._source)
        for taken in range(self._position if again else 0):
            if next(self._iterator, _END) is _END:
                given = (
                    f"{self._name} has {taken} batches in an epoch, and the run to resume had "
                    f"taken {self._position}"
                )
                raise MetaplError(f"{given}; expected the same data as then")
        return self._iterator

    def state(self) -> dict[str, Any]:
        return super().state() | {"epoch": self._epoch, "stream": plain_states(self._start)}

    def restore(self, state: dict[str, Any]) -> None:
        in_order = getattr(self._source, "in_order", True) or self._source.num_workers < 2
        if self.kind == "iterator" or (state["position"] and not in_order):
            what = "an iterator" if self.kind == "iterator" else "a loader with in_order=False"
            raise MetaplError(
                f"{self._name} is {what}, which has no position; expected a DataLoader or a list"
            )
        super().restore(state)
        self._epoch, self._start = state["epoch"], state["stream"]
        try:
            with self._generators.in_place():
                self._begun()
        except BaseException:
            self.close()
            raise


class Generators:
    """The default generators on the CPU (torch's, Python's, numpy's), seeded by a seed and a name,
    and those that the parts of a source hold as attributes, which begin where they are."""

    def __init__(self, seed: int, name: str, parts: Sequence[Any]) -> None:
        attributes = (value for part in parts for value in getattr(part, "__dict__", {}).values())
        own = {
            id(v): v
            for v in attributes
            if isinstance(v, _KINDS) and v is not torch.default_generator
        }
        self._accesses = [
            *map(_access, (torch.default_generator, random, np.random, *own.values()))
        ]
        key = draws.fold_in(seed, int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
        first = (
            torch.Generator().manual_seed(key),
            random.Random(key),
            np.random.RandomState(np.random.MT19937(key)),
        )
        self.states = [_access(generator)[0]() for generator in (*first, *own.values())]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Draw with the states kept here; afterwards the generators are as they were."""
        outside = self.read()
        try:
            self.write(self.states)
            yield
        finally:
            self.states = self.read()
            self.write(outside)

    def read(self) -> list[Any]:
        return [get() for get, _ in self._accesses]

    def write(self, states: Sequence[Any]) -> None:
        for (_, put), state in zip(self._accesses, states, strict=True):
            put(state)


def _access(generator: Any) -> tuple[Callable[[], Any], Callable[[Any], Any]]:
    """How the state of a generator is read, and how it is written."""
    if isinstance(generator, np.random.Generator):
        return lambda: generator.bit_generator.state, partial(
            setattr, generator.bit_generator, "state"
        )
    if hasattr(generator, "getstate"):  # of Python
        return generator.getstate, generator.setstate
    if isinstance(
        generator, torch.Generator
    ):  # whose state a checkpoint that was loaded onto a device has moved there
        return generator.get_state, lambda state: generator.set_state(state.cpu())
    return partial(generator.get_state, legacy=False), generator.set_state


def parts_of(source: Any) -> list[Any]:
    parts: dict[int, Any] = {}
    waiting = [source]
    while waiting:
        part = waiting.pop()
        if part is not None and id(part) not in parts:
            parts[id(part)] = part
            held = getattr(part, "__dict__", {})
            for key in _PARTS:
                several = key in ("datasets", "transforms") and isinstance(
                    held.get(key), list | tuple
                )
                waiting.extend(held[key] if several else [held.get(key)])
    return list(parts.values())
