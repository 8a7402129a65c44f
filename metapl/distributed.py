"""Laying networks out over processes: a mesh of them, and ``fully_shard``,
``DistributedDataParallel`` or ``parallelize_module`` over it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from metapl.errors import MetaplError, few
from metapl.execution.batch_norm import share_batch_norms
from metapl.execution.shards import is_sharded, local
from metapl.execution.state import named_parts
from metapl.runs.fields import Range, check_arguments, check_fields

__all__ = ["Mesh", "shard"]
__dir__ = __all__.copy

# The submodules of a network that gather their weights one after another.
Blocks = Callable[[nn.Module], Iterable[nn.Module]]
# How the products of layers are shared, by their names: as ``parallelize_module`` takes it.
Plan = Mapping[str, Any]
Count = Annotated[int, Range(1, of="a number of processes")]


@dataclass(frozen=True, kw_only=True)
class Mesh:
    """How many processes there are, and what each kind of them shares.

    Args:
        replicate: copies of the weights; each copy takes a share of every batch.
        shard: processes that hold a copy together, each a part of every weight; they too share the
            batches.
        tensor: processes that compute the products of a layer together, each with a part of its
            weights; they have the same rows of a batch, and follow each other.

    The number of processes is the product. ``Mesh(replicate=R)`` is plain data parallelism,
    ``Mesh(shard=S)`` is FSDP2, both together are hybrid sharding: shard within a machine, replicate
    between machines.

    >>> Mesh(replicate=16, shard=8).size
    128
    >>> Mesh(shard=2, tensor=4).shares  # how many shares a batch has
    2
    """

    replicate: Count = 1
    shard: Count = 1
    tensor: Count = 1

    def __post_init__(self) -> None:
        check_fields(self)

    @property
    def size(self) -> int:
        """The number of processes."""
        return self.shares * self.tensor

    @property
    def shares(self) -> int:
        """How many shares a batch has."""
        return self.replicate * self.shard

    @property
    def share(self) -> int:
        """The number of this process's share."""
        return dist.get_rank() // self.tensor

    def batch_norm_group(self, shares: int) -> dist.ProcessGroup:
        """The processes that share the statistics of batch norms with this one: those of so many
        shares of a batch that follow one another; built once."""
        built: dict[int, dist.ProcessGroup] = self.__dict__.setdefault("_batch_norm_groups", {})
        if shares not in built:
            by_share_and_copy = torch.arange(self.size).view(-1, shares, self.tensor)
            ranks_of_groups = by_share_and_copy.transpose(1, 2).flatten(0, 1).tolist()
            group, _ = dist.new_subgroups_by_enumeration(ranks_of_groups)
            assert isinstance(group, dist.ProcessGroup), "every process is in a group"
            built[shares] = group
        return built[shares]

    def devices(self, kind: str) -> Any:
        """The mesh of the devices of all processes, ``"cpu"`` or ``"cuda"``, whose dimensions are
        named as the fields here; built once, for every mesh has process groups of its own."""
        from torch.distributed.device_mesh import init_device_mesh

        built: dict[str, Any] = self.__dict__.setdefault("_meshes", {})
        if kind not in built:
            sizes = {
                name: size for name, size in asdict(self).items() if size > 1 or name == "shard"
            }
            built[kind] = init_device_mesh(kind, tuple(sizes.values()), mesh_dim_names=tuple(sizes))
        return built[kind]


