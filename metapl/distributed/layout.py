"""How a network that was handed over is laid out over processes, found by looking at it.

plain       one process, or a part of a network that knows nothing of others
replicated  in ``DistributedDataParallel``: every rank holds the whole network
sharded     by ``fully_shard``: every rank holds a part of each weight, and gathers a block while it runs
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel

from metapl import checks
from metapl.distributed.columns import columns_of
from metapl.distributed.ranks import ALONE, Ranks
from metapl.distributed.shards import ShardedSpace, as_sharded, is_sharded, local
from metapl.errors import MetaplError
from metapl.numerics import WHOLE, Space, Tree
from metapl.parts import named_parts, named_tensors, trainable


@dataclass(frozen=True)
class Layout:
    """A network, and how it is laid out.

    Args:
        network: the network itself, without a wrapper around it.
        kind: see the module's docstring.
        ranks: those that share a batch.
        space: products of trees of its weights.
        processes: the ranks' numbers in the whole job.
        blocks: the submodules that gather their weights while they run, the network itself among them.
        sharded: the sharded parameters by name: while the root has gathered its weights, the network holds others.
    """

    network: nn.Module
    kind: Literal["plain", "replicated", "sharded"] = "plain"
    ranks: Ranks = ALONE
    space: Space = WHOLE
    processes: tuple[int, ...] = ()
    blocks: tuple[Any, ...] = ()
    sharded: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)

    @property
    def is_sharded(self) -> bool:
        return self.kind == "sharded"

    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters that the network learns, as its optimizer holds them."""
        if self.is_sharded:
            return {name: p for name, p in self.sharded.items() if p.requires_grad}
        return trainable(self.network)

    def settle(self) -> None:
        """Let every block give up its gathered weights.

        The root keeps them after a pass without a backward pass, and reads them again in the next one, whatever became
        of this rank's parts; until then its parameters are other tensors than the optimizer's.
        """
        for block in self.blocks:
            block.reshard()

    def mean_gradients(self) -> None:
        """Average ``.grad`` over the ranks; a sharded network's backward pass has done so."""
        if self.kind != "replicated":
            return
        parameters = self.parameters()
        like = {name: p.detach() for name, p in parameters.items()}
        means = self.ranks.mean_tree({n: p.grad for n, p in parameters.items() if p.grad is not None}, like)
        for name, mean in means.items():
            parameters[name].grad = mean

    def mean_statistics(self) -> None:
        """Average the running statistics of batch norms over the ranks, each of which has those of its own rows.

        Their means are right; a variance is the mean of the ranks' variances, without the spread of their means.
        """
        if self.ranks.alone:
            return
        norms = [part for _, part in named_parts(self.network) if isinstance(part, _BatchNorm) and part.training]
        held = [t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None]
        if held:
            tree = {str(i): t for i, t in enumerate(held)}
            for name, mean in self.ranks.mean_tree(tree, tree).items():
                tree[name].copy_(mean)

    def as_parameters(self, tree: Tree) -> Tree:
        """A tree of this rank's parts in the layout of the parameters: DTensors where these are."""
        if not self.is_sharded:
            return tree
        return {name: as_sharded(part, self.sharded[name]) for name, part in tree.items()}


def layouts(teacher: nn.Module | None, student: nn.Module) -> tuple[Layout | None, Layout, torch.device]:
    """The layouts of two networks and their device; refuse networks that cannot be trained together."""
    of_teacher = None if teacher is None else layout_of("teacher", teacher)
    of_student = layout_of("student", student)
    known = {"teacher": of_teacher, "student": of_student}
    device = checks.networks(
        None if of_teacher is None else of_teacher.network,
        of_student.network,
        sharded=[name for name, layout in known.items() if layout is not None and layout.is_sharded],
    )
    if of_teacher is not None and of_teacher.processes != of_student.processes:
        raise MetaplError(
            f"the teacher is {_described(of_teacher)}, the student {_described(of_student)}; expected both to share "
            "their batches with the same processes: wrap both in DistributedDataParallel, or shard both with "
            "fully_shard over meshes of the same processes, in the same order."
        )
    if of_teacher is not None and of_teacher.ranks.copies != of_student.ranks.copies:
        raise MetaplError(
            f"images are split into {of_teacher.ranks.copies} parts for the teacher and {of_student.ranks.copies} for "
            "the student; expected the same number for both, which get the same images."
        )
    return of_teacher, of_student, device


def layout_of(name: str, network: Any) -> Layout:
    """The layout of a network.

    Args:
        name: its role, for errors.
        network: as it was handed over.
    """
    if not isinstance(network, nn.Module):
        raise MetaplError(f"{name} is {checks.described(network)}; expected a torch.nn.Module.")
    if isinstance(network, DistributedDataParallel):
        return _replicated(name, network)
    if any(_is_block(part) for _, part in named_parts(network)):
        return _sharded(name, network)
    if columns_of(network) is not None:
        raise MetaplError(
            f"the {name} is split along the width of its images, and nothing averages its gradients over the processes "
            f"that hold the parts; expected it in DistributedDataParallel, or in fully_shard, over these: "
            f"shard({name}, Mesh(spatial=...), example=...) does both."
        )
    return Layout(network)


def _is_block(part: nn.Module) -> bool:
    # By name: the class itself takes seconds to import, and one process has no such block.
    return any(kind.__name__ == "FSDPModule" and kind.__module__.startswith("torch.") for kind in type(part).__mro__)


