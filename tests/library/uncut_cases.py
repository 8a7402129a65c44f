"""What the ranks of tests/library/test_uncut.py do: a teacher that is not cut beside a student whose products or images
are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

import metapl
from metapl.distributed import Mesh, shard
from metapl.errors import MetaplError
from metapl.models import Corrector, mlp
from metapl.problems import ExampleWeights, LabelCorrection, MetaWeightNet, NoiseTransition, Table, WeightNet

CLASSES, ROWS, EXAMPLES, SIDE = 3, 8, 20, 8

TEACHERS: dict[str, tuple[Any, Callable[[bool], nn.Module]]] = {
    "example_weights": (ExampleWeights(), lambda images: Table(torch.linspace(-1, 1, EXAMPLES))),
    "meta_weight_net": (MetaWeightNet(), lambda images: WeightNet(5)),
    "label_correction": (LabelCorrection(), lambda images: Corrector(network(images), CLASSES)),
    "noise_transition": (NoiseTransition(), lambda images: Table(4 * torch.eye(CLASSES))),
}
READS_INPUTS = ("label_correction",)


def network(images: bool) -> nn.Module:
    """Convolutions, or linear layers whose products two processes share."""
    if not images:
        return mlp([4, 6, CLASSES], nn.Tanh)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1), nn.Tanh(), nn.GroupNorm(2, 4), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(4, CLASSES),
    )  # fmt: skip


def batches(images: bool, steps: int) -> list[tuple[Any, Any]]:
    """Trusted rows, and rows whose labels may be wrong with their numbers."""
    draw = torch.Generator().manual_seed(1)
    shape = (ROWS, 3, SIDE, SIDE) if images else (ROWS, 4)

    def rows() -> tuple[Tensor, Tensor]:
        return torch.randn(shape, generator=draw, dtype=torch.float64), torch.randint(CLASSES, (ROWS,), generator=draw)

    return [(rows(), (*rows(), torch.randperm(EXAMPLES, generator=draw)[:ROWS])) for _ in range(steps)]


def built(method: str, mode: Any, mesh: Mesh | None, images: bool) -> tuple[metapl.BilevelTrainer, Any]:
    """A trainer, and what takes this process's share of a batch for it."""
    torch.manual_seed(0)
    problem, build = TEACHERS[method]
    teacher, student = build(images).double(), network(images).double()
    if mesh is not None:
        x, y = batches(images, 1)[0][0]
        cut = mesh.spatial > 1
        student = shard(student, mesh, example=x if cut else None)
        reads = method in READS_INPUTS
        teacher = (
            shard(teacher, mesh, example=(x, y) if cut else None)
            if reads
            else shard(teacher, Mesh(replicate=mesh.size))
        )
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        problem=problem,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9),
        outer_optimizer=torch.optim.AdamW(teacher.parameters(), lr=0.05),
        teacher_losses=(),
    )

    def own(batch: Any) -> Any:
        batch = batch[: len(problem.inner_batch)]
        if mesh is None:
            return batch
        return tuple(mesh.part(t) if t.ndim == 4 else t.chunk(mesh.shares)[mesh.share] for t in batch)

    return trainer, own


def whole(t: Any) -> Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def train(method: str, mode: Any, mesh: dict[str, int] | None, images: bool, steps: int = 2) -> dict[str, Any]:
    """The teacher's first gradient, and weights and scalars after some steps."""
    trainer, own = built(method, mode, None if mesh is None else Mesh(**mesh), images)
    found: dict[str, Any] = {"scalars": []}
    for step, (trusted, noisy) in enumerate(batches(images, steps)):
        if step == 0:
            gradient = trainer.hypergradient(own(trusted), own(noisy))
            found["gradient"] = {name: whole(g) for name, g in gradient.grads.items()}
        found["scalars"].append(trainer.step(own(trusted), own(noisy)).as_dict())
    for layout in trainer.layouts:
        layout.reshard()
    for role, part in (("teacher", trainer.teacher), ("student", trainer.student)):
        assert part is not None
        found[role] = {name: whole(p) for name, p in part.named_parameters()}
    return found


