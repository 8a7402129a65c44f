"""How a network that was handed over is laid out over processes, found by looking at it.

plain       one process, or a part of a network that knows nothing of others
replicated  in ``DistributedDataParallel``: every rank holds the whole network
sharded     by ``fully_shard``: every rank holds a part of each weight, and gathers a block while it
            runs; or by ``parallelize_module``: several ranks compute each product together, with or
            without ``fully_shard``
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, Literal

import torch
from torch import distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils.weight_norm import WeightNorm
from torch.torch_version import TorchVersion

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.numerics import WHOLE, Space, Tree
from metapl.execution.ranks import ALONE, Ranks
from metapl.execution.shards import ShardedSpace, as_sharded, is_sharded, local
from metapl.execution.state import named_parts, trainable


class Capability(Enum):
    """A way to use the student that not every layout has."""

    ONE_PROCESS = "the student's weights and batch as a whole"
    FORWARD_AD = "a pass of the student in forward mode"
    CURVATURE = "second derivatives of the inner loss in the student's weights"
    THROUGH_INPUT = "a derivative through the student's input"


ONE_PROCESS, FORWARD_AD, CURVATURE, THROUGH_INPUT = Capability

# torch.distributed, whose stubs lack what DistributedDataParallel broadcasts by.
_DIST: Any = dist


@dataclass(frozen=True)
class _Kind:
    """A kind of layout in words, and what estimators and problems may require of it."""

    description: str
    capabilities: frozenset[Capability]


_PLAIN = _Kind("a plain module", frozenset(Capability))
_REPLICATED = _Kind("in DistributedDataParallel", frozenset({FORWARD_AD, CURVATURE}))
_SHARDED = _Kind("sharded", frozenset({FORWARD_AD, CURVATURE}))
_SHARDED_IN_HALF = _Kind("sharded with a mixed-precision policy", frozenset({FORWARD_AD}))
# PyTorch has no forward mode through the products of parallelize_module.
_PRODUCTS = _Kind("sharded by parallelize_module", frozenset())

# The first release in which the communication of a DTensor can be differentiated twice. Before it
# the second derivative comes out wrong, without an error of torch.
DTENSOR_TWICE = "2.12"

# PyTorch's classes around or inside a network that do not let a pass run at other weights.
_WRAPPERS = {
    "DistributedDataParallel",
    "FullyShardedDataParallel",
    "FSDPModule",
    "DataParallel",
    "ScriptModule",
}

# What switches a block's gradients to other than the mean over the ranks: an attribute, its usual
# value, and the call.
_SWITCHES = (
    ("gradient_divide_factor", None, "set_gradient_divide_factor"),
    ("reduce_grads", True, "set_requires_gradient_sync(False)"),
    ("all_reduce_grads", True, "set_requires_all_reduce(False)"),
    ("_all_reduce_hook", None, "set_all_reduce_hook"),
)

# Buffers are broadcast in pieces of at most so many bytes.
_BROADCAST_BYTES = 250 << 20


@dataclass(eq=False)
class Layout:
    """A network, and how it is laid out.

    Attributes:
        network: without a wrapper around it.
        ranks: the processes that share a batch.
        space: in which products of its trees are taken.
        processes: the ranks' numbers in the whole job.
        product_ranks: how many processes compute each product together.
        blocks: the submodules that gather their weights while they run, the network among them.
        sharded: the parameters that a block exchanges, by name.
        description: the layout in words, for errors.
        capabilities: what estimators and problems may require of it.
    """

    network: nn.Module
    kind: Literal["plain", "replicated", "sharded"] = "plain"
    ranks: Ranks = ALONE
    space: Space = WHOLE
    processes: tuple[int, ...] = ()
    product_ranks: int = 1
    blocks: tuple[Any, ...] = ()
    sharded: Mapping[str, nn.Parameter] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        self.is_sharded = self.kind == "sharded"
        kind = self._precise_kind()
        self.description = kind.description
        self.capabilities = kind.capabilities
        if not self.is_sharded or CURVATURE not in self.capabilities:
            return
        if torch.__version__ < TorchVersion(DTENSOR_TWICE):
            self.capabilities -= {CURVATURE}
            self.description += (
                f" (twice differentiable from torch {DTENSOR_TWICE} on, and this is "
                f"{torch.__version__})"
            )

    def _precise_kind(self) -> _Kind:
        if self.product_ranks > 1:
            return _PRODUCTS
        policies = {block._get_fsdp_state()._mp_policy.param_dtype for block in self.blocks}
        policies -= {None}
        if policies and any(p.dtype not in policies for p in self.network.parameters()):
            return _SHARDED_IN_HALF
        return {"plain": _PLAIN, "replicated": _REPLICATED, "sharded": _SHARDED}[self.kind]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the parameters that the network learns, by name."""
        if self.is_sharded:
            return {name: p for name, p in self.sharded.items() if p.requires_grad}
        return trainable(self.network)

    def reshard(self) -> None:
        """Have every block give up the weights that it has gathered, after a failed pass too."""
        states = [block._get_fsdp_state() for block in self.blocks]
        groups = _param_groups(self.blocks)
        parts = [*states, *groups]
        if any(part._training_state.name != "IDLE" for part in parts):
            # A pass that failed: the next one would go on with its gathered weights and its
            # gradients.
            for part in parts:
                part._training_state = type(part._training_state).IDLE
            for state in states:
                state._state_ctx.post_backward_final_callback_queued = False
                # Otherwise the next pass would not wait for copies into its weights.
                state._state_ctx.iter_forward_root = None
                state._comm_ctx.post_forward_order.clear()
            for group in groups:
                group._post_forward_indices.clear()
                group._all_gather_result = None
                for p in group.fsdp_params:
                    if hasattr(p, "_unsharded_param"):
                        p._unsharded_param.grad = None
        for block in self.blocks:
            block.reshard()

    def begin_step(self) -> None:
        """Refuse blocks whose gradients are not the mean over the ranks, and :meth:`reshard`."""
        with self.ranks.agreed():
            for group in _param_groups(self.blocks):
                for attribute, usual, call in _SWITCHES:
                    if getattr(group, attribute, usual) is not usual:
                        raise MetaplError(f"{call} was called; expected means over the ranks.")
        self.reshard()

    def agree_on_buffers(self) -> None:
        """Give the buffers the same values on all ranks.

        Running statistics get their mean (variances without the spread of the ranks' means), others
        the first rank's values, as in ``DistributedDataParallel``.
        """
        if self.ranks.alone:
            return
        norms = [
            part
            for _, part in named_parts(self.network)
            if part.training and isinstance(part, _NormBase)
        ]
        statistics: Tree = {}
        for number, norm in enumerate(norms):
            for kind, t in (("mean", norm.running_mean), ("var", norm.running_var)):
                if t is not None:
                    statistics[f"{number}.{kind}"] = t
        for name, mean in self.ranks.mean_tree(statistics, statistics).items():
            statistics[name].copy_(mean)
        of_norms: set[int] = set()
        for norm in norms:
            of_norms.update(map(id, norm._buffers.values()))
        others = [t for t in self.network.buffers() if id(t) not in of_norms]
        if others:
            first_rank = 0
            for group in self.ranks.groups:
                _DIST._broadcast_coalesced(group, others, _BROADCAST_BYTES, first_rank)

    def as_parameters(self, tree: Tree) -> Tree:
        """Return a tree of this rank's parts in the layout of the parameters.

        DTensors where these are.
        """
        return {name: as_sharded(part, self.sharded.get(name)) for name, part in tree.items()}

    def mean_gradients(self, max_norm: float | None) -> None:
        """Average ``.grad`` over the ranks, and clip its norm.

        A sharded network's backward pass has averaged already.
        """
        parameters = self.parameters()
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if self.kind == "replicated":
            weights = {name: p.detach() for name, p in parameters.items()}
            for name, mean in self.ranks.mean_tree(grads, weights).items():
                parameters[name].grad = mean
        if max_norm is None:
            return
        if not self.is_sharded:
            # Of the learned parameters alone: a frozen one may have an old gradient.
            nn.utils.clip_grad_norm_(parameters.values(), max_norm)
            return
        # The same rule, which torch has for parameters of one mesh only.
        parts = {name: local(g) for name, g in grads.items()}
        if parts:
            scale = (max_norm / (self.space.norm(parts) + 1e-6)).clamp(max=1.0)
            for part in parts.values():
                part.mul_(scale.to(part.dtype))


