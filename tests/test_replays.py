"""Students and teachers whose passes are hard to run again: the gradient is that of plain double backward, or refused.

The reference is double backward on the module itself: its weights are swapped by hand, and hooks, buffers and
checkpoints act as they do in training.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, everything, mlp, same, toy
from reference import error, own_stream
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import metapl
from metapl.feedback import Difference, ReinforcePerExample

RULE = OPTIMISERS["torch_sgd_nesterov"]
TOLERANCE = {"unrolled": 1e-9, "forward": 1e-9, "difference": 1e-4}
EXACT = list(TOLERANCE)
ALL: dict[str, Any] = {
    **{mode: mode for mode in metapl.MODES},
    "difference_one_sided": Difference(one_sided=True),
    "reinforce_per_example_by_difference": ReinforcePerExample(tangent="difference"),
}
REPLAYING = [name for name in ALL if name in ("forward", "difference") or "per_example" in name or "sided" in name]


def case(student: nn.Module, teacher: nn.Module | None = None, dtype: torch.dtype = torch.float64) -> Toy:
    base = toy("mlp", dtype=dtype, rows=6)
    return Toy(base.teacher if teacher is None else teacher, student, base.labeled, base.unlabeled, 0)


def put(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    for name, t in tensors.items():
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = t


def twin(module: nn.Module) -> nn.Module:
    """A copy, of modules too whose weight is an attribute with a graph."""
    kept = {id(t): t.detach() for part in module.modules() for t in vars(part).values() if isinstance(t, Tensor)}
    return copy.deepcopy(module, kept)


def plainly(problem: Toy, kind: str = "soft") -> tuple[reference.Tree, dict[str, Tensor]]:
    """The teacher's gradient by double backward on the student itself, and the student's buffers after its inner pass.

    ``kind`` is ``"soft"``, or ``"score"`` as in the reference.
    """
    teacher, student = twin(problem.teacher), twin(problem.student)
    theta, phi = dict(student.named_parameters()), dict(teacher.named_parameters())
    z = student(problem.unlabeled)
    after_inner = torch.get_rng_state()
    log_q = teacher(problem.unlabeled).log_softmax(-1)
    drawn = torch.multinomial(log_q.detach().exp(), 1) if kind == "score" else None
    leaf = log_q.detach().exp() if drawn is None else torch.ones(len(z), dtype=z.dtype)
    leaf.requires_grad_()
    losses = (
        reference.cross_entropy(leaf, z) if drawn is None else leaf * F.cross_entropy(z, drawn[:, 0], reduction="none")
    )
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    buffers = {name: b.detach().clone() for name, b in student.named_buffers()}
    moved, _ = RULE.rule(theta, dict(zip(theta, g, strict=True)), None)
    torch.set_rng_state(own_stream(after_inner))
    put(student, moved)
    outer = F.cross_entropy(student(problem.labeled[0]), problem.labeled[1])
    v = torch.autograd.grad(outer, list(moved.values()))  # while θ′ is there for checkpoints
    put(student, theta)
    (told,) = torch.autograd.grad(list(moved.values()), leaf, v)
    spoken = log_q.exp() if drawn is None else log_q.gather(-1, drawn)[:, 0]
    grads = torch.autograd.grad((told * spoken).sum(), list(phi.values()))
    return dict(zip(phi, grads, strict=True)), buffers


def found(problem: Toy, mode: str) -> metapl.Hypergradient:
    inner = RULE.build(problem.student)
    return metapl.hypergradient(**problem.networks(), **problem.data(), mode=ALL[mode], inner_optimizer=inner)


def check_exact(problem: Toy, mode: str, plain: Toy | None = None) -> None:
    """The gradient is right, a call moves nothing, and a step moves the buffers as the one inner pass does."""
    kind = "score" if "per_example" in mode else "soft"
    problem.draw_from_start()
    expected, buffers = plainly(problem if plain is None else plain, kind)
    problem.draw_from_start()
    before = everything(problem, generator=False)
    grads = found(problem, mode).grads
    assert same(before, everything(problem, generator=False))
    assert error(grads, expected) < (1e-4 if "difference" in mode else TOLERANCE.get(mode, 1e-9))
    problem.draw_from_start()
    inner = RULE.build(problem.student)
    metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode], inner_optimizer=inner, teacher_losses=()).step(
        **problem.data()
    )
    after = dict(problem.student.named_buffers())
    assert buffers.keys() == after.keys()
    assert all(torch.equal(after[name], b) for name, b in buffers.items())


def check_refused(problem: Toy, mode: str, match: str) -> None:
    """Refused by both calls, before anything moved."""
    inner = RULE.build(problem.student)
    problem.draw_from_start()
    before = everything(problem, inner)
    with pytest.raises(metapl.MetaplError, match=match):
        metapl.hypergradient(**problem.networks(), **problem.data(), mode=ALL[mode], inner_optimizer=inner)
    assert same(before, everything(problem, inner))
    trainer = metapl.BilevelTrainer(**problem.networks(), mode=ALL[mode], inner_optimizer=inner)
    with pytest.raises(metapl.MetaplError, match=match):
        trainer.step(**problem.data())
    assert same(before, everything(problem, inner))
    assert trainer.steps_done == 0


# ----------------------------------------------------------------------------------------- activation checkpoints


class Checkpointed(nn.Module):
    """Two blocks, each under a checkpoint of its own, or none."""

    def __init__(self, reentrant: bool | None, *, norm: bool = False, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Linear(16, 6)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6) if norm else nn.Identity(), nn.Tanh(), nn.Dropout(dropout))
            for _ in range(2)
        )
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        h = self.stem(x.flatten(1))
        for block in self.blocks:
            h = block(h) if self.reentrant is None else checkpoint(block, h, use_reentrant=self.reentrant)
        return self.head(h)


@pytest.mark.parametrize("options", [{}, {"norm": True}, {"dropout": 0.4}], ids=str)
@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("mode", [*EXACT, "reinforce_per_example"])
def test_checkpoints_in_the_student(mode: str, reentrant: bool, options: dict[str, Any]) -> None:
    torch.manual_seed(0)
    student = Checkpointed(reentrant, **options).double()
    other = copy.deepcopy(student)  # plain double backward refuses reentrant checkpoints
    other.reentrant = False
    check_exact(case(student), mode, case(other))


@pytest.mark.parametrize("mode", EXACT)
def test_a_checkpoint_changes_nothing(mode: str) -> None:
    torch.manual_seed(0)
    plain = Checkpointed(None, norm=True).double()
    grads = []
    for reentrant in (None, True, False):
        student = copy.deepcopy(plain)
        student.reentrant = reentrant
        grads.append(found(case(student), mode).grads)
    assert error(grads[1], grads[0]) < 1e-12
    assert error(grads[2], grads[0]) < 1e-12


@pytest.mark.parametrize("reentrant", [True, False])
def test_a_checkpoint_in_the_teacher(reentrant: bool) -> None:
    torch.manual_seed(0)
    teacher, student = Checkpointed(None, norm=True, dropout=0.4).double(), mlp().double()
    grads = []
    for kind in (None, reentrant):
        torch.manual_seed(1)
        teacher.reentrant = kind
        grads.append(found(case(student, teacher), "forward").grads)
    assert error(*grads) < 1e-12


# ------------------------------------------------------------------------------------------------------- buffers


class OwnNorm(nn.BatchNorm1d):
    """A batch norm with a forward of its own, which always updates its statistics."""

    def forward(self, x: Tensor) -> Tensor:
        mean, var = x.mean(0), x.var(0, correction=0)
        with torch.no_grad():
            self.running_mean.lerp_(mean.detach(), 0.1)
            self.running_var.lerp_(var.detach(), 0.1)
        return self.weight * (x - mean) / (var + self.eps).sqrt() + self.bias


class Counting(nn.Module):
    """Its outputs depend on how often it has run."""

    def __init__(self) -> None:
        super().__init__()
        self.net = mlp()
        self.register_buffer("count", torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        self.count = self.count + 1  # another tensor
        return self.net(x) * self.count.log()


class Centring(nn.Module):
    """Subtracts a running mean, updated in place before it is used, with the batch's gradient."""

    def __init__(self, track_gradient: bool = False) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)
        self.track_gradient = track_gradient
        self.register_buffer("mean", torch.zeros(6))

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        if self.track_gradient:
            mean = 0.7 * self.mean + 0.3 * h.mean(0)
            self.mean = mean.detach()
            return self.head((h - mean).tanh())
        with torch.no_grad():
            self.mean.mul_(0.7).add_(0.3 * h.mean(0))
        return self.head((h - self.mean).tanh())


