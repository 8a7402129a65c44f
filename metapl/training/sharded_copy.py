"""A copy of a sharded network's weights, such as their moving average: this process's parts, in the same layout."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from metapl.execution.layout import reshard
from metapl.execution.shards import as_sharded, is_sharded, laid_out_like, local


class ShardedCopy:
    """A copy of a sharded network's parameters and buffers, which such a network cannot make of itself.

    Attributes:
        learned, buffers: this process's parts of the copy, by name.
    """

    def __init__(self, network: nn.Module) -> None:
        self.learned, self.buffers = ({name: t.clone() for name, t in held.items()} for held in local_parts(network))

    @contextmanager
    def swapped(self, network: nn.Module) -> Iterator[None]:
        """The network has these values in this block, and bit for bit its own afterwards."""
        own = ShardedCopy(network)
        try:
            self._write(network)
            yield
        finally:
            own._write(network)

    def state_dict(self, network: nn.Module) -> dict[str, Any]:
        """As the network's ``state_dict``, with these values."""
        reshard(network)
        values = {id(t): value for t, value in self._with_copies(network)}
        return {name: as_sharded(values[id(t)], t) for name, t in network.state_dict(keep_vars=True).items()}

    def load_state_dict(self, network: nn.Module, state: Mapping[str, Any]) -> None:
        """Take the values of a network's ``state_dict``, whole or laid out as the network is."""
        reshard(network)
        values = {id(t): value for t, value in self._with_copies(network)}
        for name, t in network.state_dict(keep_vars=True).items():
            values[id(t)].copy_(local(laid_out_like(state[name], t)))

    def _with_copies(self, network: nn.Module) -> Iterator[tuple[Any, Tensor]]:
        for held, values in ((network.named_parameters(), self.learned), (network.named_buffers(), self.buffers)):
            for name, t in held:
                yield t, values[name]

    @torch.no_grad()
    def _write(self, network: nn.Module) -> None:
        learned, buffers = local_parts(network)
        for held, values in ((learned, self.learned), (buffers, self.buffers)):
            for name, t in held.items():
                t.copy_(values[name])
        reshard(network)


def local_parts(network: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """This process's parts of the parameters and of the buffers, by name, sharing their memory."""
    reshard(network)
    return (
        {name: local(p).detach() for name, p in network.named_parameters()},
        {name: local(b).detach() for name, b in network.named_buffers()},
    )


def has_sharded_weights(network: nn.Module) -> bool:
    """Whether this process holds a part of some weight only."""
    return any(is_sharded(p) for p in network.parameters())
