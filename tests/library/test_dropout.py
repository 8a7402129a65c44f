"""Dropout by keys: masks that do not depend on who computes which rows, channels or parts of a layer."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn
from torchvision.ops import StochasticDepth

from metapl.distributed import keyed_dropout
from metapl.distributed.dropout import KeyedDropout, can_be_keyed, drops_by_itself
from metapl.problems.stored import model_noise


def dropped(layer: nn.Module, x: Tensor) -> Tensor:
    torch.manual_seed(3)
    return layer(x)


@pytest.mark.parametrize("shared_from", [None, 2, 1])
def test_a_share_of_the_rows_is_dropped_as_in_the_whole_batch(shared_from: int | None) -> None:
    x = torch.randn(6, 4, 5, 3)
    whole = dropped(KeyedDropout(0.5, shared_from=shared_from), x)
    parts = [dropped(KeyedDropout(0.5, i, shared_from), rows) for i, rows in enumerate(x.chunk(3))]
    assert torch.equal(torch.cat(parts), whole)
    assert not torch.equal(dropped(KeyedDropout(0.5, 0, shared_from), x[2:4]), whole[2:4])  # its share matters


def test_a_part_of_a_layer_is_dropped_as_in_the_whole() -> None:
    x, parts = torch.randn(3, 7, 8), []
    for number, columns in enumerate(x.chunk(2, dim=-1)):
        layer = KeyedDropout(0.5)
        layer.part, layer.parts = number, 2
        parts.append(dropped(layer, columns))
    assert torch.equal(torch.cat(parts, dim=-1), dropped(KeyedDropout(0.5), x))


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_it_drops_as_often_as_asked_and_keeps_the_mean(p: float) -> None:
    kept = dropped(KeyedDropout(p), torch.ones(400, 400))
    assert kept.unique().tolist() == pytest.approx([0.0, 1 / (1 - p)])
    assert (kept == 0).double().mean().item() == pytest.approx(p, abs=0.005)
    rates = torch.stack([(kept == 0).double().mean(dim) for dim in (0, 1)])
    assert rates.std().item() == pytest.approx((p * (1 - p) / 400) ** 0.5, rel=0.15)  # as independent draws would be
    centered = (kept == 0).double() - p
    for neighbor in (centered.roll(1, 0), centered.roll(1, 1), centered.roll((1, 1), (0, 1))):
        assert abs((centered * neighbor).mean().item()) < 5 * p * (1 - p) / 400
    assert not torch.equal(KeyedDropout(p)(torch.ones(400, 400)), kept)  # another key


@pytest.mark.parametrize(
    ("layer", "mask"),
    [
        (lambda: nn.Dropout(0.5), (4, 6, 2, 3)),
        (lambda: nn.Dropout2d(0.5), (4, 6, 1, 1)),
        (lambda: StochasticDepth(0.5, "row"), (4, 1, 1, 1)),
        (lambda: DropPath(0.5), (4, 1, 1, 1)),
    ],
)
def test_layers_are_replaced_by_their_like(layer: Callable[[], nn.Module], mask: tuple[int, ...]) -> None:
    network = nn.Sequential(nn.Conv2d(3, 6, 1), nn.Sequential(layer()))
    assert drops_by_itself(network)
    assert can_be_keyed(network)
    assert isinstance(keyed_dropout(network)[1][0], KeyedDropout)
    assert not drops_by_itself(network)
    assert model_noise(network) == [network[1][0]]  # switched off with the noise of any other network
    kept = dropped(network[1], torch.ones(4, 6, 2, 3))
    assert torch.equal(kept, kept[: mask[0], : mask[1], : mask[2], : mask[3]].expand_as(kept))
    assert set(kept.flatten().tolist()) <= {0.0, 2.0}
    assert torch.equal(network.eval()[1](kept), kept)


@pytest.mark.parametrize(
    "layer", [nn.AlphaDropout(0.5), nn.MultiheadAttention(4, 2, 0.1), StochasticDepth(0.1, "batch")]
)
def test_what_has_no_form_is_known(layer: nn.Module) -> None:
    assert drops_by_itself(nn.Sequential(layer))
    assert not can_be_keyed(nn.Sequential(layer))
    assert not drops_by_itself(nn.Sequential(nn.Dropout(0.0), nn.Linear(2, 2)))


class HeadDropout(nn.Linear):
    """A layer that drops by a function, at a rate that it has, as timm's networks do."""

    def __init__(self, drop_rate: float) -> None:
        super().__init__(2, 2)
        self.drop_rate = drop_rate

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(super().forward(x), self.drop_rate, self.training)


def test_dropout_by_a_function_is_drawn_apart_in_every_share() -> None:
    network = nn.Sequential(nn.Dropout(0.5), HeadDropout(0.5))
    assert not can_be_keyed(network)
    assert drops_by_itself(keyed_dropout(nn.Sequential(HeadDropout(0.5))))
    assert not drops_by_itself(nn.Sequential(HeadDropout(0.0)))
    assert can_be_keyed(nn.Sequential(nn.Dropout(0.5), HeadDropout(0.0)))
