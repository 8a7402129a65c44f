"""Undoing a step without waiting for the device that found its batch wrong.

On the CPU a wrong batch is refused before anything moves. On an accelerator the finding is a flag on the device
(:mod:`metapl.checks`); the step goes on, and everything that it moved is put back there, by the flag, on the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution.buffers import Buffers
from metapl.optimizers import InnerOptimizer


@dataclass(frozen=True)
class Movable:
    """What a step moves.

    Args:
        networks: their weights.
        buffers: their buffers, saved before the passes, which move them first.
        optimizers: the ``torch.optim`` optimisers, with their states.
        inner: the student's update, with the state of a TorchOpt transform; None where there is none.
    """

    networks: tuple[nn.Module, ...]
    buffers: Sequence[Buffers]
    optimizers: Sequence[torch.optim.Optimizer]
    inner: InnerOptimizer | None = None

    def states(self) -> list[Tensor]:
        """The tensors of the optimisers' states that live beside the weights (Adam counts its steps on the host)."""
        states = [state for optimizer in self.optimizers for state in optimizer.state.values()]
        return [t for state in states for name, t in state.items() if isinstance(t, Tensor) and name != "step"]

    def transform_leaves(self) -> list[Any]:
        """The entries of a TorchOpt transform's state; none for ``torch.optim``."""
        leaves: list[Any] = [] if self.inner is None else self.inner.state_dict().get("leaves", [])
        return leaves


@contextmanager
def undone_where(flag: Tensor | None, movable: Movable) -> Iterator[None]:
    """Undo the block where ``flag``, a boolean scalar on the device, holds; None: nothing is deferred.

    Cost: on an accelerator one more copy of weights and optimiser states while the step is committed.
    """
    if flag is None:
        yield
        return
    weights = [p for network in movable.networks for p in network.parameters()]
    before = [(t, t.clone()) for t in [*weights, *movable.states()]]
    before += [pair for saved in movable.buffers for pair in saved.saved.values()]
    leaves = movable.transform_leaves()
    yield
    known = {id(t) for t, _ in before}
    with torch.no_grad():
        for t, old in before:
            t.copy_(torch.where(flag, old, t))
        for t in movable.states():
            if id(t) not in known:  # born in this step
                t.copy_(torch.where(flag, torch.zeros_like(t), t))
        if movable.inner is not None and leaves:
            pairs = zip(leaves, movable.transform_leaves(), strict=True)
            kept = [torch.where(flag, old, new) if isinstance(new, Tensor) else new for old, new in pairs]
            movable.inner.load_state_dict({"leaves": kept})


def kept_where(flag: Tensor | None, old: dict[str, Tensor], new: dict[str, Tensor]) -> dict[str, Tensor]:
    """``old`` where the device found the batch wrong, else ``new``."""
    return new if flag is None else {name: torch.where(flag, old[name].to(t), t) for name, t in new.items()}
