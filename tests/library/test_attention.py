"""Attention in blocks of queries, beside PyTorch's math kernel."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad, gradcheck, gradgradcheck
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.models import attention

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3, "is_causal": True},
}


def drawn(queries: int, keys: int) -> list[Tensor]:
    """Return queries, keys and values, in float64."""
    draws = torch.Generator().manual_seed(0)
    return [
        torch.randn(2, 3, length, 4, generator=draws, dtype=torch.float64)
        for length in (queries, keys, keys)
    ]


@pytest.mark.parametrize("keys", [5, 10, 13])
@pytest.mark.parametrize("rows", [1, 3, 4, 10])
@pytest.mark.parametrize("options", OPTIONS)
def test_in_blocks_it_is_what_the_math_kernel_computes(options: str, rows: int, keys: int) -> None:
    """Its values, its derivative forward, and that of its gradient."""
    inputs = drawn(10, keys)
    slopes = [torch.randn_like(t) for t in inputs]

    def by_blocks(*t: Tensor) -> Tensor:
        return attention(*t, rows=rows, **OPTIONS[options])

    def by_math(*t: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(*t, **OPTIONS[options])

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        with forward_ad.dual_level():
            duals = [forward_ad.make_dual(t, d) for t, d in zip(inputs, slopes, strict=True)]
            value, slope = forward_ad.unpack_dual(function(*duals))
        leaves = [t.clone().requires_grad_() for t in inputs]
        grads = torch.autograd.grad(function(*leaves).square().sum(), leaves, create_graph=True)
        products = [(g * d).sum() for g, d in zip(grads, slopes, strict=True)]
        return [value, slope, *grads, *torch.autograd.grad(torch.stack(products).sum(), leaves)]

    with sdpa_kernel(SDPBackend.MATH):
        for block, whole in zip(results(by_blocks), results(by_math), strict=True):
            torch.testing.assert_close(block, whole, rtol=1e-11, atol=1e-12)


def test_its_derivatives_are_those_of_differences() -> None:
    inputs = [t[:1, :1].clone().requires_grad_() for t in drawn(5, 5)]

    def by_blocks(*t: Tensor) -> Tensor:
        return attention(*t, rows=2, is_causal=True)

    with sdpa_kernel(SDPBackend.MATH):
        assert gradcheck(by_blocks, inputs, check_forward_ad=True)
        assert gradgradcheck(by_blocks, inputs)


def test_where_there_is_a_fused_kernel_it_is_pytorchs_own(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[int, ...]] = []
    own = F.scaled_dot_product_attention

    def counted(query: Tensor, *others: Any, **options: Any) -> Tensor:
        calls.append(tuple(query.shape))
        return own(query, *others, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", counted)
    q, k, v = drawn(10, 10)
    fused = attention(q, k, v, is_causal=True, rows=4)
    assert calls == [(2, 3, 10, 4)]
    with sdpa_kernel(SDPBackend.MATH):
        in_blocks = attention(q, k, v, is_causal=True, rows=4)
    assert calls[1:] == [(2, 3, 4, 4), (2, 3, 4, 4), (2, 3, 2, 4)]
    torch.testing.assert_close(fused, in_blocks, rtol=1e-11, atol=1e-12)


def test_no_query_is_refused() -> None:
    with pytest.raises(metapl.MetaplError, match="rows"):
        attention(*drawn(4, 4), rows=0)


class Attending(nn.Module):
    """A student that attends over all its tokens."""

    def __init__(self, attend: Callable[..., Tensor]) -> None:
        super().__init__()
        self.attend = attend
        self.embed = nn.Linear(4, 24)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.embed(x).chunk(3, -1))
        h = self.attend(q, k, v, is_causal=True)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


def hypergradient(
    attend: Callable[..., Tensor], mode: Any, length: int = 7, rows: int = 6, device: str = "cpu"
) -> metapl.Hypergradient:
    torch.manual_seed(0)
    teacher = Attending(attend).double().to(device)
    student = Attending(attend).double().to(device)
    x = torch.randn(5, 7, 4).double().to(device)
    return metapl.hypergradient(
        teacher,
        student,
        outer=(x, torch.arange(5, device=device) % 3),
        inner=torch.randn(rows, length, 4).double().to(device),
        mode=mode,
        inner_optimizer=torch.optim.SGD(student.parameters(), lr=0.1),
    )


def in_threes(*tensors: Tensor, is_causal: bool) -> Tensor:
    return attention(*tensors, is_causal=is_causal, rows=3)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "mode", ["forward", "unrolled", "difference", metapl.feedback.Forward(by="tangent")]
)
def test_a_student_that_attends_in_blocks_has_the_gradient_of_double_backward(mode: Any) -> None:
    """On a GPU where there is one, beside double backward on the CPU."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    exact = hypergradient(F.scaled_dot_product_attention, "unrolled")
    found = hypergradient(in_threes, mode, device=device)
    tolerance = 1e-5 if mode == "difference" else 1e-10
    torch.testing.assert_close(found.feedback.cpu(), exact.feedback, rtol=tolerance, atol=1e-12)


def test_the_pass_in_forward_mode_holds_a_part_of_the_matrix() -> None:
    mode = metapl.feedback.Forward(by="tangent")

    def held(attend: Callable[..., Tensor]) -> int:
        def run() -> None:
            hypergradient(attend, mode, length=512, rows=2)

        run()
        return peak_bytes(run, torch.device("cpu"))

    def in_blocks(*tensors: Tensor, is_causal: bool) -> Tensor:
        return attention(*tensors, is_causal=is_causal, rows=64)

    # Scores of 2 rows, 2 heads and 512 tokens.
    matrix = 8 * 2 * 2 * 512 * 512
    whole = held(F.scaled_dot_product_attention)
    assert whole > 3 * matrix
    assert held(in_blocks) < whole / 3


def test_it_can_be_traced_whole() -> None:
    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.MATH):
            return attention(q, k, v, is_causal=True, rows=4)

    q, k, v = drawn(10, 10)
    traced = torch.compile(step, backend="eager", fullgraph=True)
    torch.testing.assert_close(traced(q, k, v), step(q, k, v))
