"""Draws from Python's and NumPy's global generators are refused, in one line, in the first step.

A pass that runs again would draw other numbers.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from problems_zoo import CLASSES, Toy, gradient, toy, trainer_for
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl import MetaplError, PseudoLabels, Signal
from metapl.feedback import Forward


def coin(h: Tensor) -> Tensor:
    """Apply stochastic depth."""
    return h + h.sin() if random.random() < 0.5 else h


def noise(h: Tensor) -> Tensor:
    return h + 0.3 * torch.from_numpy(numpy.random.randn(*h.shape)).to(h)  # noqa: NPY002


DRAWS: dict[str, Callable[[Tensor], Tensor]] = {
    "a coin of Python's": coin,
    "noise of NumPy's": noise,
}


class Drawing(nn.Module):
    """Two layers with draws between them."""

    def __init__(self, draw: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.body = nn.Linear(16, 6)
        self.head = nn.Linear(6, CLASSES)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.draw(self.body(x.flatten(1)).tanh()))


class DrawingLoss(PseudoLabels):
    """Mixup by NumPy in the inner loss."""

    def inner_loss(self, outputs: Tensor, signal: Signal, batch: Any, params: Any = None) -> Tensor:
        share = numpy.random.beta(0.4, 0.4)  # noqa: NPY002
        return share * super().inner_loss(outputs, signal, batch)


def generators() -> Any:
    return random.getstate(), numpy.random.get_state(legacy=False)["state"]["pos"]  # noqa: NPY002


def with_student(draw: Callable[[Tensor], Tensor]) -> Toy:
    base = toy("mlp")
    return Toy(base.teacher, Drawing(draw).double(), base.labeled, base.unlabeled, 0)


def refuse(case: Toy, mode: Any = "forward", **options: Any) -> None:
    """Take a first step that is refused, and compare what it leaves with what there was."""
    trainer = trainer_for(case, mode, verify=True, **options)
    state_before = copy.deepcopy(trainer.state_dict())
    generators_before = generators()
    with pytest.raises(MetaplError) as refusal:
        trainer.step(**case.data())
    text = str(refusal.value)
    assert "a network or a loss draws from Python's or NumPy's global generator" in text
    assert "expected draws by torch" in text
    assert "\n" not in text
    assert generators() == generators_before
    for role in ("teacher", "student"):
        for name, t in trainer.state_dict()[role].items():
            assert torch.equal(t, state_before[role][name])


@pytest.mark.parametrize("mode", ["forward", Forward(by="tangent"), "difference", "unrolled"])
@pytest.mark.parametrize("draw", DRAWS)
def test_a_student_that_draws_is_refused(draw: str, mode: Any) -> None:
    refuse(with_student(DRAWS[draw]), mode)


def test_a_teacher_and_a_loss_that_draw_are_refused() -> None:
    refuse(toy("mlp", teacher=lambda: Drawing(noise)))
    refuse(toy("mlp"), problem=DrawingLoss())


def test_check_gradient_says_so() -> None:
    problem = with_student(noise)
    check = metapl.check_gradient(trainer_for(problem), **problem.data())
    assert check.status == "refused"
    assert "Python's or NumPy's global generator" in check.verdict


def test_nothing_looks_where_nothing_is_verified(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step must not cost what the states take to be read."""
    verified = toy("dropout")
    trainer = trainer_for(verified, Forward(by="tangent"), verify=True)
    trainer.step(**verified.data())

    def asked() -> Any:
        raise AssertionError("the state of Python's generator was read")

    monkeypatch.setattr(random, "getstate", asked)
    trainer.step(**verified.data())
    gradient(verified)
    # Each pass runs once in this mode.
    drawing = with_student(noise)
    trainer_for(drawing, "unrolled", verify=False).step(**drawing.data())


def test_a_recording_is_refused_in_its_first_step(tmp_path: Path) -> None:
    model = Drawing(coin)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x = torch.randn(8, 16)
    labels = torch.arange(8) % CLASSES

    def train() -> None:
        with metapl.record(model, out=tmp_path / "recording", train=(x, labels)):
            F.cross_entropy(model(x), labels).backward()
            optimizer.step()

    with pytest.raises(MetaplError, match="Python's or NumPy's global generator"):
        train()
