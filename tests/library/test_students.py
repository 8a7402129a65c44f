"""Students of unusual kinds whose gradient must be right, and whose state a step moves once.

The reference is double backward on the module itself, written out: the inner passes move its state one after another,
and the pass on the labeled batch sees what they left. State is what the contract says: buffers and frozen parameters.
"""

from __future__ import annotations

from typing import Any

import pytest
import reference
import torch
from problems_zoo import CLASSES, OPTIMISERS, Toy, mlp, toy
from reference import error
from replays import put, twin
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import Lookahead, MetaplError

RULE = OPTIMISERS["torch_sgd_nesterov"]

# ------------------------------------------------------------------------------------------------------------ students


class Moving(nn.Module):
    """Features that are scaled by state, which each pass moves."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(16, 6), nn.Linear(6, CLASSES)
        self.average = nn.Parameter(torch.ones(6), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1)).tanh()
        return self.head(h * self.factor(h.detach()))

    def factor(self, h: Tensor) -> Tensor:
        with torch.no_grad():
            self.average.mul_(0.8).add_(0.5)
        return self.average.clone()


def case(student: nn.Module, teacher: nn.Module | None = None) -> Toy:
    base = toy("mlp", rows=6)
    labeled = base.labeled[0][:6], base.labeled[1][:6]
    return Toy(teacher or base.teacher, student.double(), labeled, base.unlabeled, 0)


def plain() -> Toy:
    """The same whenever it is built."""
    torch.manual_seed(5)
    return case(mlp())


def ahead(problem: Toy, steps: int) -> list[Tensor]:
    return [problem.unlabeled + 0.1 * i for i in range(steps)]


def state_of(*networks: nn.Module) -> dict[str, Tensor]:
    """Copies of the buffers and of the frozen parameters."""
    found = {}
    for number, network in enumerate(networks):
        held = [*network.named_buffers(), *((n, p) for n, p in network.named_parameters() if not p.requires_grad)]
        found |= {f"{number}.{name}": t.detach().clone() for name, t in held}
    return found


def alike(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(t, b[name]) for name, t in a.items())


@pytest.mark.parametrize("mode", ["forward", "none"])
def test_micro_batches_move_state_one_after_another(mode: str) -> None:
    """Each is replayed from the state of its own pass; the labeled batch is seen with what the last one left."""
    torch.manual_seed(5)
    problem = case(Moving())
    teacher, student = twin(problem.teacher), twin(problem.student)
    z = torch.cat([student(x) for x in problem.unlabeled.chunk(2)])
    q = teacher(problem.unlabeled).softmax(-1)
    leaf = q.detach().requires_grad_()
    theta = {n: p for n, p in student.named_parameters() if p.requires_grad}
    g = torch.autograd.grad(reference.cross_entropy(leaf, z).mean(), list(theta.values()), create_graph=True)
    after = state_of(student)
    put(student, RULE.rule(theta, dict(zip(theta, g, strict=True)), None)[0])
    pairs = zip(*(t.chunk(2) for t in problem.labeled), strict=True)
    outer = torch.stack([F.cross_entropy(student(x), y) for x, y in pairs]).mean()
    phi = dict(teacher.named_parameters())
    total = (torch.autograd.grad(outer, leaf)[0] * q).sum()
    expected = dict(zip(phi, torch.autograd.grad(total, list(phi.values())), strict=True))
    trainer = metapl.BilevelTrainer(
        **problem.networks(), mode=mode, inner_optimizer=RULE.build(problem.student), accumulate=2
    )
    found = trainer.hypergradient(**problem.data())
    if mode == "forward":
        assert error(found.grads, expected) < 1e-9
    trainer.step(**problem.data())
    assert alike(state_of(problem.student), after)


# ----------------------------------------------------------------------------------------------- no cause for an alarm


@pytest.mark.parametrize("mode", ["forward", "difference"])
@pytest.mark.parametrize("seed", [39, 56, 61, 69, 84, 120])
def test_slopes_that_cancel_to_rounding_are_no_disagreement(seed: int, mode: str) -> None:
    """Batch normalization takes a bias away, and a first step of Adam makes its whole direction of such biases."""
    torch.manual_seed(seed)
    networks = [nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.ReLU(), nn.Linear(5, 3)) for _ in range(2)]
    inner, outer = (torch.optim.Adam(network.parameters(), lr=0.01) for network in networks[::-1])
    trainer = metapl.BilevelTrainer(*networks, mode, inner_optimizer=inner, outer_optimizer=outer)
    x, y = torch.randn(8, 4), torch.arange(8) % 3
    trainer.step((x, y), torch.randn(8, 4))


# ------------------------------------------------------------------------------------------ what changes between steps


def values(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def test_a_partly_frozen_student_can_be_thawed() -> None:
    """With the default optimizer; what is frozen stays, even where a stale gradient lies on it."""
    problem = plain()
    frozen, free = problem.student[1], problem.student[3]
    frozen.requires_grad_(False)
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    frozen.weight.grad = torch.ones_like(frozen.weight)
    before = values(problem.student)
    trainer.step(**problem.data())
    assert torch.equal(frozen.weight, before["1.weight"])
    assert not torch.equal(free.weight, before["3.weight"])
    frozen.requires_grad_(True)
    trainer.step(**problem.data())
    assert not torch.equal(frozen.weight, before["1.weight"])


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_layer_is_thawed_by_add_param_group_and_refused_without(who: str) -> None:
    """The step is then that of a trainer built on the whole network, where there is no momentum."""
    ends = []
    for late in (True, False):
        problem = plain()
        network = problem.networks()[who]
        layers = [p for p in network.parameters() if not late or p.shape[0] == 3]
        network[1].requires_grad_(not late)
        optimizer = torch.optim.SGD(layers, lr=0.2)
        options: dict[str, Any] = {"inner_optimizer" if who == "student" else "outer_optimizer": optimizer}
        trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward", **options)
        if late:
            network[1].requires_grad_(True)
            before = values(problem.teacher), values(problem.student)
            with pytest.raises(MetaplError):
                trainer.step(**problem.data())
            assert all(map(alike, before, (values(problem.teacher), values(problem.student))))
            optimizer.add_param_group({"params": list(network[1].parameters())})
        trainer.step(**problem.data())
        ends.append({**values(problem.teacher), **{f"s.{n}": p for n, p in values(problem.student).items()}})
    assert error(*ends) < 1e-14


@pytest.mark.parametrize("who", ["teacher", "student"])
def test_a_head_that_is_replaced_is_refused(who: str) -> None:
    """Its weights are in no optimizer."""
    problem = plain()
    trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
    problem.networks()[who][3] = nn.Linear(6, CLASSES).double()
    before = values(problem.teacher), values(problem.student)
    with pytest.raises(MetaplError):
        trainer.step(**problem.data())
    assert all(map(alike, before, (values(problem.teacher), values(problem.student))))


class Words(nn.Module):
    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embed, self.head = nn.EmbeddingBag(10, 4, sparse=sparse), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.embed(x))


def test_a_teacher_may_have_sparse_gradients() -> None:
    ids = torch.randint(0, 10, (9, 4), generator=torch.Generator().manual_seed(0))
    ends = []
    for sparse in (False, True):
        torch.manual_seed(0)
        teacher, student = Words(sparse), Words(False)
        outer = torch.optim.SGD(teacher.parameters(), lr=0.1)
        metapl.BilevelTrainer(teacher, student, "difference", outer_optimizer=outer).step(
            (ids[:5], torch.arange(5) % 3), ids[5:]
        )
        ends.append(values(teacher))
    assert error(*ends) < 1e-6


def test_over_several_steps_a_student_may_have_sparse_gradients() -> None:
    ids = torch.randint(0, 10, (9,), generator=torch.Generator().manual_seed(0))
    ends = []
    for mode, sparse in (("forward", True), ("unrolled", True), ("unrolled", False)):
        torch.manual_seed(0)
        teacher = nn.Sequential(nn.Embedding(10, 3)).double()
        student = nn.Sequential(nn.Embedding(10, 4, sparse=sparse), nn.Tanh(), nn.Linear(4, 3)).double()
        inner = torch.optim.SGD(student.parameters(), lr=0.1)
        trainer = metapl.BilevelTrainer(teacher, student, mode, lookahead=3, inner_optimizer=inner)
        trainer.step((ids[:5], torch.arange(5) % 3), Lookahead([ids[5:]] * 3))
        ends.append(values(teacher))
    assert error(ends[0], ends[2]) < 1e-12
    assert error(ends[1], ends[2]) < 1e-12


def test_a_step_takes_gradients_within_no_grad_too() -> None:
    ends = []
    for context in (torch.no_grad(), torch.enable_grad()):
        problem = plain()
        trainer = metapl.BilevelTrainer(**problem.networks(), mode="forward")
        with context:
            trainer.step(**problem.data())
        ends.append({**values(problem.teacher), **{f"s.{n}": p for n, p in values(problem.student).items()}})
    assert alike(*ends)
