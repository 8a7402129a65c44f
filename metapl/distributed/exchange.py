"""Exchanges between processes that autograd knows of: backward passes twice, and forward-mode derivatives.

PyTorch's own collectives drop or skip the tangent of a dual number without a word, so every exchange in a network's
forward pass is one of these. Each is linear: its derivative along a direction is the exchange of the direction, and its
backward pass is the adjoint exchange, which is a function of this kind again.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist


def sum_over(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum of a tensor over the processes of a group, the same on every one.

    The backward pass sums the gradients: what every process computes of the sum counts as often as there are processes,
    so that the *mean* of the processes' parameter gradients is the gradient of one process with everything.
    """
    result: Tensor = _Sum.apply(t, group)
    return result


def with_halo(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    """This process's columns of images, and columns of its neighbors beside them.

    Args:
        t: (..., W), the columns of this process; the processes of the group hold the images from left to right.
        left, right: numbers of columns of the neighbor on either side, W or less; zeros at the images' edges.
        group: the processes that hold parts of the same images.

    Returns: (..., left + W + right).
    """
    if not left and not right:
        return t
    result: Tensor = _Halo.apply(t, left, right, group)
    return result


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, group: Any) -> Tensor:
        return _summed(t, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.group = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return sum_over(gradient, ctx.group), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return _summed(tangent, ctx.group)


class _Halo(torch.autograd.Function):
    @staticmethod
    def forward(t: Tensor, left: int, right: int, group: Any) -> Tensor:
        return _gathered(t, left, right, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sides = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return _HaloAdjoint.apply(gradient, *ctx.sides), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _gathered(tangent, *ctx.sides)


class _HaloAdjoint(torch.autograd.Function):
    """Gives the columns beside a process's own back to the neighbors that they are of, who add them."""

    @staticmethod
    def forward(t: Tensor, left: int, right: int, group: Any) -> Tensor:
        return _returned(t, left, right, group)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.sides = inputs[1:]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return with_halo(gradient, *ctx.sides), None, None, None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, *_: None) -> Tensor:
        return _returned(tangent, *ctx.sides)


def _summed(t: Tensor, group: dist.ProcessGroup) -> Tensor:
    total = t.detach().clone(memory_format=torch.contiguous_format)
    dist.all_reduce(total, group=group)
    return total


def _gathered(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    t = t.detach()
    width = t.shape[-1]
    of_left, of_right = _swapped(t[..., :right], t[..., width - left :], left, right, t, group)
    return torch.cat([of_left, t, of_right], dim=-1)


def _returned(t: Tensor, left: int, right: int, group: dist.ProcessGroup) -> Tensor:
    t = t.detach()
    width = t.shape[-1] - left - right
    own = t[..., left : left + width].clone()
    # What a process holds of its left neighbor are that one's last columns.
    of_left, of_right = _swapped(t[..., :left], t[..., left + width :], right, left, t, group)
    own[..., :right] += of_left
    own[..., width - left :] += of_right
    return own


def _swapped(
    to_left: Tensor, to_right: Tensor, from_left: int, from_right: int, like: Tensor, group: dist.ProcessGroup
) -> tuple[Tensor, Tensor]:
    """Send columns to both neighbors, and receive so many from each; zeros where there is none."""
    rank, size = group.rank(), group.size()
    received = [like.new_zeros((*like.shape[:-1], count)) for count in (from_left, from_right)]
    operations = []
    for there, sent, buffer in ((rank - 1, to_left, received[0]), (rank + 1, to_right, received[1])):
        if not 0 <= there < size:
            continue
        peer = dist.get_global_rank(group, there)
        if sent.numel():
            operations.append(dist.P2POp(dist.isend, sent.contiguous(), peer, group))
        if buffer.numel():
            operations.append(dist.P2POp(dist.irecv, buffer, peer, group))
    if operations:
        for work in dist.batch_isend_irecv(operations):
            work.wait()
    return received[0], received[1]
