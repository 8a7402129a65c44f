"""Settings and data as plain values, so that a run knows whether it goes on with the same ones."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

WHOLE_NUMBERS = 2**24
"""Numbers of a tensor that are all read; of larger ones, every second, third and so on."""


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
    return type_name(
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


def type_name(kind: Any) -> str:
    return f"{kind.__module__}.{kind.__qualname__}"
