"""What the ranks of the sharded tests run, beside one process with the whole batch."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import torchopt
from problems_zoo import Judged
from torch import Tensor, nn
from torch import distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import metapl
from metapl.core import step as inner_step
from metapl.core.step import InnerStep
from metapl.distributed import Mesh, shard
from metapl.engines import sharded
from metapl.engines.eager import EagerDescent
from metapl.errors import MetaplError
from metapl.execution import ranks as ranks_module
from metapl.execution.batch import micro_batches
from metapl.execution.layout import Layout
from metapl.execution.ranks import Ranks, rows_of_all
from metapl.feedback import Forward
from metapl.problems import LearningToReweight

CLASSES = 3

# Rows of an inner batch and of an outer batch, of all processes together.
ROWS = 8
LABELED = 12


class Block(nn.Module):
    """A residual block with a width that two processes do not divide."""

    def __init__(self, width: int, inside: nn.Module, hidden: int = 9) -> None:
        super().__init__()
        self.inner = nn.Linear(width, hidden)
        self.inside = inside
        self.outer = nn.Linear(hidden, width)
        self.scale = nn.Parameter(torch.full((1,), 0.7))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.scale * self.outer(torch.tanh(self.inside(self.inner(x))))


class Distances(nn.Module):
    """Distances to anchors: cdist has no forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.anchors = nn.Parameter(torch.eye(9))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cdist(x, self.anchors)


INSIDE: dict[str, Callable[[], nn.Module]] = {
    "distances": Distances,
    "plain": nn.Identity,
    "norm": lambda: nn.BatchNorm1d(9),
    "dropout": lambda: nn.Dropout(0.3),
}


class Network(nn.Module):
    """An embedding, blocks, and a head; the embedding and the head belong to the root."""

    def __init__(
        self, blocks: int = 1, width: int = 5, inside: str = "plain", hidden: int = 9
    ) -> None:
        super().__init__()
        self.embed = nn.Linear(4, width)
        self.blocks = nn.ModuleList(Block(width, INSIDE[inside](), hidden) for _ in range(blocks))
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


class Moving(nn.Module):
    """Tied weights, a parameter without dimensions, and running statistics.

    A buffer moves with the rows.
    """

    def __init__(self, scale: bool) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.layers[2].weight = self.layers[0].weight
        self.norm = nn.InstanceNorm1d(1, track_running_stats=True)
        self.head = nn.Linear(4, CLASSES)
        self.scale = nn.Parameter(torch.tensor(0.9)) if scale else None
        self.register_buffer("seen", torch.zeros(4))
        self.register_buffer("constant", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            with torch.no_grad():
                self.seen = 0.5 * self.seen + x.mean(0)
        for layer in self.layers:
            x = torch.tanh(layer(x)) * self.constant
        x = self.norm(x[:, None])[:, 0]
        if self.scale is not None:
            x = self.scale * x
        return self.head(x)


OPTIMIZERS: dict[str, Any] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.2, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.05, betas=(0.8, 0.95), eps=1e-2, weight_decay=0.1),
}


def networks(
    inside: str = "plain", dtype: torch.dtype = torch.float64, hidden: int = 9
) -> tuple[nn.Module, nn.Module]:
    """Return a teacher and a student; ``inside`` says what is in the student's blocks."""
    torch.manual_seed(0)
    if inside.startswith("moving"):
        has_scale = "scaled" in inside
        return Moving(has_scale).to(dtype), Moving(has_scale).to(dtype)
    teacher = Network(hidden=hidden).to(dtype)
    student = Network(2, inside=inside, hidden=hidden).to(dtype)
    return teacher, student


def batches(
    steps: int, views: bool = False, dtype: torch.dtype = torch.float64
) -> list[tuple[Any, Any]]:
    """Return the outer and the inner batch of each step, of all processes together."""
    generator = torch.Generator().manual_seed(1)

    def inputs(rows: int) -> Tensor:
        return torch.randn(rows, 4, generator=generator, dtype=torch.float64).to(dtype)

    pairs: list[tuple[Any, Any]] = []
    for _ in range(steps):
        x = inputs(LABELED)
        labels = torch.randint(CLASSES, (LABELED,), generator=generator)
        unlabeled = (inputs(ROWS), inputs(ROWS)) if views else inputs(ROWS)
        pairs.append(((x, labels), unlabeled))
    return pairs