class Rows(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(1, 2)


def with_instance_norm() -> nn.Module:
    norm = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
    return nn.Sequential(Rows(), norm, nn.Flatten(), nn.Linear(16, CLASSES))


def with_own_norm() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 6), OwnNorm(6), nn.Tanh(), nn.Linear(6, CLASSES))


BUFFERED: dict[str, Callable[[], nn.Module]] = {
    "instance_norm": with_instance_norm,
    "own_norm": with_own_norm,
    "counter": Counting,
    "centring_with_gradient": lambda: Centring(True),
}


def moved_on(build: Callable[[], nn.Module]) -> nn.Module:
    """The network after two batches."""
    torch.manual_seed(0)
    net = build().double()
    for _ in range(2):
        net(torch.randn(5, 1, 4, 4, dtype=torch.float64))
    return net


@pytest.mark.parametrize("student", BUFFERED)
@pytest.mark.parametrize("mode", [*EXACT, "difference_one_sided", "reinforce_per_example"])
def test_buffers_of_the_student(mode: str, student: str) -> None:
    check_exact(case(moved_on(BUFFERED[student])), mode)


@pytest.mark.parametrize("student", BUFFERED)
@pytest.mark.parametrize("mode", ["none", "reinforce", "loss_difference"])
def test_no_mode_moves_buffers_twice(mode: str, student: str) -> None:
    problem = case(moved_on(BUFFERED[student]))
    _, buffers = plainly(problem)
    metapl.BilevelTrainer(**problem.networks(), mode=mode).step(**problem.data())
    after = dict(problem.student.named_buffers())
    assert all(torch.equal(after[name], b) for name, b in buffers.items())


