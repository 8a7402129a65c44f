"""How a network that was handed over is laid out over processes, found by looking at it.

plain       one process, or a part of a network that knows nothing of others
replicated  in ``DistributedDataParallel``: every rank holds the whole network
sharded     by ``fully_shard``: every rank holds a part of each weight, and gathers a block while it runs; or by
            ``parallelize_module``: several ranks compute each product together, with or without ``fully_shard``
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


_DIST: Any = dist  # whose stubs lack what DistributedDataParallel broadcasts by
# The kinds of layouts in words, and what estimators and problems may require of them.
_KINDS: dict[str, tuple[str, frozenset[Capability]]] = {
    "plain": ("a plain module", frozenset(Capability)),
    "replicated": ("in DistributedDataParallel", frozenset({FORWARD_AD, CURVATURE})),
    "sharded": ("sharded", frozenset({FORWARD_AD, CURVATURE})),
    "narrow": ("sharded with a mixed-precision policy", frozenset({FORWARD_AD})),
    "products": (
        "sharded by parallelize_module",
        frozenset(),
    ),  # PyTorch has no forward mode through these
}
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


@dataclass(eq=False)
class Layout:
    """A network, and how it is laid out."""

    network: nn.Module  # without a wrapper around it
    kind: Literal["plain", "replicated", "sharded"] = "plain"
    ranks: Ranks = ALONE
    space: Space = WHOLE
    processes: tuple[int, ...] = ()  # the ranks' numbers in the whole job
    product_ranks: int = 1  # how many processes compute each product together
    blocks: tuple[
        Any, ...
    ] = ()  # the submodules that gather their weights while they run, itself among them
    sharded: Mapping[str, nn.Parameter] = field(
        default_factory=dict, repr=False
    )  # which a block exchanges

    def __post_init__(self) -> None:
        policies = {block._get_fsdp_state()._mp_policy.param_dtype for block in self.blocks} - {
            None
        }
        narrow = (
            any(p.dtype not in policies for p in self.network.parameters()) if policies else False
        )
        self.description, self.capabilities = _KINDS[
            "products" if self.product_ranks > 1 else "narrow" if narrow else self.kind
        ]
        self.is_sharded = self.kind == "sharded"
        if (
            self.is_sharded
            and CURVATURE in self.capabilities
            and torch.__version__ < TorchVersion(DTENSOR_TWICE)
        ):
            self.capabilities -= {CURVATURE}
            self.description += (
                f" (twice differentiable from torch {DTENSOR_TWICE} on, and this is "
                f"{torch.__version__})"
            )

    def parameters(self) -> dict[str, nn.Parameter]:
        if self.is_sharded:
            return {name: p for name, p in self.sharded.items() if p.requires_grad}
        return trainable(self.network)

    def reshard(self) -> None:
        states, groups = (
            [block._get_fsdp_state() for block in self.blocks],
            _param_groups(self.blocks),
        )
        if any(part._training_state.name != "IDLE" for part in (*states, *groups)):
            # A pass that failed: the next one would go on with its gathered weights and its
            # gradients.
            for part in (*states, *groups):
                part._training_state = type(part._training_state).IDLE
            for state in states:
                state._state_ctx.post_backward_final_callback_queued = False
                state._state_ctx.iter_forward_root = (
                    None  # or the next pass would not wait for copies into its weights
                )
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
        """:meth:`reshard`, and refuse blocks whose gradients are not the mean over the ranks."""
        with self.ranks.agreed():
            for group in _param_groups(self.blocks):
                for attribute, usual, call in _SWITCHES:
                    if getattr(group, attribute, usual) is not usual:
                        raise MetaplError(
                            f"{call} was called, so gradients would not be means over the ranks."
                        )
        self.reshard()

    def agree_on_buffers(self) -> None:
        """Give the buffers the same values on all ranks: the mean of running statistics (of
        variances without the spread of the ranks' means), others the first rank's, as in
        ``DistributedDataParallel``."""
        if self.ranks.alone:
            return
        norms = [
            part
            for _, part in named_parts(self.network)
            if part.training and isinstance(part, _NormBase)
        ]
        running = [
            t for norm in norms for t in (norm.running_mean, norm.running_var) if t is not None
        ]
        tree = {str(i): t for i, t in enumerate(running)}
        for name, mean in self.ranks.mean_tree(tree, tree).items():
            tree[name].copy_(mean)
        known = {id(t) for norm in norms for t in norm._buffers.values()}
        others = [t for t in self.network.buffers() if id(t) not in known]
        for group in self.ranks.groups if others else ():
            _DIST._broadcast_coalesced(group, others, 250 << 20, 0)  # in pieces of so many bytes

    def as_parameters(self, tree: Tree) -> Tree:
        """A tree of this rank's parts in the layout of the parameters: DTensors where these are."""
        return {name: as_sharded(part, self.sharded.get(name)) for name, part in tree.items()}

    def mean_gradients(self, most: float | None) -> None:
        """Average ``.grad`` over the ranks, which a sharded network's backward pass has done, and clip its norm."""
        parameters = self.parameters()
        grads = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        if self.kind == "replicated":
            for name, mean in self.ranks.mean_tree(
                grads, {n: p.detach() for n, p in parameters.items()}
            ).items():
                parameters[name].grad = mean
        if most is None:
            return
        if not self.is_sharded:
            nn.utils.clip_grad_norm_(
                parameters.values(), most
            )  # a frozen one may have an old gradient
        elif parts := {
            name: local(g) for name, g in grads.items()
        }:  # the same, which torch has for one mesh only
            scale = (most / (self.space.norm(parts) + 1e-6)).clamp(max=1.0)
            for part in parts.values():
                part.mul_(scale.to(part.dtype))


def wrapped(name: str, path: str, wrapper: str) -> str:
    """Return why a network with a wrapper of torch at ``path`` is refused, and what to give instead."""
    where = f" at {path!r}" if path else ""
    given = f"the {name} has a {wrapper}{where}, in which no pass runs at other weights"
    if wrapper == "DataParallel":
        return (
            f"{given}; expected the plain module inside, .module, or DistributedDataParallel "
            "around the whole network."
        )
    if wrapper == "ScriptModule":
        return (
            f"{given}; expected the module that it was made from, before torch.jit.script or "
            "torch.jit.trace."
        )
    return f"{given}; expected it around the whole network, or none."


def layouts(
    teacher: nn.Module | None, student: nn.Module, *, differentiated: bool = True
) -> tuple[Layout | None, Layout, torch.device]:
    """Return the layouts of two networks and the student's device; refuse networks that cannot be trained together.

    Args:
        differentiated: whether a pass is differentiated other than once, by a plain backward pass,
            so that networks under ``torch.compile`` are refused.
    """
    if differentiated:
        refuse_compiled("student", student)
        refuse_compiled("teacher", teacher)
    of_teacher = None if teacher is None else layout_of("teacher", teacher)
    of_student = layout_of("student", student)
    known = (
        {"student": of_student}
        if of_teacher is None
        else {"teacher": of_teacher, "student": of_student}
    )
    for name, layout in known.items():
        for prefix, part in named_parts(layout.network):
            for wrapper in _WRAPPERS & _of_torch(type(part)):
                if not (layout.is_sharded and wrapper == "FSDPModule"):
                    raise MetaplError(wrapped(name, prefix[:-1], wrapper))
        for path, t in (*layout.network.named_parameters(), *layout.network.named_buffers()):
            if nn.parameter.is_lazy(t):
                raise MetaplError(
                    f"the {name}'s {path} has no shape before a first batch; expected one that "
                    f"has: run it once on a batch, {name}(x), before its optimizer is made."
                )
            if t.is_inference():
                given = f"the {name}'s {path} is of inference_mode()"
                raise MetaplError(f"{given}; expected one that a pass can be differentiated in.")
        if not trainable(layout.network):
            raise MetaplError(
                f"the {name} has no parameter with requires_grad=True; expected one that can learn."
            )
    device = next(of_student.network.parameters()).device
    if of_teacher is None:
        return None, of_student, device
    # A pass at other weights has others for the one network and not for the other.
    taught, learned = (
        {*map(id, layout.parameters().values())} for layout in (of_teacher, of_student)
    )
    if taught & {*map(id, of_student.network.parameters())} or learned & {
        *map(id, of_teacher.network.parameters())
    }:
        raise MetaplError(
            "teacher and student share weights that are trained; expected two, built separately."
        )
    together, own = of_teacher.processes == of_student.processes, of_student.ranks
    if together and own.copies > 1 and of_teacher.ranks.copies == 1:
        # A teacher that is not cut computes the same in all processes that hold the same rows: its
        # gradient is the mean over all processes, in which each share of the rows counts as often
        # as there are copies of it.
        of_teacher = replace(
            of_teacher, ranks=replace(of_teacher.ranks, rank=own.rank, copies=own.copies)
        )
    elif not together or of_teacher.product_ranks != of_student.product_ranks:
        given = f"the teacher is {of_teacher.description}, the student {of_student.description}"
        raise MetaplError(
            f"{given}; expected both alike, or a teacher that is not cut: shard(teacher, "
            "Mesh(replicate=...))."
        )
    return of_teacher, of_student, device


def layout_of(name: str, network: Any) -> Layout:
    """The layout of a network as it was handed over; ``name`` is its role."""
    if not isinstance(network, nn.Module):
        raise MetaplError(f"{name} is {checks.described(network)}; expected a torch.nn.Module.")
    if isinstance(network, DistributedDataParallel):
        group, network = network.process_group, network.module
        rank, processes = dist.get_rank(group), tuple(dist.get_process_group_ranks(group))
        ranks = Ranks([group], rank, next(network.parameters()).device, first=rank == 0)
        return Layout(network, "replicated", ranks, processes=processes)
    if not any(
        is_block(part) or any(map(is_sharded, part._parameters.values()))
        for part in network.modules()
    ):
        return Layout(network)
    blocks = reshard(network)
    if blocks and not is_block(network):
        raise MetaplError(
            f"fully_shard was called on parts of the {name} alone; expected fully_shard({name}) "
            "as well."
        )
    parameters: dict[str, Any] = {
        path: p for path, p in network.named_parameters() if is_sharded(p) or not blocks
    }
    for path, p in network.named_parameters():
        if p.requires_grad and path not in parameters:
            given = f"the {name}'s {path} is left out of fully_shard (ignored_params)"
            raise MetaplError(
                f"{given}; expected every parameter with requires_grad=True to be sharded."
            )
    # The mesh of all processes, over which some parameters are laid out, and that of those that
    # share the batch: fewer where several processes compute each product together.
    meshes = [p.device_mesh for p in parameters.values() if is_sharded(p)]
    mesh, rank = max(meshes, key=lambda mesh: int(mesh.size())), dist.get_rank()
    members = [*map(int, mesh.mesh.flatten())]
    own = [*map(int, _param_groups(blocks)[0].mesh_info.mesh.mesh.flatten())] if blocks else [rank]
    together = len(members) // len(own)
    if together == 1 and any(other != mesh for other in meshes):
        raise MetaplError(
            f"the {name}'s weights are sharded over several meshes; expected one for all."
        )
    # One group where it is all processes.
    everywhere = members == list(range(dist.get_world_size()))
    groups: list[Any] = (
        [dist.group.WORLD] if everywhere else [mesh.get_group(i) for i in range(mesh.ndim)]
    )
    device = local(next(network.parameters())).device
    ranks = Ranks(groups, own.index(rank), device, together, first=members.index(rank) == 0)
    space = ShardedSpace(parameters, groups, len(members))
    return Layout(network, "sharded", ranks, space, tuple(members), together, blocks, parameters)


def refuse_compiled(name: str, network: nn.Module | None) -> None:
    """Refuse a network that is under ``torch.compile``, or has a part that is; ``name`` is its role.

    A compiled backward pass runs once, and cannot be differentiated. Some modes would get along
    with that, until a second step, another batch or a rule of the feedback's size asks for one pass
    more.
    """
    if not isinstance(network, nn.Module):
        return
    for prefix, part in named_parts(network):
        # The first is what torch.compile(part) returns, the second what part.compile() leaves.
        if "OptimizedModule" in _of_torch(type(part)) or part._compiled_call_impl is not None:
            whole = "" if not prefix else f" in its part {prefix[:-1]!r}"
            raise MetaplError(
                f"the {name} is under torch.compile{whole}, whose backward pass cannot be "
                "differentiated; expected the plain module, and compile=True, which compiles the "
                "whole step."
            )


def is_block(part: nn.Module) -> bool:
    """Whether ``fully_shard`` gathers the weights of a module while it runs."""
    return "FSDPModule" in _of_torch(type(part))


def _of_torch(kind: type) -> frozenset[str]:
    """The names of a class and its bases that are PyTorch's.

    The classes that spread weights take seconds to import.
    """
    return frozenset(base.__name__ for base in kind.__mro__ if base.__module__.startswith("torch."))


def reshard(network: nn.Module) -> tuple[Any, ...]:
    blocks: tuple[Any, ...] = tuple(part for _, part in named_parts(network) if is_block(part))
    for block in blocks:
        block.reshard()
    return blocks


def _param_groups(blocks: Sequence[Any]) -> list[Any]:
    """What blocks gather; nothing where all weights of a block belong to blocks inside it."""
    states = [block._get_fsdp_state() for block in blocks]
    groups = [
        getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states
    ]
    return [group for own in groups for group in own if group is not None]
