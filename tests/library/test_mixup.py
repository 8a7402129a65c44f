"""MixUp: its loss against the definition, what it leaves as it is, and a training with it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import metapl
from metapl.errors import MetaplError
from metapl.problems.base import Signal
from metapl.problems.mixup import MixUp

NOTHING = Signal(torch.empty(0))


def mixed_loss(
    network: nn.Module, x: Tensor, targets: Tensor, share: float, partners: list[int]
) -> float:
    """Return the loss by the definition, one row after another."""
    total = 0.0
    for row, partner in enumerate(partners):
        mixture = share * x[row] + (1 - share) * x[partner]
        target = share * targets[row] + (1 - share) * targets[partner]
        log_p = F.log_softmax(network(mixture[None])[0], 0)
        total -= (target * log_p).sum().item()
    return total / len(partners)


def drawn(alpha: float, rows: int, seed: int) -> tuple[float, list[int]]:
    """Return the share and the partners that the loss draws after a seed."""
    torch.manual_seed(seed)
    share = float(torch.distributions.Beta(alpha, alpha).sample())
    return max(share, 1 - share), torch.randperm(rows).tolist()


def call(loss: MixUp, network: nn.Module, outer: object, inner: object = None) -> Tensor:
    return loss(network, outer=outer, inner=inner, signal=NOTHING, step=0)


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_it_is_the_cross_entropy_of_mixtures(label_smoothing: float) -> None:
    torch.manual_seed(0)
    network = nn.Linear(5, 3).double()
    x = torch.randn(7, 5).double()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0])
    targets = (1 - label_smoothing) * F.one_hot(labels, 3).double() + label_smoothing / 3
    share, partners = drawn(0.7, rows=7, seed=5)
    torch.manual_seed(5)
    loss = call(MixUp(0.7, label_smoothing, weight=2.0), network, (x, labels))
    expected = 2 * mixed_loss(network, x, targets, share, partners)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_labeled_and_unlabeled_rows_are_mixed_together() -> None:
    torch.manual_seed(0)
    network = nn.Linear(5, 3).double()
    x = torch.randn(4, 5).double()
    labels = torch.tensor([0, 1, 2, 0])
    more = torch.randn(6, 5).double()
    soft = torch.rand(6, 3).double().softmax(1)
    targets = torch.cat([F.one_hot(labels, 3).double(), soft])
    share, partners = drawn(0.4, rows=10, seed=9)
    torch.manual_seed(9)
    loss = call(MixUp(0.4), network, (x, labels), (more, soft))
    expected = mixed_loss(network, torch.cat([x, more]), targets, share, partners)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_nothing_is_mixed_or_drawn_in_evaluation() -> None:
    network = nn.Sequential(nn.Linear(5, 3), nn.Dropout(0.5)).eval()
    x = torch.randn(4, 5)
    labels = torch.tensor([0, 1, 2, 0])
    state = torch.get_rng_state()
    loss = call(MixUp(0.4), network, (x, labels))
    assert torch.equal(torch.get_rng_state(), state)
    torch.testing.assert_close(loss, F.cross_entropy(network(x), labels))


def test_distributions_may_be_the_labels_of_the_outer_batch() -> None:
    network = nn.Linear(5, 3).eval()
    x = torch.randn(4, 5)
    labels = torch.rand(4, 3).softmax(1)
    torch.testing.assert_close(
        call(MixUp(0.4), network, (x, labels)), F.cross_entropy(network(x), labels)
    )


def test_an_inner_batch_without_distributions_is_refused() -> None:
    network = nn.Linear(5, 3)
    outer = (torch.randn(4, 5), torch.tensor([0, 1, 2, 0]))
    views = (torch.randn(6, 5, 1), torch.randn(6, 5, 1))
    for inner in (torch.randn(6, 5), views, (torch.randn(6, 5), torch.tensor([0] * 6))):
        with pytest.raises(MetaplError, match=r"expected inner=\(x, p\) with class distributions"):
            call(MixUp(0.4), network, outer, inner)
    with pytest.raises(MetaplError, match="distributions over 4 classes for a network of 3"):
        call(MixUp(0.4), network, outer, (torch.randn(6, 5), torch.rand(6, 4)))


@pytest.mark.parametrize("settings", [{"alpha": 0.0}, {"alpha": -1.0}, {"label_smoothing": 1.0}])
def test_settings_out_of_range_are_refused(settings: dict[str, float]) -> None:
    with pytest.raises(MetaplError, match="expected"):
        MixUp(**settings)


def test_a_training_with_it_learns_the_digits() -> None:
    split = metapl.pictures.load_digits_split(labels_per_class=20, seed=0)
    x, y = split.labeled
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
    trainer = metapl.LossTrainer(network, (MixUp(0.4, 0.1),), optimizer=optimizer)
    trainer.fit((x, y), steps=400, batch_size=64)
    accuracy = (network.eval()(split.test[0]).argmax(1) == split.test[1]).double().mean()
    # A linear layer has 92 % there.
    assert accuracy > 0.9
