"""Norms in forward mode by the kernels of their backward passes, against PyTorch's own formulas."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F

import metapl
from metapl.execution import tangents
from metapl.execution.tangents import NormsByBackwardKernels, norms_by_backward_kernels
from metapl.feedback import Forward

Tree = dict[str, Tensor]


def convolutions(*norms: nn.Module) -> nn.Module:
    """Return two convolutions, each with a norm behind it."""
    first, second = norms
    return nn.Sequential(nn.Conv2d(3, 4, 3), first, nn.Tanh(), nn.Conv2d(4, 4, 3), second)


def rows(*norms: nn.Module) -> nn.Module:
    """Return two linear layers of four numbers, each with a norm behind it."""
    first, second = norms
    return nn.Sequential(nn.Linear(3, 4), first, nn.Tanh(), nn.Linear(4, 4), second)


class BiasAlone(nn.Module):
    """A norm with β and without γ, which no module of PyTorch has."""

    def __init__(self, norm: Callable[..., Tensor]) -> None:
        super().__init__()
        self.norm = norm
        self.bias = nn.Parameter(torch.randn(4))

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x, self.bias)


def batch_norm_by_bias(x: Tensor, bias: Tensor) -> Tensor:
    return F.batch_norm(x, None, None, None, bias, training=True)


def layer_norm_by_bias(x: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, (4,), None, bias)


def group_norm_by_bias(x: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x, 2, None, bias)


class RowByRow(nn.Module):
    """A group norm that each row takes by itself, under ``vmap``."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(1, 4)

    def forward(self, x: Tensor) -> Tensor:
        of_rows: Tensor = torch.func.vmap(lambda row: self.norm(row[None])[0])(x)
        return of_rows


PICTURES = (5, 3, 8, 8)
SEQUENCES = (5, 6, 3)
# A network with its norms, and the shape of a batch for it.
NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "batch norm": (
        lambda: convolutions(nn.BatchNorm2d(4), nn.BatchNorm2d(4, affine=False)),
        PICTURES,
    ),
    "batch norm without running statistics": (
        lambda: convolutions(nn.BatchNorm2d(4, track_running_stats=False), nn.BatchNorm2d(4)),
        PICTURES,
    ),
    "batch norm that sums its statistics": (
        lambda: convolutions(nn.BatchNorm2d(4, momentum=None), nn.BatchNorm2d(4, eps=0.1)),
        PICTURES,
    ),
    "batch norm of rows": (lambda: rows(nn.BatchNorm1d(4), nn.BatchNorm1d(4)), (7, 3)),
    "batch norm of the input": (
        lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)),
        PICTURES,
    ),
    "batch norm in eval mode": (
        lambda: convolutions(nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval(),
        PICTURES,
    ),
    "layer norm": (
        lambda: rows(nn.LayerNorm(4), nn.LayerNorm(4, elementwise_affine=False)),
        SEQUENCES,
    ),
    "layer norm of two dimensions": (
        lambda: rows(nn.LayerNorm((6, 4)), nn.LayerNorm(4, bias=False)),
        SEQUENCES,
    ),
    "group norm": (
        lambda: convolutions(nn.GroupNorm(2, 4), nn.GroupNorm(1, 4, affine=False)),
        PICTURES,
    ),
    "a bias alone": (
        lambda: rows(BiasAlone(batch_norm_by_bias), BiasAlone(layer_norm_by_bias)),
        (7, 3),
    ),
    "a bias alone in groups": (
        lambda: rows(BiasAlone(group_norm_by_bias), BiasAlone(group_norm_by_bias)),
        (7, 3),
    ),
    "group norm of rows": (lambda: rows(nn.GroupNorm(1, 4), nn.GroupNorm(1, 4)), (7, 3)),
    "group norm under vmap": (lambda: rows(RowByRow(), nn.GroupNorm(1, 4)), (7, 3)),
}


def dual(network: nn.Module, x: Tensor, direction: Tree) -> tuple[Tensor, Tensor]:
    """Return the outputs and their derivative along a direction of the weights."""
    duals: Tree = {}
    with torch.no_grad(), forward_ad.dual_level():
        for name, p in network.named_parameters():
            value = p.detach().clone()
            duals[name] = value
            if name in direction:
                duals[name] = forward_ad.make_dual(value, direction[name])
        outputs = torch.func.functional_call(network, duals, (x,))
        return forward_ad.unpack_dual(outputs)


def pure(network: nn.Module, x: Tensor, direction: Tree) -> tuple[Tensor, Tensor]:
    """Return the same by a transform."""
    buffers = dict(network.named_buffers())

    def outputs(params: Tree) -> Tensor:
        # A transform moves no tensor from outside.
        copies = {name: t.clone() for name, t in buffers.items()}
        return torch.func.functional_call(network, {**params, **copies}, (x,))

    params = {name: p.detach() for name, p in network.named_parameters()}
    whole = {name: direction.get(name, torch.zeros_like(p)) for name, p in params.items()}
    result: tuple[Tensor, Tensor] = torch.func.jvp(outputs, (params,), (whole,))
    return result


