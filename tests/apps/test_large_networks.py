"""EfficientNet-L2, B6-Wide and a vision transformer of 1.2 billion weights: by name, too large to run whole here."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torchvision.models.efficientnet import MBConv

from metapl.apps.networks import Architecture, create

BLOCKS = {"efficientnet_l2": (6, 11, 11, 16, 16, 22, 6), "efficientnet_b6_wide": (3, 6, 6, 8, 8, 11, 3)}
"""Blocks of each stage: those of B0 times 5.3 and 2.6, rounded up."""


def on_meta(name: str, **fields: Any) -> nn.Module:
    with torch.device("meta"):
        return create(name, 1000, **fields)


@pytest.mark.parametrize("name", BLOCKS)
def test_width_and_depth(name: str) -> None:
    network: Any = on_meta(name, stochastic_depth=0.2, dropout=0.5)
    stages = [[m for m in stage.modules() if isinstance(m, MBConv)] for stage in network.features[1:-1]]
    assert tuple(map(len, stages)) == BLOCKS[name]
    factor = {"efficientnet_l2": 4.3, "efficientnet_b6_wide": 5.0}[name]
    for blocks, channels in zip(stages, (16, 24, 40, 80, 112, 192, 320), strict=True):
        assert blocks[-1].out_channels == pytest.approx(factor * channels, abs=4)
        assert blocks[-1].out_channels % 8 == 0
    assert stages[-1][-1].stochastic_depth.p == pytest.approx(0.2)
    assert {m.eps for m in network.modules() if isinstance(m, nn.BatchNorm2d)} == {0.001}


def test_counts_are_those_of_timm() -> None:
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        theirs = timm.create_model("tf_efficientnet_l2", num_classes=1000)
    assert sum(p.numel() for p in theirs.parameters()) == sum(
        p.numel() for p in on_meta("efficientnet_l2").parameters()
    )


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("efficientnet_l2", {}),
        ("efficientnet_b6_wide", {"in_channels": 1, "image_size": 112}),
        ("vit_1b_14", {}),
        ("vit_1b_14", {"in_channels": 1, "image_size": 112}),
    ],
)
def test_its_code_builds_it(name: str, fields: dict[str, int]) -> None:
    import torchvision

    architecture = Architecture(name=name, num_classes=5, **fields)
    scope: dict[str, Any] = {"torch": torch, "torchvision": torchvision}
    with torch.device("meta"):
        exec(architecture.code(), scope)
        made = architecture.create()
    assert "metapl" not in architecture.code()
    shapes = [{key: t.shape for key, t in net.state_dict().items()} for net in (scope["model"], made)]
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize("name", ["efficientnet_b6_wide", "vit_1b_14"])
def test_a_pass_at_any_size_of_pictures(name: str) -> None:
    size = 28 if name == "vit_1b_14" else 64
    fields = {"image_size": size} if name == "vit_1b_14" else {}
    network = on_meta(name, **fields)
    assert network(torch.empty(2, 3, size, size, device="meta")).shape == (2, 1000)


def test_the_first_stages_of_l2_run() -> None:
    network: Any = on_meta("efficientnet_l2")
    short = nn.Sequential(network.features[0], *(stage[0] for stage in network.features[1:4]))
    torch.manual_seed(0)
    short = short.to_empty(device="cpu")
    for t in short.state_dict().values():
        t.normal_(0.0, 0.05) if t.is_floating_point() and t.ndim > 1 else t.fill_(1)
    outputs = short(torch.randn(2, 3, 32, 32))
    assert outputs.shape == (2, 176, 4, 4)
    assert outputs.isfinite().all()
    assert outputs.std() > 0
