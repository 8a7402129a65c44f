"""Laying networks out over processes.

There is a mesh of processes, and ``fully_shard``, ``DistributedDataParallel`` or
``parallelize_module`` over it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
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
        """Return the processes that share the statistics of batch norms with this one.

        These are those of so many shares of a batch that follow one another. The group is built
        once.
        """
        built: dict[int, dist.ProcessGroup] = self.__dict__.setdefault("_batch_norm_groups", {})
        if shares not in built:
            by_share_and_copy = torch.arange(self.size).view(-1, shares, self.tensor)
            ranks_of_groups = by_share_and_copy.transpose(1, 2).flatten(0, 1).tolist()
            group, _ = dist.new_subgroups_by_enumeration(ranks_of_groups)
            assert isinstance(group, dist.ProcessGroup), "every process is in a group"
            built[shares] = group
        return built[shares]

    def devices(self, kind: str) -> Any:
        """Return the mesh of the devices of all processes, ``"cpu"`` or ``"cuda"``.

        Its dimensions are named as the fields here. It is built once, for every mesh has process
        groups of its own.
        """
        from torch.distributed.device_mesh import init_device_mesh

        built: dict[str, Any] = self.__dict__.setdefault("_meshes", {})
        if kind not in built:
            # FSDP2 needs a dimension, also where there is one shard.
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
    """Lay a network out over a mesh, for :class:`metapl.BilevelTrainer`.

    It does what a user of PyTorch would do by hand. Call it before the optimizer is built, on equal
    weights in every process (the same seed, or a loaded file).

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
    chosen_blocks = _blocks_to_gather(module, blocks)
    refusal = _refusal(
        module,
        mesh,
        blocks=chosen_blocks,
        precision=precision,
        checkpoint=checkpoint,
        plan=plan,
        batch_norm_ranks=batch_norm_ranks,
    )
    if refusal is not None:
        raise MetaplError(refusal)
    device_kind = next(module.parameters()).device.type
    if batch_norm_ranks > 1 and _batch_norms_in(module):
        share_batch_norms(module, mesh.batch_norm_group(batch_norm_ranks))
        # The batch norms are other modules now, and a block may be one of them.
        chosen_blocks = _blocks_to_gather(module, blocks)
    if checkpoint:
        from torch.distributed._composable.checkpoint_activation import checkpoint as checkpointed

        for block in chosen_blocks:
            checkpointed(block)
    if plan is not None:
        from torch.distributed.tensor.parallel import parallelize_module

        parallelize_module(module, mesh.devices(device_kind)["tensor"], dict(plan))
        if mesh.shares == 1:
            return module
    elif mesh.shard == 1:
        return nn.parallel.DistributedDataParallel(module)
    devices = mesh.devices(device_kind)
    if mesh.tensor > 1:
        devices = devices[("replicate", "shard") if mesh.replicate > 1 else "shard"]
    _fully_shard(module, chosen_blocks, devices, shards=mesh.shard, precision=precision)
    return module


def _refusal(
    module: nn.Module,
    mesh: Mesh,
    *,
    blocks: Sequence[nn.Module],
    precision: str,
    checkpoint: bool,
    plan: Plan | None,
    batch_norm_ranks: int,
) -> str | None:
    """Return why a network cannot be laid out so, or None where it can."""
    if precision == "bfloat16" and mesh.shard == 1:
        return "precision='bfloat16' was given with mesh.shard=1; expected more."
    parameters = _parameters_in(module)
    if not parameters or any(is_sharded(p) for p in parameters):
        return (
            "the module has no parameters, or is sharded already; expected a network on one device."
        )
    if checkpoint and _batch_norms_in(module):
        return "checkpoint=True would count each batch twice in batch norms; expected none."
    if (mesh.tensor > 1) != (plan is not None):
        return f"mesh.tensor is {mesh.tensor}; expected plan= where it is above 1."
    if mesh.shares % batch_norm_ranks != 0:
        return (
            f"batch_norm_ranks={batch_norm_ranks}: expected a divisor of the {mesh.shares} shares "
            "of a batch."
        )
    if batch_norm_ranks > 1 and isinstance(module, _BatchNorm):
        return (
            "batch_norm_ranks above 1 was given, and the network is a batch norm; expected one "
            "around it."
        )
    unknown = [] if plan is None else _without_layer(plan, module)
    if unknown:
        return f"plan names {few(unknown)}, and the network has no such layer."
    if mesh.shard > 1 and len(_untied(module, blocks)) < len(blocks):
        return "blocks share a weight with others; expected all places of their weights."
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 0
    if world != mesh.size:
        return f"{mesh} is not of the {world} processes here; expected torchrun --nproc-per-node."
    return None


