"""What estimators say of themselves, and that alterations say the same as what they alter."""

from __future__ import annotations

from typing import Any

import torch
from problems_zoo import toy
from reference import error
from torch import nn

import metapl
from metapl import MetaplError
from metapl.ablation import Altered
from metapl.execution.layout import Layout
from metapl.feedback import Difference, Estimator, Forward, Unrolled, estimator
from metapl.feedback.compatible import check_mode, prepare


def gradient(mode: str | Estimator, kind: Any) -> metapl.Hypergradient:
    problem = toy("mlp")
    optimizer = torch.optim.SGD(problem.student.parameters(), lr=0.05)
    generator = torch.Generator().manual_seed(0)
    pseudo = metapl.PseudoLabels(kind=kind)
    return metapl.hypergradient(
        **problem.networks(),
        **problem.data(),
        mode=mode,
        problem=pseudo,
        inner_optimizer=optimizer,
        generator=generator,
    )


def test_exact_modes_are_those_that_say_so() -> None:
    exact = gradient(Unrolled(), "soft").grads
    modes = [Forward(), Forward(normalization="cosine"), Difference(), estimator("none")]
    for mode in modes:
        assert mode.exact == (error(gradient(mode, "soft").grads, exact) < 1e-10)
    assert [name for name in metapl.MODES if estimator(name).exact] == ["unrolled", "forward"]
    assert not Unrolled(truncate=1).exact
    assert not Forward(truncate=2).exact
    assert not Altered().exact


def test_modes_run_on_the_layouts_that_offer_what_they_require() -> None:
    """What a layout offers follows from its kind, without the processes."""

    def refused(steps: int = 1, **laid_out: Any) -> set[str]:
        student, found = Layout(nn.Linear(2, 2), **laid_out), set()
        for mode in map(estimator, metapl.MODES):
            try:
                check_mode(mode, steps, prepare(None, mode), student)
            except MetaplError:
                found.add(mode.name)
        return found

    assert refused() == set()
    assert refused(kind="replicated") == refused(kind="sharded") == {"unrolled", "implicit"}
    of_products = {"unrolled", "implicit", "forward", "reinforce_per_example"}
    assert refused(kind="sharded", product_ranks=2) == of_products
    assert "forward" not in refused(steps=2)
    assert (
        refused(steps=2, kind="sharded") == refused(steps=2, kind="replicated") == {*metapl.MODES} - {"forward", "none"}
    )
    assert refused(steps=2, kind="sharded", product_ranks=2) == {*metapl.MODES}
