"""Products with a Hessian through layers that have a double backward of their own, against PyTorch's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from metapl.execution.hessians import HessianGraph, hessian_graph
from reference import error
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint

import metapl
from metapl import Lookahead
from metapl.feedback import Forward
from metapl.problems import EqualWeights

Made = tuple[Callable[[], nn.Module], tuple[int, ...]]


class Twice(nn.Module):
    """A layer that runs two times, and a ReLU that writes to its output."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(F.relu(self.layer(x), inplace=True))


class Checkpointed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False)


class ChannelsLast(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.contiguous(memory_format=torch.channels_last))


class Penalized(nn.Module):
    """Its outputs have the value of a gradient in a weight, as a penalty on gradients has."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Conv1d(3, 4, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(self.norm(x) ** 2).tanh()
        (slope,) = torch.autograd.grad(y.square().sum(), self.layer.weight, create_graph=True)
        return y * slope.square().sum()


class Adapted(nn.Module):
    """A block that takes a step on its own weight by a part of its gradient, in a checkpoint. It runs again in
    the backward pass, and there the gradient is read too."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv1d(3, 4, 3)

    def block(self, x: Tensor) -> Tensor:
        with torch.enable_grad():
            y = self.layer(x).tanh()
            (slope,) = torch.autograd.grad((y - 1).square().mean(), self.layer.weight, create_graph=True)
        return F.conv1d(x, self.layer.weight - 0.3 * torch.where(slope.abs() < 0.02, slope, 0.0)).tanh()

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.block, x, use_reentrant=False)


class Applied(nn.Module):
    def __init__(self, function: Callable[..., Tensor], *shape: int) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(*shape))

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x, self.weight)


def frozen(layer: nn.Module, name: str) -> nn.Module:
    layer.get_parameter(name).requires_grad_(False)
    return layer


OWN: dict[str, Made] = {
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1), (3, 4, 9)),
    "conv2d": (lambda: nn.Conv2d(4, 6, 3, padding=1, bias=False), (3, 4, 6, 5)),
    "conv2d, strided": (lambda: nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(0, 1), dilation=(1, 2)), (3, 4, 7, 6)),
    "conv2d, groups": (lambda: nn.Conv2d(4, 8, 3, groups=4), (2, 4, 5, 5)),
    "conv2d, channels last": (lambda: ChannelsLast(nn.Conv2d(4, 6, 3)), (3, 4, 6, 5)),
    "conv2d, circular": (lambda: nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (3, 4, 6, 5)),
    "conv2d, frozen weight": (lambda: frozen(nn.Conv2d(4, 6, 3), "weight"), (3, 4, 6, 5)),
    "conv2d, frozen bias": (lambda: frozen(nn.Conv2d(4, 6, 3), "bias"), (3, 4, 6, 5)),
    "conv2d, twice": (lambda: Twice(nn.Conv2d(4, 4, 3, padding=1)), (3, 4, 6, 5)),
    "conv2d, computed weight": (lambda: weight_norm(nn.Conv2d(4, 6, 3)), (3, 4, 6, 5)),
    "conv2d, checkpointed": (lambda: Checkpointed(nn.Conv2d(4, 6, 3), nn.Tanh(), nn.BatchNorm2d(6)), (3, 4, 6, 5)),
    "conv2d, called": (lambda: Applied(lambda x, w: F.conv2d(x, w, None, 2, (1,)), 6, 4, 3, 3), (3, 4, 6, 5)),
    "conv3d": (lambda: nn.Conv3d(2, 3, 2, dilation=2), (2, 2, 4, 5, 4)),
    "linear": (lambda: nn.Linear(4, 6), (5, 4)),
    "linear, rows of rows": (lambda: nn.Linear(4, 6, bias=False), (5, 3, 4)),
    "batch norm": (lambda: nn.BatchNorm1d(4), (5, 4)),
    "batch norm 2d": (lambda: nn.BatchNorm2d(4, eps=0.1), (3, 4, 3, 2)),
    "batch norm 3d": (lambda: nn.BatchNorm3d(3, track_running_stats=False), (3, 3, 2, 2, 2)),
    "batch norm, channels last": (lambda: ChannelsLast(nn.BatchNorm2d(4)), (3, 4, 3, 2)),
    "batch norm, frozen weight": (lambda: frozen(nn.BatchNorm2d(4), "weight"), (3, 4, 3, 2)),
    "batch norm, frozen bias": (lambda: frozen(nn.BatchNorm2d(4), "bias"), (3, 4, 3, 2)),
    "batch norm, twice": (lambda: Twice(nn.BatchNorm2d(4)), (3, 4, 3, 2)),
    "penalty": (Penalized, (5, 3, 6)),
    "a gradient within a checkpoint": (Adapted, (5, 3, 6)),
}
LEFT: dict[str, Made] = {
    "conv2d, same": (lambda: nn.Conv2d(4, 6, 3, padding="same"), (3, 4, 6, 5)),
    "conv2d, one picture": (lambda: nn.Conv2d(4, 6, 3), (4, 6, 5)),
    "conv2d, transposed": (lambda: nn.ConvTranspose2d(4, 6, 3, stride=2), (3, 4, 3, 4)),
    "linear, one row": (lambda: nn.Linear(4, 6), (4,)),
    "linear, a bias for each row": (lambda: Applied(lambda x, w: F.linear(x, w, x @ w.T), 6, 4), (5, 4)),
    "linear, mapped": (lambda: Applied(lambda x, w: torch.vmap(lambda r: F.linear(r, w))(x), 6, 4), (5, 3, 4)),
    "batch norm, eval": (lambda: nn.BatchNorm2d(4).eval(), (3, 4, 3, 2)),
    "batch norm without weights": (lambda: nn.BatchNorm2d(4, affine=False), (3, 4, 3, 2)),
}


