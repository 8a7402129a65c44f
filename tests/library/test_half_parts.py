"""Students with a part in half precision.

A pass is rounded to the type of that part, which a graph shows.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from problems_zoo import CLASSES, Toy, gradient, toy, trainer_for
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.feedback import Forward


class PartlyHalf(nn.Module):
    """A layer, or a norm, in bfloat16, between layers in the type of the weights."""

    def __init__(self, kind: str, width: int = 6, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.kind = kind
        self.dtype = dtype
        self.body = nn.Linear(16, width)
        self.head = nn.Linear(width, CLASSES)
        self.inside = nn.LayerNorm(width) if kind == "norm" else nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h = self.body(x.flatten(1))
        weight = self.inside.weight.to(self.dtype)
        bias = self.inside.bias.to(self.dtype)
        if self.kind == "norm":
            inside = F.layer_norm(h.to(self.dtype), h.shape[1:], weight, bias)
        else:
            inside = F.linear(h.to(self.dtype), weight, bias)
        return self.head(inside.to(h.dtype).tanh())


def case(kind: str, width: int, dtype: torch.dtype) -> tuple[Toy, Toy]:
    """Return a problem with such a student, and the same without the part in half precision."""
    base = toy("mlp", rows=12, dtype=dtype)
    torch.manual_seed(5)
    student = PartlyHalf(kind, width).to(dtype)
    twin = copy.deepcopy(student)
    twin.dtype = dtype

    def of_student(network: nn.Module) -> Toy:
        teacher = copy.deepcopy(base.teacher)
        return Toy(teacher, network, base.labeled, base.unlabeled, 0)

    return of_student(student), of_student(twin)


# The widths of networks below and above 2^15 weights.
WIDTHS = {"layer": (6, 180), "norm": (6, 1700)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", WIDTHS)
@pytest.mark.parametrize("is_large", [False, True])
@pytest.mark.parametrize("steps", [1, 3])
def test_forward_is_right_to_the_parts_rounding(
    dtype: torch.dtype, kind: str, is_large: bool, steps: int
) -> None:
    rounded, exact = case(kind, WIDTHS[kind][is_large], dtype)
    assert (sum(p.numel() for p in rounded.student.parameters()) > 2**15) == is_large
    batches = None if steps == 1 else [rounded.unlabeled] * steps
    expected = gradient(exact, "unrolled", batches).grads
    for mode in ("forward", Forward(by="tangent"), Forward(by="double_backward"), "unrolled"):
        assert error(gradient(rounded, mode, batches).grads, expected) < 5e-2


@pytest.mark.parametrize("kind", WIDTHS)
def test_a_training_goes_on(kind: str) -> None:
    problem, _ = case(kind, 6, torch.float32)
    trainer = trainer_for(problem, Forward(by="tangent"), lookahead=2)
    losses = []
    for _ in range(20):
        report = trainer.step(problem.labeled, metapl.Lookahead([problem.unlabeled] * 2))
        losses.append(float(report.scalars["outer_loss"]))
    assert losses[-1] < losses[0]


def test_a_wrong_gradient_is_refused_there_too() -> None:
    problem, _ = case("layer", 6, torch.float64)

    def reversed_gradient(module: nn.Module, inputs: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(torch.neg)

    problem.student.body.register_forward_hook(reversed_gradient)
    with pytest.raises(metapl.MetaplError, match="slopes"):
        gradient(problem, Forward(by="tangent"))