def wrapped(name: str, path: str, wrapper: str) -> str:
    """Return why a network with a wrapper of torch is refused, and what to give instead.

    Args:
        path: of the wrapper, inside the network.
    """
    where = f" at {path!r}" if path else ""
    expected = "it around the whole network, or none"
    if wrapper == "DataParallel":
        expected = "its .module, or DistributedDataParallel around the whole network"
    elif wrapper == "ScriptModule":
        expected = "the module that it was made from"
    return (
        f"the {name} has a {wrapper}{where}, in which no pass runs at other weights; expected "
        f"{expected}."
    )


def layouts(
    teacher: nn.Module | None, student: nn.Module, *, differentiated: bool = True
) -> tuple[Layout | None, Layout, torch.device]:
    """Return the layouts of two networks and the student's device.

    Networks that cannot be trained together are refused.

    Args:
        differentiated: whether a pass is differentiated other than once, by a plain backward pass,
            so that networks under ``torch.compile`` are refused.
    """
    if differentiated:
        refuse_compiled("student", student)
        refuse_compiled("teacher", teacher)
    of_teacher = None if teacher is None else layout_of("teacher", teacher)
    of_student = layout_of("student", student)
    if of_teacher is not None:
        refuse_untrainable("teacher", of_teacher)
    refuse_untrainable("student", of_student)
    device = next(of_student.network.parameters()).device
    if of_teacher is not None:
        of_teacher = _beside_student(of_teacher, of_student)
    return of_teacher, of_student, device


