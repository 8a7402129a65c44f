r"""What a training takes on many ranks, without any: a rank's memory, operations, wire, hours.

    python examples/plan.py                        # two EfficientNet-L2 on 2,048 ranks
    python examples/plan.py imagenet-b7-reduced    # another row of protocols.py, with its mesh
    python examples/plan.py --network resnet50 --size 224 --replicate 1 --shard 8 \
        --labeled 64 --unlabeled 448

``rehearse`` takes one step of any trainer, by the code that trains: networks, optimizers and
batches are tensors without values (PyTorch's fake tensors), the other ranks are a process group
that only pretends, and what a step holds is counted while its storages live. Not counted: what
kernels, NCCL and CUDA take for themselves, memory that lies in pieces, batches that are read ahead,
evaluation, torch.compile.
"""

import argparse
import copy
import dataclasses
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple, get_args
from unittest.mock import patch

import torch
from torch import Tensor, UntypedStorage, nn
from torch import distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed import ProcessGroup, distributed_c10d
from torch.nn.parallel import DistributedDataParallel
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

import metapl
from metapl.ablation.cost import FORMULAS
from metapl.core import keeping, step, teacher
from metapl.core.path import Path
from metapl.core.step import InnerStep
from metapl.core.teacher import Teaching
from metapl.distributed import Mesh, shard
from metapl.engines.eager import EagerDescent, EagerEngine
from metapl.execution import checks
from metapl.execution.batch_norm import share_batch_norms
from metapl.execution.layout import Layout
from metapl.execution.ranks import Ranks
from metapl.execution.shards import local
from metapl.execution.state import RandomState
from metapl.feedback import base
from metapl.guards import door
from metapl.models import LabelAdjuster
from metapl.training.loss_trainer import LossTrainer

# The teacher's labels and the student's gradient; the gradient of the labeled loss at the student's
# new weights; what follows from it for the labels; the teacher's gradient; both optimizers.
PHASES = ("student step", "labeled gradient", "feedback", "teacher step", "update")
# What tensors are for. Activations are everything that no name was given to: gathered weights and
# batches too.
NAMES = ("weights", "gradients", "optimizer", "for feedback", "activations")
# ImageNet's number of classes.
CLASSES = {"imagenet": 1_000, "cifar10": 10, "svhn": 10}
# Operations, by operator.
COUNTED = FlopCounterMode(display=False, custom_mapping=FORMULAS).flop_registry


class Rehearsal(NamedTuple):
    """Of one rank: the most bytes held, by phase and by use.

    Operations of products and convolutions; bytes sent.
    """

    phases: dict[str, dict[str, int]]
    flops: int
    sent: int


