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
from metapl.execution.checks import dense, described, refuse_not_finite, whole_number
from metapl.runs.fingerprints import fingerprint


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
        sampler = StepSampler(count, min(self.batch_size, count), seed=0, stream=self.stream)
        chosen = sampler.indices(step)
        return pytree.tree_map_only(Tensor, lambda t: t[chosen.to(t.device)], self.rows)

    def record(self) -> dict[str, Any]:
        held = fingerprint(pytree.tree_leaves(self.rows))
        return {"examples": self.examples, "batch_size": self.batch_size, "fingerprint": held}


def in_memory(source: Any, name: str, batch_size: int | None, dtype: torch.dtype, stream: int) -> Any:
    """Batches of ``batch_size`` of examples held in memory: a tensor, an array, or a dict or tuple of these with a row
    for each example; any other source, such as a list of batches, as it is.

    Raises: :class:`metapl.MetaplError` for a tuple of tensors without ``batch_size``, which may be examples or batches.
    """
    if batch_size is not None:
        whole_number(batch_size, f"batch_size={batch_size!r}", "a number of examples")
    parts = source if isinstance(source, tuple) else ()
    alone = is_array(source) or isinstance(source, Mapping)
    if not alone and not any(map(is_array, parts)):
        return source
    if batch_size is None:
        if alone:
            return source  # refused as what is no source of batches
        raise MetaplError(
            f"{name} is {described(source)}, which may be examples in memory or batches; expected batch_size=64, say, "
            "with examples, a row of each tensor for each, or a list with batches: [(x, y)] serves a whole pair at "
            "every step."
        )
    held = as_tensors(plain(source), dtype, f"{name} holds")
    leaves = pytree.tree_leaves(held)
    dense(held, f"{name} holds")
    lengths = [len(t) if isinstance(t, Tensor) and t.ndim else 0 for t in leaves]
    if not lengths or min(lengths) != max(lengths) or not min(lengths):
        raise MetaplError(
            f"{name} has tensors of {', '.join(map(str, lengths)) or 'no'} rows; expected as many in each, one for "
            "each example, and at least one."
        )
    for t in leaves:
        if t.is_floating_point():
            refuse_not_finite(t, f"{name} holds NaN or infinite values; clean the examples first.")
    return ArrayBatches(held, batch_size, stream)