def share(batch: Any, together: int = 1) -> Any:
    """Return this rank's rows of a batch, which ``together`` ranks have in common."""
    if not dist.is_initialized():
        return batch
    if isinstance(batch, tuple):
        return tuple(share(t, together) for t in batch)
    return batch.chunk(dist.get_world_size() // together)[dist.get_rank() // together]


def laid_out(network: nn.Module, layout: str | None) -> nn.Module:
    """Lay a network out as a user does, by hand or with metapl's own function.

    Products are shared by two processes.
    """
    if layout is None:
        return network
    if layout == "ddp":
        return nn.parallel.DistributedDataParallel(network)
    world = dist.get_world_size()
    if layout.startswith("tensor_by_"):
        plan: dict[str, Any] = {
            "blocks.*.inner": ColwiseParallel(),
            "blocks.*.outer": RowwiseParallel(),
        }
        second_axis = {layout.removeprefix("tensor_by_"): world // 2}
        return shard(network, Mesh(tensor=2, **second_axis), plan=plan)
    if layout == "tensor":
        for block in network.blocks:
            plan = {"inner": ColwiseParallel(), "outer": RowwiseParallel()}
            parallelize_module(block, init_device_mesh("cpu", (2,)), plan)
        return network
    if layout == "replicate":
        return shard(network, Mesh(replicate=world))
    if layout.startswith("shard"):
        return shard(network, Mesh(shard=world), checkpoint=layout == "shard_checkpoint")
    if layout == "hsdp":
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh("cpu", (world,))
    for block in network.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(network, mesh=mesh)


def gathered(t: Any) -> Tensor:
    """Return a copy of a tensor, gathered where it is sharded."""
    if hasattr(t, "full_tensor"):
        t = t.full_tensor()
    return t.detach().clone()


def built(
    mode: Any,
    layout: str | None,
    optimizer: str = "sgd",
    *,
    inside: str = "plain",
    hidden: int = 9,
    dtype: torch.dtype = torch.float64,
    teacher_layout: str | None = "same",
    inner: Any = None,
    **options: Any,
) -> metapl.BilevelTrainer:
    teacher, student = networks(inside, dtype, hidden)
    if isinstance(options.get("problem"), ReadsTeacher):
        options["problem"] = ReadsTeacher(teacher)
    teacher = laid_out(teacher, layout if teacher_layout == "same" else teacher_layout)
    student = laid_out(student, layout)
    build = OPTIMIZERS[optimizer]
    return metapl.BilevelTrainer(
        teacher,
        student,
        mode=mode,
        inner_optimizer=build(student.parameters()) if inner is None else inner,
        outer_optimizer=build(teacher.parameters()),
        generator=torch.Generator().manual_seed(5),
        **{"verify": False, **options},
    )


def train(
    mode: Any,
    layout: str | None = None,
    optimizer: str = "sgd",
    *,
    steps: int = 2,
    views: bool = False,
    gradients: bool = True,
    dtype: torch.dtype = torch.float64,
    **options: Any,
) -> dict[str, Any]:
    """Take some steps on the share of each batch of this rank.

    One process alone has all of a batch.
    """
    trainer = built(mode, layout, optimizer, dtype=dtype, **options)
    lookahead = trainer.lookahead
    # Products are shared by two processes, which have the same rows.
    together = 2 if layout is not None and layout.startswith("tensor") else 1
    result: dict[str, Any] = {"scalars": [], "feedback": [], "gradients": [], "moved": []}
    torch.manual_seed(3)
    pairs = batches(steps * lookahead, views, dtype)
    for step in range(steps):
        of_step = pairs[step * lookahead : (step + 1) * lookahead]
        labeled = share(of_step[0][0], together)
        inner = [share(unlabeled, together) for _, unlabeled in of_step]
        unlabeled = metapl.Lookahead(inner) if lookahead > 1 else inner[0]
        if gradients and step == 0:
            generator = torch.Generator().manual_seed(6)
            gradient = trainer.hypergradient(labeled, unlabeled, generator=generator)
            result["gradients"].append({name: gathered(g) for name, g in gradient.grads.items()})
            result["moved"].append(
                {name: gathered(p) for name, p in gradient.student_params.items()}
            )
        report = trainer.step(labeled, unlabeled)
        result["scalars"].append(report.as_dict())
        result["feedback"].append(joined_feedback(report.feedback))
    for network_layout in trainer.layouts:
        network_layout.reshard()
    for name, network in (("teacher", trainer.teacher), ("student", trainer.student)):
        result[name] = {path: gathered(p) for path, p in network.named_parameters()}
        result[f"{name}_buffers"] = {path: b.clone() for path, b in network.named_buffers()}
    return result


def joined_feedback(feedback: Any) -> Tensor:
    """Return the feedback of a step in one tensor, with a row for each example.

    It comes by field where a signal has several, and as a tuple over several student steps.
    """
    if isinstance(feedback, dict):
        columns = [h.flatten(1) if h.ndim > 1 else h[:, None] for h in feedback.values()]
        return torch.cat(columns, 1)
    if isinstance(feedback, tuple):
        return torch.stack(feedback, 1)
    return feedback


class Several(Judged):
    """A signal of two tensors: a label, and how much it counts."""

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        label = teacher(batch).softmax(-1)
        return metapl.Signal({"weight": label[:, 0].sigmoid(), "label": label})

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        return signal.value["weight"] * nn.functional.cross_entropy(
            outputs, signal.value["label"], reduction="none"
        )


class OfAllRows(Judged):
    """The weights of all ranks' rows are a softmax over them."""

    signal_of_batch = True

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Any, *, generator: Any
    ) -> metapl.Signal:
        scores, own_rows = rows_of_all(teacher(batch)[:, 0])
        return metapl.Signal(len(scores) * scores.softmax(0)[own_rows])

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        return signal.value * outputs.logsumexp(-1)


class ReadsTeacher(Judged):
    """An outer loss that reads the teacher, which the problem holds: it has a direct term."""

    def __init__(self, teacher: nn.Module | None = None) -> None:
        self.teacher = teacher

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        return metapl.Signal(teacher(batch).softmax(-1))

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        return nn.functional.cross_entropy(outputs, signal.value, reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Any:
        assert self.teacher is not None, "it is given the teacher as this is built"
        x, y = batch
        weights = 1 + self.teacher(x).softmax(-1)[:, 0]
        losses = nn.functional.cross_entropy(outputs, y, reduction="none")
        return (weights * losses).sum(), float(len(y))


SEVERAL = Several()
OF_ALL_ROWS = OfAllRows()


def many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the results of several cases, one after another."""
    return [train(**case) for case in cases]


def refused(call: str) -> str:
    """Return the text with which something is refused on this rank, before anything moved."""
    try:
        REFUSED[call]()
    except MetaplError as error:
        return str(error)
    return "not refused"


def _unequal() -> None:
    trainer = built("forward", "fsdp")
    labeled, unlabeled = share(batches(1)[0])
    weights_before = [gathered(p) for p in trainer.student.parameters()]
    try:
        trainer.step(labeled, unlabeled[: 4 - dist.get_rank()])
    finally:
        weights = [gathered(p) for p in trainer.student.parameters()]
        assert all(torch.equal(p, q) for p, q in zip(weights_before, weights, strict=True))


def interrupted(layout: str, failing_call: int) -> float:
    """Return how far a plain gradient after a failed look-ahead is from that of one process.

    The student fails in the call of this number.
    """
    teacher, student = networks()
    state = student.state_dict()
    student = laid_out(student, layout)
    (x, y), u = share(batches(1)[0])
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(0)
        if len(calls) == failing_call:
            raise ZeroDivisionError

    handle = student.blocks[0].inner.register_forward_pre_hook(fail)
    with pytest.raises(ZeroDivisionError):
        metapl.hypergradient(
            laid_out(teacher, layout),
            student,
            outer=(x, y),
            inner=metapl.Lookahead([u, u, u]),
            inner_optimizer=OPTIMIZERS["sgd"](student.parameters()),
        )
    handle.remove()
    root: Any = student
    # Otherwise the next pass would not wait on a GPU.
    assert root._get_fsdp_state()._state_ctx.iter_forward_root is None
    nn.functional.cross_entropy(student(x), y).backward()
    _, unsharded = networks()
    unsharded.load_state_dict(state)
    ((inputs, labels), _), *_ = batches(1)
    nn.functional.cross_entropy(unsharded(inputs), labels).backward()
    pairs = zip(student.parameters(), unsharded.parameters(), strict=True)
    return max(float((gathered(p.grad) - q.grad).abs().max()) for p, q in pairs)


def _another_batch_on_one() -> None:
    """Give another batch the second time, from batches that are made as they are read."""
    teacher, student = (laid_out(network, "ddp") for network in networks())
    labeled, unlabeled = share(batches(1)[0])
    calls: list[int] = []

    def batch_of(step: int) -> Tensor:
        calls.append(step)
        is_another = dist.get_rank() == 1 and step == 1 and calls.count(1) > 1
        return unlabeled + float(is_another)

    metapl.hypergradient(
        teacher,
        student,
        outer=labeled,
        inner=metapl.Lookahead(batch_of, steps=3),
        inner_optimizer=OPTIMIZERS["sgd"](student.parameters()),
    )


def _root_forgotten() -> None:
    teacher, student = networks()
    fully_shard(student.blocks[0])
    metapl.BilevelTrainer(laid_out(teacher, "fsdp"), student)


def _not_means(role: int, switch: str, **arguments: Any) -> None:
    """Set a switch of the gradients of one of the networks, and take a step."""
    trainer = built("forward", "hsdp")
    getattr((trainer.teacher, trainer.student)[role], switch)(**arguments)
    trainer.step(*share(batches(1)[0]))


def _part_left_out() -> None:
    teacher, student = networks()
    fully_shard(student, ignored_params={student.head.weight})
    metapl.BilevelTrainer(laid_out(teacher, "fsdp"), student)


def _not_finite_on_one() -> None:
    trainer = built("reinforce", "ddp")
    labeled, unlabeled = share(batches(1)[0])
    if dist.get_rank() == 1:
        unlabeled = unlabeled * torch.nan
    trainer.step(labeled, unlabeled)


class Weighted(metapl.PseudoLabels):
    """An outer loss that is a mean by weights of the classes, which the ranks' rows differ in."""

    def outer_loss(self, outputs: Any, batch: Any) -> Any:
        weights = torch.arange(1.0, 1 + outputs.shape[1], dtype=outputs.dtype)
        total = torch.nn.functional.cross_entropy(outputs, batch[1], weights, reduction="sum")
        return total, weights[batch[1]].sum()


class WeightedScalar(metapl.PseudoLabels):
    """The same mean over one rank's rows, as a scalar."""

    def outer_loss(self, outputs: Any, batch: Any) -> Any:
        weights = torch.arange(1.0, 1 + outputs.shape[1], dtype=outputs.dtype)
        return torch.nn.functional.cross_entropy(outputs, batch[1], weights)


def _reweight() -> None:
    student = laid_out(networks()[1], "ddp")
    metapl.BilevelTrainer(None, student, mode="forward", problem=LearningToReweight())


def _outputs_in_parts() -> None:
    teacher, student = networks()
    for network in (teacher, student):
        plan = {"head": ColwiseParallel(output_layouts=Replicate(), use_local_output=False)}
        parallelize_module(network, init_device_mesh("cpu", (2,)), plan)
    metapl.BilevelTrainer(teacher, student, mode="reinforce").step(*batches(1)[0])


REFUSED: dict[str, Callable[[], Any]] = {
    "graph_of_shards": lambda: built(Forward(by="graph"), "fsdp").step(*share(batches(1)[0])),
    "unrolled": lambda: built("unrolled", "ddp"),
    "direct_term_of_shards": lambda: built(
        "forward", "fsdp", teacher_layout="ddp", problem=ReadsTeacher()
    ),
    "another_batch_on_one": _another_batch_on_one,
    "torchopt": lambda: built("forward", "fsdp", inner=torchopt.sgd(0.1)),
    "reweight": _reweight,
    "unequal": _unequal,
    "not_finite_on_one": _not_finite_on_one,
    "root_forgotten": _root_forgotten,
    "divided_otherwise": lambda: _not_means(1, "set_gradient_divide_factor", factor=1.0),
    "not_synchronized": lambda: _not_means(
        0, "set_requires_gradient_sync", requires_gradient_sync=False
    ),
    "not_reduced": lambda: _not_means(1, "set_requires_all_reduce", requires_all_reduce=False),
    "hooked": lambda: _not_means(0, "set_all_reduce_hook", hook=Tensor.zero_),
    "part_left_out": _part_left_out,
    "outputs_in_parts": _outputs_in_parts,
    "tensor_parallel_forward": lambda: built("forward", "tensor", hidden=8),
}


def _mean_over_own_rows(patch: pytest.MonkeyPatch) -> None:
    real_slope = inner_step._slope
    real_in_fields = EagerDescent._in_fields

    def slope(step: InnerStep, *args: Any, **options: Any) -> Any:
        return real_slope(step, *args, **options) * step.student.ranks.size

    def in_fields(self: EagerDescent, *args: Any) -> Any:
        size = self.student.ranks.size
        derivatives = real_in_fields(self, *args)
        return {name: None if t is None else t * size for name, t in derivatives.items()}

    patch.setattr(inner_step, "_slope", slope)
    patch.setattr(EagerDescent, "_in_fields", in_fields)


WHOLE = sharded.whole
FAULTS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    # The root keeps its gathered weights while the parts are moved.
    "stale_root": lambda patch: patch.setattr(Layout, "reshard", lambda self: None),
    # Every rank goes along its own part of w only.
    "direction_not_gathered": lambda patch: patch.setattr(
        sharded, "whole", lambda t: WHOLE(t if dist.get_rank() == 0 else torch.zeros_like(t))
    ),
    # As ``torch.autograd.grad`` on gathered weights, or hooks of DistributedDataParallel that are
    # bypassed.
    "gradient_not_averaged": lambda patch: patch.setattr(
        Ranks, "mean_tree", lambda self, tree, like: tree
    ),
    # 1/B with the B of this rank: by the tangent in the head, and by a graph that is kept.
    "mean_over_own_rows": _mean_over_own_rows,
    # Each rank learns by what it alone has found for its rows.
    "rows_of_others_forgotten": lambda patch: patch.setattr(
        ranks_module._AllRows, "backward", lambda ctx, *g: (ctx.ranks.own_rows(g[0]), None)
    ),
}


def faulty(fault: str, case: dict[str, Any]) -> dict[str, Any] | str:
    """Run a case with a planted fault, and return what it ends with.

    That is its result, or the error.
    """
    with pytest.MonkeyPatch.context() as patch:
        FAULTS[fault](patch)
        try:
            return train(**case)
        except Exception as error:
            return f"{type(error).__name__}: {error}"


class Both(Judged):
    """A temperature for all examples, and a weight for each."""

    signal_has_rows: ClassVar[Any] = {"scale": False}

    def signal(
        self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any
    ) -> metapl.Signal:
        scale, *_ = values = teacher(torch.arange(1 + CLASSES))
        return metapl.Signal({"scale": scale[None], "weight": values[1:][batch[1]].sigmoid()})

    def inner_loss(
        self, outputs: Tensor, signal: metapl.Signal, batch: Any, params: Any = None
    ) -> Tensor:
        scale = signal.value["scale"]
        weight = signal.value["weight"]
        return weight * nn.functional.cross_entropy(scale * outputs, batch[1], reduction="none")


def without_rows(
    mode: Any = "forward", matrix: bool = True, rows: int = ROWS, **options: Any
) -> dict[str, float]:
    """Return the report of a step on a signal without rows, and the teacher then.

    The signal is a matrix, or has a number about all examples.
    """
    start = (
        4 * torch.eye(CLASSES, dtype=torch.float64) if matrix else torch.ones(1 + CLASSES).double()
    )
    student = networks()[1]
    teacher = metapl.problems.Table(start)
    student, teacher = (
        laid_out(n, "ddp" if dist.is_initialized() else None) for n in (student, teacher)
    )
    problem = metapl.problems.NoiseTransition() if matrix else Both()
    options = {"teacher_losses": (), **options}
    trainer = metapl.BilevelTrainer(teacher, student, mode, problem=problem, **options)
    (x, y), unlabeled = batches(1)[0]
    report: dict[str, float] = trainer.step(
        share((x, y)), share((unlabeled[:rows], y[:rows]))
    ).as_dict()
    assert trainer.teacher is not None
    values = torch.cat([p.detach().flatten() for p in trainer.teacher.parameters()])
    # Of this rank's h.
    report = {name: value for name, value in report.items() if not name.startswith("feedback_")}
    return report | {f"teacher_{i}": float(v) for i, v in enumerate(values)}


def in_bfloat16(inside: str) -> dict[str, Any]:
    """Return the teacher's gradient with weights gathered in bfloat16, and in float32.

    Beside it is what ``difference`` says.
    """
    results: dict[str, Any] = {}
    labeled, unlabeled = share(batches(1, dtype=torch.float32)[0])
    for precision in ("float32", "bfloat16"):
        teacher, student = networks(inside, torch.float32)
        mesh = Mesh(shard=dist.get_world_size())
        teacher = shard(teacher, mesh)
        student = shard(student, mesh, precision=precision, blocks=lambda n: n.blocks)
        trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
        gradient = trainer.hypergradient(labeled, unlabeled)
        results[precision] = {name: gathered(g) for name, g in gradient.grads.items()}
        trainer.step(labeled, unlabeled)
    results["dtypes"] = {str(p.dtype) for p in student.parameters()}
    results["blocks"] = [
        name for name, part in student.named_modules() if isinstance(part, FSDPModule)
    ]
    try:
        trainer.hypergradient(labeled, unlabeled, mode="difference")
    except MetaplError as error:
        results["difference"] = str(error)
    return results


class Share(list[Any]):
    """This rank's rows of batches that all ranks have whole."""

    def __init__(self, batches: list[Any], ranks: Ranks) -> None:
        super().__init__(micro_batches(batch, ranks.size, "whole")[ranks.rank] for batch in batches)
        # By this attribute a fit reads the facts of the data of all ranks.
        self.whole = batches


def whole_training(
    layout: str | None, optimizer: str = "sgd", inside: str = "plain", **options: Any
) -> dict[str, Any]:
    """Return scores of examples through four steps, and the derivative in the start through two.

    Every rank is given all rows of the first, and its share of the second.
    """
    network = networks(inside)[1]
    student = laid_out(network, layout)
    inner_optimizer = OPTIMIZERS[optimizer](student.parameters())
    # Dropout masks differ by rank.
    torch.manual_seed(3 + (dist.get_rank() if dist.is_initialized() else 0))
    (train, _), (outer, _), *inner = batches(4)
    tensors_before = [gathered(t) for t in (*network.parameters(), *network.buffers())]
    defaults = {
        "optimizer": inner_optimizer,
        "steps": 4,
        "batch_size": 8,
        "mode": metapl.feedback.Forward(keep_every=2),
        # Adam's adjoint is smoothed by default in one process, and not in parts of tensors.
        "smoothing": 0.0,
        "progress": False,
    }
    attribution = metapl.attribute(student, train, outer, **{**defaults, **options})
    gradient = metapl.hypergradient(
        None,
        student,
        outer=share(outer),
        inner=metapl.Lookahead([share(labeled) for labeled, _ in inner]),
        inner_optimizer=inner_optimizer,
        problem=metapl.problems.EqualWeights(),
        wrt=("teacher", "start"),
        accumulate=3,
    )
    tensors = [gathered(t) for t in (*network.parameters(), *network.buffers())]
    assert all(torch.equal(a, b) for a, b in zip(tensors_before, tensors, strict=True))
    results = {
        "scores": attribution.scores,
        "losses": attribution.outer_loss,
        "start_loss": gradient.outer_loss,
    }
    trees = {
        "params": attribution.student_params,
        "start": gradient.start,
        "moved": gradient.student_params,
    }
    for kind, tree in trees.items():
        for name, t in tree.items():
            results[f"{kind} {name}"] = gathered(t)
    return results


def gathered_at_once(**case: Any) -> tuple[dict[str, Any], int, int]:
    """Take a training, and count the weights that are gathered at once.

    Return the training, the most weights that were gathered at once, and those of a block and the
    root.
    """
    # A reference to each gathered tensor, which is None once the tensor is gone.
    references: list[weakref.ref[Tensor]] = []
    most = 0
    whole_together = sharded.whole_together

    def watched(parts: Any, likes: Any) -> list[Tensor]:
        nonlocal most
        tensors = whole_together(parts, likes)
        references.extend(weakref.ref(t) for t in tensors)
        alive = [t for reference in references if (t := reference()) is not None]
        most = max(most, sum(t.numel() for t in alive))
        return tensors

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharded, "whole_together", watched)
        training = whole_training(**case)
    student = networks()[1]
    weights_of_block = sum(p.numel() for p in student.blocks[0].parameters())
    weights = sum(p.numel() for p in student.parameters())
    return training, most, weights - weights_of_block


