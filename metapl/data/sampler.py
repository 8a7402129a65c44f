"""Which examples make up the batch of a step."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
from torch import Tensor

from metapl.data import draws
from metapl.errors import MetaplError
from metapl.runs.fields import Range, check_fields

# Keeps the shuffles apart from every other use of the same seed.
_SHUFFLE = 0x5A3F


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, stream: int, epoch: int) -> Tensor:
    """A random order of range(size). Remembered, since the steps of an epoch share it; callers must not write to it."""
    keys = draws.bits(draws.fold_in(seed, _SHUFFLE), epoch, torch.arange(size), 1, stream)
    return torch.argsort(keys[:, 0], stable=True)


@dataclass(frozen=True)
class StepSampler:
    """The batches of an endless stream of shuffled epochs, each found from its step alone.

    The stream is π₀, π₁, π₂, … with π_e an independent random order of range(size); batch t is its elements
    tB, …, (t + 1)B − 1. So every example comes once per epoch, and a batch may span two epochs or, with B > size, more.

    Args:
        size: number of examples, 1 or more.
        batch_size: B, 1 or more; it may exceed ``size``.
        seed: any integer.
        stream: any integer; gives samplers of one seed and size different orders.

    Cost: one sort of ``size`` keys per epoch, and on a restart for the epoch that is entered; nothing is replayed.

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
        """The epoch that each example of a step belongs to, (B,) int64, which tells apart the copies of an example in a
        batch of more than ``size``."""
        return torch.arange(*self._span(step)) // self.size

    def _span(self, step: int) -> tuple[int, int]:
        if step < 0:
            raise MetaplError(f"step is {step}; expected 0 or more: steps are counted from the start of the run")
        return step * self.batch_size, (step + 1) * self.batch_size
