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

    Returns: the batch with its tensors on the device; those that are there already, and what is no tensor, are the same
    objects.

    Cost: to CUDA, the copy is queued and not waited for; what is not in pinned memory is copied there first.

    >>> batch = {"x": torch.ones(2), "names": ["a", "b"]}
    >>> to_device(batch, "meta")["x"].device, to_device(batch, "cpu")["x"] is batch["x"]
    (device(type='meta'), True)
    """
    device = torch.device(device)

    def moved(t: Tensor) -> Tensor:
        # Towards the CPU, a copy that is not waited for could be read before it is there.
        queued = device.type == "cuda" and t.device.type == "cpu" and t.layout == torch.strided
        if queued and not t.is_pinned():  # not Tensor.pin_memory, which refuses what expand() makes
            t = torch.empty_like(t, pin_memory=True).copy_(t)
        return t.to(device, non_blocking=queued)

    return pytree.tree_map_only(Tensor, moved, plain(batch))
