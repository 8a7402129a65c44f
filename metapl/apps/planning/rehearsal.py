"""A step of training rehearsed: run by the trainer itself, on tensors without values and ranks that are not there.

The networks, their optimizers and the batches are fake tensors, which have shapes and storages but no memory; the
collective operations of one rank are those of a process group that only pretends. So what a step holds, computes and
sends is counted from the code that will run, without any device.
"""

from __future__ import annotations

import copy
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    FakeTensor,
    FakeTensorMode,
    unset_fake_temporarily,
)
from torch.distributed import ProcessGroup, distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from metapl.ablation.cost import FORMULAS
from metapl.apps.networks.products import products_of
from metapl.distributed.mesh import Mesh, shard
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.local import Pass
from metapl.execution.modules import trainable
from metapl.execution.ranks import Ranks
from metapl.execution.rng import RandomState
from metapl.execution.shards import local
from metapl.feedback import keeping
from metapl.feedback.inner_step import InnerStep
from metapl.feedback.path import Path
from metapl.feedback.teacher import Teaching
from metapl.training import trainer as trainers
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer

# The teacher's labels and the student's gradient; the gradient of the labeled loss at the student's new weights; what
# follows from it for the labels; the teacher's gradient; both optimizers.
STUDENT, LABELED, FEEDBACK, TEACHER, UPDATE = PHASES = (
    *("student step", "labeled gradient", "feedback", "teacher step", "update"),
)

# What no name was given to: activations, gathered weights, and what operations need for a moment; and what is held for
# the feedback alone.
OTHER, FOR_FEEDBACK = "activations", "feedback"

# Names of the operations of DTensors, as those of process groups are called.
SENT_AS = {
    "all_reduce": "allreduce",
    "all_gather_into_tensor": "allgather_base",
    "reduce_scatter_tensor": "reduce_scatter_base",
}

Seam = tuple[Any, str, str | None, str | None]
"""A function by its class or module and its name, the phase that it is, and what it returns is for."""


class Rehearsal(NamedTuple):
    """What one rank does in a step: the most bytes held, by phase and by what they are for; the same where a step
    without feedback holds the most; operations of products and convolutions; bytes sent, by collective operation."""

    phases: dict[str, dict[str, int]]
    plain: dict[str, int]
    flops: int
    sent: dict[str, int]

    @property
    def peaks(self) -> dict[str, int]:
        """The most bytes held, by phase."""
        return {name: sum(held.values()) for name, held in self.phases.items()}


@contextmanager
def stage(mesh: Mesh) -> Iterator[None]:
    """In this block tensors have no values, and this process is rank 0 of a mesh: the others say what it says."""

    def outside(function: Callable[..., Any]) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            with unset_fake_temporarily():
                return function(*args, **kwargs)

        return called

    with ExitStack() as stack:
        if mesh.size > 1:
            if dist.is_available() and dist.is_initialized():
                raise MetaplError("a plan pretends the ranks of a mesh; this process is in a process group already.")
            from torch.testing._internal.distributed.fake_pg import FakeStore

            dist.init_process_group("fake", rank=0, world_size=mesh.size, store=FakeStore())
            stack.callback(dist.destroy_process_group)
            agreement = [
                (Ranks, "agreed", lambda _ranks, **_: nullcontext()),
                (Ranks, "equal", lambda _ranks, *_: None),
                (Ranks, "gathered", lambda ranks, value: [value] * ranks.size),
                (Ranks, "any", lambda _ranks, here: here),
            ]
            stack.enter_context(replaced(agreement))
            mesh.devices("cpu")  # while tensors have values
        # Nothing reads a value of a tensor that has none; generators, which have one, work as ever.
        waits = checks.waits
        stack.enter_context(patch.object(checks, "waits", lambda t: isinstance(t, FakeTensor) or waits(t)))
        stack.enter_context(patch.object(RandomState, "now", staticmethod(outside(RandomState.now))))
        stack.enter_context(patch.object(keeping, "free_bytes", lambda _: None))  # of another machine
        names = ("restore", "same", "branch")
        stack.enter_context(replaced((RandomState, name, outside(getattr(RandomState, name))) for name in names))
        # A tangent may be wider than the weight that it meets; only this way such a product is let through, as it is.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


@contextmanager
def replaced(attributes: Iterable[tuple[Any, str, Any]]) -> Iterator[None]:
    with ExitStack() as stack:
        for owner, name, value in attributes:
            stack.enter_context(patch.object(owner, name, value))
        yield


