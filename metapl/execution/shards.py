"""Weights of which this process holds a part.

A DTensor's part as a plain tensor, and products over all parts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from metapl.execution.numerics import Space, Tree, by_backward, wide


def is_sharded(t: Any) -> bool:
    """Return whether a tensor is a DTensor, of which this process holds a part."""
    # This is asked of every parameter in every step, and nearly all are plain.
    kind = type(t)
    return (
        kind is not nn.Parameter
        and kind is not Tensor
        and hasattr(t, "device_mesh")
        and hasattr(t, "to_local")
    )


def local(t: Any) -> Any:
    """Return this process's part of a DTensor, sharing its memory, without a graph.

    Anything else as it is.
    """
    return t.detach().to_local() if is_sharded(t) else t


def number_of_shard(tensors: Iterable[Any]) -> int:
    """Return the number of the part that this process holds of tensors that share a mesh.

    Processes along a dimension of the mesh that nothing is sharded over hold the same part.
    """
    sharded = [t for t in tensors if is_sharded(t)]
    if not sharded:
        return 0
    mesh = sharded[0].device_mesh
    number = 0
    for dimension, (size, place) in enumerate(zip(mesh.shape, mesh.get_coordinate(), strict=True)):
        if any(t.placements[dimension].is_shard() for t in sharded if t.device_mesh == mesh):
            number = number * size + place
    return number


def as_sharded(part: Tensor, like: Any) -> Tensor:
    """Return the DTensor of which this is this process's part, laid out like ``like``.

    A part as it is where ``like`` is no DTensor.
    """
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
    """Return all of a DTensor, gathered from the processes that hold its parts.

    Anything else as it is.
    """
    return t.full_tensor() if is_sharded(t) else t


class _Rows(NamedTuple):
    """How a weight is cut into rows along one dimension, each process with as many.

    Attributes:
        dim: the dimension along which it is cut.
        rows: the number of rows of each process. The last ones may hold fewer, or none, and are
            filled up.
        row_shape: the shape of one row.
    """

    dim: int
    rows: int
    row_shape: list[int]

    def numel(self) -> int:
        return self.rows * math.prod(self.row_shape)


def whole_together(parts: Sequence[Tensor], likes: Sequence[Any]) -> list[Tensor]:
    """Return the whole tensors of which these are this process's parts, laid out like ``likes``.

    There is one exchange for each type, which can be differentiated twice. A cotangent is the sum
    of those of all processes.
    """
    wholes: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(t.dtype for t in parts):
        numbers = [number for number, t in enumerate(parts) if t.dtype == dtype]
        of_type = _gathered_of_type(
            [parts[number] for number in numbers], [likes[number] for number in numbers]
        )
        wholes.update(zip(numbers, of_type, strict=True))
    return [wholes[number] for number in range(len(parts))]


def _gathered_of_type(parts: Sequence[Tensor], likes: Sequence[Any]) -> list[Tensor]:
    """Return what :func:`whole_together` returns, for parts of one type, by one exchange."""
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

    mesh = likes[0].device_mesh
    placements = likes[0].placements
    shards = mesh.shape[-1]
    cuts: list[_Rows] = []
    pieces: list[Tensor] = []
    for part, like in zip(parts, likes, strict=True):
        dim = like.placements[-1].dim
        # An empty part may have lost its other dimensions, so these are read from the whole.
        row_shape = [size for number, size in enumerate(like.shape) if number != dim]
        cut = _Rows(dim, math.ceil(like.shape[dim] / shards), row_shape=row_shape)
        rows = part.movedim(dim, 0)
        # Not by cat, whose backward pass drops the graph of an empty part, and with it the
        # exchange.
        pieces.append(F.pad(rows.flatten(), (0, cut.numel() - rows.numel())))
        cuts.append(cut)

    flat = DTensor.from_local(
        torch.cat(pieces), mesh, [*placements[:-1], Shard(0)], run_check=False
    )
    everywhere = flat.redistribute(placements=[Replicate()] * mesh.ndim)
    all_pieces = everywhere.to_local(grad_placements=[Partial()] * mesh.ndim).view(shards, -1)

    wholes: list[Tensor] = []
    of_each = all_pieces.split([cut.numel() for cut in cuts], 1)
    for cut, like, piece in zip(cuts, likes, of_each, strict=True):
        rows = piece.reshape(shards * cut.rows, *cut.row_shape)[: like.shape[cut.dim]]
        wholes.append(rows.movedim(0, cut.dim).contiguous())
    return wholes


def gathered(tree: Any) -> Any:
    """Return a tree whose DTensors are whole, on the host.

    Every process has to call this, as each holds a part of them.
    """
    return pytree.tree_map(lambda t: whole(t).cpu() if is_sharded(t) else t, tree)


def laid_out_for(state: dict[str, Any], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a whole ``state_dict()`` of an optimizer, laid out as its parameters are."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    laid_out: dict[int, dict[str, Any]] = {}
    for number, values in state["state"].items():
        like = parameters[number]
        laid_out[number] = {key: laid_out_like(t, like) for key, t in values.items()}
    return {**state, "state": laid_out}


def laid_out_like(value: Any, like: Any) -> Any:
    """Return this process's part of what is laid out as a parameter is.

    A count of steps is whole everywhere, and stays as it is.
    """
    if not isinstance(value, Tensor) or is_sharded(value):
        return value
    if not is_sharded(like) or value.shape != like.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    # Every process has all of it, so nothing is sent.
    return distribute_tensor(
        value.to(like.device), like.device_mesh, like.placements, src_data_rank=None
    )


def load_whole(network: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load whole weights into a network, sharded or not."""
    likes = network.state_dict()
    network.load_state_dict(
        {name: laid_out_like(t, likes.get(name)) for name, t in weights.items()}
    )


