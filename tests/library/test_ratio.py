"""feedback_ratio: the ratio of the norms of the two gradients in the teacher's parameters, and nothing else changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from problems_zoo import toy, trainer_for
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import metapl


class OfTheSignal:
    """A teacher loss in the outputs that the feedback goes through as well."""

    name = "of_the_signal"

    def __call__(self, teacher: nn.Module, *, signal: metapl.Signal, **batches: object) -> Tensor:
        assert signal.outputs is not None
        return signal.outputs.square().mean()


LOSSES = [(metapl.CrossEntropy(0.1),), (metapl.CrossEntropy(0.1), OfTheSignal()), (OfTheSignal(),)]


def moved(**options: Any) -> tuple[Tensor, Any]:
    """How far a step at rate 1 has moved the teacher, and its report."""
    case = toy("mlp")
    before = parameters_to_vector(case.teacher.parameters()).detach()
    outer = torch.optim.SGD(case.teacher.parameters(), lr=1.0)
    trainer = trainer_for(case, outer_optimizer=outer, generator=torch.Generator().manual_seed(3), **options)
    report = trainer.step(tuple(t[:4] for t in case.labeled), case.unlabeled)
    return parameters_to_vector(case.teacher.parameters()).detach() - before, report


@pytest.mark.parametrize("losses", LOSSES)
@pytest.mark.parametrize("given", [{}, {"accumulate": 2}, {"recompute_teacher": True}], ids=str)
@pytest.mark.parametrize("mode", ["forward", "reinforce"])
def test_the_norms_of_the_two_gradients_have_this_ratio(
    mode: str, given: dict[str, Any], losses: tuple[Any, ...]
) -> None:
    """And the step is that of the weight which the report says."""
    found, report = moved(mode=mode, feedback_ratio=0.25, teacher_losses=losses, **given)
    own, _ = moved(mode=mode, feedback_weight=0.0, teacher_losses=losses, **given)
    assert float((found - own).norm() / own.norm()) == pytest.approx(0.25)
    by_weight, _ = moved(mode=mode, feedback_weight=report.feedback_weight, teacher_losses=losses, **given)
    torch.testing.assert_close(found, by_weight)


def test_feedback_that_is_zero_stays_zero() -> None:
    found, report = moved(mode="none", feedback_ratio=0.25)
    torch.testing.assert_close(found, moved(mode="none")[0])
    assert report.feedback_weight == 0