class Replicated(DistributedDataParallel):
    """``DistributedDataParallel`` without its start, in which ranks compare weights; its buckets are held here too."""

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module: Any = module
        self.process_group: Any = dist.group.WORLD
        self.buckets = [torch.empty_like(p) for p in module.parameters() if p.requires_grad]

    def __del__(self) -> None:
        pass


def laid_out(module: nn.Module, mesh: Mesh) -> nn.Module:
    """A network, on the meta device, over the ranks of the stage's mesh, as ``shard`` lays it out, without values."""
    with unset_fake_temporarily():  # the meta device cuts a weight into many parts much faster
        if mesh.shard > 1 or mesh.tensor > 1:
            mesh.devices("cpu")
            vars(mesh)["_meshes"]["meta"] = vars(mesh)["_meshes"]["cpu"]
            module = shard(module, mesh, plan=products_of(module, mesh.tensor) if mesh.tensor > 1 else None)
    module = module.to_empty(device="cpu")
    return Replicated(module) if mesh.size > 1 and mesh.shard == mesh.tensor == 1 else module


def rehearse(
    networks: Sequence[nn.Module],
    train: Callable[..., BilevelTrainer | LossTrainer],
    batches: Callable[[], Any],
    mesh: Mesh | None = None,
    *,
    averaged: bool = False,
) -> Rehearsal:
    """What a step of training holds, computes and sends, in one process or as rank 0 of a mesh; nothing is computed.

    Args:
        networks: on the meta device, where they stay.
        train: makes the trainer, with its optimizers, from the networks as they are laid out over the mesh.
        batches: makes what ``trainer.step`` is given, this rank's rows, by calls such as ``torch.empty``.
        averaged: with a moving average of the last network's weights and buffers.

    Raises: :class:`metapl.MetaplError` for networks with values, for a trainer of others, and for a step that reads
        values.

    >>> import metapl
    >>> with torch.device("meta"):
    ...     networks = [metapl.models.mlp([64, 1000, 10]) for _ in range(2)]
    >>> def batches():
    ...     return (torch.empty(8, 64), torch.empty(8, dtype=torch.int64)), torch.empty(32, 64)
    >>> step = rehearse(networks, metapl.BilevelTrainer, batches)
    >>> step.phases["feedback"]["weights"] == 2 * 4 * 75_010
    True
    """
    mesh = Mesh() if mesh is None else mesh
    _refuse_other("networks", networks, list | tuple, "a list of networks, in the order in which train takes them")
    _refuse_other("train", train, Callable, "a function that makes a trainer from the networks")
    _refuse_other("batches", batches, Callable, "a function that makes what trainer.step is given")
    _refuse_other("mesh", mesh, Mesh, "a metapl.distributed.Mesh, such as Mesh(shard=8), or None")
    for network in networks:
        _refuse_other("a network to rehearse", network, nn.Module, "a torch.nn.Module")
    places = {t.device.type for network in networks for t in network.parameters()} - {"meta"}
    if places:
        raise MetaplError(
            f"a network to rehearse has weights on {', '.join(sorted(places))}; expected all networks on the meta "
            'device, where they take no memory: build them within `with torch.device("meta"):`.'
        )
    networks = copy.deepcopy(list(networks))
    log = logging.getLogger("torch._subclasses.fake_tensor")  # it logs the traceback of each error
    before, log.disabled = log.disabled, True
    try:
        with stage(mesh):
            networks = [laid_out(network, mesh) for network in networks]
            with unset_fake_temporarily():
                trainer = train(*networks)
            _refuse_other("what train returns", trainer, BilevelTrainer | LossTrainer, "a trainer")
            if isinstance(trainer, BilevelTrainer):
                trainer.verification.setting = False  # there are no values to compare
            trained = [net for net in (getattr(trainer, "teacher", None), trainer.student) if net is not None]
            if not all(isinstance(local(p), FakeTensor) for net in trained for p in net.parameters()):
                raise MetaplError(
                    "train returned a trainer of other networks than train was given; expected one of those, as they "
                    "are laid out over the mesh, with optimizers over their parameters."
                )
            kept = [*networks[-1].parameters(), *networks[-1].buffers()] if averaged else []
            average, given = [torch.empty_like(local(t)) for t in kept], batches()
            _refuse_other("what batches returns", given, list | tuple, "the arguments of trainer.step, in a tuple")
            if mesh.tensor > 1:  # the first time, DTensor runs each operation on whole shapes, to learn its result's
                trainer.step(*given)
            return rehearsed(trainer, given, average)
    except DataDependentOutputException as error:
        raise MetaplError(
            f"the step reads the value of a tensor ({error}), and in a rehearsal there are none; expected networks and "
            "losses that compute with tensors alone, without .item(), float() or bool()."
        ) from error
    finally:
        log.disabled = before


