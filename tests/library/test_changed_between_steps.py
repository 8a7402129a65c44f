"""Networks that are cast between steps: the step is that of a trainer that is built anew there."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems_zoo import Toy, noisy_teacher, toy
from torch import Tensor
from torch.utils import _pytree as pytree

import metapl


def in_training(mode: Any = "forward", kind: type[torch.optim.Optimizer] = torch.optim.Adam) -> tuple[Toy, Any]:
    """Two steps into training."""
    case = toy("batch_norm", teacher=noisy_teacher)
    trainer = metapl.BilevelTrainer(
        **case.networks(),
        mode=mode,
        inner_optimizer=kind(case.student.parameters(), lr=0.01),
        outer_optimizer=torch.optim.SGD(case.teacher.parameters(), lr=0.1),
        verify=False,
    )
    for _ in range(2):
        trainer.step(**case.data())
    return case, trainer


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.SGD])
@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce"])
def test_networks_that_are_cast_take_the_step_of_a_new_trainer(mode: str, kind: type[torch.optim.Optimizer]) -> None:
    """Of weights in half precision, the adjoint of the update is computed in float64."""
    case, trainer = in_training(mode, kind)
    for network in case.networks().values():
        network.bfloat16()
    for state in (trainer.inner_optimizer.state, trainer.outer_optimizer.state):
        for held in state.values():
            held.update({k: t.bfloat16() for k, t in held.items() if isinstance(t, Tensor) and k != "step"})
    data = {k: pytree.tree_map(cast, value) for k, value in case.data().items()}
    twin, inner, outer = copy.deepcopy((case.networks(), trainer.inner_optimizer, trainer.outer_optimizer))
    again = metapl.BilevelTrainer(**twin, mode=mode, inner_optimizer=inner, outer_optimizer=outer, verify=False)
    ends = []
    for one, networks in ((trainer, case.networks()), (again, twin)):
        torch.manual_seed(3)
        report = one.step(**data)
        ends.append([report.feedback, *(p.detach() for net in networks.values() for p in net.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


def cast(t: Tensor) -> Tensor:
    return t.bfloat16() if t.is_floating_point() else t
