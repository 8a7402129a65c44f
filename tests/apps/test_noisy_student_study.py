"""The stacked steps and selections that the studies of Noisy Student are made with are those of the library."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from metapl.apps.labels import LabelStore, LabelWriter
from metapl.apps.labels.queries import select
from metapl.models import mlp
from metapl.problems.base import Signal
from metapl.problems.stored import NoisyStudentLoss
from metapl.training.options import FitOptions

pytestmark = pytest.mark.docs

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import noisy_student

    yield noisy_student
    for path in BENCHMARKS.glob("*.py"):
        sys.modules.pop(path.stem, None)


def plain(weights: list[Tensor], seed: int) -> nn.Sequential:
    """One network of a stack as a module."""
    network = mlp([weights[0].shape[1], *(w.shape[2] for w in weights[::2])])
    layers = [m for m in network if isinstance(m, nn.Linear)]
    with torch.no_grad():
        for layer, weight, bias in zip(layers, weights[::2], weights[1::2], strict=True):
            layer.weight.copy_(weight[seed].T)
            layer.bias.copy_(bias[seed, 0])
    return network


def test_steps_are_those_of_the_librarys_loss_by_sgd(study: ModuleType) -> None:
    """Three steps on the mean over labeled and pseudo-labeled examples, for two seeds at once and one by one."""
    torch.manual_seed(0)
    weights = study.first_weights(8, (1, 2), 0)
    networks = [plain(weights, seed) for seed in range(2)]
    learner = study.Learner(weights, lr=0.3)
    optimizers = [torch.optim.SGD(n.parameters(), lr=0.3, momentum=study.MOMENTUM) for n in networks]
    for step in range(3):
        x_l, y, x_u = torch.rand(2, 4, 64), torch.randint(10, (2, 4)), torch.rand(2, 12, 64)
        q = torch.rand(2, 12, 10).softmax(-1)
        one_hot = nn.functional.one_hot(y, 10).float()
        learner.step(torch.cat([x_l, x_u], 1), torch.cat([one_hot, q], 1), [None, None], 0.5**step)
        for seed, (network, optimizer) in enumerate(zip(networks, optimizers, strict=True)):
            optimizer.param_groups[0]["lr"] = 0.3 * 0.5**step
            batches = {"labeled": (x_l[seed], y[seed]), "unlabeled": (x_u[seed], q[seed])}
            loss = NoisyStudentLoss()(network, **batches, signal=Signal(torch.zeros(0)), step=step)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for seed, network in enumerate(networks):
        for ours, theirs in zip(plain(learner.weights, seed).parameters(), network.parameters(), strict=True):
            assert torch.allclose(ours, theirs, atol=1e-6)


def test_dropout_is_on_the_rows_that_it_is_meant_for(study: ModuleType) -> None:
    weights = study.first_weights(16, (1, 2), 0)
    x = torch.rand(2, 400, 64)
    masks = study.Dropout(0.25, torch.Generator().manual_seed(0), 100).masks(weights, 400)
    for mask in masks:
        assert (mask[:, 100:] == 1).all()
        assert mask[:, :100].unique().tolist() == pytest.approx([0.0, 4 / 3])
        assert float((mask[:, :100] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert study.Dropout(0.0, torch.Generator()).masks(weights, 4) == [None, None]
    assert all((mask == 1).all() for mask in study.Dropout(0.5, torch.Generator(), 0).masks(weights, 4))
    h = x
    for weight, bias, mask in zip(weights[:-2:2], weights[1:-2:2], masks, strict=True):
        h = (h @ weight + bias).relu() * mask
    assert torch.allclose(study.passed(weights, x, masks), h @ weights[-2] + weights[-1], atol=1e-6)


@pytest.mark.parametrize(("per_class", "balanced"), [(None, False), (7, True), (None, True), (9, False)])
def test_what_is_kept_is_what_the_librarys_selection_keeps(
    study: ModuleType, tmp_path: Path, per_class: int | None, balanced: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    q = (3 * torch.randn(60, 4, generator=generator)).softmax(1)
    with LabelWriter(tmp_path / "all", tuple("abcd"), provenance={}, rows_per_part=25) as writer:
        writer.add(list(range(60)), q)
    select(LabelStore(tmp_path / "all"), tmp_path / "some", threshold=0.6, per_class=per_class, balance=balanced)
    store = LabelStore(tmp_path / "some")
    ids = np.fromiter(store, dtype=np.int64, count=len(store))
    expected = sorted(ids[store.rows_with_copies()].tolist())
    found = study.selected(q, threshold=0.6, per_class=per_class, balanced=balanced)
    assert found.tolist() == expected
    assert 0 < len(set(expected)) < 60


def test_the_rate_is_that_of_the_librarys_schedule(study: ModuleType) -> None:
    options = FitOptions(steps=700, schedule="exponential")
    for step in (0, 1, 350, 699):
        assert study.decayed(step, 700) == pytest.approx(options.rate(step))


def test_every_arm_differs_from_the_others_and_says_what_it_is(study: ModuleType) -> None:
    assert len(set(study.ARMS)) == len(study.ARMS)
    assert len(study.FULL.seeds) >= 10
    assert not set(study.FULL.seeds) & {*study.FULL.tuning_seeds, *range(220)}
    q = torch.rand(2, 40, 10).softmax(-1)
    fifths = [study.kept_of(study._same(16, fifth=fifth), q, (1, 2)) for fifth in range(5)]
    for seed in range(2):
        parts = [part[seed] for part in fifths]
        assert sorted(torch.cat(parts).tolist()) == list(range(40))
        confidence = q[seed].max(1).values
        assert all(confidence[a].max() <= confidence[b].min() for a, b in pairwise(parts))
    quarter = study.kept_of(study._same(16, share=0.25, balanced=False), q, (1, 2))
    assert all(len(set(part.tolist())) <= 10 for part in quarter)
