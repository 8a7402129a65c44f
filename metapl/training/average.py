"""The moving average of a network's weights."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.training.sharded_copy import ShardedCopy, has_sharded_weights, local_parts


class Average:
    r"""A network whose weights follow another's, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics) are copied.
    ``torch.optim.swa_utils.AveragedModel`` would do the same, but counts on the device, so that each step would wait
    for it.

    Args:
        network: is copied.
        decay: in [0, 1).

    Cost: a copy of the network, of a sharded one of this process's parts; one fused pass over its weights an update,
    and no wait for the device.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(network.weight)
    >>> average = Average(network, decay=0.995)
    >>> _ = nn.init.ones_(network.weight)
    >>> average.update(network)
    >>> round(average.module.weight.item(), 6)  # d_0 = 1/10
    0.9
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError(
                "the average of 16-bit weights does not move: its steps are below their resolution; expected "
                "ema_decay=None, or 32-bit weights with precision='bfloat16'."
            )
        self.decay, self.steps = decay, 0
        self.network = network
        # Sharded modules cannot be copied: their average is a copy of their weights that takes turns with them.
        self.sharded = ShardedCopy(network) if has_sharded_weights(network) else None
        self.module = copy.deepcopy(network) if self.sharded is None else network

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow the network by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        if self.sharded is None:
            averaged: list[Tensor] = [*self.module.parameters()]
            weights: list[Tensor] = [*network.parameters()]
            buffers = [*zip(self.module.buffers(), network.buffers(), strict=True)]
        else:
            learned, current = local_parts(network)
            averaged, weights = [self.sharded.learned[name] for name in learned], [*learned.values()]
            buffers = [(self.sharded.buffers[name], b) for name, b in current.items()]
        torch._foreach_lerp_(averaged, weights, 1 - decay)
        for kept, buffer in buffers:
            kept.copy_(buffer)
        self.steps += 1

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """The network with the averaged weights, in this block; a sharded one has its own again afterwards."""
        if self.sharded is None:
            yield self.module
            return
        with self.sharded.swapped(self.network):
            yield self.network

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and how many steps they have followed."""
        module = self.module.state_dict() if self.sharded is None else self.sharded.state_dict(self.network)
        return {"module": module, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        if self.sharded is None:
            self.module.load_state_dict(state["module"])
        else:
            self.sharded.load_state_dict(self.network, state["module"])
        self.steps = state["steps"]
