"""Weights of which this process holds a part.

A DTensor's part as a plain tensor, and products over all parts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from metapl.execution.numerics import Space, Tree, wide


def is_sharded(t: Any) -> bool:
    """Whether a tensor is a DTensor, of which this process holds a part."""
    kind = type(t)  # asked of every parameter in every step, and nearly all are plain
    return (
        kind is not nn.Parameter
        and kind is not Tensor
        and hasattr(t, "device_mesh")
        and hasattr(t, "to_local")
    )


def local(t: Any) -> Any:
    """This process's part of a DTensor, sharing its memory, without a graph.

    Anything else as it is.
    """
    return t.detach().to_local() if is_sharded(t) else t


def as_sharded(part: Tensor, like: Any) -> Tensor:
    """The DTensor laid out like ``like`` of which this is this process's part."""
    if not is_sharded(like):
        return part
    from torch.distributed.tensor import DTensor

    return DTensor.from_local(
        part,
        like.device_mesh,
        like.placements,
        run_check=False,
        shape=like.shape,
        stride=like.stride(),
    )


def whole(t: Any) -> Any:
    """All of a DTensor, gathered from the processes that hold its parts; anything else as it is."""
    return t.full_tensor() if is_sharded(t) else t


def whole_together(parts: Sequence[Tensor], likes: Sequence[Any]) -> list[Tensor]:
    """The whole tensors of which these are this process's parts, laid out like ``likes``, in one
    exchange for each type, which can be differentiated twice. A cotangent is the sum of those of
    all processes."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    found: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in parts):
        numbers = [i for i, t in enumerate(parts) if t.dtype == dtype]
        mesh, placements = likes[numbers[0]].device_mesh, likes[numbers[0]].placements
        shards, over = mesh.shape[-1], [Replicate()] * mesh.ndim
        pieces, shapes = list[Tensor](), list[tuple[int, int, Any]]()
        for i in numbers:
            dim = likes[i].placements[-1].dim
            rows = parts[i].movedim(dim, 0)
            most = -(-likes[i].shape[dim] // shards)  # the last processes may hold less, or nothing
            rest = [
                n for at, n in enumerate(likes[i].shape) if at != dim
            ]  # an empty part may have lost its own
            # Not by cat, whose backward pass drops the graph of an empty part, and with it the
            # exchange.
            pieces.append(F.pad(rows.flatten(), (0, most * math.prod(rest) - rows.numel())))
            shapes.append((dim, most, rest))
        flat = DTensor.from_local(
            torch.cat(pieces), mesh, [*placements[:-1], Shard(0)], run_check=False
        )
        every = (
            flat.redistribute(placements=over)
            .to_local(grad_placements=[Partial()] * mesh.ndim)
            .view(shards, -1)
        )
        sizes = [most * math.prod(rest) for _, most, rest in shapes]
        for i, (dim, most, rest), piece in zip(numbers, shapes, every.split(sizes, 1), strict=True):
            rows = piece.reshape(shards * most, *rest)[: likes[i].shape[dim]]
            found[i] = rows.movedim(0, dim).contiguous()
    return [found[i] for i in range(len(parts))]


def gathered(tree: Any) -> Any:
    """A tree whose DTensors are whole, on the host.

    Every process has to call this, as each holds a part of them.
    """
    return pytree.tree_map(lambda t: whole(t).cpu() if is_sharded(t) else t, tree)


def laid_out_for(state: dict[str, Any], optimizer: Any) -> dict[str, Any]:
    """The whole ``state_dict()`` of an optimizer of ``torch.optim``, laid out as its parameters are."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        return state
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    held = {
        i: {n: laid_out_like(t, parameters[i]) for n, t in values.items()}
        for i, values in state["state"].items()
    }
    return {**state, "state": held}


def laid_out_like(value: Any, like: Any) -> Any:
    """This process's part of what is laid out as a parameter is.

    A count of steps is whole everywhere.
    """
    if (
        not isinstance(value, Tensor)
        or not is_sharded(like)
        or value.shape != like.shape
        or is_sharded(value)
    ):
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it, so nothing is sent.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def load_whole(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    held = network.state_dict()
    network.load_state_dict({name: laid_out_like(t, held.get(name)) for name, t in weights.items()})


def weights_of(model: nn.Module) -> dict[str, Any]:
    """The weights and buffers of a network as they are now, whole and on the host."""
    return {
        name: whole(t).detach().cpu().clone() if isinstance(t, Tensor) else copy.deepcopy(t)
        for name, t in model.state_dict().items()
    }


class ShardedSpace(Space):
    """Products of trees that hold this process's parts, over the parts of all processes.

    One exchange each.
    """

    def __init__(
        self, parameters: Mapping[str, Any], groups: Iterable[dist.ProcessGroup], processes: int
    ) -> None:
        self.groups = tuple(groups)
        self.sizes = {name: p.numel() for name, p in parameters.items()}
        self.copies = dict.fromkeys(parameters, processes)  # how many processes hold each part
        for name, p in parameters.items():
            if is_sharded(p):
                cut = [
                    n
                    for n, how in zip(p.device_mesh.shape, p.placements, strict=True)
                    if not how.is_replicate()
                ]
                self.copies[name] //= math.prod(cut)

    def dot(self, a: Tree, b: Tree) -> Tensor:
        return self._total([self._dot(a, b)])[0]

    def norm(self, a: Tree) -> Tensor:
        return self.dot(a, a).sqrt()

    def slope(self, a: Tree, b: Tree) -> tuple[Tensor, Tensor]:
        products = {name: wide(t) * wide(b[name]) for name, t in a.items() if name in b}
        total = self._total([self._dot(a, b), self._dot(products, products)])
        return total[0], total[1].sqrt()

    def count(self, a: Tree) -> int:
        return sum(self.sizes[name] for name in a)

    def _dot(self, a: Tree, b: Tree) -> Tensor:
        """This process's share of ⟨a, b⟩; a part that several processes hold counts once in all."""
        terms = [
            (wide(a[name]) * wide(b[name])).sum() / self.copies[name] for name in a if name in b
        ]
        return torch.stack(terms).sum()

    def _total(self, shares: list[Tensor]) -> Tensor:
        total = torch.stack(shares)
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total
