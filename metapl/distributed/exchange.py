"""Exchanges between processes that autograd knows of: backward passes twice, and forward-mode derivatives.

PyTorch's own collectives drop or skip the tangent of a dual number without a word, so every exchange in a network's
forward pass is one of these. Each is linear: its derivative along a direction is the exchange of the direction, and its
backward pass is the adjoint exchange, which is one of this kind again.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Linear = Callable[[Tensor], Tensor]


def sum_over(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the processes of a group, the same on every one.

    The backward pass sums the gradients: what every process computes of the sum counts as often as there are processes,
    so that the *mean* of the processes' parameter gradients is the gradient of one process with everything.
    """
    summed = partial(_summed, group=group)
    result: Tensor = Exchange.apply(t, summed, summed)
    return result


def with_halo(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    """This process's columns of images, (..., W), and ``left`` and ``right`` columns of its neighbors beside them.

    The processes of the group hold the images from left to right; there are zeros at the images' edges. No more than W
    columns of a neighbor. Returns (..., left + W + right).
    """
    if not left and not right:
        return t
    sides: dict[str, Any] = {"left": left, "right": right, "group": group}
    result: Tensor = Exchange.apply(t, partial(_gathered, **sides), partial(_returned, **sides))
    return result


class Exchange(torch.autograd.Function):
    """A linear exchange of a tensor, given with its adjoint."""

    @staticmethod
    def forward(t: Tensor, exchange: Linear, adjoint: Linear) -> Tensor:
        return exchange(t.detach())

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.exchange, ctx.adjoint = inputs

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return Exchange.apply(gradient, ctx.adjoint, ctx.exchange), None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        exchanged: Tensor = ctx.exchange(tangent.detach())
        return exchanged


def _summed(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = t.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    of_left, of_right = _swapped(t[..., :right], t[..., t.shape[-1] - left :], group)
    return torch.cat([of_left, t, of_right], dim=-1)


def _returned(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    """The adjoint: the columns beside a process's own go back to the neighbors that they are of, who add them."""
    width = t.shape[-1] - left - right
    own = t[..., left : left + width].clone()
    # What a process holds of its left neighbor are that one's last columns.
    of_left, of_right = _swapped(t[..., :left], t[..., left + width :], group)
    own[..., :right] += of_left
    own[..., width - left :] += of_right
    return own


def _swapped(to_left: Tensor, to_right: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Send columns to both neighbors; what the left one sends to its right, and the other to its left, of which zeros
    stand where there is none."""
    # Every process sends as many columns as any other.
    received = to_right.new_zeros(to_right.shape), to_left.new_zeros(to_left.shape)
    operations = []
    for there, sent, buffer in zip((group.rank() - 1, group.rank() + 1), (to_left, to_right), received, strict=True):
        if 0 <= there < group.size():
            peer = dist.get_global_rank(group, there)
            operations += [dist.P2POp(dist.isend, sent.contiguous(), peer, group)] * bool(sent.numel())
            operations += [dist.P2POp(dist.irecv, buffer, peer, group)] * bool(buffer.numel())
    for work in dist.batch_isend_irecv(operations) if operations else ():
        work.wait()
    return received
