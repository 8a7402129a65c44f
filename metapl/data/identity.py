"""Which batches they are, as plain values: a run is resumed on the same ones."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, Subset, TensorDataset

from metapl.data.batches import EvaluationBatches, ExampleBatches
from metapl.data.images.store import FileImages, MemoryImages
from metapl.data.unlabeled import WithoutLabels

WHOLE_NUMBERS = 2**24
"""Numbers of a tensor that are all read; of larger ones, every second, third and so on."""

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

    >>> source_record([(torch.zeros(2, 3), torch.ones(2))])["batches"]
    1
    >>> record = source_record(DataLoader(TensorDataset(torch.zeros(10, 3)), batch_size=4, shuffle=True))
    >>> record["examples"], record["batch_size"], record["sampler"]
    (10, 4, 'RandomSampler')
    """
    if isinstance(source, WithoutLabels):
        return source_record(source.source) | {"without_labels": True}
    if isinstance(source, ExampleBatches):
        sampler = dataclasses.asdict(source.sampler)
        columns = [*source.columns.values()]
        return {
            "examples": sampler.pop("size"),
            **sampler,
            "view_seed": source.seed,
            "views": [as_values(view) for view in source.views],
            "fingerprint": fingerprint([_images(source.images), columns]),
        }
    if isinstance(source, EvaluationBatches):
        return {"examples": len(source.images), "fingerprint": fingerprint([_images(source.images), source.labels])}
    if isinstance(source, DataLoader):
        order = source.sampler if source.batch_sampler is None else getattr(source.batch_sampler, "sampler", None)
        return {
            "examples": _length(source.dataset),
            "batch_size": source.batch_size,
            "drop_last": source.drop_last,
            "sampler": type(source.sampler if order is None else order).__name__,
            "fingerprint": _data_set(source.dataset),
        }
    if isinstance(source, list | tuple):
        return {"batches": len(source), "fingerprint": fingerprint(list(source))}
    return {"kind": _name(type(source)), "length": _length(source)}


def as_values(value: Any) -> Any:
    """A setting as numbers, texts, lists and dicts: dataclasses by their fields, and what else there is by its type.

    >>> as_values((1, None, torch.nn.ReLU()))
    [1, None, 'torch.nn.modules.activation.ReLU']
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor):
        return float(value) if value.numel() == 1 else fingerprint([value])
    if isinstance(value, tuple | list):
        return [as_values(entry) for entry in value]
    if isinstance(value, Mapping):
        return {str(name): as_values(entry) for name, entry in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: as_values(getattr(value, field.name)) for field in dataclasses.fields(value)}
        return {"type": type(value).__name__, **fields}
    return _name(
        value if isinstance(value, type) or (callable(value) and hasattr(value, "__qualname__")) else type(value)
    )


def fingerprint(tree: Any) -> str | None:
    """SHA-256 over the tensors, arrays, numbers and texts in a tree; None where it holds anything else."""
    digest = hashlib.sha256()
    for leaf in pytree.tree_leaves(tree):
        if isinstance(leaf, Tensor | np.ndarray):
            digest.update(f"{leaf.dtype}{tuple(leaf.shape)}".encode() + _numbers(leaf))
        elif leaf is None or isinstance(leaf, bool | int | float | str | bytes):
            digest.update(repr(leaf).encode("utf-8", "surrogateescape"))
        else:
            return None
    return digest.hexdigest()


def _numbers(values: Tensor | np.ndarray[Any, Any]) -> bytes:
    if isinstance(values, np.ndarray):
        if values.dtype.hasobject:
            return repr(values.tolist()).encode("utf-8", "surrogateescape")
        flat = values.reshape(-1)
        return flat[:: _stride(flat.size)].tobytes()
    flat_tensor = values.detach().reshape(-1)
    taken = flat_tensor[:: _stride(flat_tensor.numel())].cpu().contiguous()
    return taken.view(torch.uint8).numpy().tobytes() if taken.numel() else b""


def _stride(numbers: int) -> int:
    return max(1, -(-numbers // WHOLE_NUMBERS))


def _images(images: Any) -> Any:
    """Images in a way that can be hashed; folders of files may move, their names count."""
    if isinstance(images, MemoryImages):
        return [images.data, images.indices]
    if isinstance(images, FileImages):
        some = range(0, len(images), max(1, -(-len(images) // NAMES)))
        return [os.path.basename(images.path(index)) for index in some]
    return images


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
    return fingerprint(_without_folders(shortened)) if held else None


def _some(values: Sequence[Any]) -> Sequence[Any]:
    """All of a list, or of a long one every second, third and so on."""
    return values[:: max(1, -(-len(values) // NAMES))]


def _without_folders(held: Sequence[Any]) -> list[Any]:
    """Paths by their last names."""
    return pytree.tree_map(  # type: ignore[no-any-return]  # a list as it was
        lambda leaf: os.path.basename(leaf) if isinstance(leaf, str | os.PathLike) else leaf, list(held)
    )


def _length(source: Any) -> int | None:
    try:
        return len(source)
    except (TypeError, NotImplementedError):
        return None


def _name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
