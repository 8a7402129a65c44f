"""Processes that ``torchrun`` has started, as the command joins them.

All train, and the first one shows and writes.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
from torch import distributed as dist
from torch import nn

from metapl.data import StepBatches
from metapl.distributed import Mesh
from metapl.errors import MetaplError
from metapl.execution.batch import length, map_tensors, micro_batches
from metapl.pictures.batches import ExampleBatches
from metapl.problems.model_noise import model_noise

# How long a process waits for another one before it gives up.
PATIENCE = timedelta(minutes=10)


@dataclass(frozen=True, eq=False)
class Share(StepBatches[Any]):
    """This process's rows of batches that are the same in every process.

    Pictures are read and changed for these rows alone, and for those that a view mixes with them,
    as Sample Pairing does. Other sources are made whole, and this process takes its rows of them. A
    run may go on in another number of processes.

    Args:
        whole: the batches.
        number: of this share, from 0.
        shares: how many there are.
    """

    whole: StepBatches[Any]
    number: int
    shares: int
    own_rows: ExampleBatches[Any] | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        # What makes the rows of this process first, and little else; None: the whole batch is made.
        own_rows = None
        if isinstance(self.whole, ExampleBatches):
            own_rows = self.whole.share(self.number, self.shares)
        object.__setattr__(self, "own_rows", own_rows)
        # Half of a batch is made on the device.
        source = self.whole if own_rows is None else own_rows
        if hasattr(source, "raw"):
            object.__setattr__(self, "raw", source.raw)

    @property
    def steps(self) -> int | None:  # type: ignore[override]  # the whole batches'
        return self.whole.steps

    def batch(self, step: int) -> Any:
        if self.own_rows is not None:
            return self._first_rows(self.own_rows[step])
        return self._rows_of_whole(self.whole[step])

    def augment(self, step: int, fetched: Any) -> Any:
        """Return the batch of a step whose pictures ``raw`` has fetched."""
        if self.own_rows is not None:
            return self._first_rows(self.own_rows.augment(step, fetched))
        # Whatever has raw() has augment() too.
        whole: Any = self.whole
        return self._rows_of_whole(whole.augment(step, fetched))

    def _first_rows(self, batch: Any) -> Any:
        """Return the rows of this process, which come first in a batch of its share."""
        assert self.own_rows is not None
        rows = self.own_rows.batch_size // self.shares
        return map_tensors(lambda t: t[:rows], batch)

    def _rows_of_whole(self, batch: Any) -> Any:
        assert length(batch) % self.shares == 0, "check_shares has refused it"
        return micro_batches(batch, self.shares, "whole")[self.number]


@dataclass(frozen=True)
class Processes:
    """The processes that train together, as one of them sees them."""

    mesh: Mesh = field(default_factory=Mesh)

    @property
    def first(self) -> bool:
        """Return whether this is the first process, which shows and writes."""
        return self.mesh.size == 1 or dist.get_rank() == 0

    def share(self, source: Any) -> Any:
        """Return a source of the rows of this process."""
        if self.mesh.size == 1 or source is None:
            return source
        return Share(source, self.mesh.share, self.mesh.shares)

    def seed(self, network: nn.Module, seed: int) -> None:
        """Seed the default generators.

        Where the network drops rows of a batch, each share has its masks.
        """
        torch.manual_seed(seed)
        if self.mesh.size > 1 and model_noise(network):
            torch.manual_seed(seed + 2**32 * (1 + self.mesh.share))


def from_first(value: Any, patience: timedelta | None = None) -> Any:
    """Return in every process what the first one has.

    Args:
        value: what the first process has; that of the others is not looked at.
        patience: how long the others wait for it, where that may take longer than the steps of a
            training; the same in every process.
    """
    if not dist.is_initialized():
        return value
    values = [value]
    if patience is None:
        dist.broadcast_object_list(values, src=0)
        return values[0]
    untyped: Any = dist
    patient_group = untyped.new_group(backend="gloo", timeout=patience)
    dist.broadcast_object_list(values, src=0, group=patient_group)
    dist.destroy_process_group(patient_group)
    return values[0]


@dataclass(frozen=True)
class FailureOfFirst:
    """What an error in the first process says, which the others end with."""

    text: str


def done_by_first(
    work: Callable[[], Any], processes: Processes, patience: timedelta | None = None
) -> Any:
    """Return in every process what the first one's work returns.

    Args:
        work: what the first process does, and it alone.
        processes: those that wait for it.
        patience: how long the others wait, as for :func:`from_first`.

    Raises: in the first process what the work raises; then MetaplError in the others, at once.
    """
    result = None
    if processes.first:
        try:
            result = work()
        except BaseException as error:
            reason = str(error) or type(error).__name__
            # Another process may have ended too. The first error is the one to be told.
            with suppress(RuntimeError):
                from_first(FailureOfFirst(reason), patience)
            raise
    result = from_first(result, patience)
    if isinstance(result, FailureOfFirst):
        raise MetaplError(f"the first process has failed: {result.text}")
    return result


@contextmanager
def joined(mesh: Mesh, place: torch.device) -> Iterator[Processes]:
    """Join the processes of a mesh for this block.

    Refused where it is not of the processes that were started.
    """
    if mesh.size == 1:
        yield Processes()
        return
    if place.type == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    untyped: Any = dist
    store, rank, size = next(untyped.rendezvous("env://", timeout=PATIENCE))
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # The store of torchrun outlives a restart, and a process might find there where a killed
        # one was. On several machines each has restarts of its own to count.
        store = untyped.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    backend = "nccl" if place.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Processes(mesh)
    finally:
        dist.destroy_process_group()
