"""Derivatives through steps of ``functional()``, beside a loop by hand and beside real steps."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import pytest
import torch
from reference import outputs_at
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import metapl
from metapl.functional import State, stack

Tree = dict[str, Tensor]
Tensors = Sequence[Tensor]
RATE = 0.2
TEACHER_RATE = 0.3
MOMENTUM = 0.8
CLASSES = 3
STEPS = 3


@pytest.fixture(autouse=True)
def in_float64() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    torch.manual_seed(0)
    yield
    torch.set_default_dtype(torch.float32)


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, CLASSES))


def sgd(module: nn.Module, rate: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(module.parameters(), lr=rate, momentum=MOMENTUM)


def batches(make: Callable[[int], Tensor], steps: int) -> tuple[list[Any], list[Tensor]]:
    """Return an outer and an inner batch for each step."""
    outer = [(make(7), torch.randint(0, CLASSES, (7,))) for _ in range(steps)]
    return outer, [make(8) for _ in range(steps)]


def vectors(count: int) -> Tensor:
    return torch.randn(count, 4)


def at(state: State, theta: Tree, rates: Tensors) -> State:
    """Return a state at other weights of the student and other rates."""
    rate, teacher_rate = rates
    return state._replace(
        student=state.student._replace(params=theta),
        inner=state.inner._replace(settings=[{**state.inner.settings[0], "lr": rate}]),
        outer=state.outer._replace(settings=[{**state.outer.settings[0], "lr": teacher_rate}]),
    )


def along(gradients: Tensors, directions: Tensors) -> Tensor:
    """Return the derivative along a direction."""
    terms = [(g * d).sum() for g, d in zip(gradients, directions, strict=True)]
    return torch.stack(terms).sum()


def leaves_like(tree: Any) -> Any:
    return pytree.tree_map(lambda t: t.detach().clone().requires_grad_(), tree)


# -------------------------------------------------------------------------------- by hand


def loop_by_hand(
    student: nn.Module,
    teacher: nn.Module,
    theta: Tree,
    rates: Tensors,
    outer: list[Any],
    inner: Tensors,
) -> Tensor:
    """Return the outer loss after steps of soft labels by hand, with ``torch.func``.

    ``torch.autograd.grad`` in the loop would be wrong: labels depend on weights of the student by
    earlier steps of the teacher, and are constants of a step.
    """
    phi: Tree = dict(teacher.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in theta.items()}
    teacher_velocity = {name: torch.zeros_like(p) for name, p in phi.items()}

    def inner_loss(theta: Tree, labels: Tensor, u: Tensor) -> Tensor:
        return F.cross_entropy(outputs_at(student, theta, u), labels)

    def after_step(phi: Tree, theta: Tree, velocity: Tree, u: Tensor) -> tuple[Tree, Tree]:
        labels = outputs_at(teacher, phi, u).softmax(-1)
        g = torch.func.grad(inner_loss)(theta, labels, u)
        velocity = {name: MOMENTUM * velocity[name] + t for name, t in g.items()}
        return {name: p - rates[0] * velocity[name] for name, p in theta.items()}, velocity

    def judged(phi: Tree, theta: Tree, velocity: Tree, batch: Any, u: Tensor) -> Tensor:
        x, y = batch
        theta, _ = after_step(phi, theta, velocity, u)
        taught = F.cross_entropy(outputs_at(teacher, phi, x), y)
        return F.cross_entropy(outputs_at(student, theta, x), y) + taught

    for batch, u in zip(outer, inner, strict=True):
        g = torch.func.grad(judged)(phi, theta, velocity, batch, u)
        theta, velocity = after_step(phi, theta, velocity, u)
        teacher_velocity = {name: MOMENTUM * teacher_velocity[name] + t for name, t in g.items()}
        phi = {name: p - rates[1] * teacher_velocity[name] for name, p in phi.items()}
    x, y = outer[0]
    taught = F.cross_entropy(outputs_at(teacher, phi, x), y)
    return F.cross_entropy(outputs_at(student, theta, x), y) + taught


def test_a_loss_after_three_steps_is_differentiated_as_in_a_loop_by_hand() -> None:
    """In the start, the rates and the data; then a second and a third time, along a direction."""
    teacher, student = perceptron(), perceptron()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode="forward",
        problem=metapl.PseudoLabels("soft"),
        inner_optimizer=sgd(student, RATE),
        outer_optimizer=sgd(teacher, TEACHER_RATE),
        teacher_losses=(metapl.CrossEntropy(label_smoothing=0.0),),
        feedback_weight=1.0,
    )
    step, state = trainer.functional()
    outer, inner = batches(vectors, STEPS)
    rates = [state.inner.settings[0]["lr"], state.outer.settings[0]["lr"]]
    ours = leaves_like((state.student.params, rates, inner))
    by_hand = leaves_like((state.student.params, rates, inner))

    theta, rates, inner = ours
    moved = at(state, theta, rates)
    for batch, u in zip(outer, inner, strict=True):
        moved, _ = step(moved, batch, u)
    x, y = outer[0]
    loss = F.cross_entropy(outputs_at(student, moved.student.params, x), y)
    loss = loss + F.cross_entropy(outputs_at(teacher, moved.teacher.params, x), y)
    theta, rates, inner = by_hand
    expected = loop_by_hand(student, teacher, theta, rates, outer, inner)

    flat, flat_by_hand = pytree.tree_leaves(ours), pytree.tree_leaves(by_hand)
    directions = [torch.randn_like(t) for t in flat]
    for order in (1, 2, 3):
        torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
        has_more = order < 3
        found = torch.autograd.grad(loss, flat, create_graph=has_more)
        wanted = torch.autograd.grad(expected, flat_by_hand, create_graph=has_more)
        torch.testing.assert_close(found, wanted, rtol=1e-8, atol=1e-9)
        if has_more:
            loss, expected = along(found, directions), along(wanted, directions)


# ------------------------------------------------------------------------------- real steps


class OfSequence(nn.Module):
    """A recurrent layer, or one of attention, on sequences."""

    def __init__(self, body: nn.Module) -> None:
        super().__init__()
        self.enter = nn.Linear(4, 8)
        self.body = body
        self.leave = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        out = self.body(self.enter(x))
        if isinstance(out, tuple):
            out = out[0]
        return self.leave(out.mean(1))


def convolutions(norm: nn.Module) -> nn.Module:
    layers = [nn.Conv2d(2, 4, 3), norm, nn.SiLU(), nn.AvgPool2d(2), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(16, CLASSES))


def attention() -> nn.Module:
    layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, activation="gelu", batch_first=True)
    return OfSequence(layer)


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dropout": (lambda: nn.Sequential(nn.Linear(4, 9), nn.Dropout(0.3), perceptron_of(9)), (4,)),
    "layer norm": (lambda: nn.Sequential(nn.Linear(4, 9), nn.LayerNorm(9), perceptron_of(9)), (4,)),
    "batch norm": (lambda: convolutions(nn.BatchNorm2d(4)), (2, 6, 6)),
    "group norm": (lambda: convolutions(nn.GroupNorm(2, 4)), (2, 6, 6)),
    "attention": (attention, (5, 4)),
    "gated": (lambda: OfSequence(nn.GRU(8, 8, batch_first=True)), (5, 4)),
}


def perceptron_of(width: int) -> nn.Module:
    return nn.Sequential(nn.GELU(), nn.Linear(width, CLASSES))


def slope_beside_real_steps(
    trainer: metapl.BilevelTrainer,
    make: Callable[[int], Tensor],
    *,
    noise: Tensor | None = None,
) -> tuple[float, float]:
    """Return the slope of a loss after two steps by autograd, and by differences of real steps."""
    step, state = trainer.functional()
    outer, inner = batches(make, steps=2)

    def loss_of(theta: Tree, phi: Tree, rates: Tensors, inner: Tensors) -> Tensor:
        torch.manual_seed(3)
        moved = at(state, theta, rates)
        moved = moved._replace(teacher=moved.teacher._replace(params=phi))
        for batch, u in zip(outer, inner, strict=True):
            moved, _ = step(moved, batch, u, noise)
        numbers = [t for t in pytree.tree_leaves(moved) if t.is_floating_point()]
        sizes = torch.stack([t.square().sum() for t in numbers])
        return sizes.sum()

    rates = [state.inner.settings[0]["lr"], state.outer.settings[0]["lr"]]
    given = (state.student.params, state.teacher.params, rates, inner)
    point, structure = pytree.tree_flatten(leaves_like(given))
    directions = [0.1 * torch.randn_like(t) for t in point]
    loss = loss_of(*pytree.tree_unflatten(point, structure))
    gradients = torch.autograd.grad(loss, point, materialize_grads=True)
    slope = float(along(gradients, directions))

    def moved_by(size: float) -> float:
        there = [t.detach() + size * d for t, d in zip(point, directions, strict=True)]
        return float(loss_of(*pytree.tree_unflatten(there, structure)))

    size = 1e-4
    near, far = (moved_by(size * n) - moved_by(-size * n) for n in (1, 2))
    return slope, (8 * near - far) / (12 * size)


LONG = ("attention", "gated", "group norm")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.long] if name in LONG else [], id=name)
        for name in NETWORKS
    ],
)
def test_the_derivative_through_steps_of_a_network_is_that_of_real_steps(name: str) -> None:
    build, shape = NETWORKS[name]
    teacher, student = build(), build()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode="forward",
        inner_optimizer=sgd(student, RATE),
        outer_optimizer=sgd(teacher, TEACHER_RATE),
    )
    found, wanted = slope_beside_real_steps(trainer, lambda count: torch.randn(count, *shape))
    assert found == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "mode",
    [
        "forward",
        "reinforce",
        "none",
        pytest.param("unrolled", marks=pytest.mark.long),
        pytest.param("loss_difference", marks=pytest.mark.long),
    ],
)
def test_the_derivative_through_steps_of_a_mode_is_that_of_real_steps(mode: str) -> None:
    teacher, student = perceptron(), perceptron()
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode=mode,
        inner_optimizer=torch.optim.AdamW(student.parameters(), lr=0.02, eps=1e-2),
        outer_optimizer=torch.optim.AdamW(teacher.parameters(), lr=0.02, eps=1e-2),
    )
    noise = None
    if mode in ("reinforce", "loss_difference"):
        noise = -torch.log(-torch.log(torch.rand(8, CLASSES)))
    found, wanted = slope_beside_real_steps(trainer, vectors, noise=noise)
    assert found == pytest.approx(wanted, rel=1e-6)


def test_what_a_loss_detaches_is_no_constant_of_the_derivative_through_a_step() -> None:
    """UDA's targets are detached: its gradient is that of constants, which depend on weights."""
    teacher, student = perceptron(), perceptron()
    trainer = metapl.BilevelTrainer(
        teacher, student, mode="forward", teacher_losses=(metapl.UDA(),), feedback_weight=1.0
    )
    step, state = trainer.functional()
    (outer,), _ = batches(vectors, steps=1)
    views = (vectors(8), vectors(8))
    phi = leaves_like(state.teacher.params)
    directions = [torch.randn_like(t) for t in phi.values()]

    def loss_of(weights: Tensors) -> Tensor:
        teacher = state.teacher._replace(params=dict(zip(phi, weights, strict=True)))
        moved, _ = step(state._replace(teacher=teacher), outer, views)
        return torch.stack([p.square().sum() for p in moved.teacher.params.values()]).sum()

    def moved_by(size: float) -> float:
        ahead = zip(phi.values(), directions, strict=True)
        return float(loss_of([t.detach() + size * d for t, d in ahead]))

    gradients = torch.autograd.grad(loss_of([*phi.values()]), [*phi.values()])
    slope = float(along(gradients, directions))
    size = 1e-5
    assert slope == pytest.approx((moved_by(size) - moved_by(-size)) / (2 * size), rel=1e-6)