class Aside(Block):
    """A block that is handed a tensor past its arguments."""

    aside: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.aside


class PastArguments(Network):
    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            block.aside = x.tanh()
            x = block(x)
        return self.head(x)


def _past_arguments() -> None:
    torch.manual_seed(0)
    student = PastArguments(2)
    student.blocks = nn.ModuleList(Aside(5, nn.Identity()) for _ in range(2))
    _attributed(student.double())


def _attributed(
    student: nn.Module | None = None, layout: str = "fsdp", rule: str = "sgd", **options: Any
) -> metapl.Attribution:
    if student is None:
        student = networks()[1]
    student = laid_out(student, layout)
    labeled, _ = batches(1)[0]
    defaults = {
        "optimizer": OPTIMIZERS[rule](student.parameters()),
        "steps": 2,
        "batch_size": 8,
        "progress": False,
    }
    return metapl.attribute(student, labeled, labeled, **{**defaults, **options})


def trained_again(inside: str) -> Tensor:
    """Return by how much replicas' outer loss changes without no example, and without one."""
    attribution = _attributed(networks(inside)[1], "ddp", steps=4, clip_norm=0.5)
    no_example = torch.zeros(LABELED, dtype=torch.bool)
    return attribution.validate([no_example, [0], [1]], progress=False).retrained