def case(kind: str, layout: torch.memory_format | None = None) -> tuple[nn.Module, Tensor, Tree]:
    """Return a network in float64, a batch, and a direction that lacks the first weight."""
    torch.manual_seed(0)
    build, shape = NETWORKS[kind]
    network = build().double()
    x = torch.randn(shape, dtype=torch.float64)
    direction = {name: torch.randn_like(p) for name, p in network.named_parameters()}
    if kind != "batch norm of the input":
        del direction[next(iter(direction))]
    if layout is not None:
        # Numbers are drawn in the order of memory.
        network = network.to(memory_format=layout)
        x = x.contiguous(memory_format=layout)
    return network, x, direction


@pytest.mark.parametrize("road", [dual, pure])
@pytest.mark.parametrize("kind", NETWORKS)
def test_outputs_buffers_and_derivatives_are_those_of_pytorch(kind: str, road: Any) -> None:
    network, x, direction = case(kind)
    other = copy.deepcopy(network)
    outputs, expected = road(network, x, direction)
    with NormsByBackwardKernels():
        same_outputs, derivative = road(other, x, direction)
    assert torch.equal(same_outputs, outputs)
    # Groups of two numbers are badly conditioned.
    assert float((derivative - expected).norm() / expected.norm()) < 1e-13
    for buffer, expected_buffer in zip(other.buffers(), network.buffers(), strict=True):
        assert torch.equal(buffer, expected_buffer)


@pytest.mark.parametrize("kind", ["batch norm", "group norm"])
def test_channels_last_has_the_same_derivative(kind: str) -> None:
    """Also for group norm, where torch 2.11 has no derivative forward in this layout."""
    network, x, direction = case(kind)
    _, expected = dual(network, x, direction)
    network, x, direction = case(kind, torch.channels_last)
    with NormsByBackwardKernels():
        _, derivative = dual(network, x, direction)
    assert float((derivative - expected).norm() / expected.norm()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["batch norm", "layer norm", "group norm"])
def test_it_rounds_no_more_than_pytorch(kind: str, dtype: torch.dtype) -> None:
    network, x, direction = case(kind)
    _, exact = dual(network, x, direction)
    network = network.to(dtype)
    direction = {name: t.to(dtype) for name, t in direction.items()}
    errors: list[float] = []
    modes: list[AbstractContextManager[Any]] = [nullcontext(), NormsByBackwardKernels()]
    for mode in modes:
        with mode:
            _, derivative = dual(network, x.to(dtype), direction)
        errors.append(float((derivative - exact).norm()))
    by_pytorch, by_kernels = errors
    assert by_kernels < 1.5 * by_pytorch


def test_a_region_of_autocast_keeps_its_types() -> None:
    network, x, direction = case("layer norm")
    network = network.float()
    direction = {name: t.float() for name, t in direction.items()}
    ends: list[tuple[Tensor, Tensor]] = []
    modes: list[AbstractContextManager[Any]] = [nullcontext(), NormsByBackwardKernels()]
    for mode in modes:
        with torch.autocast("cpu", torch.bfloat16), mode:
            ends.append(dual(network, x.float(), direction))
    (outputs, expected), (same_outputs, derivative) = ends
    assert same_outputs.dtype == outputs.dtype
    assert derivative.dtype == expected.dtype
    assert torch.equal(same_outputs, outputs)
    assert float((derivative - expected).float().norm() / expected.float().norm()) < 2e-2


def test_a_channel_of_one_number_is_refused_as_pytorch_refuses_it() -> None:
    network, _, direction = case("batch norm of rows")
    one_row = torch.randn(1, 3, dtype=torch.float64)
    with NormsByBackwardKernels(), pytest.raises(ValueError, match="more than 1 value"):
        dual(network, one_row, direction)


def test_a_network_without_norms_is_left_alone() -> None:
    assert isinstance(norms_by_backward_kernels(nn.Linear(2, 2)), nullcontext)
    assert isinstance(norms_by_backward_kernels(nn.LayerNorm(2)), NormsByBackwardKernels)


def test_a_step_in_forward_mode_takes_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that takes ż in forward mode calls the rule once for each norm of the student."""
    calls: list[Any] = []

    def counted(*args: Any, **keywords: Any) -> Tensor | None:
        calls.append(args)
        return tangents.batch_norm(*args, **keywords)

    monkeypatch.setitem(tangents.REPLACEMENTS, F.batch_norm, counted)
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(3, 4))
    student = rows(nn.BatchNorm1d(4), nn.BatchNorm1d(4))
    trainer = metapl.BilevelTrainer(teacher, student, Forward(by="tangent"), verify=False)
    trainer.step((torch.randn(8, 3), torch.arange(8) % 4), torch.randn(8, 3))
    assert len(calls) == 2