# ------------------------------------------------------------------------------- transforms


def test_transforms_differentiate_steps_as_autograd_does() -> None:
    """``grad``, ``vmap`` over ``grad``, ``grad`` of a mapped step, ``jvp``, and dual numbers."""
    teacher, student = perceptron(), perceptron()
    trainer = metapl.BilevelTrainer(teacher, student, mode="forward")
    step, state = trainer.functional()
    (outer,), (inner,) = batches(vectors, steps=1)

    def loss_of(rate: Tensor) -> Tensor:
        moved, report = step(at(state, state.student.params, [rate, rate]), outer, inner)
        return report.outer_loss + moved.student.params["0.weight"].square().sum()

    rates = torch.tensor([0.1, 0.3])
    expected = []
    for rate in rates:
        leaf = rate.clone().requires_grad_()
        expected += torch.autograd.grad(loss_of(leaf), leaf)
    wanted = torch.stack(expected)
    torch.testing.assert_close(torch.func.grad(loss_of)(rates[0]), wanted[0])
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss_of))(rates), wanted)
    _, tangent = torch.func.jvp(loss_of, (rates[1],), (torch.ones(()),))
    torch.testing.assert_close(tangent, wanted[1])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(rates[1], torch.ones(()))
        _, tangent = torch.autograd.forward_ad.unpack_dual(loss_of(dual))
    torch.testing.assert_close(tangent, wanted[1])

    states = stack([at(state, state.student.params, [rate, rate]) for rate in rates])
    leaf = rates.clone().requires_grad_()
    states.inner.settings[0]["lr"] = states.outer.settings[0]["lr"] = leaf
    moved, report = torch.func.vmap(step, in_dims=(0, None, None))(states, outer, inner)
    mapped = report.outer_loss.sum() + moved.student.params["0.weight"].square().sum()
    (found,) = torch.autograd.grad(mapped, leaf)
    torch.testing.assert_close(found, wanted)


def test_a_step_whose_values_are_read_has_no_derivative() -> None:
    class Reads(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, CLASSES)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.layer(x) * float(x.abs().max())
            return out

    trainer = metapl.BilevelTrainer(perceptron(), Reads(), mode="forward", verify=False)
    step, state = trainer.functional()
    (outer,), (inner,) = batches(vectors, steps=1)
    with pytest.raises(metapl.MetaplError, match="cannot differentiate through this step"):
        step(state, outer, inner.requires_grad_())