def shard(
    module: nn.Module,
    mesh: Mesh,
    *,
    blocks: Blocks | None = None,
    precision: Literal["float32", "bfloat16"] = "float32",
    checkpoint: bool = False,
    plan: Plan | None = None,
    batch_norm_ranks: Count = 1,
) -> nn.Module:
    """Lay a network out over a mesh, for :class:`metapl.BilevelTrainer`: what a user of PyTorch would do by hand.

    Call it before the optimizer is built, on equal weights in every process (the same seed, or a
    loaded file).

    Args:
        module: the network; its parameters become sharded where they are. With ``mesh.shard == 1``
            it stays as it is, inside ``DistributedDataParallel``.
        mesh: of all processes.
        blocks: the submodules that gather their weights one after another, so that one of them is
            whole at a time; by default those of :func:`blocks_of` that share no weight with the
            rest of the network.
        precision: ``"bfloat16"`` gathers weights and computes in it, and keeps weights, gradients
            and their averages in float32; batch norms stay in float32. Not with ``mesh.shard ==
            1``, where ``BilevelTrainer(precision=...)`` computes under autocast.
        checkpoint: run each block again in the backward pass instead of keeping what it computed.
        plan: with ``mesh.tensor`` above 1, how the products of layers are shared, by their names,
            as ``parallelize_module`` takes it: ``{"0": ColwiseParallel(), "2":
            RowwiseParallel()}``. Dropout between two such layers drops alike in all processes.
        batch_norm_ranks: how many shares of a batch the statistics of a batch norm are of, in every
            pass that takes them from the batch; those that follow one another belong together. 1:
            each share has its own. With ``mesh.shares``, several processes compute what one
            computes. The batch norms of the module are replaced by ones with the same weights and
            names.

    A teacher that has nothing to cut goes beside a student that is cut by ``mesh.tensor`` as
    ``shard(teacher, Mesh(replicate=mesh.size))``.

    Returns: the network to train: ``module`` itself, or the wrapper around it.
    """
    check_arguments(shard, locals())
    norms = [part for _, part in named_parts(module) if isinstance(part, _BatchNorm)]
    names = dict(module.named_modules(remove_duplicate=False))
    unknown = [key for key in plan or () if not any(fnmatchcase(name, key) for name in names)]
    chosen = _untied(module, blocks_of(module)) if blocks is None else list(blocks(module))
    parameters = [
        p for _, part in named_parts(module) for p in part._parameters.values() if p is not None
    ]
    whole, tied = (
        parameters and not any(map(is_sharded, parameters)),
        len(_untied(module, chosen)) < len(chosen),
    )
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
    refusals = {
        "precision='bfloat16' was given with mesh.shard=1; expected more.": precision == "bfloat16"
        and mesh.shard == 1,
        "the module has no parameters, or is sharded already; expected a network on one "
        "device.": not whole,
        "checkpoint=True would count each batch twice in batch norms; expected none.": checkpoint
        and bool(norms),
        f"mesh.tensor is {mesh.tensor}; expected plan= where it is above 1.": (mesh.tensor > 1)
        != (plan is not None),
        f"batch_norm_ranks={batch_norm_ranks}: expected a divisor of the {mesh.shares} shares of "
        "a batch.": (mesh.shares % batch_norm_ranks != 0),
        "batch_norm_ranks above 1 was given, and the network is a batch norm; expected one around "
        "it.": (batch_norm_ranks > 1 and isinstance(module, _BatchNorm)),
        f"plan names {few(unknown)}, and the network has no such layer.": bool(unknown),
        "blocks share a weight with others; expected all places of their weights.": mesh.shard > 1
        and tied,
        f"{mesh} is not of the {world} processes here; expected torchrun --nproc-per-node.": world
        != mesh.size,
    }
    for text, wrong in refusals.items():
        if wrong:
            raise MetaplError(text)
    kind = next(module.parameters()).device.type
    if batch_norm_ranks > 1 and norms:
        share_batch_norms(module, mesh.batch_norm_group(batch_norm_ranks))
        # The batch norms are other modules now, and a block may be one of them.
        norms = [part for _, part in named_parts(module) if isinstance(part, _BatchNorm)]
        chosen = _untied(module, blocks_of(module)) if blocks is None else list(blocks(module))
    if checkpoint:
        from torch.distributed._composable.checkpoint_activation import checkpoint as checkpointed

        for block in chosen:
            checkpointed(block)
    if plan is not None:
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(module, mesh.devices(kind)["tensor"], dict(plan))
        if mesh.shares == 1:
            return module
    elif mesh.shard == 1:
        return nn.parallel.DistributedDataParallel(module)
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    def placement(p: nn.Parameter) -> Shard:
        """Along a dimension that the shards divide, so that nothing is padded."""
        return Shard(
            next((dim for dim, n in enumerate(local(p).shape) if n and n % mesh.shard == 0), 0)
        )

    module.to(memory_format=torch.contiguous_format)  # fully_shard takes no other
    half = precision == "bfloat16"
    policy = (
        MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        if half
        else MixedPrecisionPolicy()
    )
    devices = mesh.devices(kind)
    if mesh.tensor > 1:
        devices = devices[("replicate", "shard") if mesh.replicate > 1 else "shard"]
    options = {"mesh": devices, "shard_placement_fn": placement}
    for norm in norms if half else ():
        if norm.affine and not any(norm is block for block in chosen):
            fully_shard(
                norm, mp_policy=MixedPrecisionPolicy(output_dtype=torch.bfloat16), **options
            )
    for block in dict.fromkeys([*chosen, module]):
        fully_shard(block, mp_policy=policy, **options)
    return module


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """The blocks of a network: of the modules that its ``Sequential``, ``ModuleList`` and
    ``ModuleDict`` hold, the innermost ones that hold more than a layer, such as residual blocks; in
    a network of plain layers, its layers."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    composite: list[nn.Module] = []
    layers: list[nn.Module] = []

    def collect(part: nn.Module) -> None:
        for child in part.children():
            inside = list(child.children())
            outer = isinstance(child, containers) and any(
                list(inner.children()) for inner in inside
            )
            if isinstance(part, containers) and any(True for _ in child.parameters()) and not outer:
                (composite if inside else layers).append(child)
            else:
                collect(child)

    collect(module)
    return composite or layers


def _untied(module: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks whose weights have no place outside of them."""

    def places(part: nn.Module) -> Counter[int]:
        return Counter(
            id(p) for _, own in named_parts(part) for p in own._parameters.values() if p is not None
        )

    everywhere = places(module).items()
    return [block for block in blocks if places(block).items() <= everywhere]
