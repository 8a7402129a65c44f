"""Processes that ``torchrun`` has started, as the command joins them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist

from metapl.distributed.mesh import Mesh
from metapl.errors import MetaplError

PATIENCE = timedelta(minutes=10)
"""How long a process waits for another one before it gives up."""


def started() -> int:
    """The number of processes that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_first() -> bool:
    """Whether this process is the one that shows and writes."""
    return os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(mesh: Mesh, device: torch.device) -> Iterator[int]:
    """Join the processes of a mesh for this block.

    Args:
        mesh: of all processes; one of a single process joins nothing.
        device: where the networks will be.

    Yields: this process's number; 0 is the one that shows and writes.
    """
    check_started(mesh)
    if mesh.size == 1:
        yield 0
        return
    if device.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    try:
        yield dist.get_rank()
    finally:
        dist.destroy_process_group()


def check_started(mesh: Mesh) -> None:
    """Refuse a mesh that is not of the processes that were started."""
    if mesh.size != started():
        how = f"torchrun --nproc-per-node={mesh.size} -m metapl train ..."
        raise MetaplError(
            f"the mesh is of {mesh.size} processes (--mesh.replicate {mesh.replicate} x --mesh.shard {mesh.shard}) and "
            f"{started()} were started; expected as many. Start them with: {how}"
        )


def from_first(value: Any) -> Any:
    """What the first process has, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]
