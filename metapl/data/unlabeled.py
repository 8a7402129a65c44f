"""Labeled data as unlabeled data."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from metapl.execution.batch import inputs_of


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

    Returns:
        A source that ``fit`` takes, resumable as the one it was made of, and that can be iterated over by itself.

    >>> import torch
    >>> from torch.utils.data import DataLoader, TensorDataset
    >>> loader = DataLoader(TensorDataset(torch.rand(6, 2), torch.arange(6)), batch_size=3)
    >>> [x.shape for x in without_labels(loader)]
    [torch.Size([3, 2]), torch.Size([3, 2])]
    """
    return WithoutLabels(source)
