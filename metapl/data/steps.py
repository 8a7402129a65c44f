"""Batches by position.

Item t of a data set here is the whole batch of step t, a pure function of t, so that a run that
resumes at step t asks for item t and nothing is replayed.
"""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from types import FrameType, TracebackType
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metapl.data import draws
from metapl.errors import MetaplError, few
from metapl.execution.batch import (
    Batch,
    as_tensors,
    is_array,
    is_record_of_rows,
    leaves_of,
    length,
    map_tensors,
    plain,
)
from metapl.runs.fields import Range, check_fields
from metapl.runs.terminal import END, is_heard

BatchT = TypeVar("BatchT")

# Keeps the shuffles apart from every other use of the same seed.
_SHUFFLE = 0x5A3F

# Seconds that a worker lives on after it was asked to end, for the step under way.
PATIENCE = 30


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, stream: int, epoch: int) -> Tensor:
    """Return a random order of range(size).

    It is remembered, since the steps of an epoch share it; callers must not write to it.
    """
    shuffle_seed = draws.fold_in(seed, _SHUFFLE)
    keys = draws.bits(shuffle_seed, epoch, torch.arange(size), n=1, stream=stream)
    return torch.argsort(keys[:, 0], stable=True)


@dataclass(frozen=True)
class StepSampler:
    """The batches of an endless stream of shuffled epochs, each found from its step alone.

    The stream is π₀, π₁, π₂, … with π_e an independent random order of range(size); batch t is its
    elements tB, …, (t + 1)B − 1. So every example comes once per epoch, and a batch may span two
    epochs or, with B > size, more.

    Args:
        size: number of examples, 1 or more.
        batch_size: B, 1 or more; it may exceed ``size``.
        seed: any integer.
        stream: any integer; gives samplers of one seed and size different orders.

    Cost: one sort of ``size`` keys per epoch, and on a restart for the epoch that is entered;
    nothing is replayed.

    >>> sampler = StepSampler(size=5, batch_size=3, seed=0)
    >>> torch.cat([sampler.indices(t) for t in range(5)])[:5].sort().values
    tensor([0, 1, 2, 3, 4])
    """

    size: Annotated[int, Range(1, of="a number of examples")]
    batch_size: Annotated[int, Range(1, of="a number of examples")]
    seed: int
    stream: int = 0

    def __post_init__(self) -> None:
        check_fields(self)

    def indices(self, step: int) -> Tensor:
        """Return the examples of a step: (B,) int64 on the CPU, each in [0, size)."""
        start, stop = self._span(step)
        first_epoch = start // self.size
        last_epoch = (stop - 1) // self.size
        parts = []
        for epoch in range(first_epoch, last_epoch + 1):
            epoch_start = epoch * self.size
            order = _permutation(self.size, self.seed, stream=self.stream, epoch=epoch)
            parts.append(order[max(start - epoch_start, 0) : stop - epoch_start])
        # This copies, so that the remembered orders stay as they are.
        return torch.cat(parts)

    def epochs(self, step: int) -> Tensor:
        """Return the epoch that each example of a step belongs to, (B,) int64.

        It tells apart the copies of an example in a batch of more than ``size``.
        """
        return torch.arange(*self._span(step)) // self.size

    def _span(self, step: int) -> tuple[int, int]:
        """Return where a step begins in the stream, and where the next one does."""
        if step < 0:
            raise MetaplError(f"step is {step}; expected 0 or more, from the start of the run")
        return step * self.batch_size, (step + 1) * self.batch_size


class StepBatches(Dataset[BatchT], ABC):
    """A map-style data set whose item t is the batch of step t.

    A subclass has a field ``steps``, the number of steps or None for an endless stream, and says in
    :meth:`batch` what step t holds, from t and its own constant fields alone. ``batches[t]`` and
    ``len(batches)`` follow.
    """

    steps: int | None

    @abstractmethod
    def batch(self, step: int) -> BatchT:
        """Return the batch of a step in [0, len(self))."""

    def __getitem__(self, step: int) -> BatchT:
        # An IndexError ends a ``for`` loop over the data set.
        if not 0 <= step < len(self):
            raise IndexError(f"step is {step}; expected 0 to {len(self) - 1}")
        return self.batch(step)

    def __len__(self) -> int:
        return sys.maxsize if self.steps is None else self.steps


