"""Batches on their way to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution.batch import plain


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a batch to a device.

    Args:
        batch: a tensor, or dicts, lists, tuples and named tuples of tensors and other values. What is like a dict, such
            as the output of a tokenizer, comes back as a dict.
        device: where to.

    Returns:
        The batch with its tensors on the device; those that are there already, and what is no tensor, are the same
        objects.

    Cost: to CUDA, the copy is queued and not waited for; what is not in pinned memory is copied there first.

    >>> batch = {"x": torch.ones(2), "names": ["a", "b"]}
    >>> to_device(batch, "meta")["x"].device, to_device(batch, "cpu")["x"] is batch["x"]
    (device(type='meta'), True)
    """
    device = torch.device(device)
    return pytree.tree_map(lambda leaf: _moved(leaf, device) if isinstance(leaf, Tensor) else leaf, plain(batch))


def _moved(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu" and tensor.layout == torch.strided:
        return _pinned(tensor).to(device, non_blocking=True)
    # Towards the CPU, a copy that is not waited for could be read before it is there.
    return tensor.to(device)


def _pinned(tensor: Tensor) -> Tensor:
    """The tensor in pinned memory: from elsewhere, a copy waits for all that the device has been given to do."""
    # Not Tensor.pin_memory, which refuses what expand() makes.
    return tensor if tensor.is_pinned() else torch.empty_like(tensor, pin_memory=True).copy_(tensor)
