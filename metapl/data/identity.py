"""Which data it was: batches as plain values, so that one set of examples is told from another."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, Subset, TensorDataset

from metapl.data.feed import WithoutLabels
from metapl.data.steps import StepBatches
from metapl.runs.fingerprints import fingerprint, type_name

NAMES = 50_000  # names of files that are read; of more, every second, third and so on

# Attributes in which data sets have their examples: torch's own, torchvision's, and many that are made after these; and
# what torch's samplers keep of how they draw.
HELD = ("tensors", "data", "targets", "labels", "samples", "imgs", "images")
OF_SAMPLERS = ("replacement", "num_samples", "weights", "indices")


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
    if isinstance(source, list | tuple):
        return {"batches": len(source), "fingerprint": fingerprint(list(source))}
    if not isinstance(source, DataLoader):
        return {"kind": type_name(type(source)), "length": _length(source)}
    order = getattr(source.batch_sampler, "sampler", None)
    order = source.sampler if order is None else order
    # A function is known by its name.
    settings = {"collate_fn": getattr(source.collate_fn, "__qualname__", type(source.collate_fn).__qualname__)}
    if not isinstance(order, DistributedSampler):  # whose numbers depend on how many processes there are
        for name in OF_SAMPLERS:
            value = getattr(order, name, None)
            if isinstance(value, Tensor | np.ndarray):
                value = fingerprint(value)
            elif isinstance(value, list | tuple | range):
                value = fingerprint([len(value), *_some(value)])
            settings |= {name: value} if isinstance(value, bool | int | str) else {}
    return {
        "examples": _length(source.dataset),
        "batch_size": source.batch_size,
        "drop_last": source.drop_last,
        "sampler": type(order).__name__,
        "settings": settings,
        "fingerprint": _data_set(source.dataset),
    }


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
    held = [getattr(data, name, None) for name in HELD]
    held = [_some(value) if isinstance(value, list | tuple) else value for value in held]
    held = [value for value in held if isinstance(value, Tensor | np.ndarray | list | tuple)]
    # Paths by their last names: folders may move.
    last_names = pytree.tree_map(lambda x: os.path.basename(x) if isinstance(x, str | os.PathLike) else x, held)
    return fingerprint(last_names) if held else None


def _some(values: Sequence[Any]) -> Sequence[Any]:
    """All of a list, or of a long one every second, third and so on."""
    return values[:: max(1, -(-len(values) // NAMES))]


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None
