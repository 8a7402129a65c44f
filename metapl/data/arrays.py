"""Batches of examples that are held in memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.data.sampler import StepSampler
from metapl.data.steps import StepBatches
from metapl.errors import MetaplError
from metapl.execution.batch import as_tensors, is_array, length, plain


@dataclass(frozen=True, eq=False)
class ArrayBatches(StepBatches[Any]):
    """Batches of the rows of tensors, in endless shuffled epochs; of fewer rows than ``batch_size``, all of them.

    Args:
        rows: tensors with a row for each example, in any nesting of dicts and tuples.
        batch_size: rows of a batch.
        stream: any integer; sources with different ones are shuffled differently.

    >>> batches = ArrayBatches((torch.arange(4), torch.arange(4) % 2), batch_size=3)
    >>> x, y = batches[0]
    >>> len(x), torch.equal(y, x % 2), torch.equal(batches[0][0], x)
    (3, True, True)
    """

    rows: Any
    batch_size: int
    stream: int = 0
    steps: int | None = None

    @property
    def examples(self) -> int:
        return length(self.rows)

    def batch(self, step: int) -> Any:
        count = self.examples
        chosen = StepSampler(count, min(self.batch_size, count), seed=0, stream=self.stream).indices(step)
        return pytree.tree_map_only(Tensor, lambda t: t[chosen.to(t.device)], self.rows)


def in_memory(source: Any, name: str, batch_size: int | None, dtype: torch.dtype, stream: int) -> Any:
    """Batches of examples held in memory, a tensor, an array, a dict or tuple of these; any other source as it is."""
    held = isinstance(source, tuple) and any(map(is_array, source))
    if not (held or is_array(source) or isinstance(source, Mapping)):
        return source
    if batch_size is None or batch_size < 1:
        raise MetaplError(f"{name} has examples in memory and batch_size={batch_size}; expected 1 or more, or a list.")
    rows = as_tensors(plain(source), dtype, f"{name} holds")
    lengths = {len(t) if t.ndim else 0 for t in pytree.tree_leaves(rows)}
    if len(lengths) != 1 or 0 in lengths:
        raise MetaplError(f"{name} has tensors of {sorted(lengths)} rows; expected as many in each, at least one.")
    return ArrayBatches(rows, batch_size, stream)