def loader(
    batches: StepBatches[BatchT],
    start: int,
    stop: int,
    num_workers: int = 0,
    *,
    pin_memory: bool = False,
) -> DataLoader[BatchT]:
    """Serve the batches of steps start, …, stop − 1 in order, whatever the number of workers.

    Args:
        batches: item t is the batch of step t.
        start, stop: the first step, where a resumed run goes on, and the one after the last.
        num_workers: processes that prepare batches ahead; 0 prepares them in this one.
        pin_memory: serve tensors of the CPU in pinned memory, from which they are copied to CUDA
            without a wait.

    Returns: a loader that leaves the default random number generator alone.

    >>> class Squares(StepBatches[int]):
    ...     steps = None
    ...     def batch(self, step: int) -> int:
    ...         return step**2
    >>> [*loader(Squares(), 5, 8)]
    [25, 36, 49]
    """
    if not 0 <= start <= stop <= len(batches):
        raise MetaplError(f"steps {start} to {stop} were given; expected some of {len(batches)}")
    return DataLoader(
        batches,
        batch_size=None,
        sampler=range(start, stop),
        num_workers=num_workers,
        worker_init_fn=_begin_worker,
        pin_memory=pin_memory,
        # A loader draws a base seed for its workers. From the default generator, that would change
        # what dropout and sampled labels draw after a restart.
        generator=torch.Generator(),
    )


def _begin_worker(worker: int) -> None:
    """Let a worker live through signals that the parent needs to survive its step under way."""
    # Ctrl-C, and who stops a group of processes, reach the workers too; the parent needs them for
    # the step under way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # The parent ends its workers when its step is saved, however often it is asked to end. A worker
    # that is asked to, and that the parent does not end, goes by itself when the alarm rings.
    for number in END:
        if is_heard(number):
            signal.signal(number, _set_alarm)
    # Errors travel to the parent. The only one that would be printed here is that a parent that
    # failed fetched nothing any more.
    sys.excepthook = _print_nothing


def _set_alarm(number: int, frame: FrameType | None) -> None:
    signal.alarm(PATIENCE)


def _print_nothing(
    kind: type[BaseException], error: BaseException, trace: TracebackType | None
) -> None:
    """Take the place of ``sys.excepthook``, and print nothing."""


@dataclass(frozen=True, eq=False)
class ArrayBatches(StepBatches[Any]):
    """Batches of the rows of tensors, in endless shuffled epochs.

    Args:
        rows: tensors with a row for each example, in any nesting of dicts and tuples.
        batch_size: the number of rows in a batch; where there are fewer, a batch is all of them.
        stream: sources with different streams are shuffled differently.
        steps: the number of steps, or None for an endless stream.
    """

    rows: Any
    batch_size: int
    stream: int = 0
    steps: int | None = None

    @property
    def examples(self) -> int:
        return length(self.rows)

    def batch(self, step: int) -> Batch:
        """Return the rows of a step."""
        sampler = StepSampler(
            size=self.examples,
            batch_size=min(self.batch_size, self.examples),
            seed=0,
            stream=self.stream,
        )
        indices = sampler.indices(step)
        return map_tensors(lambda t: t[indices.to(t.device)], self.rows)


def in_memory(
    source: Any, name: str, batch_size: int | None, dtype: torch.dtype, stream: int
) -> Any:
    """Return batches of examples in memory, or a source of another kind as it is.

    Examples in memory are a tensor, an array, or a dict, tuple or dataclass of these.
    """
    is_tuple_of_arrays = isinstance(source, tuple) and any(map(is_array, source))
    is_single = is_array(source) or isinstance(source, Mapping) or is_record_of_rows(source)
    if not is_tuple_of_arrays and not is_single:
        return source
    if batch_size is None or batch_size < 1:
        expected = "1 or more, such as batch_size=64, or a list of batches"
        raise MetaplError(f"{name} was given with batch_size={batch_size}; expected {expected}.")
    rows = as_tensors(plain(source), dtype, subject=f"{name} holds data")
    lengths = {len(t) if t.ndim else 0 for t in leaves_of(rows) if isinstance(t, Tensor)}
    if len(lengths) != 1 or 0 in lengths:
        from metapl.execution.failed_steps import named_parts

        counts = [f"{part} {len(t) if t.ndim else 0} rows" for part, t in named_parts(rows, name)]
        expected = "one number of rows" if len(lengths) > 1 else "one row or more"
        raise MetaplError(f"{few(counts) or f'{name} no tensors'}; expected {expected}.")
    return ArrayBatches(rows, batch_size, stream=stream)
