"""Endless streams of batches that know their position, made of whatever a user has batches in.

A feed that is restored goes on with the very batches that an uninterrupted run would have seen. For a
:class:`~metapl.data.StepBatches` or a list, the position is a number. For a ``DataLoader``, it is where the random
number generators were at the start of the epoch, and how many batches were taken since: the epoch is drawn again up to
there. That is exact only if nothing else draws from those generators, so each feed has states of its own for them,
which are in place while it makes a batch and at no other time.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, default_convert

from metapl.data.generators import Generators, parts_of
from metapl.data.steps import StepBatches, loader
from metapl.errors import MetaplError
from metapl.execution.batch import inputs_of
from metapl.execution.checks import described
from metapl.execution.device import to_device
from metapl.runs.generators import plain_states

_END: Any = object()


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
            - a list or tuple of batches: batch t is ``source[t % len(source)]``.
            - a torch ``DataLoader``, or anything else that ``iter`` begins anew each time: its epochs follow each
              other, and ``set_epoch(epoch)`` is called on samplers and data sets that have it.
            - :func:`~metapl.data.without_labels` of one of these: its batches without their labels.
            - an iterator or generator: served once, and it cannot be restored.
        name: what messages call the source, such as "labeled"; feeds of different names draw differently.
        stop: number of batches that the run needs, 0 or more. Batches beyond it are not promised.
        num_workers: processes that prepare batches of a ``StepBatches`` ahead. A ``DataLoader`` has its own number.
        seed: of what the source draws, any integer.
        device: where the batches are wanted; None: wherever the source has them.

    Returns: a feed at batch 0. Workers start with the first batch.

    Cost: to restore a ``DataLoader`` takes as long as the batches of the epoch so far; everything else is immediate.
    Swapping generators takes about 0.2 ms a batch; ``StepBatches`` and lists do without.

    Exactness: what is drawn on the CPU while a batch is made comes from generators seeded by (seed, name), and from
    generators that the loader, its samplers, its data set or their transforms hold as attributes; see "Loaders that can
    be resumed" in docs/runs.md for the exceptions.

    Raises: :class:`metapl.MetaplError` for a source that is none of these, or has no batch or fewer than ``stop``.

    >>> from torch.utils.data import DataLoader
    >>> digits = DataLoader(range(10), batch_size=4, shuffle=True)
    >>> first = feed(digits, name="labeled", stop=100)
    >>> _ = [first.next() for _ in range(5)]  # the second epoch has begun
    >>> second = feed(digits, name="labeled", stop=100)
    >>> second.restore(first.state())
    >>> torch.equal(first.next(), second.next())
    True
    """
    target = None if device is None else torch.device(device)
    if isinstance(source, WithoutLabels):
        inner = feed(source.source, name=name, stop=stop, num_workers=num_workers, seed=seed, device=device)
        return _ChangedFeed(inner, inputs_of)
    no_batches = isinstance(source, str | bytes | Mapping | Set | nn.Module | Tensor | np.ndarray)
    if no_batches or not isinstance(source, StepBatches | Iterable):
        raise MetaplError(f"{name} is {described(source)}; expected a DataLoader, or a list or iterable of batches.")
    if isinstance(source, StepBatches | Sequence):
        return _NumberedFeed(source, name, stop, num_workers, target)
    stream = _EpochFeed(source, name, stop, seed)
    return stream if target is None else _ChangedFeed(stream, partial(to_device, device=target))


