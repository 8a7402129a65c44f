"""The moving average of a network's weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.layout import reshard
from metapl.execution.shards import as_sharded, laid_out_like, local


class Average:
    r"""The average that follows a network's weights, \theta̅ \leftarrow d_t \theta̅ + (1 - d_t) \theta.

    .. math:: d_t = \min\big(\mathrm{decay}, \tfrac{1 + t}{10 + t}\big), \quad t = 0, 1, \dots

    so early in training the average is over the last few steps only. Buffers (running statistics) are copied.
    ``torch.optim.swa_utils.AveragedModel`` would do the same, but counts on the device, so that each step would wait
    for it, and copies the module, which a sharded one does not allow.

    Args:
        network: whose weights take turns with their average.
        decay: in [0, 1).

    Cost: a copy of the weights, of sharded ones of this process's parts; one fused pass over them an update.

    >>> network = nn.Linear(1, 1, bias=False)
    >>> _ = nn.init.zeros_(network.weight)
    >>> average = Average(network, decay=0.995)
    >>> _ = nn.init.ones_(network.weight)
    >>> average.update()
    >>> with average.held() as averaged:
    ...     print(round(averaged.weight.item(), 6))  # d_0 = 1/10
    0.9
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in network.parameters()):
            raise MetaplError(
                "the average of 16-bit weights does not move: its steps are below their resolution; expected "
                "ema_decay=None, or 32-bit weights with precision='bfloat16'."
            )
        self.network, self.decay, self.steps = network, decay, 0
        self._kept = [t.clone() for t in self._parts()]

    @torch.no_grad()
    def update(self) -> None:
        """Follow the network by one step."""
        decay = min(self.decay, (1 + self.steps) / (10 + self.steps))
        learned, parts = len([*self.network.parameters()]), self._parts()
        torch._foreach_lerp_(self._kept[:learned], parts[:learned], 1 - decay)
        _write(self._kept[learned:], parts[learned:])
        self.steps += 1

    @contextmanager
    def held(self) -> Iterator[nn.Module]:
        """The network with the averaged weights in this block, and bit for bit its own afterwards."""
        own = [t.clone() for t in self._parts()]
        try:
            _write(self._parts(), self._kept)
            yield self.network
        finally:
            _write(self._parts(), own)

    def state_dict(self) -> dict[str, Any]:
        """The averaged weights, as the network's state has its own, and how many steps they have followed."""
        return {"module": {name: as_sharded(kept, t) for name, t, kept in self._of_state()}, "steps": self.steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from :meth:`state_dict`, whole or laid out as the network is."""
        given = {name: local(laid_out_like(state["module"][name], t)) for name, t, _ in self._of_state()}
        for name, _, kept in self._of_state():
            if kept.shape != given[name].shape:
                raise ValueError(f"the average of {name} has the shape {tuple(given[name].shape)}")
            kept.copy_(given[name])
        self.steps = state["steps"]

    def _tensors(self) -> list[Any]:
        reshard(self.network)  # else a sharded network holds other tensors
        return [*self.network.parameters(), *self.network.buffers()]

    def _parts(self) -> list[Tensor]:
        """This process's parts of the weights, sharing their memory."""
        return [local(t).detach() for t in self._tensors()]

    def _of_state(self) -> Iterator[tuple[str, Any, Tensor]]:
        """The tensors of the network's state by name, each with this process's part of its average."""
        kept = dict(zip(map(id, self._tensors()), self._kept, strict=True))
        for name, t in self.network.state_dict(keep_vars=True).items():
            if id(t) in kept:
                yield name, t, kept[id(t)]


@torch.no_grad()
def _write(into: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for t, value in zip(into, values, strict=True):
        t.copy_(value)
