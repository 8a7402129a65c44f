"""Micro-batches give the numbers of the whole batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import metapl
from metapl import UDA, CrossEntropy
from metapl.feedback import Difference, Reinforce
from metapl.problems.losses import TeacherLoss
from metapl.training.loss_trainer import LossTrainer


def _networks() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    return tuple(
        nn.Sequential(nn.Linear(5, 8), nn.GroupNorm(2, 8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2)
    )


def _after(mode: object, accumulate: int, **options: object) -> tuple[list[torch.Tensor], dict[str, float]]:
    teacher, student = _networks()
    optimizer = torch.optim.SGD(student.parameters(), lr=0.3, momentum=0.9, nesterov=True)
    trainer = metapl.BilevelTrainer(
        teacher,
        student,
        mode,
        inner_optimizer=optimizer,
        accumulate=accumulate,
        feedback_weight=5.0,
        verify=False,
        generator=torch.Generator().manual_seed(3),
        **options,
    )
    draws = torch.Generator().manual_seed(1)
    for _ in range(3):
        x, weak, strong = (torch.randn(8, 5, generator=draws, dtype=torch.float64) for _ in range(3))
        report = trainer.step((x, torch.randint(0, 3, (8,), generator=draws)), (weak, strong))
    weights = [p.detach() for module in (teacher, student) for p in module.parameters()]
    return weights, report.as_dict()


@pytest.mark.parametrize(
    "mode",
    [
        "forward",
        "difference",
        Difference(one_sided=True),
        "reinforce",
        Reinforce(similarity="cosine", baseline=0.9),
        "reinforce_per_example",
        "loss_difference",
        "none",
    ],
    ids=str,
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_nothing_but_memory(mode: object, accumulate: int) -> None:
    whole, report = _after(mode, 1, clip_norm=0.5)
    parts, same = _after(mode, accumulate, clip_norm=0.5)
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)
    assert report.keys() == same.keys()
    for name, value in report.items():
        assert same[name] == pytest.approx(value, rel=1e-5, abs=1e-9, nan_ok=True), name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("mode", ["forward", "difference", "reinforce", "reinforce_per_example"])
def test_the_gradient_that_is_looked_at_is_the_one_that_a_step_applies(mode: str, recompute: bool) -> None:
    """With batch norm in both networks, where micro-batches do change the numbers."""
    torch.manual_seed(0)
    teacher, student = (
        nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Linear(8, 3)).double() for _ in range(2)
    )
    labeled, unlabeled = (torch.randn(8, 5).double(), torch.arange(8) % 3), torch.randn(12, 5).double()
    found = {}
    for parts in (1, 2, 4):
        networks = copy.deepcopy(teacher), copy.deepcopy(student)
        trainer = metapl.BilevelTrainer(
            *networks,
            mode,
            inner_optimizer=torch.optim.SGD(networks[1].parameters(), lr=0.3, momentum=0.9),
            outer_optimizer=torch.optim.SGD(networks[0].parameters(), lr=1.0),
            teacher_losses=(),
            recompute_teacher=recompute,
            accumulate=parts,
            verify=False,
            generator=torch.Generator().manual_seed(3),
        )
        seen = trainer.hypergradient(labeled, unlabeled, generator=torch.Generator().manual_seed(3)).grads
        before = {name: p.detach().clone() for name, p in networks[0].named_parameters()}
        trainer.step(labeled, unlabeled)
        found[parts] = torch.cat([g.flatten() for g in seen.values()])
        moved = torch.cat([(before[name] - p.detach()).flatten() for name, p in networks[0].named_parameters()])
        torch.testing.assert_close(found[parts], moved, rtol=1e-6, atol=1e-9)
        if mode == "forward":
            exact = trainer.hypergradient(labeled, unlabeled, "unrolled").grads  # which a trainer does not split
            again = trainer.hypergradient(labeled, unlabeled).grads
            for name, g in again.items():
                torch.testing.assert_close(g, exact[name], rtol=1e-7, atol=1e-10)
    assert not torch.allclose(found[1], found[2], rtol=1e-2)


def _alone(accumulate: int, losses: tuple[TeacherLoss, ...]) -> tuple[nn.Module, list[dict]]:
    model, _ = _networks()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    trainer = LossTrainer(model, losses, optimizer=optimizer, clip_norm=0.5, accumulate=accumulate)
    draws = torch.Generator().manual_seed(1)
    reports = []
    for _ in range(3):
        labels = torch.randint(0, 3, (8,), generator=draws)
        x, weak, strong = (torch.randn(n, 5, generator=draws, dtype=torch.float64) for n in (8, 12, 12))
        unlabeled = (weak, strong) if len(losses) > 1 else None
        reports.append(trainer.step((x, labels), unlabeled).as_dict())
    return model, reports


@pytest.mark.parametrize(
    "losses",
    [
        (CrossEntropy(0.1),),
        (CrossEntropy(), UDA(temperature=0.5, threshold=0.4, weight=2.0)),
        (CrossEntropy(), CrossEntropy(0.3, weight=0.5), UDA(ramp=2)),
    ],
)
@pytest.mark.parametrize("accumulate", [2, 4])
def test_micro_batches_change_no_number_of_a_loss_trainer(accumulate: int, losses: tuple[TeacherLoss, ...]) -> None:
    whole, reports = _alone(1, losses)
    parts, same = _alone(accumulate, losses)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    for one, other in zip(reports, same, strict=True):
        assert other == pytest.approx(one, rel=1e-12)