class _ChangedFeed:
    """Another feed's batches, each changed."""

    def __init__(self, stream: Feed, change: Callable[[Any], Any]) -> None:
        self._stream, self._change = stream, change
        self.state, self.restore, self.close = stream.state, stream.restore, stream.close

    def next(self) -> Any:
        return self._change(self._stream.next())


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
        source: a DataLoader, or anything else that :func:`feed` takes. Of a batch that is a tuple or list the first
            element stays, of a dict all but ``labels`` and ``label``, and a tensor stays as it is.

    Returns: a source that ``fit`` takes, resumable as the one it was made of, and that can be iterated over by itself.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.rand(6, 2), torch.arange(6)), batch_size=3)
    >>> [x.shape for x in without_labels(loader)]
    [torch.Size([3, 2]), torch.Size([3, 2])]
    """
    return WithoutLabels(source)


class _NumberedFeed:
    """The batches of a `StepBatches` by their step, or those of a list over and over.

    Of a `StepBatches` with ``raw()`` and ``augment(step, fetched)``, the halves of its batches, workers fetch the first
    half and the second is made on the device; both ways give the same.
    """

    def __init__(self, source: Any, name: str, stop: int, workers: int, device: torch.device | None) -> None:
        self.kind = "steps" if isinstance(source, StepBatches) else "sequence"
        least = stop if self.kind == "steps" else min(stop, 1)
        if len(source) < least:
            raise MetaplError(f"{name} has {len(source)} batches; expected {least} or more.")
        self._source, self._name, self._stop, self._workers, self._device = source, name, stop, workers, device
        self._halves = device is not None and _finishes_batches(device) and hasattr(source, "raw")
        self._position = 0
        self._iterator: Iterator[Any] | None = None

    def next(self) -> Any:
        try:
            batch = self._batch()
        except BaseException:
            # An interrupted loader may skip the batch that it was at; a new one begins with it.
            self.close()
            raise
        self._position += 1
        return batch

    def _batch(self) -> Any:
        if self.kind == "sequence":
            batch = self._source[self._position % len(self._source)]
            return batch if self._device is None else to_device(batch, self._device)
        if self._position >= self._stop:
            raise MetaplError(f"{self._name} was made for {self._stop} batches; make a feed with a larger stop")
        if self._iterator is None:
            source = self._source.raw() if self._halves else self._source
            # Workers have their batches pinned in the background, for CUDA.
            pinned = self._workers > 0 and self._device is not None and self._device.type == "cuda"
            self._iterator = iter(loader(source, self._position, self._stop, self._workers, pin_memory=pinned))
        batch = next(self._iterator)
        batch = batch if self._device is None else to_device(batch, self._device)
        # Converted as loaders do, which turn tuples into lists.
        return default_convert(self._source.augment(self._position, batch)) if self._halves else batch

    def state(self) -> dict[str, Any]:
        return {"kind": self.kind, "position": self._position}

    def restore(self, state: dict[str, Any]) -> None:
        _check_kind(state, self.kind, self._name)
        self.close()
        self._position = state["position"]

    def close(self) -> None:
        _stop_workers(self._iterator)
        self._iterator = None


def _finishes_batches(device: torch.device) -> bool:
    """Whether half of a batch is made on the device itself: on the CPU, workers do that."""
    return device.type != "cpu"


class _EpochFeed:
    """The epochs of a `DataLoader`, or of anything else that begins anew each time, with generators of its own. An
    iterator is one epoch, which can be gone through once."""

    def __init__(self, source: Any, name: str, stop: int, seed: int) -> None:
        self._source, self._name, self._stop = source, name, stop
        self._once = isinstance(source, Iterator)
        self.kind = "iterator" if self._once else "epochs"
        self._parts = parts_of(source)
        self._generators = Generators(seed, name, self._parts)
        self._start = self._generators.states  # at the start of the epoch
        self._epoch = self._batches = 0
        self._iterator: Iterator[Any] | None = None
        if isinstance(source, DataLoader) and source.persistent_workers:  # else workers go on with their generators
            self._source = copy.copy(source)
            # A loader guards this attribute against being set; the user's own loader stays as it is.
            vars(self._source).update(persistent_workers=False, _iterator=None)

    def next(self) -> Any:
        try:
            with self._generators.in_place():
                while (batch := next(self._begun() if self._iterator is None else self._iterator, _END)) is _END:
                    if self._once or not self._batches:
                        # An iterator that is used up, an empty data set, or one smaller than a batch with drop_last.
                        raise MetaplError(
                            f"{self._name} has no batch {self._batches} in epoch {self._epoch}, and the run needs "
                            f"{self._stop}; expected more, or a source that can be gone through again"
                        )
                    self._epoch, self._batches, self._iterator = self._epoch + 1, 0, None
                    self._start = self._generators.read()
        except BaseException:
            # Nobody knows what an interrupted iterator gives next. Without it, the next call draws the epoch again.
            self.close()
            raise
        self._batches += 1
        return batch

    def _begun(self) -> Iterator[Any]:
        """The epoch as it began, at the batch that is next."""
        if not self._once:
            self._generators.write(self._start)
        for part in self._parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(self._epoch)
        self._iterator = iter(self._source)
        for taken in range(0 if self._once else self._batches):
            if next(self._iterator, _END) is _END:
                raise MetaplError(
                    f"{self._name} has {taken} batches in an epoch, and the run to resume had taken {self._batches} of "
                    f"epoch {self._epoch}; expected the same data, batch size and seeds as then"
                )
        return self._iterator

    def state(self) -> dict[str, Any]:
        stream = plain_states(self._start)
        return {"kind": self.kind, "epoch": self._epoch, "batches": self._batches, "stream": stream}

    def restore(self, state: dict[str, Any]) -> None:
        _check_kind(state, self.kind, self._name)
        in_order = getattr(self._source, "in_order", True) or self._source.num_workers < 2
        if self._once or (state["batches"] and not in_order):
            what = "an iterator" if self._once else "a loader with in_order=False"
            raise MetaplError(f"{self._name} is {what}, which has no position; expected a DataLoader or a list")
        self.close()
        self._epoch, self._batches, self._start = state["epoch"], state["batches"], state["stream"]
        try:
            with self._generators.in_place():
                self._begun()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if not self._once:  # an iterator belongs to its owner, and may go on elsewhere
            _stop_workers(self._iterator)
            self._iterator = None


def _stop_workers(iterator: Iterator[Any] | None) -> None:
    # torch stops workers when the iterator is collected, but a traceback may hold on to it for long.
    getattr(iterator, "_shutdown_workers", lambda: None)()


def _check_kind(state: Mapping[str, Any], kind: str, name: str) -> None:
    if state["kind"] != kind:
        raise MetaplError(f"{name} was a source of kind {state['kind']!r}, and is {kind!r} now; expected the same kind")
