"""What is refused or fails has moved nothing; a state is a snapshot; threads do not meet."""

from __future__ import annotations

import copy
import dataclasses
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torchopt
from problems_zoo import ANYWHERE, Toy, everything, same, toy, unmoved
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree
from trainers import OnceDifferentiable, Supervised, trainer_for

import metapl
from metapl import MetaplError, Signal

# ----------------------------------------------------------------------------------------------- nothing half done


@pytest.mark.parametrize("mode", ANYWHERE)
def test_a_student_that_is_nan_does_not_poison_the_teacher(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode)
    with torch.no_grad():
        case.student[3].weight.fill_(torch.nan)
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())


@pytest.mark.parametrize("mode", [mode for mode in ANYWHERE if mode != "none"])
def test_nor_does_one_that_diverges_within_its_step(mode: str) -> None:
    case = toy("mlp")
    trainer = trainer_for(case, mode, inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=float("inf")))
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
    call = metapl.hypergradient
    with unmoved(case), pytest.raises(MetaplError):
        call(**case.networks(), **case.data(), mode=mode, inner_optimizer=trainer.inner_optimizer)


@pytest.mark.parametrize("way", ["step", "hypergradient"])
def test_ones_own_generator_is_put_back_after_a_refusal(way: str) -> None:
    class Failing(metapl.PseudoLabels):
        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            raise ZeroDivisionError

    case, generator = toy("mlp"), torch.Generator().manual_seed(3)
    before = generator.get_state()
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    options = {"mode": "reinforce", "problem": Failing(), "inner_optimizer": inner, "generator": generator}
    trainer = trainer_for(case, **options)
    call = {
        "step": lambda: trainer.step(**case.data()),
        "hypergradient": lambda: metapl.hypergradient(**case.networks(), **case.data(), **options),
    }[way]
    with pytest.raises(ZeroDivisionError):
        call()
    assert torch.equal(generator.get_state(), before)


def test_a_student_optimizer_that_fails_leaves_the_teacher_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights, statistics, optimizer and gradients, and the generator."""
    case = toy("batch_norm", teacher=lambda: nn.Sequential(nn.Flatten(), nn.Linear(16, 3), nn.BatchNorm1d(3)))
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    outer = torch.optim.Adam(case.teacher.parameters())
    trainer = trainer_for(case, inner_optimizer=inner, outer_optimizer=outer)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(torch.optim.SGD, "step", fail)
    before = everything(case, inner, outer)
    with pytest.raises(ZeroDivisionError):
        trainer.step(**case.data())
    assert same(before, everything(case, inner, outer))
    assert trainer.steps_done == 0


@pytest.mark.parametrize("after", [0, 1])
@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_a_teacher_optimizer_that_fails_leaves_both_networks_alone(register: str, transform: bool, after: int) -> None:
    """Their weights, statistics, optimizers and gradients, on the first step and later."""
    case = toy("batch_norm")
    sgd = torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9)
    outer = torch.optim.Adam(case.teacher.parameters())
    inner = torchopt.sgd(0.1, momentum=0.9) if transform else sgd
    trainer = trainer_for(case, inner_optimizer=inner, outer_optimizer=outer)
    for _ in range(after):
        trainer.step(**case.data())
    for p in case.teacher.parameters():
        p.grad = torch.ones_like(p)

    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    getattr(outer, register)(fail)
    before = everything(case, sgd, outer), copy.deepcopy(trainer.update.read_state())
    with pytest.raises(ZeroDivisionError):
        trainer.step(**case.data())
    now = everything(case, sgd, outer), trainer.update.read_state()
    assert same(*([t for t in pytree.tree_leaves(one) if isinstance(t, Tensor)] for one in (before, now)))
    assert trainer.steps_done == after


def test_a_refused_step_leaves_the_teachers_gradients() -> None:
    case = toy("mlp")
    outer = torch.optim.Adam(case.teacher.parameters())
    trainer = trainer_for(case, outer_optimizer=outer)
    for p in case.teacher.parameters():
        p.grad = torch.full_like(p, 0.25)
    with unmoved(case, outer), pytest.raises(MetaplError):
        trainer.step(labeled=case.data()["labeled"], unlabeled="images")


def test_an_optimizer_that_evaluates_the_loss_is_refused() -> None:
    case = toy("mlp")
    outer = torch.optim.LBFGS(case.teacher.parameters())
    with pytest.raises(MetaplError):
        trainer_for(case, outer_optimizer=outer)
    with pytest.raises(MetaplError):
        metapl.LossTrainer(case.teacher, optimizer=outer)


@pytest.mark.parametrize("register", ["register_step_pre_hook", "register_step_post_hook"])
def test_hooks_of_the_students_optimizer_are_refused(register: str) -> None:
    """They may change the step that is differentiated: gradients before it, weights after it."""
    case = toy("mlp")
    inner = torch.optim.SGD(case.student.parameters(), lr=0.1)
    trainer = trainer_for(case, inner_optimizer=inner)
    getattr(inner, register)(lambda *given: None)
    with unmoved(case, inner), pytest.raises(MetaplError):
        trainer.step(**case.data())
    with pytest.raises(MetaplError):
        trainer_for(case, inner_optimizer=inner)


class Elsewhere(nn.Module):
    """A student that reads a weight from a list of its own, beside the layer that holds it."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Sequential(nn.Flatten(), nn.Linear(16, 5), nn.Tanh()), nn.Linear(5, 3)
        self.double()
        self.kept = [self.head.weight]

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.body(x), self.kept[0], self.head.bias)