def rehearse(
    networks: Sequence[nn.Module],
    train: Callable[..., metapl.BilevelTrainer | LossTrainer],
    batches: Callable[[], tuple],
    mesh: Mesh | None = None,
    averaged: bool = False,
    batch_norm_ranks: int = 1,
) -> Rehearsal:
    """Return what a step of training holds, computes and sends as rank 0 of a mesh.

    Nothing is computed.

    Args:
        networks: on the meta device, where they stay.
        train: makes the trainer, with its optimizers, from the networks as they are laid out over
            the mesh.
        batches: makes what ``trainer.step`` is given, this rank's rows, by calls such as
            ``torch.empty``.
        averaged: with a moving average of the last network's weights.
        batch_norm_ranks: how many ranks share the statistics of batch norms, as for
            :func:`metapl.distributed.shard`.
    """
    mesh = mesh or Mesh()
    networks = copy.deepcopy(list(networks))
    memory = Memory()
    with stage(mesh):
        for number, network in enumerate(networks):
            # The meta device cuts a weight into many parts much faster.
            with unset_fake_temporarily():
                if mesh.shard > 1:
                    vars(mesh)["_meshes"]["meta"] = vars(mesh)["_meshes"]["cpu"]
                    network = shard(network, mesh, batch_norm_ranks=batch_norm_ranks)
                elif batch_norm_ranks > 1:
                    share_batch_norms(network, mesh.batch_norm_group(batch_norm_ranks))
            network = network.to_empty(device="cpu")
            networks[number] = Replicated(network) if mesh.size > mesh.shard == 1 else network
        with unset_fake_temporarily():
            trainer = train(*networks)
        # An optimizer makes its state by a step, which is taken on gradients of zero.
        for optimizer in trainer.schedulable:
            for group in optimizer.param_groups:
                for p in group["params"]:
                    p.grad = torch.zeros_like(p)
            optimizer.step()
            optimizer.zero_grad()
        averaged_tensors = [*networks[-1].parameters(), *networks[-1].buffers()] if averaged else []
        average = [torch.empty_like(local(t)) for t in averaged_tensors]
        arguments = batches()
        optimizers = trainer.schedulable
        # Functions by their class or module and name, the phase that each is, and what it returns
        # is for.
        seams = [
            (type(optimizer), "step", "update", None)
            for optimizer in (optimizers[1:] or optimizers)
        ]
        seams.append((Layout, "mean_gradients", "update", None))
        if isinstance(trainer, LossTrainer):
            trained = [trainer.student]
            by_backward = trained
            seams.append((LossTrainer, "step", "student step", None))
        else:
            # There are no values to compare.
            trainer.verification.setting = False
            trained = [
                network for network in (trainer.teacher, trainer.student) if network is not None
            ]
            by_backward = trained[:-1]
            update = type(trainer.update)
            seams += [
                (Path, "take_steps", "student step", None),
                (EagerEngine, "descend", None, "gradients"),
                (Path, "outer_gradient", "labeled gradient", "for feedback"),
                (Path, "commit", "update", None),
                (Path, "_outer_losses_at", "labeled gradient", None),
                (Teaching, "backward", "teacher step", None),
                (type(trainer.mode), "feedback", "feedback", "for feedback"),
                (InnerStep, "pullback", None, "for feedback"),
                (EagerDescent, "tangent", None, "for feedback"),
                (InnerStep, "second_derivatives", None, "for feedback"),
                (update, "update", None, "for feedback"),
                (update, "stepped", None, "for feedback"),
                (update, "vjp", None, "for feedback"),
            ]

        def watched(method: Callable, phase: str | None, name: str | None) -> Callable:
            def called(*args, **kwargs):
                # One inside another counts for the inner one.
                outer_phase = memory.phase
                memory.phase = phase or memory.phase
                memory.look()
                result = method(*args, **kwargs)
                memory.phase = outer_phase
                tensors = result
                if phase == "feedback":
                    tensors = [(h.h, h.others) for h in result[0]]
                elif name == "gradients":
                    tensors = result.gradient
                if name is not None:
                    memory.name(pytree.tree_leaves(tensors), name, only_unnamed=True)
                return result

            return called

        def name_gradient(p: Tensor) -> None:
            memory.name([p.grad], "gradients", only_unnamed=True)

        for network in by_backward:
            for p in network.parameters():
                if p.requires_grad:
                    p.register_post_accumulate_grad_hook(name_gradient)
        with memory, ExitStack() as watching:
            for owner, attribute, phase, name in seams:
                method = watched(getattr(owner, attribute), phase, name)
                watching.enter_context(patch.object(owner, attribute, method))
            memory.name(average, "weights")
            for network in trained:
                memory.name([*network.parameters(), *network.buffers()], "weights")
            for network in networks:
                if isinstance(network, Replicated):
                    memory.name(network.buckets, "gradients")
            states = [optimizer.state for optimizer in optimizers]
            memory.name(pytree.tree_leaves(states), "optimizer")
            memory.name(pytree.tree_leaves(arguments), "activations")
            # This step is the second of the optimizers, so that their states are there.
            trainer.step(*arguments)
    phases = {name: memory.peaks[name] for name in PHASES if name in memory.peaks}
    return Rehearsal(phases, memory.flops, memory.sent)