class Case:
    """A layer, its input, and a loss; equal ones for equal arguments."""

    def __init__(self, made: Made, dtype: torch.dtype = torch.float64, *, entering: bool = True, at: float = 0) -> None:
        torch.manual_seed(0)
        self.layer = made[0]().to(dtype)
        self.x = (at + torch.randn(made[1])).to(dtype).requires_grad_(entering)
        self.scale = torch.ones((), dtype=dtype, requires_grad=True)
        self.leaves = [p for p in (*self.layer.parameters(), self.x) if p.requires_grad]
        self.w = [torch.randn(p.shape).to(dtype) for p in self.leaves]

    def gradient(self, graph: HessianGraph | None) -> list[Tensor]:
        self.outputs = self.layer(self.x)
        value = (self.scale * self.outputs).sin().square().sum()
        if graph is not None:
            return list(graph.gradient(value, self.leaves))
        return list(torch.autograd.grad(value, self.leaves, create_graph=True))

    def products(self, graph: HessianGraph | None = None) -> list[Tensor | None]:
        """The derivatives of ⟨g, w⟩ in all leaves and in the scale."""
        ends = [*self.leaves, self.scale]
        return list(torch.autograd.grad(self.gradient(graph), ends, self.w, allow_unused=True))

    def own_products(self) -> list[Tensor | None]:
        with hessian_graph() as graph:
            return self.products(graph)


def operations(outputs: Tensor) -> set[str]:
    found: set[Any] = set()
    nodes: list[Any] = [outputs.grad_fn]
    while nodes:
        node = nodes.pop()
        if node is not None and node not in found:
            found.add(node)
            nodes += [following for following, _ in node.next_functions]
    return {node.name() for node in found} & {"_LinearBackward", "_BatchNormBackward"}