@pytest.mark.parametrize("mode", [mode for mode in metapl.MODES if mode != "none"])
def test_a_weight_that_is_read_from_elsewhere_than_its_module_is_refused(mode: str) -> None:
    """Other weights in the module's place are not seen there: the labelled loss was that at the old one."""
    case = toy("mlp")
    case = Toy(case.teacher, Elsewhere(), case.labeled, case.unlabeled, 0)
    trainer = trainer_for(case, mode)
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
    trainer_for(case, "none").step(**case.data())


@pytest.mark.parametrize("mode", [mode for mode in ANYWHERE if mode != "none"])
def test_an_outer_loss_per_example_is_refused(mode: str) -> None:
    class PerExample(metapl.PseudoLabels):
        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1], reduction="none")

    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=PerExample())
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())


def test_a_teacher_loss_per_example_is_refused() -> None:
    class PerExample(Supervised):
        def __call__(self, teacher: Any, **given: Any) -> Tensor:
            return F.cross_entropy(teacher(given["labeled"][0]), given["labeled"][1], reduction="none")

    case = toy("mlp")
    trainer = trainer_for(case, teacher_losses=(PerExample(),))
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "difference", "reinforce", "loss_difference"])
def test_a_signal_without_the_teachers_graph_is_refused(mode: str, recompute: bool) -> None:
    class Detached(metapl.PseudoLabels):
        def signal(self, *given: Any, **options: Any) -> Signal:
            return super().signal(*given, **options).detached()

    case = toy("mlp")
    trainer = trainer_for(case, mode, problem=Detached(), recompute_teacher=recompute)
    text = r"signal \((value|log_prob)\) carries no gradient.*detached.*mode=\"none\""
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
    inner = trainer.inner_optimizer
    with unmoved(case), pytest.raises(MetaplError):
        metapl.hypergradient(**case.networks(), **case.data(), mode=mode, problem=Detached(), inner_optimizer=inner)
    trainer_for(case, "none", problem=Detached()).step(**case.data())


# ------------------------------------------------------------------------------------------------------- snapshots


