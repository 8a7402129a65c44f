"""Problems and losses of a user's own, against double backward written out."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_zoo import Toy, mlp, toy, unmoved
from reference import error, weights
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from trainers import trainer_for, values

import metapl
from metapl import MetaplError, Signal


class Labeller(nn.Module):
    """A teacher with a method of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.network = mlp().double()

    def forward(self, x: Tensor) -> Tensor:
        return self.network(x)

    def label(self, x: Tensor) -> Tensor:
        return self.network(x)


class Reweighting(metapl.BilevelProblem):
    """The teacher weighs each example by the student's own loss on it; a batch is (x, noisy label)."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        losses = F.cross_entropy(student_outputs, batch[1], reduction="none")
        return Signal(teacher(losses.unsqueeze(-1)).squeeze(-1).sigmoid())

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value * F.cross_entropy(outputs, batch[1], reduction="none")

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


def reweighting(**options: Any) -> tuple[Toy, metapl.BilevelTrainer]:
    case = toy("mlp", teacher=lambda: nn.Sequential(nn.Linear(1, 4), nn.Tanh(), nn.Linear(4, 1)))
    case = Toy(case.teacher, case.student, case.labeled, (case.unlabeled, torch.tensor([2, 0, 1, 1])), case.seed)
    return case, trainer_for(case, problem=Reweighting(), **options)


def test_a_problem_of_ones_own_needs_no_teacher_losses() -> None:
    """By default it has none; the teacher's step is the hypergradient's."""
    case, trainer = reweighting(outer_optimizer=None)
    trainer.outer_optimizer.param_groups[0].update(lr=1.0, momentum=0.0, nesterov=False, weight_decay=0.0)
    inner = trainer.inner_optimizer
    found = metapl.hypergradient(**case.networks(), **case.data(), problem=Reweighting(), inner_optimizer=inner)
    before = values(case.teacher)
    trainer.step(**case.data())
    assert error({n: before[n] - p for n, p in values(case.teacher).items()}, found.grads) < 1e-12
    with pytest.raises(MetaplError):
        reweighting(feedback_ratio=0.1)
    with pytest.raises(MetaplError):
        trainer.teacher_step(**case.data())


class Anchored(metapl.PseudoLabels):
    """The student's logits are drawn towards the teacher's, which the loss reads from ``signal.outputs``."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        anchor = self.read(signal.outputs)
        return super().inner_loss(outputs, signal, batch, params) + 0.1 * (anchor - outputs).square().mean(1)

    def read(self, outputs: Any) -> Tensor:
        return outputs.detach()


class AnchoredWithGraph(Anchored):
    def read(self, outputs: Any) -> Tensor:
        return outputs


@pytest.mark.parametrize("problem", [Anchored, AnchoredWithGraph], ids=["constants", "with_graph"])
@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_an_inner_loss_may_read_the_teachers_outputs(mode: str, problem: type[Anchored]) -> None:
    """Against double backward with the graph through the label, and through the outputs where the loss keeps it."""
    case = toy("mlp")
    theta, phi = weights(case.student), weights(case.teacher)
    z = functional_call(case.student, theta, (case.unlabeled,))
    logits = functional_call(case.teacher, phi, (case.unlabeled,))
    anchor = problem.read(problem(), logits)
    losses = -(logits.softmax(-1) * z.log_softmax(-1)).sum(-1) + 0.1 * (anchor - z).square().mean(1)
    g = torch.autograd.grad(losses.mean(), list(theta.values()), create_graph=True)
    moved = {n: p - 0.3 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(functional_call(case.student, moved, (case.labeled[0],)), case.labeled[1])
    expected = dict(zip(phi, torch.autograd.grad(outer, list(phi.values())), strict=True))
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    found = metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=problem(), inner_optimizer=inner)
    assert error(found.grads, expected) < (1e-4 if mode == "difference" else 1e-9)
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    before = {n: p.detach().clone() for n, p in case.teacher.named_parameters()}
    outer_optimizer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer_for(
        case, mode, problem=problem(), inner_optimizer=inner, outer_optimizer=outer_optimizer, teacher_losses=()
    ).step(**case.data())
    moved = {n: before[n] - p.detach() for n, p in case.teacher.named_parameters()}
    assert error(moved, expected) < (1e-4 if mode == "difference" else 1e-9)


class OutputsAlone(AnchoredWithGraph):
    """Nothing but the teacher's logits teaches the student."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return (signal.outputs - outputs).square().mean(1)


@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_an_inner_loss_may_read_nothing_but_the_teachers_outputs(mode: str) -> None:
    case = toy("mlp")
    found = {
        one: metapl.hypergradient(
            **case.networks(),
            **case.data(),
            mode=one,
            problem=OutputsAlone(),
            inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        )
        for one in (mode, "unrolled")
    }
    assert error(found[mode].grads, found["unrolled"].grads) < (1e-4 if mode == "difference" else 1e-9)
    assert not found[mode].feedback.any()


class Steep(AnchoredWithGraph):
    """Its derivative in the teacher's outputs is infinite."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        steep = (signal.outputs - signal.outputs.detach()).abs().sqrt().sum(1)
        return super().inner_loss(outputs, signal, batch, params) + steep * outputs.sum(1)


@pytest.mark.parametrize("mode", ["unrolled", "forward", "difference"])
def test_feedback_that_is_not_finite_is_refused_in_every_field(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=Steep())
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    with pytest.raises(MetaplError):
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=Steep(), inner_optimizer=inner)


class Shares(metapl.BilevelProblem):
    """The teacher weighs each example against the others of the batch that the loss is given."""

    def signal(self, teacher: nn.Module, batch: Any, student_outputs: Tensor, *, generator: Any) -> Signal:
        return Signal(teacher(batch).sigmoid()[:, 0])

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        return signal.value / signal.value.mean() * outputs.square().sum(1)

    def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(outputs, batch[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("mode", ["forward", "difference"])
def test_micro_batches_and_a_loss_that_looks_at_the_whole_batch(mode: str, dtype: torch.dtype) -> None:
    """It is given a micro-batch, in the student's step as in the feedback on it."""
    case = toy("mlp", rows=8, dtype=dtype)
    case = Toy(case.teacher, case.student, (case.labeled[0][:8], case.labeled[1][:8]), case.unlabeled, 0)
    theta, phi = weights(case.student), weights(case.teacher)
    z = functional_call(case.student, theta, (case.unlabeled,)).square().sum(1)
    share = functional_call(case.teacher, phi, (case.unlabeled,)).sigmoid()[:, 0]
    halves = [(q / q.mean() * one).mean() for q, one in zip(share.chunk(2), z.chunk(2), strict=True)]
    g = torch.autograd.grad((halves[0] + halves[1]) / 2, list(theta.values()), create_graph=True)
    moved = {n: p - 0.3 * d for (n, p), d in zip(theta.items(), g, strict=True)}
    outer = F.cross_entropy(functional_call(case.student, moved, (case.labeled[0],)), case.labeled[1])
    grads = torch.autograd.grad(outer, list(phi.values()))
    before = values(case.teacher)
    trainer = trainer_for(
        case,
        mode,
        problem=Shares(),
        accumulate=2,
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=1.0),
    )
    trainer.step(**case.data())
    found = {n: before[n] - p for n, p in values(case.teacher).items()}
    assert error(found, dict(zip(phi, grads, strict=True))) < 1e-3
