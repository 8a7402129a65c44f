"""Mode ``none`` takes any optimizer of ``torch.optim``, since nothing is differentiated."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import toy
from torch import nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError

Build = Callable[[nn.Module], torch.optim.Optimizer]
OTHERS: dict[str, Build] = {
    "RMSprop": lambda module: torch.optim.RMSprop(module.parameters(), lr=0.01, momentum=0.9),
    "Adagrad": lambda module: torch.optim.Adagrad(module.parameters(), lr=0.1),
    "NAdam": lambda module: torch.optim.NAdam(module.parameters(), lr=0.01),
    "Rprop": lambda module: torch.optim.Rprop(module.parameters(), lr=0.01),
}


@pytest.mark.parametrize("lookahead", [1, 2])
@pytest.mark.parametrize("name", OTHERS)
def test_the_students_steps_are_the_optimizers_own(name: str, lookahead: int) -> None:
    """They are compared with a loop by hand.

    The teacher stays as it is, and the student learns its soft labels.
    """
    case = toy("mlp")
    twin = copy.deepcopy(case.student)
    trainer = metapl.BilevelTrainer(
        **case.networks(),
        mode="none",
        inner_optimizer=OTHERS[name](case.student),
        teacher_losses=(),
        lookahead=lookahead,
    )
    optimizer = OTHERS[name](twin)
    labels = case.teacher(case.unlabeled).softmax(-1).detach()
    unlabeled: Any = case.unlabeled
    if lookahead > 1:
        unlabeled = metapl.Lookahead([case.unlabeled] * lookahead)
    for _ in range(3):
        trainer.step(case.labeled, unlabeled)
        for _ in range(lookahead):
            optimizer.zero_grad()
            F.cross_entropy(twin(case.unlabeled), labels).backward()
            optimizer.step()
    for ours, theirs in zip(case.student.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_a_training_goes_on_from_a_saved_state() -> None:
    case = toy("mlp")
    trainer = metapl.BilevelTrainer(
        **case.networks(), mode="none", inner_optimizer=OTHERS["RMSprop"](case.student)
    )
    trainer.step(case.labeled, case.unlabeled)
    state = trainer.state_dict()
    ends = []
    for _ in range(2):
        trainer.load_state_dict(state)
        trainer.step(case.labeled, case.unlabeled)
        ends.append(torch.cat([p.detach().flatten() for p in case.student.parameters()]))
    assert torch.equal(*ends)


def test_it_is_refused_where_a_derivative_or_a_closure_is_needed() -> None:
    case = toy("mlp")
    rmsprop = OTHERS["RMSprop"](case.student)
    with pytest.raises(MetaplError, match="SGD, Adam, AdamW"):
        metapl.BilevelTrainer(**case.networks(), mode="forward", inner_optimizer=rmsprop)
    compiled = metapl.BilevelTrainer(
        **case.networks(), mode="none", inner_optimizer=rmsprop, compile=True
    )
    with pytest.raises(MetaplError, match="an optimizer without a rule here"):
        compiled.step(case.labeled, case.unlabeled)
    trainer = metapl.BilevelTrainer(**case.networks(), mode="none", inner_optimizer=rmsprop)
    with pytest.raises(MetaplError, match="RMSprop, which has no derivative here"):
        trainer.hypergradient(case.labeled, case.unlabeled, "forward")
    with pytest.raises(MetaplError, match="LBFGS"):
        metapl.BilevelTrainer(
            **case.networks(),
            mode="none",
            inner_optimizer=torch.optim.LBFGS(case.student.parameters()),
        )


class Counting(torch.optim.RMSprop):
    """An optimizer with a state of its own outside of its groups."""

    steps = 0


def test_several_steps_of_an_optimizer_of_ones_own_are_refused() -> None:
    """They are taken by fresh ones of its type.

    These would lack what it has besides groups and states.
    """
    case = toy("mlp")
    hooked = OTHERS["RMSprop"](case.student)
    hooked.register_step_pre_hook(lambda *args: None)
    for optimizer in (Counting(case.student.parameters(), lr=0.01), hooked):
        trainer = metapl.BilevelTrainer(
            **case.networks(), mode="none", inner_optimizer=optimizer, lookahead=2
        )
        with pytest.raises(
            MetaplError, match=r"expected one step, or an optimizer of torch.optim without hooks"
        ):
            trainer.step(case.labeled, metapl.Lookahead([case.unlabeled] * 2))
        one_step = metapl.BilevelTrainer(**case.networks(), mode="none", inner_optimizer=optimizer)
        one_step.step(case.labeled, case.unlabeled)


def test_where_the_students_optimizer_fails_nothing_has_moved() -> None:
    """Sparse Adam takes no dense gradients; by then the teacher's optimizer has stepped."""
    case = toy("mlp")
    trainer = metapl.BilevelTrainer(
        **case.networks(),
        mode="none",
        inner_optimizer=torch.optim.SparseAdam(list(case.student.parameters())),
    )
    state_before = copy.deepcopy(trainer.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match="SparseAdam does not support dense"):
            trainer.step(case.labeled, case.unlabeled)
    state_after = trainer.state_dict()
    for role in ("teacher", "student"):
        for name, value in state_before[role].items():
            assert torch.equal(value, state_after[role][name]), name
    assert state_after["outer"]["state"] == state_before["outer"]["state"] == {}
    assert state_after["steps_done"] == 0
