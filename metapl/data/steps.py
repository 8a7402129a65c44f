"""Batches by position: item t of a data set here is the whole batch of step t, a pure function of
t, so that a run that resumes at step t asks for item t and nothing is replayed."""

from __future__ import annotations

import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, TypeVar

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from metapl.data import draws
from metapl.errors import MetaplError
from metapl.execution.batch import (
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
_SHUFFLE = 0x5A3F  # keeps the shuffles apart from every other use of the same seed
PATIENCE = 30  # seconds that a worker lives on after it was asked to end, for the step under way


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, stream: int, epoch: int) -> Tensor:
    """A random order of range(size).

    Remembered, since the steps of an epoch share it; callers must not write to it.
    """
    keys = draws.bits(draws.fold_in(seed, _SHUFFLE), epoch, torch.arange(size), 1, stream)
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
        """The examples of a step: (B,) int64 on the CPU, each in [0, size)."""
        start, stop = self._span(step)
        parts = []
        for epoch in range(start // self.size, (stop - 1) // self.size + 1):
            begin = epoch * self.size
            order = _permutation(self.size, self.seed, self.stream, epoch)
            parts.append(order[max(start - begin, 0) : stop - begin])
        return torch.cat(parts)  # a copy: the remembered orders stay as they are

    def epochs(self, step: int) -> Tensor:
        """The epoch that each example of a step belongs to, (B,) int64, which tells apart the
        copies of an example in a batch of more than ``size``."""
        return torch.arange(*self._span(step)) // self.size

    def _span(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise MetaplError(
                f"step is {step}; expected 0 or more: steps are counted from the start of the run"
            )
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
        """The batch of a step in [0, len(self))."""

    def __getitem__(self, step: int) -> BatchT:
        if not 0 <= step < len(self):  # an IndexError ends a ``for`` loop over the data set
            raise IndexError(
                f"step is {step}; expected 0 to {len(self) - 1}, counted from the start of the run"
            )
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
        raise MetaplError(
            f"steps {start} to {stop} of {len(batches)}; expected 0 <= start <= stop <= "
            "len(batches)"
        )
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
    # Ctrl-C, and who stops a group of processes, reach the workers too; the parent needs them for
    # the step under way.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # However often it comes: the parent ends its workers when its step is saved. One that is asked
    # to, and is not ended so, goes by itself.
    for number in filter(is_heard, END):
        signal.signal(number, lambda number, frame: signal.alarm(PATIENCE) and None)
    # Errors travel to the parent. What is printed here is that a parent that failed fetched nothing
    # any more.
    sys.excepthook = lambda kind, error, trace: None


@dataclass(frozen=True, eq=False)
class ArrayBatches(StepBatches[Any]):
    """Batches of the rows of tensors, in endless shuffled epochs.

    Of fewer rows than ``batch_size``, all of them.
    """

    rows: Any  # tensors with a row for each example, in any nesting of dicts and tuples
    batch_size: int
    stream: int = 0  # sources with different ones are shuffled differently
    steps: int | None = None

    @property
    def examples(self) -> int:
        return length(self.rows)

    def batch(self, step: int) -> Any:
        count = self.examples
        chosen = StepSampler(
            count, min(self.batch_size, count), seed=0, stream=self.stream
        ).indices(step)
        return map_tensors(lambda t: t[chosen.to(t.device)], self.rows)


def in_memory(
    source: Any, name: str, batch_size: int | None, dtype: torch.dtype, stream: int
) -> Any:
    """Batches of examples in memory, a tensor, an array, a dict, tuple or dataclass of these.

    Others as they are.
    """
    held = isinstance(source, tuple) and any(map(is_array, source))
    if not (held or is_array(source) or isinstance(source, Mapping) or is_record_of_rows(source)):
        return source
    if batch_size is None or batch_size < 1:
        raise MetaplError(
            f"{name} has examples in memory and batch_size={batch_size}; expected 1 or more, or a "
            "list."
        )
    rows = as_tensors(plain(source), dtype, f"{name} holds")
    lengths = {len(t) if t.ndim else 0 for t in leaves_of(rows) if isinstance(t, Tensor)}
    if len(lengths) != 1 or 0 in lengths:
        raise MetaplError(
            f"{name} has tensors of {sorted(lengths)} rows; expected as many in each, at least one."
        )
    return ArrayBatches(rows, batch_size, stream)