@contextmanager
def passes_only(network: nn.Module) -> Iterator[None]:
    """Passes without gradients in this block.

    In inference mode; a sharded network would then gather its weights into tensors that no later pass could fill again.
    """
    blocks: list[Any] = [part for _, part in named_parts(network) if _is_block(part)]
    with torch.no_grad() if blocks else torch.inference_mode():
        yield
    for block in blocks:
        block.reshard()


def _replicated(name: str, wrapper: DistributedDataParallel) -> Layout:
    if getattr(wrapper, "_comm_hooks", None):
        raise MetaplError(
            f"the {name} is a DistributedDataParallel with a communication hook (register_comm_hook), which would not "
            "be called: metapl averages the gradients itself. Leave the hook out."
        )
    group = wrapper.process_group
    processes = tuple(dist.get_process_group_ranks(group))
    device = next(wrapper.module.parameters()).device
    ranks = _ranks(name, wrapper.module, [group], processes, device)
    return Layout(wrapper.module, "replicated", ranks, processes=processes)


def _sharded(name: str, network: nn.Module) -> Layout:
    blocks: tuple[Any, ...] = tuple(part for _, part in named_parts(network) if _is_block(part))
    if not _is_block(network):
        raise MetaplError(
            f"fully_shard was called on parts of the {name} and not on the {name} itself, so the rest of it would "
            f"learn from this rank's share of the batch alone; expected fully_shard({name}) after its blocks."
        )
    for block in blocks:
        block.reshard()
        _check_reduction(name, block)
    for path, t in named_tensors(network):
        if isinstance(t, nn.Parameter) and t.requires_grad and not is_sharded(t):
            raise MetaplError(
                f"the {name}'s {path} is not sharded although fully_shard was called on the {name} (ignored_params), "
                "so it would learn from this rank's share of the batch alone; expected every parameter with "
                "requires_grad=True to be sharded."
            )
    parameters: dict[str, Any] = {}
    known: set[int] = set()
    for path, t in named_tensors(network):
        if isinstance(t, nn.Parameter) and is_sharded(t) and id(t) not in known:
            known.add(id(t))
            parameters[path] = t
    if not any(p.requires_grad for p in parameters.values()):
        raise MetaplError(
            f"the {name} has no parameter with requires_grad=True, so it cannot learn; expected a trainable one."
        )
    first = next(iter(parameters.values()))
    for path, p in parameters.items():
        _check_placements(name, path, p, first)
    mesh = first.device_mesh
    processes = tuple(int(i) for i in mesh.mesh.flatten().tolist())
    groups = _groups(mesh, processes)
    ranks = _ranks(name, network, groups, processes, local(first).device)
    return Layout(network, "sharded", ranks, ShardedSpace(parameters, groups), processes, blocks, parameters)


def _ranks(
    name: str, network: nn.Module, groups: Sequence[Any], processes: tuple[int, ...], device: torch.device
) -> Ranks:
    """The ranks over which a network is laid out; those that hold parts of the same images share their rows."""
    number = processes.index(dist.get_rank())
    columns = columns_of(network)
    if columns is None:
        return Ranks(groups, number, device, first=number == 0)
    members = tuple(dist.get_process_group_ranks(columns.group))
    start = number - number % len(members)
    if processes[start : start + len(members)] != members:
        raise MetaplError(
            f"the {name}'s images are split over the processes {', '.join(map(str, members))}, which do not follow "
            f"each other among those that share the batch, {', '.join(map(str, processes))}; expected neighbors."
        )
    return Ranks(groups, number // len(members), device, len(members), first=number == 0)


def _groups(mesh: Any, processes: Sequence[int]) -> list[Any]:
    """The process groups whose product is a mesh: one where it is all processes."""
    if list(processes) == list(range(dist.get_world_size())):
        return [dist.group.WORLD]
    return [mesh.get_group(i) for i in range(mesh.ndim)]


def _check_placements(name: str, path: str, p: Any, first: Any) -> None:
    if p.device_mesh != first.device_mesh:
        raise MetaplError(
            f"the {name}'s {path} is laid out over {p.device_mesh}, other parameters over {first.device_mesh}; "
            "expected one mesh for all parameters of a network."
        )
    kinds = [type(placement).__name__ for placement in p.placements]
    if kinds not in (["Shard"], ["Replicate", "Shard"]):
        raise MetaplError(
            f"the {name}'s {path} has the placements {tuple(p.placements)}; expected those of fully_shard over a mesh "
            "of one dimension, or of two: replicas, and the shards of each. Tensor parallelism (parallelize_module) is "
            "not built yet."
        )


def _check_reduction(name: str, block: Any) -> None:
    """Refuse a block whose gradients are not the mean over the ranks."""
    state = block._get_fsdp_state()
    for group in getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]:
        if group is not None and getattr(group, "gradient_divide_factor", None) is not None:
            raise MetaplError(
                f"set_gradient_divide_factor was called on the {name}, so its gradients are not the mean over the "
                "ranks, as the feedback takes them to be; leave it out, and scale the loss."
            )


def compute_dtype(block: Any) -> Any:
    """The type that a block's mixed-precision policy computes in; None: that of its weights."""
    policy = getattr(block._get_fsdp_state(), "_mp_policy", None)
    return getattr(policy, "param_dtype", None)


def _described(layout: Layout) -> str:
    if layout.kind == "plain":
        return "a plain module"
    how = "in DistributedDataParallel" if layout.kind == "replicated" else "sharded"
    return f"{how} over the processes {', '.join(map(str, layout.processes))}"


def parts_of(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """This rank's parts of parameters, sharing their memory."""
    return {name: local(p) if is_sharded(p) else p.detach() for name, p in parameters.items()}