def _refuse_other(name: str, given: Any, kind: Any, expected: str) -> None:
    if not isinstance(given, kind):
        raise MetaplError(f"{name} is {checks.described(given)}; expected {expected}.")


def tensors_in(tree: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(tree) if isinstance(t, Tensor)]


def rehearsed(trainer: BilevelTrainer | LossTrainer, batches: Any, average: Sequence[Tensor] = ()) -> Rehearsal:
    """A step of a trainer on a labeled and an unlabeled batch, the second: optimizers then have their states. Beside
    the networks, a moving ``average`` of weights may be held. All is of this rank, inside a :func:`stage`."""
    for optimizer in trainer.schedulable:  # they make their states by a step on gradients of zero
        own = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
        for p in own:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        for p in own:
            p.grad = None
    if isinstance(trainer, LossTrainer):
        networks = by_backward = [trainer.student]
        given: tuple[nn.Module | None, ...] = (trainer.as_given,)
        seams: list[Seam] = [
            (LossTrainer, "step", STUDENT, None),
            (LossTrainer, "clip", UPDATE, None),
            (type(trainer.optimizer), "step", UPDATE, None),
        ]
    else:
        networks = [net for net in (trainer.teacher, trainer.student) if net is not None]
        by_backward, given = networks[:-1], trainer.pair
        seams = [
            (trainers, "take_steps", STUDENT, None),
            (Pass, "gradient", None, "gradients"),
            (Path, "outer_gradient", LABELED, FOR_FEEDBACK),
            (Path, "_outer_loss_at", LABELED, None),
            (type(trainer.mode), "feedback", FEEDBACK, None),
            (InnerStep, "pullback", None, FOR_FEEDBACK),
            (InnerStep, "tangent", None, FOR_FEEDBACK),
            *((type(trainer.update), name, None, FOR_FEEDBACK) for name in ("update", "stepped", "vjp")),
            (InnerStep, "second_derivatives", None, FOR_FEEDBACK),
            (Teaching, "backward", TEACHER, None),
            (LossTrainer, "clip", UPDATE, None),
            (Path, "commit", UPDATE, None),
            *((type(optimizer), "step", UPDATE, None) for optimizer in trainer.schedulable[1:]),
        ]
    held = Held()

    def watched(method: Callable[..., Any], phase: str | None, name: str | None) -> Callable[..., Any]:
        def called(*args: Any, **kwargs: Any) -> Any:
            with nullcontext() if phase is None else held.phase(phase):
                result = method(*args, **kwargs)
            if phase == FEEDBACK:
                held.name([t for h in result[0] for t in (h.h, *h.others.values())], FOR_FEEDBACK, others=True)
            elif name is not None:
                held.name(tensors_in(result), name, others=True)
            return result

        return called

    def named(p: Tensor) -> None:
        """What the backward pass leaves in the parameters' ``.grad``."""
        if p.grad is not None:
            held.name([p.grad], "gradients", others=True)

    parameters = [p for network in by_backward for p in trainable(network).values()]
    handles = [p.register_post_accumulate_grad_hook(named) for p in parameters]
    try:
        watching = [(owner, at, watched(getattr(owner, at), *about)) for owner, at, *about in seams]
        with held, replaced(watching):
            held.name([t for net in networks for t in (*net.parameters(), *net.buffers())], "weights")
            held.name(average, "weights")
            held.name([t for net in given if isinstance(net, Replicated) for t in net.buckets], "gradients")
            held.name(tensors_in([optimizer.state for optimizer in trainer.schedulable]), "optimizer")
            held.name(tensors_in(batches), OTHER)
            trainer.step(*batches)
    finally:
        for handle in handles:
            handle.remove()
    phases = {name: held.phases[name] for name in PHASES if name in held.phases}
    plain = [dict(phases[name].plain) for name in (STUDENT, TEACHER, UPDATE) if name in phases]
    return Rehearsal(
        phases={name: dict(phase.peak) for name, phase in phases.items()},
        plain=max(plain, key=lambda held: sum(held.values())),
        flops=held.flops,
        sent=dict(held.sent),
    )


