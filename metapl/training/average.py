"""The moving average of a network's weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from metapl.distributed.shards import is_sharded
from metapl.errors import MetaplError


class Average:
    r"""A network whose weights follow another's, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics) are copied.
    ``torch.optim.swa_utils.AveragedModel`` would do the same, but counts on the device, so that each step would wait
    for it.

    Args:
        network: is copied.
        decay: in [0, 1).

    Cost: a copy of the network; one fused pass over its weights an update, and no wait for the device.

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
        if any(is_sharded(p) for p in network.parameters()):
            raise MetaplError(
                "ema_decay was given, and an average of sharded weights is not built yet; leave ema_decay out, or wrap "
                "the networks in DistributedDataParallel."
            )
        self.module = copy.deepcopy(network)
        self.decay, self.steps = decay, 0

    @torch.no_grad()
    def update(self, network: nn.Module) -> None:
        """Follow the network by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        torch._foreach_lerp_(list(self.module.parameters()), list(network.parameters()), 1 - decay)
        for averaged, current in zip(self.module.buffers(), network.buffers(), strict=True):
            averaged.copy_(current)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights and how many steps they have followed."""
        return {"module": self.module.state_dict(), "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`."""
        self.module.load_state_dict(state["module"])
        self.steps = state["steps"]
