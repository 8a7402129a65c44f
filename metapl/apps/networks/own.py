"""The networks that are metapl's own, by name."""

from __future__ import annotations

from torch import nn

from metapl.apps.networks.family import Family, Sizes
from metapl.apps.networks.pooled_cnn import pooled_cnn
from metapl.models.small_cnn import small_cnn
from metapl.models.wide_resnet import wide_resnet

_WIDTHS = {"wide_resnet28_2": 2, "wide_resnet28_10": 10}


def _build(a: Sizes) -> nn.Module:
    if a.name == "pooled_cnn":
        return pooled_cnn(a.num_classes, in_channels=a.in_channels, dropout=a.dropout, image_size=a.image_size)
    if a.name == "small_cnn":
        return small_cnn(a.num_classes, in_channels=a.in_channels, dropout=a.dropout)
    return wide_resnet(28, _WIDTHS[a.name], a.num_classes, dropout=a.dropout, in_channels=a.in_channels)


def _code(a: Sizes) -> list[str]:
    channels = f", in_channels={a.in_channels}" * (a.in_channels != 3)
    size = f", image_size={a.image_size}" * (a.name == "pooled_cnn" and a.image_size is not None)
    return [f'model = metapl.apps.networks.create("{a.name}", num_classes={a.num_classes}{channels}{size})']


def _heads(_module: nn.Module) -> tuple[str, ...]:
    return ("head",)


_FAMILY = Family(library="metapl", build=_build, code=_code, heads=_heads, dropout=True)
FAMILIES = dict.fromkeys(("pooled_cnn", "small_cnn", *_WIDTHS), _FAMILY)