@contextmanager
def stage(mesh: Mesh):
    """Make this process rank 0 of a mesh; in this block tensors have no values.

    The other ranks say what it says.
    """

    waits = checks.waits
    # Used as a decorator, it runs a function outside of the block's mode.
    outside = unset_fake_temporarily()
    replacements = [
        # Nothing reads a value of a tensor that has none; generators, which have one, work as ever.
        (checks, "waits", lambda t: isinstance(t, FakeTensor) or waits(t)),
        (RandomState, "now", staticmethod(outside(RandomState.now))),
        *(
            (RandomState, name, outside(getattr(RandomState, name)))
            for name in ("restore", "branch", "equals")
        ),
        # Derivatives without values cannot be compared, or be found to be infinite.
        (step, "slopes_differ", lambda *_: False),
        (base, "refuse_not_finite_feedback", lambda *_: None),
        # Memory without values has no address, by which two parameters would share it.
        (door, "refuse_shared_memory", lambda *_: None),
        # The losses of micro-batches are compared with those of their rows together once.
        (teacher, "refuse_other_than_means", lambda *_, **__: None),
        # This machine's memory says nothing of the one that is planned for.
        (keeping, "free_bytes", lambda _: None),
        (Ranks, "agreed", lambda _ranks, **_: nullcontext()),
        (Ranks, "equal", lambda _ranks, *_: None),
        (Ranks, "gathered", lambda ranks, value: [value] * ranks.size),
        (Ranks, "any", lambda _ranks, is_so: is_so),
    ]
    with ExitStack() as stack:
        if mesh.size > 1:
            dist.init_process_group("fake", rank=0, world_size=mesh.size, store=FakeStore())
            stack.callback(dist.destroy_process_group)
            # The mesh is made here, while tensors have values.
            mesh.devices("cpu")
        for owner, attribute, replacement in replacements:
            stack.enter_context(patch.object(owner, attribute, replacement))
        # A tangent may be wider than the weight that it meets; only this way such a product is let
        # through, as it is.
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield


class Replicated(DistributedDataParallel):
    """``DistributedDataParallel`` without its start, in which ranks compare weights.

    Its buckets are held here too.
    """

    def __init__(self, module: nn.Module) -> None:
        nn.Module.__init__(self)
        self.module = module
        self.process_group = dist.group.WORLD
        self.buckets = [torch.empty_like(p) for p in module.parameters() if p.requires_grad]

    def __del__(self) -> None:
        pass


