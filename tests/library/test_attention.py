"""Attention in forward mode, beside PyTorch's math kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import metapl
from metapl.execution import kernels

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"is_causal": True},
    "scaled": {"scale": 0.3, "is_causal": True},
    "masked": {"attn_mask": torch.ones(150, 90, dtype=torch.bool).tril(3)},
}


def dual(of: Any, moved: tuple[bool, ...], keys: int, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    shapes = [(2, 3, n, 8) for n in (150, keys, keys)]
    with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
        given = [torch.randn(shape, dtype=torch.float64) for shape in shapes]
        slopes = [torch.randn_like(t) for t in given]
        pairs = zip(given, slopes, moved, strict=True)
        return tuple(
            forward_ad.unpack_dual(of(*(forward_ad.make_dual(t, d) if m else t for t, d, m in pairs), **options))
        )


@pytest.mark.parametrize("moved", [(True, True, True), (True, False, False), (False, False, True)], ids=str)
@pytest.mark.parametrize(
    ("options", "keys"),
    [(options, keys) for options in OPTIONS for keys in (90, 150, 200) if options != "masked" or keys == 90],
)
def test_the_derivative_is_that_of_the_math_kernel(options: str, keys: int, moved: tuple[bool, ...]) -> None:
    found, expected = (
        dual(of, moved, keys, **OPTIONS[options]) for of in (kernels.attention, F.scaled_dot_product_attention)
    )
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-11, atol=1e-13)


class Attending(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, 24), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in self.embed(x).chunk(3, -1))
        with torch.no_grad():  # which ends the derivative here
            weight = F.scaled_dot_product_attention(q, k, v).mean()
        h = weight * F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.head(h.transpose(1, 2).flatten(2).mean(1))


def test_a_student_that_attends_has_the_gradient_of_double_backward() -> None:
    torch.manual_seed(0)
    teacher, student = Attending().double(), Attending().double()
    labeled = torch.randn(5, 7, 4).double(), torch.arange(5) % 3
    given = {"labeled": labeled, "unlabeled": torch.randn(6, 7, 4).double()}
    inner, called = torch.optim.SGD(student.parameters(), lr=0.1), []
    with pytest.MonkeyPatch.context() as patch:
        own = kernels.attention
        patch.setattr(kernels, "attention", lambda *args, **named: called.append(1) or own(*args, **named))
        found, exact = (
            metapl.hypergradient(teacher, student, **given, mode=mode, inner_optimizer=inner)
            for mode in ("forward", "unrolled")
        )
    assert len(called) == 2
    assert torch.allclose(found.feedback, exact.feedback, rtol=1e-10, atol=1e-14)
    assert F.scaled_dot_product_attention is kernels._attention