def many(cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Several of these, one after another."""
    return [train(**case) for case in cases]


def by_double_backward(images: bool) -> dict[str, Tensor]:
    """dL(θ′)/dθ_T of Meta-Weight-Net's first step, written out, in one process."""
    torch.manual_seed(0)
    teacher, student = WeightNet(5).double(), network(images).double()
    ((x, y), (u, given, _)), *_ = batches(images, 1)
    losses = nn.functional.cross_entropy(student(u), given, reduction="none")
    params = dict(student.named_parameters())
    g = torch.autograd.grad((teacher(losses.detach()) * losses).mean(), [*params.values()], create_graph=True)
    moved = {name: p - 0.5 * d for (name, p), d in zip(params.items(), g, strict=True)}
    loss = nn.functional.cross_entropy(torch.func.functional_call(student, moved, (x,)), y)
    names = dict(teacher.named_parameters())
    return dict(zip(names, torch.autograd.grad(loss, [*names.values()]), strict=True))


# ---------------------------------------------------------------------------------------------------------- refusals


def refused(how: str) -> str:
    """The text with which something is refused on this rank."""
    try:
        REFUSED[how]()
    except MetaplError as error:
        return str(error)
    return "not refused"


def _reads_columns(wait: bool = False) -> None:
    """A teacher that is given the columns of a student's images, and is not cut."""
    mesh = Mesh(spatial=2)
    (x, y), (u, *_) = batches(True, 1)[0]
    teacher = shard(network(True).double(), Mesh(replicate=2))
    trainer = metapl.BilevelTrainer(teacher, shard(network(True).double(), mesh, example=x), "forward")
    kept = [p.detach().clone() for p in trainer.student.parameters()]
    try:
        (trainer.teacher_step if wait else trainer.step)((mesh.part(x), y), mesh.part(u))
    finally:
        assert all(torch.equal(a, b) for a, b in zip(kept, trainer.student.parameters(), strict=True))


def _other_weights() -> None:
    """Copies of a table that differ."""
    trainer, own = built("example_weights", "difference", Mesh(tensor=2), False)
    assert isinstance(trainer.teacher, Table)
    with torch.no_grad():
        trainer.teacher.values += dist.get_rank()
    trusted, noisy = batches(False, 1)[0]
    trainer.step(own(trusted), own(noisy))


def _other_rows() -> None:
    """Copies that get other rows."""
    trainer, _ = built("example_weights", "difference", Mesh(tensor=2), False)
    trusted, noisy = batches(False, 2)[dist.get_rank()]
    trainer.step(trusted, noisy)


def _other_labels() -> None:
    """Copies whose trusted labels differ, which enter no signal."""
    trainer, own = built("example_weights", "forward", Mesh(spatial=2), True)
    (x, y), noisy = batches(True, 1)[0]
    trainer.step(own((x, (y + dist.get_rank()) % CLASSES)), own(noisy))


def _other_inputs() -> None:
    """Copies whose inputs differ, under a signal that does not depend on them."""
    trainer, own = built("noise_transition", "difference", Mesh(tensor=2), False)
    trusted, (x, *rest) = batches(False, 1)[0]
    trainer.step(own(trusted), own((x.roll(dist.get_rank(), 0), *rest)))


def _cut_beside_whole() -> None:
    metapl.BilevelTrainer(
        shard(mlp([4, 6, CLASSES]), Mesh(tensor=2)), shard(mlp([4, 6, CLASSES]), Mesh(replicate=2)), "reinforce"
    )


def _images_beside_products() -> None:
    example = batches(True, 1)[0][0][0].float()
    metapl.BilevelTrainer(
        shard(network(True), Mesh(spatial=2), example=example), shard(mlp([4, 6, CLASSES]), Mesh(tensor=2)), "reinforce"
    )


REFUSED: dict[str, Callable[[], Any]] = {
    "reads columns": _reads_columns,
    "waits on columns": lambda: _reads_columns(wait=True),
    "other weights": _other_weights,
    "other rows": _other_rows,
    "other labels": _other_labels,
    "other inputs": _other_inputs,
    "cut beside whole": _cut_beside_whole,
    "images beside products": _images_beside_products,
    "a table by products": lambda: shard(Table(torch.zeros(4)), Mesh(tensor=2)),
    "weights by images": lambda: shard(WeightNet(), Mesh(spatial=2), example=torch.zeros(2, 3, SIDE, SIDE)),
}
