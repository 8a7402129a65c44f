"""Which data it was: batches as plain values, so that one set of examples is told from another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from metapl.data.steps import StepBatches
from metapl.data.unlabeled import WithoutLabels
from metapl.runs.fingerprints import fingerprint, type_name

NAMES = 50_000
"""Names of files that are read; of more, every second, third and so on."""

HELD = ("tensors", "data", "targets", "labels", "samples", "imgs", "images")
"""Attributes in which data sets have their examples: torch's own, torchvision's, and many that are made after these."""


def source_record(source: Any) -> dict[str, Any]:
    """What is known of a source of batches without drawing one.

    Args:
        source: as :func:`metapl.data.feed.feed` takes it, or whole (inputs, labels).

    Returns: numbers and texts by name: how many examples, the batch size, whether they are shuffled, and a
    ``fingerprint`` of the examples, where the source holds them in a way that is known: in tensors, in arrays or as
    the paths of files, of which the last names count. Numbers of workers and other things of speed are left out.

    Cost: one reading of the tensors, of the largest ones in part.

    >>> import torch
    >>> source_record([(torch.zeros(2, 3), torch.ones(2))])["batches"]
    1
    >>> record = source_record(DataLoader(TensorDataset(torch.zeros(10, 3)), batch_size=4, shuffle=True))
    >>> record["examples"], record["batch_size"], record["sampler"]
    (10, 4, 'RandomSampler')
    """
    if isinstance(source, WithoutLabels):
        return source_record(source.source) | {"without_labels": True}
    if isinstance(source, StepBatches):
        return source.record()
    if isinstance(source, DataLoader):
        order = source.sampler if source.batch_sampler is None else getattr(source.batch_sampler, "sampler", None)
        return {
            "examples": _length(source.dataset),
            "batch_size": source.batch_size,
            "drop_last": source.drop_last,
            "sampler": type(source.sampler if order is None else order).__name__,
            "settings": _settings(source, order),
            "fingerprint": _data_set(source.dataset),
        }
    if isinstance(source, list | tuple):
        return {"batches": len(source), "fingerprint": fingerprint(list(source))}
    return {"kind": type_name(type(source)), "length": _length(source)}


OF_SAMPLERS = ("replacement", "num_samples", "weights", "indices")
"""What torch's samplers keep of how they draw."""


def _settings(loader: DataLoader[Any], sampler: Any) -> dict[str, Any]:
    """How a loader draws and what puts its examples together; a function is known by its name."""
    collate = loader.collate_fn
    found = {"collate_fn": getattr(collate, "__qualname__", type(collate).__qualname__)}
    if not isinstance(sampler, DistributedSampler):  # whose numbers depend on how many processes there are
        for name in OF_SAMPLERS:
            value = getattr(sampler, name, None)
            if isinstance(value, Tensor | np.ndarray | list | tuple | range):
                value = fingerprint(value if isinstance(value, Tensor | np.ndarray) else [len(value), *_some(value)])
            found |= {name: value} if isinstance(value, bool | int | str) else {}
    return found


def _data_set(data: Any) -> str | None:
    if isinstance(data, Subset):
        inside = _data_set(data.dataset)
        return None if inside is None else fingerprint([inside, len(data), *_some(data.indices)])
    if isinstance(data, TensorDataset):
        return fingerprint(data.tensors)
    own = getattr(data, "_fingerprint", None)
    if isinstance(own, str):  # of the package datasets
        return own
    if isinstance(data, list | tuple | range):
        return fingerprint([len(data), *_some(data)])
    held = [
        value for name in HELD if isinstance(value := getattr(data, name, None), Tensor | np.ndarray | list | tuple)
    ]
    shortened = [_some(value) if isinstance(value, list | tuple) else value for value in held]
    # Paths by their last names: folders may move.
    last_names = pytree.tree_map(lambda x: os.path.basename(x) if isinstance(x, str | os.PathLike) else x, shortened)
    return fingerprint(last_names) if held else None


def _some(values: Sequence[Any]) -> Sequence[Any]:
    """All of a list, or of a long one every second, third and so on."""
    return values[:: max(1, -(-len(values) // NAMES))]


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