@dataclass
class Phase:
    """Bytes by what they are for where a phase holds the most, and where it does without feedback."""

    peak: Mapping[str, int] = field(default_factory=dict)
    plain: Mapping[str, int] = field(default_factory=dict)


class Held(TorchDispatchMode):
    """Counts the bytes of all storages that operations in this block make, for as long as each is alive: ``bytes`` held
    now, by name, and ``phases``; what this rank sends to others if they run in rings, ``sent`` by collective operation;
    and ``flops`` of products and convolutions.

    It works on tensors without values too. What an operation uses within itself is not seen.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # of torch
        self.bytes: Counter[str] = Counter()
        self.phases: dict[str, Phase] = {}
        self.sent: Counter[str] = Counter()
        self.flops = 0
        self._entries: dict[int, tuple[str, int]] = {}
        self._phase = Phase()

    def name(self, tensors: Iterable[Any], name: str, *, others: bool = False) -> None:
        """Say what tensors are for, whoever made them; with ``others``, those alone that have no name yet."""
        for t in tensors:
            storage = local(t).untyped_storage()
            if not others or self._entries.get(id(storage), (OTHER, 0))[0] == OTHER:
                self._count(storage, name)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """A phase of the step, which may go on later; one inside another counts for the inner one."""
        before = self._phase
        self._phase = self.phases.setdefault(name, Phase())
        self._look()
        try:
            yield
        finally:
            self._phase = before

    def __enter__(self) -> Held:
        resize = UntypedStorage.resize_

        def resized(storage: UntypedStorage, size: int) -> Any:
            result = resize(storage, size)
            self._count(storage)
            self._look()
            return result

        # Sharded networks free and allocate storages in place, past the dispatcher.
        self._resized = patch.object(UntypedStorage, "resize_", resized)
        self._resized.start()
        super().__enter__()  # type: ignore[no-untyped-call]  # of torch
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]  # of torch
        self._resized.stop()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(hasattr(kind, "redistribute") for kind in types):
            return NotImplemented  # a DTensor: what it does with its parts is seen afterwards
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device  # half of all calls
        kwargs = kwargs or {}
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_sent(func, args)
        result = func(*args, **kwargs)
        for t in (result,) if isinstance(result, Tensor) else pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        flops = FORMULAS.get(func.overloadpacket)
        if flops is not None:
            self.flops += flops(*args, **kwargs, out_val=result)
        self._look()
        return result

    def _count(self, storage: UntypedStorage, name: str | None = None) -> None:
        """The storage as it is now, under a new name if there is one."""
        key = id(storage)
        if key not in self._entries:
            weakref.finalize(storage, self._change, key, None, 0)
        entry = (name or self._entries.get(key, (OTHER, 0))[0], storage.nbytes())
        if self._entries.get(key) != entry:
            self._change(key, *entry)

    def _change(self, key: int, name: str | None, size: int) -> None:
        before, was = self._entries.pop(key, (OTHER, 0))
        if name is not None:
            self._entries[key] = (name, size)
            self.bytes[name] += size
        self.bytes[before] -= was

    def _look(self) -> None:
        phase, total = self._phase, self.bytes.total()
        if total > sum(phase.peak.values()):
            phase.peak = dict(self.bytes)
        if total - self.bytes[FOR_FEEDBACK] > sum(phase.plain.values()):
            phase.plain = {name: size for name, size in self.bytes.items() if name != FOR_FEEDBACK}

    def _count_sent(self, func: Any, args: Any) -> None:
        """In a ring over n ranks each sends (n − 1)/n of what is gathered or scattered, twice that in a reduction."""
        given = dict(zip((argument.name for argument in func._schema.arguments), args, strict=False))
        sizes = [t.numel() * t.element_size() for t in pytree.tree_leaves(args) if isinstance(t, Tensor)]
        name, group = func.overloadpacket.__name__.strip("_"), given.get("process_group", given.get("group_name"))
        if not sizes or group is None or name == "wait_tensor":  # a barrier, say
            return
        if "process_group" in given:
            group = ProcessGroup.unbox(group)
        elif isinstance(group, str):  # the operations of DTensors
            group = cast(Any, distributed_c10d)._resolve_process_group(group)
        ranks = group.size()
        whole = max(sizes) * (ranks if name == "all_gather_into_tensor" else 1)
        name = SENT_AS.get(name, name)
        self.sent[name] += (2 if name.startswith("allreduce") else 1) * whole * (ranks - 1) // ranks