def refuse_untrainable(name: str, layout: Layout) -> None:
    """Refuse a network in which no pass runs at other weights, or that learns nothing.

    Args:
        name: its role.
    """
    for prefix, part in named_parts(layout.network):
        for wrapper in _WRAPPERS & _of_torch(type(part)):
            if not (layout.is_sharded and wrapper == "FSDPModule"):
                raise MetaplError(wrapped(name, prefix[:-1], wrapper=wrapper))
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                raise MetaplError(
                    f"the {name}'s {prefix}{hook.name} has torch.nn.utils.weight_norm, of a wrong "
                    "second derivative; expected torch.nn.utils.parametrizations.weight_norm."
                )
        for path, t in (*part._parameters.items(), *part._buffers.items()):
            if t is not None and nn.parameter.is_lazy(t):
                raise MetaplError(
                    f"the {name}'s {prefix}{path} has no shape; expected one: run it on a batch, "
                    f"{name}(x), before its optimizer is made."
                )
    if not any(p.requires_grad for p in layout.network.parameters()):
        raise MetaplError(f"the {name} has no parameter with requires_grad=True; expected one.")


def _beside_student(of_teacher: Layout, of_student: Layout) -> Layout:
    """Return the teacher's layout, fitted to the student's; refuse two that do not go together."""
    # A pass at other weights has others for the one network and not for the other.
    taught = {id(p) for p in of_teacher.parameters().values()}
    learned = {id(p) for p in of_student.parameters().values()}
    in_teacher = {id(p) for p in of_teacher.network.parameters()}
    in_student = {id(p) for p in of_student.network.parameters()}
    if taught & in_student or learned & in_teacher:
        raise MetaplError("teacher and student share weights that are trained; expected none.")
    have_same_processes = of_teacher.processes == of_student.processes
    ranks = of_student.ranks
    if have_same_processes and ranks.copies > 1 and of_teacher.ranks.copies == 1:
        # A teacher that is not cut computes the same in all processes that hold the same rows: its
        # gradient is the mean over all processes, in which each share of the rows counts as often
        # as there are copies of it.
        teacher_ranks = replace(of_teacher.ranks, rank=ranks.rank, copies=ranks.copies)
        return replace(of_teacher, ranks=teacher_ranks)
    if not have_same_processes or of_teacher.product_ranks != of_student.product_ranks:
        raise MetaplError(
            f"the teacher is {of_teacher.description}, the student {of_student.description}; "
            "expected both alike, or a whole teacher: shard(teacher, Mesh(replicate=...))."
        )
    return of_teacher


def layout_of(name: str, network: Any) -> Layout:
    """Return the layout of a network as it was handed over.

    Args:
        name: its role, for errors.
    """
    if not isinstance(network, nn.Module):
        raise checks.unexpected(f"{name} is", network, "a torch.nn.Module")
    if isinstance(network, DistributedDataParallel):
        return _replicated(network)
    for part in network.modules():
        if is_block(part) or any(map(is_sharded, part._parameters.values())):
            return _sharded(name, network)
    return Layout(network)