class Memory(TorchDispatchMode):
    """A count of the bytes of all storages that operations in this block make while each lives.

    They count with values or without: ``bytes`` now, by name, and ``peaks`` by phase; bytes
    ``sent`` in rings; ``flops`` of products and convolutions.
    """

    def __init__(self) -> None:
        super().__init__()
        self.bytes = Counter()
        self.sent = 0
        self.flops = 0
        self.phase = ""
        self.peaks: dict[str, dict[str, int]] = {}
        # Of storages: what they are for, and their size.
        self._entries: dict[int, tuple[str, int]] = {}

    def name(self, tensors: Iterable, name: str, *, only_unnamed: bool = False) -> None:
        """Say what tensors are for, whoever made them.

        With ``only_unnamed``, those alone that have no name yet.
        """
        for t in tensors:
            if not isinstance(t, Tensor):
                continue
            storage = local(t).untyped_storage()
            name_so_far, _ = self._entries.get(id(storage), ("activations", 0))
            if not only_unnamed or name_so_far == "activations":
                self._count(storage, name)

    def __enter__(self) -> "Memory":
        resize = UntypedStorage.resize_

        def resized(storage: UntypedStorage, size: int):
            result = resize(storage, size)
            self._count(storage)
            self.look()
            return result

        # Sharded networks free and allocate storages in place, past the dispatcher.
        self._resized = patch.object(UntypedStorage, "resize_", resized)
        self._resized.start()
        return super().__enter__()

    def __exit__(self, *error) -> None:
        super().__exit__(*error)
        self._resized.stop()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(hasattr(kind, "redistribute") for kind in types):
            # Of a DTensor, what it does with its parts is seen afterwards.
            return NotImplemented
        # Half of all calls are of this kind, and need no count.
        if func is torch.ops.prim.device.default and isinstance(args[0], FakeTensor):
            return args[0].fake_device
        if func is torch.ops.aten.equal.default:
            # Tensors without values have moved nowhere.
            return True
        if func.namespace in ("c10d", "_c10d_functional"):
            self._count_sent(func, args)
        result = func(*args, **(kwargs or {}))
        for t in pytree.tree_leaves(result):
            if isinstance(t, Tensor):
                self._count(t.untyped_storage())
        if func.overloadpacket in COUNTED:
            self.flops += COUNTED[func.overloadpacket](*args, **(kwargs or {}), out_val=result)
        self.look()
        return result

    def _count(self, storage: UntypedStorage, name: str | None = None) -> None:
        """Count the storage as it is now, under a new name if there is one, until it is freed."""
        if id(storage) not in self._entries:
            weakref.finalize(storage, self._free, id(storage))
        old_name, old_size = self._entries.get(id(storage), ("activations", 0))
        new_name = name or old_name
        self._entries[id(storage)] = (new_name, storage.nbytes())
        self.bytes[old_name] -= old_size
        self.bytes[new_name] += storage.nbytes()

    def _free(self, key: int) -> None:
        name, size = self._entries.pop(key)
        self.bytes[name] -= size

    def look(self) -> None:
        if self.bytes.total() > sum(self.peaks.get(self.phase, {}).values()):
            self.peaks[self.phase] = dict(self.bytes)

    def _count_sent(self, func, args) -> None:
        """Count what a rank sends in a ring over n ranks.

        It is (n − 1)/n of what is gathered or scattered, twice that in a reduction.
        """
        names = [argument.name for argument in func._schema.arguments]
        arguments = dict(zip(names, args, strict=False))
        sizes = [
            t.numel() * t.element_size() for t in pytree.tree_leaves(args) if isinstance(t, Tensor)
        ]
        name = func.overloadpacket.__name__
        group = arguments.get("process_group", arguments.get("group_name"))
        # A barrier, for example, sends no tensor.
        if not sizes or group is None or name == "wait_tensor":
            return
        # Operations of DTensors name their group.
        if isinstance(group, str):
            group = distributed_c10d._resolve_process_group(group)
        else:
            group = ProcessGroup.unbox(group)
        ranks = group.size()
        size = max(sizes)
        if name == "all_gather_into_tensor":
            size *= ranks
        rounds = 2 if name.replace("_", "").startswith("allreduce") else 1
        self.sent += rounds * size * (ranks - 1) // ranks