@pytest.mark.parametrize("inner", ["sgd", "adam", "torchopt"])
def test_a_state_dict_is_a_snapshot(inner: str) -> None:
    """Steps leave it as it is, also those after it was loaded; what it brings back is the run from there, twice."""
    case = toy("batch_norm")
    optimizer = {
        "sgd": lambda: torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9),
        "adam": lambda: torch.optim.Adam(case.student.parameters()),
        "torchopt": lambda: torchopt.sgd(0.1, momentum=0.9),
    }[inner]()
    trainer = trainer_for(case, metapl.feedback.Reinforce(baseline=0.9), inner_optimizer=optimizer)
    trainer.step(**case.data())
    best, runs = trainer.state_dict(), []
    for _ in range(2):
        trainer.load_state_dict(best)
        torch.manual_seed(0)
        for _ in range(3):
            trainer.step(**case.data())
        runs.append(everything(case, generator=False))
    assert same(*runs)


def test_so_is_that_of_a_trainer_of_one_network() -> None:
    case = toy("batch_norm")
    optimizer = torch.optim.SGD(case.student.parameters(), lr=0.1, momentum=0.9)
    trainer = metapl.LossTrainer(case.student, optimizer=optimizer)
    trainer.step(case.labeled)
    best, runs = trainer.state_dict(), []
    for _ in range(2):
        trainer.load_state_dict(best)
        for _ in range(3):
            trainer.step(case.labeled)
        runs.append(everything(case, generator=False))
    assert same(*runs)


def test_the_weights_of_a_fit_are_a_snapshot() -> None:
    case = toy("batch_norm")
    trainer = trainer_for(case)
    found = trainer.fit([case.labeled], [case.unlabeled], steps=2, progress=False)
    before = copy.deepcopy(found.weights)
    trainer.step(**case.data())
    assert all(torch.equal(t, before[name]) for name, t in found.weights.items())
    assert not torch.equal(case.student[0].weight, before["0.weight"])


# ------------------------------------------------------------------------------------------------------- two threads


def in_threads(*runs: Callable[[], Any]) -> None:
    failures: list[BaseException] = []

    def guarded(run: Callable[[], Any]) -> None:
        try:
            run()
        except BaseException as failure:
            failures.append(failure)

    threads = [threading.Thread(target=guarded, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_threads_take_turns() -> None:
    """Two trainers as well: dropout masks are replayed by generators that the whole process shares."""
    under_way: list[int] = []

    class Watching(metapl.PseudoLabels):
        def signal(self, *given: Any, **options: Any) -> Signal:
            assert under_way == []
            under_way.append(threading.get_ident())
            time.sleep(0.002)
            return super().signal(*given, **options)

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            assert under_way == [threading.get_ident()]
            under_way.clear()
            return super().outer_loss(outputs, batch)

    cases = [toy("dropout", seed=seed) for seed in range(2)]
    trainers = [trainer_for(case, problem=Watching()) for case in cases]
    inner = torch.optim.SGD(cases[1].student.parameters(), lr=0.1)
    in_threads(
        lambda: [trainers[0].step(**cases[0].data()) for _ in range(10)],
        lambda: [
            metapl.hypergradient(**cases[1].networks(), **cases[1].data(), problem=Watching(), inner_optimizer=inner)
            for _ in range(10)
        ],
    )


def test_one_trainer_steps_in_two_threads() -> None:
    """Twenty steps are twenty steps."""
    case, twin = toy("mlp"), toy("mlp")
    trainer, again = trainer_for(case, "difference"), trainer_for(twin, "difference")
    in_threads(*[lambda: [trainer.step(**case.data()) for _ in range(10)]] * 2)
    for _ in range(20):
        again.step(**twin.data())
    assert trainer.steps_done == 20
    assert same(everything(case, generator=False), everything(twin, generator=False))


@pytest.mark.parametrize("mode", ["unrolled", "forward"])
def test_a_backward_pass_that_cannot_be_differentiated_is_refused_by_name(mode: str) -> None:
    """Double backward gives zero for it, without a word."""
    base = toy("mlp")
    case = dataclasses.replace(base, student=OnceDifferentiable(16, 3).double())
    trainer = trainer_for(case, mode)
    text = "marked with @once_differentiable" if mode == "unrolled" else "lacks a derivative that it needs"
    with unmoved(case), pytest.raises(MetaplError):
        trainer.step(**case.data())