@pytest.mark.parametrize("mode", EXACT)
def test_running_statistics_by_which_the_student_normalises(mode: str) -> None:
    """Centring by a mean that follows the batch without its gradient: right, or refused."""
    problem = case(moved_on(Centring))
    if mode == "unrolled":
        check_exact(problem, mode)
    else:
        check_refused(problem, mode, "no_grad")


SPECTRAL: dict[str, Callable[[nn.Module], nn.Module]] = {
    "parametrization": nn.utils.parametrizations.spectral_norm,
    "hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("kind", SPECTRAL)
@pytest.mark.parametrize("mode", EXACT)
def test_spectral_norm(mode: str, kind: str) -> None:
    net = moved_on(
        lambda: nn.Sequential(nn.Flatten(), SPECTRAL[kind](nn.Linear(16, 6)), nn.Tanh(), nn.Linear(6, CLASSES))
    )
    problem = case(net)
    if mode == "forward":  # the power iteration writes to a given tensor
        check_refused(problem, mode, 'div_out has no derivative.*mode="difference"')
    else:
        check_exact(problem, mode)


@pytest.mark.parametrize("mode", ["unrolled", "difference"])
def test_a_spectral_norm_that_has_not_converged(mode: str) -> None:
    """The power iteration follows the weights without a gradient, which a difference of outputs sees all the same."""
    norm = nn.utils.parametrizations.spectral_norm
    net = moved_on(lambda: nn.Sequential(nn.Flatten(), norm(nn.Linear(16, 6)), nn.Tanh(), nn.Linear(6, CLASSES)))
    torch.manual_seed(4)
    with torch.no_grad():
        for b in net.buffers():
            b.copy_(F.normalize(torch.randn_like(b), dim=0))
    if mode == "unrolled":
        check_exact(case(net), mode)
    else:
        check_refused(case(net), mode, "not of one function")
