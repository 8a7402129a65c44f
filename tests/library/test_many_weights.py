"""Networks of many weights: sums over all of them hold one product at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import metapl
from metapl.ablation.cost import peak_bytes
from metapl.execution import numerics
from metapl.execution.numerics import WHOLE, Tree

ENTRIES = {"weight": (30, 20), "bias": (30,), "scale": ()}


def tree(seed: int, dtype: torch.dtype = torch.float64) -> Tree:
    draws = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=draws, dtype=dtype) for name, shape in ENTRIES.items()
    }


def sparse(t: Tensor) -> Tensor:
    """Return the rows of a matrix whose first entry is positive, as a gradient of embeddings is."""
    return (t * (t[:, :1] > 0)).to_sparse(1)


@pytest.mark.parametrize("kind", ["dense", "bfloat16", "complex", "sparse", "missing"])
def test_products_of_many_entries_are_those_of_few(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    dtype = {"bfloat16": torch.bfloat16, "complex": torch.complex128}.get(kind, torch.float64)
    a, b = tree(0, dtype), tree(1, dtype)
    if kind == "sparse":
        a["weight"] = sparse(a["weight"])
    if kind == "missing":
        del b["bias"]
    few = [WHOLE.dot(a, b), *WHOLE.slope(a, b)]
    monkeypatch.setattr(numerics, "MANY_ENTRIES", 0)
    many = [WHOLE.dot(a, b), *WHOLE.slope(a, b)]
    tolerance = 1e-5 if kind == "bfloat16" else 1e-12
    for one, other in zip(few, many, strict=True):
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("mode", ["forward", "reinforce", "difference"])
def test_a_step_is_the_same(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def weights_after_a_step() -> Tensor:
        torch.manual_seed(0)
        teacher, student = (metapl.models.mlp([4, 8, 3]).double() for _ in range(2))
        trainer = metapl.BilevelTrainer(teacher, student, mode)
        labeled = torch.randn(6, 4, dtype=torch.float64), torch.arange(6) % 3
        trainer.step(labeled, torch.randn(8, 4, dtype=torch.float64))
        return nn.utils.parameters_to_vector(teacher.parameters()).detach()

    few = weights_after_a_step()
    monkeypatch.setattr(numerics, "MANY_ENTRIES", 0)
    torch.testing.assert_close(weights_after_a_step(), few, rtol=1e-9, atol=1e-12)


def test_one_product_is_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    a = {str(number): torch.ones(10_000) for number in range(8)}
    of_one = 4 * 10_000

    def peak() -> int:
        return peak_bytes(lambda: WHOLE.slope(a, a), torch.device("cpu"))

    assert peak() > 15 * of_one
    monkeypatch.setattr(numerics, "MANY_ENTRIES", 1)
    assert peak() < 3 * of_one


def test_gradients_of_micro_batches_are_added_up_as_they_come() -> None:
    """Eight of them hold no more than two, of a network of large weights and small batches."""

    def peak(accumulate: int) -> int:
        torch.manual_seed(0)
        teacher = metapl.models.mlp([200, 3])
        student = metapl.models.mlp([200, 500, 3])
        trainer = metapl.BilevelTrainer(
            teacher, student, "forward", accumulate=accumulate, verify=False
        )
        labeled = torch.randn(8, 200), torch.arange(8) % 3
        unlabeled = torch.randn(8, 200)
        trainer.step(labeled, unlabeled)
        return peak_bytes(lambda: trainer.step(labeled, unlabeled), torch.device("cpu"))

    assert peak(8) < 1.1 * peak(2)


def test_a_sum_of_trees_counts_what_is_missing_as_zero() -> None:
    first, second = tree(0), tree(1)
    del second["bias"]
    total = numerics.TreeSum([first, second, {}])
    assert total.count == 3
    mean = total.mean()
    torch.testing.assert_close(mean["bias"], first["bias"] / 3)
    torch.testing.assert_close(mean["weight"], (first["weight"] + second["weight"]) / 3)
    assert numerics.TreeSum([first]).mean()["bias"] is first["bias"]
