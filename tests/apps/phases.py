"""What a method fits, phase by phase, without a folder: a few steps of each phase are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.methods import Training
from metapl.training import FitResult

STEPS = 2  # that are taken of each phase


@dataclass
class Phase:
    """What was fitted, on what, and what became of it in a few steps."""

    trainer: Any
    labeled: Any
    unlabeled: Any
    options: dict[str, Any]
    before: list[dict[str, Tensor]]  # the weights of teacher and student, or of the one network
    reports: list[Any]


def weights(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def phases_of(config: Any, method: Any, data: Any) -> list[Phase]:
    torch.manual_seed(0)
    teacher, student = config.network(), config.network()
    found: list[Phase] = []

    def fit(trainer: Any, labeled: Any, unlabeled: Any, **options: Any) -> FitResult:
        before = [weights(network) for network in (trainer.teacher, trainer.student) if network is not None]
        torch.manual_seed(1)
        rows = [(labeled[t], None if unlabeled is None else unlabeled[t]) for t in range(STEPS)]
        reports = [trainer.step(*row) for row in rows]
        found.append(Phase(trainer, labeled, unlabeled, options, before, reports))
        return FitResult(None, STEPS, weights(trainer.student))

    def label(network: nn.Module | None) -> dict[str, Tensor]:
        assert network is teacher
        return {"unlabeled": torch.eye(10)[torch.arange(len(data.unlabeled.images)) % 10]}

    training = Training(config=config, data=data, teacher=teacher, student=student, fit=fit, label=label)
    ended = method.scheduled(config.fitting.steps).train(training)
    assert ended.trainer is found[-1].trainer
    if ended.teacher is not None and ended.teacher[1]:  # what is kept is of the network that its card tells
        ended.configs.get("teacher", config).network().load_state_dict(ended.teacher[1])
    return found
