"""Networks: shapes, weight counts, noise, and the derivatives that feedback takes through them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.func import functional_call, jvp, vjp

from metapl.errors import MetaplError
from metapl.models import mlp, wide_resnet, wide_resnet28_2, wide_resnet28_10


def count(model: nn.Module) -> int:
    return sum(p.numel() for p in model.parameters())


def test_mlp_layers() -> None:
    model = mlp([64, 32, 16, 10], activation=nn.Tanh, dropout=0.25)
    kinds = [type(layer) for layer in model]
    assert kinds == [nn.Flatten, nn.Linear, nn.Tanh, nn.Dropout, nn.Linear, nn.Tanh, nn.Dropout, nn.Linear]
    assert count(model) == 64 * 32 + 32 + 32 * 16 + 16 + 16 * 10 + 10
    assert not any(isinstance(layer, nn.Dropout) for layer in mlp([4, 3, 2]))


@pytest.mark.parametrize("sizes", [[], [4], [4, 0, 2]])
def test_mlp_refuses_sizes(sizes: list[int]) -> None:
    with pytest.raises(MetaplError, match=r"sizes.*expected at least two"):
        mlp(sizes)


def test_published_weight_counts() -> None:
    with torch.device("meta"):
        assert count(wide_resnet28_2()) == 1_467_610
        assert count(wide_resnet28_10()) == 36_479_194
        # 128 features, so each further class adds 129.
        assert count(wide_resnet28_2(num_classes=100)) == 1_467_610 + 90 * 129


@pytest.mark.parametrize(("depth", "widen", "classes"), [(9, 1, 10), (4, 1, 10), (27, 2, 10), (10, 0, 10), (10, 1, 0)])
def test_wide_resnet_refuses_sizes(depth: int, widen: int, classes: int) -> None:
    with pytest.raises(MetaplError, match="expected"):
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


@pytest.mark.parametrize("training", [True, False])
def test_forward_mode_agrees_with_reverse_mode_and_differences(training: bool) -> None:
    torch.manual_seed(0)
    model = wide_resnet(10, 1, num_classes=3).double().train(training)
    images = torch.randn(4, 3, 8, 8, dtype=torch.float64)
    params = {k: p.detach() for k, p in model.named_parameters()}
    buffers = {k: b.detach() for k, b in model.named_buffers()}
    direction = {k: torch.randn_like(p) for k, p in params.items()}

    def outputs(weights: dict[str, torch.Tensor]) -> torch.Tensor:
        return functional_call(model, (weights, {k: b.clone() for k, b in buffers.items()}), (images,))

    _, along = jvp(outputs, (params,), (direction,))
    eps = 1e-8  # small enough that no ReLU passes its kink on the way
    plus = outputs({k: p + eps * direction[k] for k, p in params.items()})
    minus = outputs({k: p - eps * direction[k] for k, p in params.items()})
    torch.testing.assert_close(along, (plus - minus) / (2 * eps), rtol=1e-5, atol=1e-6)

    cotangent = torch.randn_like(along)
    (pulled,) = vjp(outputs, params)[1](cotangent)
    inner_product = sum((pulled[k] * direction[k]).sum() for k in params)
    torch.testing.assert_close(inner_product, (along * cotangent).sum())
