"""Networks: shapes, weight counts, noise, and the derivatives that feedback takes through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metapl.errors import MetaplError
from metapl.models import wide_resnet, wide_resnet28_2, wide_resnet28_10


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_published_weight_counts() -> None:
    with torch.device("meta"):
        assert count(wide_resnet28_2()) == 1_467_610
        assert count(wide_resnet28_10()) == 36_479_194
        # 128 features, so each further class adds 129.
        assert count(wide_resnet28_2(num_classes=100)) == 1_467_610 + 90 * 129


@pytest.mark.parametrize(
    ("depth", "widen", "classes"), [(9, 1, 10), (4, 1, 10), (27, 2, 10), (10, 0, 10), (10, 1, 0)]
)
def test_wide_resnet_refuses_sizes(depth: int, widen: int, classes: int) -> None:
    with pytest.raises(MetaplError):
        wide_resnet(depth, widen, classes)


def test_dropout_acts_in_training_alone() -> None:
    model = wide_resnet(10, 1, dropout=0.5)
    images = torch.randn(4, 3, 16, 16)
    model.eval()
    assert torch.equal(model(images), model(images))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(images), model(images))