def main() -> None:
    """Plan a row of protocols.py, by default the largest experiment of Meta Pseudo Labels.

    It is EfficientNet-L2 twice, 512 pixels, 2,048 labeled and 16,384 unlabeled pictures, a million
    steps.
    """
    # The import stands here, for a user of rehearse alone need not have the protocols beside it.
    from protocols import ROWS, Feedback, build_network, trainer_of

    names = [name for name, row in ROWS.items() if row.values["data"] in CLASSES]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("row", nargs="?", choices=names, default="imagenet-l2")
    settings = {
        "network": str,
        "size": int,
        "labeled": int,
        "unlabeled": int,
        "steps": int,
        "replicate": int,
        "shard": int,
        "batch-norm-ranks": int,
    }
    for name, kind in settings.items():
        parser.add_argument(f"--{name}", type=kind, help="instead of the row's")
    parser.add_argument("--feedback", choices=get_args(Feedback), help="instead of the row's")
    parser.add_argument("--flops-per-second", type=float, default=2e14, help="of a rank")
    args = parser.parse_args()
    row = ROWS[args.row].settings()
    mesh = Mesh(replicate=args.replicate or row.mesh.replicate, shard=args.shard or row.mesh.shard)
    c = dataclasses.replace(
        row,
        mesh=mesh,
        network=args.network or row.network,
        image_size=args.size or row.image_size,
        labeled_batch=args.labeled or row.labeled_batch,
        unlabeled_batch=args.unlabeled or row.unlabeled_batch,
        steps=args.steps or row.steps,
        feedback=args.feedback or row.feedback,
        precision="bfloat16",
        device="cpu",
        channels_last=False,
    )
    if not c.network.startswith("efficientnet"):
        c = dataclasses.replace(c, stochastic_depth=0.0)
    for name, size in (("labeled", c.labeled_batch), ("unlabeled", c.unlabeled_batch)):
        if size % mesh.shares:
            parser.error(f"{size:,} {name} pictures do not fall into {mesh.shares:,} equal shares")
    labeled = c.labeled_batch // mesh.shares
    unlabeled = c.unlabeled_batch // mesh.shares
    batch_norm_ranks = args.batch_norm_ranks or min(
        row.batch_norm_ranks or mesh.shares, mesh.shares
    )
    if mesh.shares % batch_norm_ranks:
        parser.error(
            f"--batch-norm-ranks {batch_norm_ranks}: expected a divisor of {mesh.shares:,} shares"
        )
    is_reduced = c.method == "reduced_mpl"
    classes = CLASSES[c.data]
    with torch.device("meta"):
        on_meta = dataclasses.replace(c, device="meta")
        student = build_network(on_meta, classes, c.dropout, c.network)
        if is_reduced:
            teacher: nn.Module = LabelAdjuster(classes)
        else:
            teacher = build_network(on_meta, classes, c.teacher_dropout, c.network)

    def batches() -> tuple:
        views = [
            torch.empty(rows, 3, c.image_size, c.image_size)
            for rows in (labeled, unlabeled, unlabeled)
        ]
        targets = torch.empty(labeled, dtype=torch.int64)
        if is_reduced:
            stored = [torch.empty(rows, classes) for rows in (labeled, unlabeled)]
            return (views[0], targets, stored[0]), (views[1], stored[1])
        return (views[0], targets), (views[1], views[2])

    step = rehearse(
        [teacher, student],
        partial(trainer_of, c),
        batches,
        mesh,
        averaged=True,
        batch_norm_ranks=batch_norm_ranks,
    )
    weights = sum(p.numel() for p in student.parameters())
    hours = c.steps * step.flops / args.flops_per_second / 3600
    twice = "on stored labels" if is_reduced else "twice"
    print(
        f"{c.network} {twice}, {weights:,} weights, feedback {c.feedback}, on {mesh.size:,} ranks"
    )
    print(
        f"{labeled:,} labeled and {unlabeled:,} unlabeled pictures of {c.image_size} pixels for a "
        "rank"
    )
    seen = (
        f"{labeled * batch_norm_ranks:,} labeled and {unlabeled * batch_norm_ranks:,} unlabeled "
        "pictures"
    )
    print(f"a statistic of a batch norm sees {seen}, of {batch_norm_ranks:,} ranks\n")
    widths = {name: max(len(name) + 2, 10) for name in NAMES} | {"sum": 12}
    print(f"{'MB of a rank':17}{''.join(f'{name:>{width}}' for name, width in widths.items())}")
    for phase, sizes in step.phases.items():
        row = {**sizes, "sum": sum(sizes.values())}
        cells = [f"{row.get(name, 0) / 1e6:{width},.1f}" for name, width in widths.items()]
        print(f"{phase:17}{''.join(cells)}")
    print(
        f"\nA rank computes {step.flops / 1e12:.3g} TFLOP a step and sends {step.sent / 1e9:.3g} "
        "GB."
    )
    print(f"{c.steps:,} steps take {hours:.3g} hours.")


if __name__ == "__main__":
    main()