REFUSED |= {
    "past_arguments": _past_arguments,
    "unequal_rows_of_a_training": lambda: _attributed(batch_size=5),
    "compiled_training": lambda: _attributed(compile=True),
    "smoothed_training": lambda: _attributed(rule="adamw", smoothing=0.3),
    "repeated_training": lambda: _attributed().validate([[0], [1], [2]], progress=False),
}


class Stopped(Exception):
    """What ends a fit in the middle."""


def fitted(
    layout: str | None,
    out: str,
    stop: int | None = None,
    resume: bool = False,
    inside: str = "plain",
    ema_decay: float | None = None,
) -> dict[str, Any]:
    """Take a short, tuned fit on the same batches everywhere.

    It begins at the start, or goes on from where it was stopped.
    """
    trainer = built("reinforce", layout, "adamw", inside=inside)
    # Dropout masks differ by rank.
    has_own_masks = inside == "dropout" and dist.is_initialized()
    torch.manual_seed(7 + (dist.get_rank() if has_own_masks else 0))
    pairs = batches(4)
    labeled = Share([outer for outer, _ in pairs], trainer.ranks)
    unlabeled = Share([inner for _, inner in pairs], trainer.ranks)

    lines = list[str]()

    def end(step: int, row: Any, trainer: Any) -> None:
        if stop is not None and step >= stop:
            raise Stopped

    try:
        fit = trainer.fit(
            labeled,
            unlabeled,
            steps=4,
            out=out,
            resume=resume,
            validation=batches(5)[4][0],
            validate_every=2,
            log_every=1,
            save_every=2,
            ema_decay=ema_decay,
            wait=1,
            callbacks=[end],
            say=lines.append,
            progress=False,
        )
    except Stopped:
        return {}
    tuned = trainer.finetune(labeled, steps=2, progress=False)
    return {
        "history": fit.history,
        "step": fit.step,
        "weights": fit.weights,
        "teacher": fit.teacher_weights,
        "tuned": tuned.weights,
        "said": lines,
    }