@pytest.mark.parametrize("entering", [True, False])
@pytest.mark.parametrize("name", [*OWN, *LEFT])
def test_products_are_those_of_pytorch(name: str, entering: bool) -> None:
    made = (OWN | LEFT)[name]
    entering = entering or name == "batch norm without weights"
    case, plain = Case(made, entering=entering), Case(made, entering=entering)
    found, expected = case.own_products(), plain.products()
    assert bool(operations(case.outputs)) == (name in OWN)
    assert torch.equal(case.outputs, plain.outputs)
    assert [t is None for t in found] == [t is None for t in expected]
    for t, exact in zip(found, expected, strict=True):
        if t is not None and exact is not None and exact.norm() > 1e-12:
            assert error(t, exact) < 1e-12
    for t, exact in zip(case.layer.buffers(), plain.layer.buffers(), strict=True):
        assert torch.equal(t, exact)


@pytest.mark.parametrize("at", [0.0, 10.0])
@pytest.mark.parametrize("name", ["conv2d", "linear", "batch norm 2d", "batch norm, twice"])
def test_float32_is_as_close_as_pytorch_is(name: str, at: float) -> None:
    exact = Case(OWN[name], at=at).products()
    found, plain = (Case(OWN[name], torch.float32, at=at) for _ in range(2))
    for t, other, truth in zip(found.own_products(), plain.products(), exact, strict=True):
        assert t is not None
        assert other is not None
        assert truth is not None
        assert error(t.double(), truth) < 3 * error(other.double(), truth) + 1e-6


def test_a_graph_has_several_products() -> None:
    case = Case((lambda: nn.Sequential(nn.Conv2d(4, 6, 3), nn.BatchNorm2d(6), nn.Tanh()), (3, 4, 6, 5)))
    with hessian_graph() as graph:
        g = case.gradient(graph)
    first, other, again = (
        torch.autograd.grad(g, case.leaves, [factor * t for t in case.w], retain_graph=True) for factor in (1, 2, 1)
    )
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert all(error(b, 2 * a) < 1e-12 for a, b in zip(first, other, strict=True) if a.norm() > 1e-12)


def test_a_gradient_that_is_not_computed_is_no_number() -> None:
    case = Case(OWN["conv2d"])
    with hessian_graph() as graph:
        in_weight, in_x = case.gradient(graph)
    assert in_weight.isnan().all()
    assert in_x.isfinite().all()
    with hessian_graph() as graph, torch.autograd.set_detect_anomaly(True):  # which would refuse it
        in_weight, _ = Case(OWN["conv2d"]).gradient(graph)
    assert in_weight.isfinite().all()


@pytest.mark.parametrize("inside", [partial(torch.autocast, "cpu"), torch.no_grad])
def test_others_are_left_to_pytorch(inside: Callable[[], Any]) -> None:
    layer, x = nn.Conv2d(4, 6, 3), torch.randn(3, 4, 6, 5)
    with hessian_graph(), inside():
        assert not operations(layer(x))
    with hessian_graph():
        assert not operations(layer.bfloat16()(x.bfloat16()))


def test_the_feedback_of_a_path_is_that_of_double_backward() -> None:
    def feedback(mode: Any) -> list[Tensor]:
        torch.manual_seed(0)
        student = nn.Sequential(
            *(nn.Conv2d(1, 4, 3, bias=False), nn.BatchNorm2d(4), nn.GELU(), nn.Conv2d(4, 4, 3, stride=2)),
            *(nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 3)),
        ).double()
        batches = [(torch.randn(6, 1, 8, 8).double(), torch.randint(0, 3, (6,))) for _ in range(5)]
        optimizer = torch.optim.SGD(student.parameters(), lr=0.1, momentum=0.9)
        given = {"outer": batches[4], "inner": Lookahead(batches[:4]), "inner_optimizer": optimizer}
        return list(metapl.hypergradient(None, student, mode=mode, problem=EqualWeights(), **given).feedback)

    for h, exact in zip(feedback(Forward()), feedback("unrolled"), strict=True):
        assert error(h, exact) < 1e-12
