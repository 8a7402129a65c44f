"""Operations that lack a derivative are refused, and never differentiated wrongly; half precision by autocast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from problems_zoo import ANYWHERE, CLASSES, OPTIMISERS, STUDENTS, Toy, everything, same, toy
from reference import error, pseudo_labels
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.feedback import Forward

MODES = {"unrolled": "unrolled", "graph": Forward(by="graph"), "tangent": Forward(by="tangent")}


class WithoutForwardMode(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * (1 - ctx.saved_tensors[0].tanh().square())


class DifferentiableOnce(WithoutForwardMode):
    backward = staticmethod(once_differentiable(WithoutForwardMode.backward))


class Within(nn.Module):
    """A function between two layers."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self.body, self.head, self.function = nn.Linear(16, 6), nn.Linear(6, CLASSES), function

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.function(self.body(x.flatten(1))))


class Recurrent(nn.Module):
    """In float32 the CPU runs it as one fused operation, without forward mode."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(4, 5, batch_first=True), nn.Linear(5, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x.flatten(1, 2))[0][:, -1])


def weight_normed() -> nn.Module:
    normed = nn.utils.parametrizations.weight_norm(nn.Linear(16, 6))
    return nn.Sequential(nn.Flatten(), normed, nn.Tanh(), nn.Linear(6, CLASSES))


# A student, the same by operations of torch, and the modes that run on it.
STUDENTS_OF: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module], set[str]]] = {
    "lstm": (Recurrent, Recurrent, {"unrolled", "graph", "difference"}),
    "weight norm": (weight_normed, weight_normed, {"unrolled", "graph", "difference"}),
    "distances": (
        *[lambda: Within(lambda x: torch.cdist(x, torch.eye(6)))] * 2,
        {"unrolled", "graph", "difference"},
    ),
    "no jvp": (
        lambda: Within(WithoutForwardMode.apply),
        lambda: Within(torch.tanh),
        {"unrolled", "graph", "difference"},
    ),
    "differentiable once": (lambda: Within(DifferentiableOnce.apply), lambda: Within(torch.tanh), {"difference"}),
}


def built(student: str, which: int) -> Toy:
    base = toy("mlp", dtype=torch.float32, rows=16)
    torch.manual_seed(0)
    return Toy(base.teacher, STUDENTS_OF[student][which](), base.labeled, base.unlabeled, 0)


@pytest.mark.parametrize("student", STUDENTS_OF)
@pytest.mark.parametrize("mode", [*MODES, "difference"])
def test_a_mode_is_exact_or_refused(mode: str, student: str) -> None:
    """Double backward through what is differentiable once is zero without a word: verification says so."""
    case, runs = built(student, 0), mode in STUDENTS_OF[student][2]
    trainer = metapl.BilevelTrainer(
        **case.networks(),
        mode=MODES.get(mode, mode),
        inner_optimizer=torch.optim.SGD(case.student.parameters(), lr=0.3),
        verify=not runs,
    )
    if runs:
        twin = built(student, 1)
        expected = pseudo_labels(**twin.networks(), **twin.data(), rule=OPTIMISERS["torch_sgd"].rule).grads
        bound = 2e-2 if mode == "difference" else 1e-4
        assert error(trainer.hypergradient(**case.data()).grads, expected) < bound
    else:
        before = everything(case)
        with pytest.raises(metapl.MetaplError):
            trainer.step(**case.data())
        assert same(before, everything(case))


@pytest.mark.parametrize("mode", MODES)
def test_a_callers_flash_attention_is_set_aside(mode: str) -> None:
    """The exact modes ask for the math kernel themselves, whatever the caller prefers."""
    case = toy("attention")
    given = {**case.networks(), **case.data(), "mode": MODES[mode]}
    inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
    plain = metapl.hypergradient(**given, inner_optimizer=inner)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        fused = metapl.hypergradient(**given, inner_optimizer=inner)
    assert error(fused.grads, plain.grads) < 1e-12


class FixedToFirst(metapl.PseudoLabels):
    """Every label is class 0, so that rounding cannot change a draw."""

    def signal(self, teacher: Any, batch: Any, student_outputs: Tensor, *, generator: Any) -> metapl.Signal:
        log_q = teacher(batch).float().log_softmax(-1)
        return metapl.Signal(torch.zeros(len(log_q), dtype=torch.int64), log_q[:, 0], log_q.exp())


# Measured over the cases below: at most 1.0e-2; bf16 itself has eight bits, 3.9e-3.
@pytest.mark.parametrize("student", [s for s in STUDENTS if s != "dropout"])
@pytest.mark.parametrize("mode", [*MODES, "difference", "reinforce_per_example"])
def test_under_bfloat16_autocast_the_gradient_is_that_of_float32(mode: str, student: str) -> None:
    """Not zero, as a difference of bf16 outputs is, and near the float32 gradient."""
    found = []
    for enabled in (True, False):
        case = toy(student, dtype=torch.float32, rows=8)
        inner = torch.optim.SGD(case.student.parameters(), lr=0.3)
        labels = FixedToFirst("hard") if mode == "reinforce_per_example" else None
        given = {**case.networks(), **case.data(), "mode": MODES.get(mode, mode), "problem": labels}
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            found.append(metapl.hypergradient(**given, inner_optimizer=inner).grads)
    assert error(*found) < 0.03


@pytest.mark.parametrize("mode", ANYWHERE)
def test_every_mode_steps_under_autocast(mode: str) -> None:
    case = toy("batch_norm", dtype=torch.float32)
    trainer = metapl.BilevelTrainer(**case.networks(), mode=mode, verify=False)
    before = [p.clone() for p in case.student.parameters()]
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            report = trainer.step(**case.data())
    assert all(torch.isfinite(torch.tensor(v)) for v in report.as_dict().values())
    assert all(not torch.equal(a, b) for a, b in zip(before, case.student.parameters(), strict=True))
