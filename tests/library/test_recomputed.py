"""Parts of which no graph keeps more than their inputs: the same function, twice differentiable."""

from __future__ import annotations

from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from metapl.execution.recomputed import recomputed


class Part(nn.Module):
    """Dropout, a buffer that moves what comes out, nested arguments and results, and one that is no number."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.drop = nn.Linear(3, 3), nn.Dropout(0.4)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x: Tensor, *, others: list[Tensor], scale: float) -> Any:
        self.calls = self.calls + 1
        hidden = self.drop(torch.tanh(self.layer(x) * others[0])) * self.calls
        return {"hidden": hidden, "places": hidden.argmax(-1), "more": (scale * others[1] * x, "text")}


def test_first_and_second_derivatives_of_a_part_that_runs_again() -> None:
    torch.manual_seed(0)
    part = Part().double()
    names = [name for name, _ in part.named_parameters()]
    weights = [p.detach().clone().requires_grad_() for p in part.parameters()]
    runs: list[int] = []

    @contextmanager
    def using(given: Any) -> Any:
        runs.append(len(given))
        with torch.nn.utils.stateless._reparametrize_module(part, dict(zip(names, given, strict=True))):
            yield

    again = recomputed(part, part.forward, torch.device("cpu"), weights, using)

    def derivatives(run: Any) -> list[Tensor]:
        torch.manual_seed(1)
        part.calls = torch.zeros(())
        x, a, b = (torch.randn(4, 3, dtype=torch.float64, requires_grad=True) for _ in range(3))
        total: Any = 0
        for _ in range(2):  # the second time from the state that the first has left
            found = run(x, others=[a, b], scale=0.7)
            assert found["more"][1] == "text"
            assert found["places"].dtype == torch.long
            total = total + (found["hidden"] ** 3).sum() + (found["more"][0] ** 2).sum()
        first = torch.autograd.grad(total, [*weights, x, a, b], create_graph=True)
        along = [torch.ones_like(t) * (i + 1) for i, t in enumerate(first)]
        second = torch.autograd.grad(first, [*weights, x, a, b], along)
        assert float(part.calls) == 2  # and no more by the runs in the backward passes
        return [total, *first, *second, torch.rand(2)]

    def plainly(*args: Any, **kwargs: Any) -> Any:
        return functional_call(part, dict(zip(names, weights, strict=True)), args, kwargs)

    pairs = zip(derivatives(again), derivatives(plainly), strict=True)
    assert all(torch.allclose(a, b, rtol=1e-12, atol=1e-14) for a, b in pairs)
    assert len(runs) == 2 * 4  # forward, backward, and in the second backward both again