def _replicated(wrapper: DistributedDataParallel) -> Layout:
    group = wrapper.process_group
    network = wrapper.module
    rank = dist.get_rank(group)
    device = next(network.parameters()).device
    ranks = Ranks([group], rank=rank, device=device, first=rank == 0)
    processes = tuple(dist.get_process_group_ranks(group))
    return Layout(network, "replicated", ranks=ranks, processes=processes)


def _sharded(name: str, network: nn.Module) -> Layout:
    """Return the layout of a network by ``fully_shard``, ``parallelize_module`` or both."""
    blocks = reshard(network)
    if blocks and not is_block(network):
        raise MetaplError(f"fully_shard({name}) is missing after its parts; expected it as well.")
    parameters: dict[str, Any] = {}
    for path, p in network.named_parameters():
        if is_sharded(p) or not blocks:
            parameters[path] = p
        elif p.requires_grad:
            raise MetaplError(f"the {name}'s {path} is left out of fully_shard; expected it in.")

    # The mesh of all processes over which some parameters are laid out.
    meshes = [p.device_mesh for p in parameters.values() if is_sharded(p)]
    mesh = max(meshes, key=lambda mesh: int(mesh.size()))
    members = [int(number) for number in mesh.mesh.flatten()]
    # The processes that share the batch: fewer where several compute each product together.
    process = dist.get_rank()
    sharers = [process]
    if blocks:
        first_group = _param_groups(blocks)[0]
        sharers = [int(number) for number in first_group.mesh_info.mesh.mesh.flatten()]
    product_ranks = len(members) // len(sharers)
    if product_ranks == 1 and any(other != mesh for other in meshes):
        raise MetaplError(f"the {name} is sharded over several meshes; expected one for all.")

    groups: list[Any]
    if members == list(range(dist.get_world_size())):
        # One group where it is all processes.
        groups = [dist.group.WORLD]
    else:
        groups = [mesh.get_group(dimension) for dimension in range(mesh.ndim)]
    device = local(next(network.parameters())).device
    ranks = Ranks(
        groups,
        rank=sharers.index(process),
        device=device,
        copies=product_ranks,
        first=members.index(process) == 0,
    )
    return Layout(
        network,
        "sharded",
        ranks=ranks,
        space=ShardedSpace(parameters, groups, processes=len(members)),
        processes=tuple(members),
        product_ranks=product_ranks,
        blocks=blocks,
        sharded=parameters,
    )


def refuse_compiled(name: str, network: nn.Module | None) -> None:
    """Refuse a network that is under ``torch.compile``, or has a part that is.

    A compiled backward pass runs once, and cannot be differentiated. Some modes would get along
    with that, until a second step, another batch or a rule of the feedback's size asks for one pass
    more.

    Args:
        name: its role, for errors.
    """
    if not isinstance(network, nn.Module):
        return
    for prefix, part in named_parts(network):
        # torch.compile(part) returns a wrapper, and part.compile() leaves an attribute.
        is_wrapper = "OptimizedModule" in _of_torch(type(part))
        if is_wrapper or part._compiled_call_impl is not None:
            where = f" in its part {prefix[:-1]!r}" if prefix else ""
            raise MetaplError(
                f"the {name} is under torch.compile{where}, and cannot be differentiated twice; "
                "expected the plain module (compile=True of the trainer compiles the step)."
            )


def is_block(part: nn.Module) -> bool:
    """Return whether ``fully_shard`` gathers the weights of a module while it runs."""
    return "FSDPModule" in _of_torch(type(part))


def _of_torch(kind: type) -> frozenset[str]:
    """Return the names of a class and its bases that are PyTorch's.

    Names, since the classes that spread weights take seconds to import. Of a plain layer none.
    """
    if kind.__module__.startswith("torch.nn.modules."):
        return frozenset()
    return frozenset(base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch."))


def reshard(network: nn.Module) -> tuple[Any, ...]:
    """Have every block of a network give up its gathered weights, and return the blocks."""
    blocks: tuple[Any, ...] = tuple(part for _, part in named_parts(network) if is_block(part))
    for block in blocks:
        block.reshard()
    return blocks


def _param_groups(blocks: Sequence[Any]) -> list[Any]:
    """Return the groups of weights that blocks gather.

    A block has none where all its weights belong to blocks inside it.
    """
    groups: list[Any] = []
    for block in blocks:
        state = block._get_fsdp_state()
        of_block = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        groups += [group for group in of_block if group is not None]
    return groups
