"""Batches on their way to a device."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution.batch import plain


def to_device(batch: Any, device: torch.device | str) -> Any:
    """Move every tensor of a batch, of any nesting, to a device; to CUDA, the copy is queued and not waited for.

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