def weights_of(model: nn.Module) -> dict[str, Any]:
    """Return copies of the weights and buffers of a network, whole and on the host."""
    weights: dict[str, Any] = {}
    for name, t in model.state_dict().items():
        if isinstance(t, Tensor):
            weights[name] = whole(t).detach().cpu().clone()
        else:
            weights[name] = copy.deepcopy(t)
    return weights


class ShardedSpace(Space):
    """Products of trees that hold this process's parts, over the parts of all processes.

    Cost: one exchange each.

    Args:
        parameters: the weights, by name.
        groups: of processes, whose product is all of them.
        processes: how many there are.

    Attributes:
        copies: how many processes hold each part.
    """

    def __init__(
        self, parameters: Mapping[str, Any], groups: Iterable[dist.ProcessGroup], processes: int
    ) -> None:
        self.groups = tuple(groups)
        self.sizes = {name: p.numel() for name, p in parameters.items()}
        self.copies: dict[str, int] = {}
        for name, p in parameters.items():
            parts = 1
            if is_sharded(p):
                for size, placement in zip(p.device_mesh.shape, p.placements, strict=True):
                    if not placement.is_replicate():
                        parts *= size
            self.copies[name] = processes // parts

    def dot(self, a: Tree, b: Tree) -> Tensor:
        (total,) = self._total([self._dot(a, b)])
        return total

    def norm(self, a: Tree) -> Tensor:
        return self.dot(a, a).sqrt()

    def slope(self, a: Tree, b: Tree) -> tuple[Tensor, Tensor]:
        products = {name: wide(t) * wide(b[name]) for name, t in a.items() if name in b}
        dot, square_norm = self._total([self._dot(a, b), self._dot(products, products)])
        return dot, square_norm.sqrt()

    def count(self, a: Tree) -> int:
        return sum(self.sizes[name] for name in a)

    def _dot(self, a: Tree, b: Tree) -> Tensor:
        """Return this process's share of ⟨a, b⟩.

        A part that several processes hold counts once in all.
        """
        terms = [
            (wide(a[name]) * wide(b[name])).sum() / self.copies[name] for name in a if name in b
        ]
        return torch.stack(terms).sum()

    def _total(self, shares: list[Tensor]) -> Sequence[Tensor]:
        """Return the sums over processes, by one exchange."""
        total = torch.stack(shares)
        for group in self.groups:
            dist.all_reduce(total, group=group)
        return total.unbind()


def mean_by_backward(
    value: Tensor, parameters: Mapping[str, nn.Parameter], *, retain: bool = False
) -> dict[str, Any]:
    """Return the gradient of a scalar by ``.backward()``, whose hooks average over the ranks.

    ``.grad`` stays as it is.
    """
    gradient: dict[str, Any] = by_backward(value, parameters, retain=retain)
    for name, g in gradient.items():
        like: Any = parameters[name]
        if type(g) is not Tensor and is_sharded(g) and g.placements != like.placements:
            # parallelize_module leaves sums over processes that are still to be taken.
            gradient[name] = g.redistribute(like.device_mesh, like.placements)
    return gradient
