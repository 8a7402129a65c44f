"""Networks: shapes, weight counts, noise, and the derivatives that feedback takes through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from metapl.errors import MetaplError
from metapl.models import MeanOverPositions, wide_resnet, wide_resnet28_2, wide_resnet28_10


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


@pytest.mark.parametrize("size", [(2, 5, 3, 4), (2, 5, 1, 1), (1, 1, 3, 4)])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_mean_over_positions_is_that_of_pooling_and_keeps_the_format(
    memory_format: torch.memory_format, size: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    features = torch.randn(size).to(memory_format=memory_format).requires_grad_()
    upstream = torch.randn(size[:2])
    # Of an intermediate result, for that of a leaf would be brought to the format of the leaf.
    gradients: list[torch.Tensor] = []
    inner = features * 1.0
    inner.register_hook(gradients.append)
    mean = MeanOverPositions()(inner)
    mean.backward(upstream)
    expected = features.detach().clone().requires_grad_()
    pooled = nn.AdaptiveAvgPool2d(1)(expected).flatten(1)
    pooled.backward(upstream)
    torch.testing.assert_close(mean, pooled)
    torch.testing.assert_close(features.grad, expected.grad)
    assert gradients[0].is_contiguous(memory_format=memory_format)


def test_the_mean_over_positions_can_be_stacked_and_differentiated_twice() -> None:
    torch.manual_seed(0)
    features = torch.randn(2, 3, 2, 2, dtype=torch.float64).to(memory_format=torch.channels_last)
    pool = MeanOverPositions()
    stacked = torch.func.vmap(pool)(torch.stack([features, 2 * features]))
    torch.testing.assert_close(stacked, torch.stack([pool(features), 2 * pool(features)]))
    assert torch.autograd.gradgradcheck(
        lambda x: pool(x).pow(3), features.requires_grad_(), check_fwd_over_rev=True
    )


def test_dropout_acts_in_training_alone() -> None:
    model = wide_resnet(10, 1, dropout=0.5)
    images = torch.randn(4, 3, 16, 16)
    model.eval()
    assert torch.equal(model(images), model(images))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.train()
    assert not torch.equal(model(images), model(images))