def _fully_shard(
    module: nn.Module,
    blocks: Sequence[nn.Module],
    devices: Any,
    *,
    shards: int,
    precision: Literal["float32", "bfloat16"],
) -> None:
    """Shard a network by FSDP2 over a mesh of devices, the blocks first and then the rest."""
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import Shard

    def placement(p: nn.Parameter) -> Shard:
        """Cut along a dimension that the shards divide, so that nothing is padded."""
        for dim, size in enumerate(local(p).shape):
            if size and size % shards == 0:
                return Shard(dim)
        return Shard(0)

    # fully_shard takes no other memory format.
    module.to(memory_format=torch.contiguous_format)
    policy = MixedPrecisionPolicy()
    if precision == "bfloat16":
        policy = MixedPrecisionPolicy(torch.bfloat16, reduce_dtype=torch.float32)
        # Batch norms compute in float32, and give what the layers around them take.
        norm_policy = MixedPrecisionPolicy(output_dtype=torch.bfloat16)
        for norm in _batch_norms_in(module):
            if norm.affine and not any(norm is block for block in blocks):
                fully_shard(norm, mp_policy=norm_policy, mesh=devices, shard_placement_fn=placement)
    # The network itself comes last; it may be a block, and is sharded once.
    for block in dict.fromkeys([*blocks, module]):
        fully_shard(block, mp_policy=policy, mesh=devices, shard_placement_fn=placement)


def _without_layer(plan: Plan, module: nn.Module) -> list[str]:
    """Return the names of a plan, which may be patterns, that no layer of the network has."""
    layers = [name for name, _ in module.named_modules(remove_duplicate=False)]
    unknown = []
    for pattern in plan:
        if not any(fnmatchcase(layer, pattern) for layer in layers):
            unknown.append(pattern)
    return unknown


def _batch_norms_in(module: nn.Module) -> list[_BatchNorm]:
    return [part for _, part in named_parts(module) if isinstance(part, _BatchNorm)]


def _parameters_in(module: nn.Module) -> list[nn.Parameter]:
    """Return the parameters of a network, one that has several places once for each."""
    parameters = []
    for _, part in named_parts(module):
        parameters += [p for p in part._parameters.values() if p is not None]
    return parameters


def _blocks_to_gather(module: nn.Module, blocks: Blocks | None) -> list[nn.Module]:
    """Return the submodules that a user names, or those that :func:`shard` takes by default."""
    if blocks is None:
        return _untied(module, blocks_of(module))
    return list(blocks(module))


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a network, or its layers in a network of plain layers.

    Of the modules that its ``Sequential``, ``ModuleList`` and ``ModuleDict`` hold, the blocks are
    the innermost ones that hold more than a layer, such as residual blocks.
    """
    blocks: list[nn.Module] = []
    layers: list[nn.Module] = []
    _collect_blocks(module, blocks, layers)
    return blocks or layers


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _collect_blocks(module: nn.Module, blocks: list[nn.Module], layers: list[nn.Module]) -> None:
    """Add to ``blocks`` and ``layers`` what a module, or one inside of it, holds as a container."""
    for child in module.children():
        grandchildren = list(child.children())
        holds_composites = any(list(grandchild.children()) for grandchild in grandchildren)
        is_outer_container = isinstance(child, _CONTAINERS) and holds_composites
        has_weights = any(True for _ in child.parameters())
        if isinstance(module, _CONTAINERS) and has_weights and not is_outer_container:
            if grandchildren:
                blocks.append(child)
            else:
                layers.append(child)
        else:
            _collect_blocks(child, blocks, layers)


def _untied(module: nn.Module, blocks: Iterable[nn.Module]) -> list[nn.Module]:
    """Return the blocks whose weights have no place outside of them."""
    places_in_network = _places(module)
    untied = []
    for block in blocks:
        if all(places_in_network[p] == count for p, count in _places(block).items()):
            untied.append(block)
    return untied


def _places(module: nn.Module) -> Counter[int]:
    """Return how many places each weight has in a module, by its identity."""
    return Counter(id(p) for p in _parameters_in(module))
