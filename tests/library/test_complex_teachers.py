"""A teacher with complex weights is verified as one with real weights is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

import metapl
from metapl import MetaplError, Signal
from metapl.problems import BilevelProblem

RATE = 0.3


class ComplexTeacher(nn.Module):
    """Real logits of a product with complex weights."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(0.5 * torch.randn(4, 3, dtype=torch.complex128))

    def forward(self, x: Tensor) -> Tensor:
        z = x.to(torch.complex128) @ self.weight
        return (z * z).real + z.imag


def made() -> tuple[ComplexTeacher, nn.Linear, tuple[Tensor, Tensor], Tensor]:
    torch.manual_seed(0)
    teacher, student = ComplexTeacher(), nn.Linear(4, 3).double()
    x, u = torch.randn(7, 4).double(), torch.randn(9, 4).double()
    return teacher, student, (x, torch.arange(7) % 3), u


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("mode", ["forward", "unrolled", "reinforce", "reinforce_per_example"])
def test_complex_weights_are_found_right(mode: str) -> None:
    teacher, student, outer, inner = made()
    trainer = metapl.BilevelTrainer(teacher, student, mode, teacher_losses=())
    trainer.step(outer, inner)
    assert metapl.check_gradient(trainer, outer=outer, inner=inner).status == "right"


def test_the_gradient_in_complex_weights_is_that_of_double_backward() -> None:
    teacher, student, outer, inner = made()
    found = metapl.hypergradient(
        teacher,
        student,
        outer=outer,
        inner=inner,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=RATE),
    )
    params = dict(student.named_parameters())
    loss = F.cross_entropy(student(inner), teacher(inner).softmax(-1))
    g = torch.autograd.grad(loss, list(params.values()), create_graph=True)
    moved = {name: p - RATE * g_of for (name, p), g_of in zip(params.items(), g, strict=True)}
    after = F.cross_entropy(functional_call(student, moved, (outer[0],)), outer[1])
    (expected,) = torch.autograd.grad(after, [teacher.weight])
    torch.testing.assert_close(found.grads["weight"], expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize("is_dict", [True, False])
def test_a_complex_signal_is_refused(is_dict: bool, verify: bool) -> None:
    class Phases(BilevelProblem):
        signal_has_rows = False

        def signal(self, teacher: Any, batch: Any, outputs: Any, *, generator: Any) -> Signal:
            return Signal({"phases": teacher.weight * 1} if is_dict else teacher.weight * 1)

        def inner_loss(self, outputs: Any, signal: Any, batch: Any, params: Any = None) -> Tensor:
            return F.cross_entropy(outputs, batch[1], reduction="none")

        def outer_loss(self, outputs: Tensor, batch: Any) -> Tensor:
            return F.cross_entropy(outputs, batch[1])

    teacher, student, outer, _ = made()
    trainer = metapl.BilevelTrainer(
        teacher, student, problem=Phases(), teacher_losses=(), verify=verify
    )
    before = student.weight.detach().clone()
    with pytest.raises(MetaplError, match=r"real numbers \(of complex ones torch.view_as_real\)"):
        trainer.step(outer, outer)
    assert torch.equal(student.weight, before)
