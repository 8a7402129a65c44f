"""Processes that ``torchrun`` has started, as the command joins them: all train, and the first one shows and writes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from metapl.apps.fitting import Share
from metapl.apps.model_noise import model_noise
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError

PATIENCE = timedelta(minutes=10)  # for which a process waits for another one before it gives up


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them."""

    mesh: Mesh = field(default_factory=Mesh)

    @property
    def first(self) -> bool:
        return self.mesh.size == 1 or dist.get_rank() == 0

    def share(self, source: Any) -> Any:
        """The rows of this process."""
        alone = self.mesh.size == 1 or source is None
        return source if alone else Share(source, self.mesh.share, self.mesh.shares)

    def laid_out(self, *networks: nn.Module, seed: int) -> list[nn.Module]:
        """Networks over the processes."""
        found = [shard(network, self.mesh) for network in networks]
        if any(map(model_noise, networks)):
            self.seed(networks[-1], seed)
        return found

    def seed(self, network: nn.Module, seed: int) -> None:
        """Seed the default generators; where the network drops rows of a batch, each share has its masks."""
        torch.manual_seed(seed)
        if self.mesh.size > 1 and model_noise(network):
            torch.manual_seed(seed + 2**32 * (1 + self.mesh.share))


def program() -> str:
    """What this command was started with, for a line that starts it again."""
    count = os.environ.get("WORLD_SIZE", "1")
    if count == "1":
        return "metapl"
    here = os.environ.get("LOCAL_WORLD_SIZE") == count
    return f"torchrun {f'--nproc-per-node={count}' if here else '...'} -m metapl.apps"


def from_first(value: Any) -> Any:
    """What the first process has, in every process."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def check_started(mesh: Mesh) -> None:
    """Refuse a mesh that is not of the processes that were started."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if mesh.size != count:
        raise MetaplError(
            f"{count} process{'es were' if count > 1 else ' was'} started for a mesh of {mesh.size}; expected as many: "
            f"torchrun --nproc-per-node=N -m metapl.apps ... --mesh.replicate N, or --mesh.shard N for shared weights."
        )


@contextmanager
def joined(mesh: Mesh, place: torch.device) -> Iterator[Processes]:
    """Join the processes of a mesh for this block."""
    if mesh.size == 1:
        yield Processes()
        return
    if place.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    untyped: Any = dist
    store, rank, size = next(untyped.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # The store of torchrun outlives a restart, and a process might find there where a killed one was. On several
        # machines each has restarts of its own to count.
        store = untyped.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Processes(mesh)
    finally:
        dist.destroy_process_group()