def said(layout: str | None) -> list[str]:
    """Return what a fit says whose teacher hardly moves."""
    trainer = built("forward", layout)
    lines = list[str]()
    optimizer: Any = trainer.outer_optimizer
    optimizer.param_groups[0]["lr"] = 1e-9
    labeled, unlabeled = (Share([*part], trainer.ranks) for part in zip(*batches(30), strict=True))
    validation = batches(31)[30][0]
    options: dict[str, Any] = {
        "validation": validation,
        "validate_every": 10,
        "log_every": 5,
        "progress": False,
    }
    trainer.fit(labeled, unlabeled, steps=30, say=lines.append, **options)
    return lines


def unwritten(folder: str) -> list[str]:
    """Return the errors on this rank of two checkpoints that fail on the first rank alone.

    One fails in its part, the other at the end.
    """
    from torch.distributed.checkpoint import FileSystemWriter

    from metapl.runs import checkpoint

    def refuse(*_: Any) -> Any:
        raise RuntimeError("a bug")

    errors = []
    for owner, name in ((FileSystemWriter, "write_data"), (checkpoint, "save")):
        writer = checkpoint.PartsFolder(Path(folder), 2)
        with pytest.MonkeyPatch.context() as patch:
            if dist.get_rank() == 0:
                patch.setattr(owner, name, refuse)
            try:
                writer.write(1, {"weight": torch.ones(3)})
                writer.finish()
            except checkpoint.CheckpointError as error:
                errors.append(str(error))
        writer.close()
    return errors
