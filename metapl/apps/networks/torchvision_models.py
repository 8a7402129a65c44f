"""torchvision's networks, by name, with the noise and the sizes of the papers."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.networks.family import Family, Sizes
from metapl.errors import MetaplError

_KEEPING_STAGES = (2, 3)
"""The stages of EfficientNet-B0 whose stride is 1 instead of 2 on SVHN: a total of 8 instead of 32."""

_IMAGENET_CLASSES = 1000
"""The head of an EfficientNet is drawn from ±1/sqrt(classes). For three classes that makes logits of ten, which takes
long to unlearn; so it is drawn as for these many classes at least."""


_STAGES = (
    (1, 3, 1, 32, 16, 1),
    (6, 3, 2, 16, 24, 2),
    (6, 5, 2, 24, 40, 2),
    (6, 3, 2, 40, 80, 3),
    (6, 5, 1, 80, 112, 3),
    (6, 5, 2, 112, 192, 4),
    (6, 3, 1, 192, 320, 1),
)
"""The stages of EfficientNet-B0: expansion, kernel, stride, channels before and after, blocks. torchvision scales them
up to B7 by name; further than that it has the parts alone."""

_SCALES = {"efficientnet_b6_wide": (5.0, 2.6), "efficientnet_l2": (4.3, 5.3)}
"""The factors of width and depth beyond B7. L2: Noisy Student, Table 8. B6-Wide: Meta Pseudo Labels, section 4, which
says the depth of B6 and a width of 5.0; that makes 317 million weights, and the 390 million that it prints follow from
no depth at this width."""

_LARGE_VIT = {"patch_size": 14, "num_layers": 24, "num_heads": 16, "hidden_dim": 2048, "mlp_dim": 8192}
"""A vision transformer of 1.2 billion weights, of the usual shape: twice the width of ViT-L at its depth."""


class _DroppedLinear(nn.Linear):
    """A linear layer behind dropout, under the names of a plain one."""

    def __init__(self, features: int, outputs: int, p: float) -> None:
        super().__init__(features, outputs)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def _build_resnet(a: Sizes) -> nn.Module:
    module = _make(a.name, num_classes=a.num_classes)
    if a.dropout > 0:
        module.fc = _DroppedLinear(module.fc.in_features, a.num_classes, a.dropout)  # type: ignore[arg-type,union-attr]
    return _with_channels(module, "conv1", a.in_channels)


def _build_efficientnet(a: Sizes) -> nn.Module:
    module = _make(a.name.removesuffix("_svhn"), num_classes=a.num_classes, dropout=a.dropout)
    if a.name.endswith("_svhn"):
        for stage in _KEEPING_STAGES:
            # The first block of a stage: expansion, then the depthwise convolution that strides.
            module.get_submodule(f"features.{stage}.0.block.1.0").stride = (1, 1)  # type: ignore[assignment]  # a Conv2d
    _set_stochastic_depth(module, a.stochastic_depth)
    with torch.no_grad():
        module.get_parameter("classifier.1.weight").mul_(min(1.0, a.num_classes / _IMAGENET_CLASSES) ** 0.5)
    return _with_channels(module, "features.0.0", a.in_channels)


def _set_stochastic_depth(module: nn.Module, last: float) -> None:
    """Drop block l of L with probability (l/L) · last, l = 1 … L.

    torchvision counts blocks from 0, so with it the last block is dropped less often than the rule says.
    """
    from torchvision.ops import StochasticDepth

    blocks = [m for m in module.modules() if isinstance(m, StochasticDepth)]
    for number, block in enumerate(blocks, start=1):
        block.p = last * number / len(blocks)


def _build_vit(a: Sizes) -> nn.Module:
    size = {} if a.image_size is None else {"image_size": a.image_size}
    module = _make(a.name, num_classes=a.num_classes, dropout=a.dropout, **size)
    return _with_channels(module, "conv_proj", a.in_channels)


def _make(name: str, **fields: Any) -> nn.Module:
    from torchvision import models
    from torchvision.models.efficientnet import EfficientNet, MBConvConfig

    if name in _SCALES:
        width, depth = _SCALES[name]
        stages = [MBConvConfig(*stage, width_mult=width, depth_mult=depth) for stage in _STAGES]
        # The batch norm of B5 to B7.
        large: nn.Module = EfficientNet(stages, norm_layer=partial(nn.BatchNorm2d, eps=0.001, momentum=0.01), **fields)
        return large
    if name == "vit_1b_14":
        transformer: nn.Module = models.VisionTransformer(**{"image_size": 224, **_LARGE_VIT, **fields})
        return transformer
    module: nn.Module = models.get_model(name, weights=None, **fields)
    return module


def _with_channels(module: nn.Module, stem: str, in_channels: int) -> nn.Module:
    """The network with a fresh first convolution for pictures that do not have three channels."""
    old = module.get_submodule(stem)
    assert isinstance(old, nn.Conv2d)
    if old.in_channels != in_channels:
        new = _like(old, in_channels)
        if old.bias is None:
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        else:  # a vision transformer's patches
            nn.init.trunc_normal_(new.weight, std=new.weight[0].numel() ** -0.5)
            nn.init.zeros_(new.bias)  # type: ignore[arg-type]  # there is one where there was one
        module.set_submodule(stem, new)
    return module


def _like(old: nn.Conv2d, in_channels: int) -> nn.Conv2d:
    return nn.Conv2d(
        in_channels,
        old.out_channels,
        old.kernel_size,  # type: ignore[arg-type]  # two numbers, of which mypy has forgotten the count
        old.stride,  # type: ignore[arg-type]
        old.padding,  # type: ignore[arg-type]
        bias=old.bias is not None,
    )


def _code(a: Sizes, stem: str) -> list[str]:
    """Lines that need torchvision alone; noise is left out, for it acts in training only and has no weights."""
    sized = a.image_size is not None and a.name.startswith("vit_")
    size = f", image_size={a.image_size}" * sized
    if a.name in _SCALES:
        width, depth = _SCALES[a.name]
        lines = [
            "nets = torchvision.models.efficientnet",
            f"stages = {_STAGES}",
            f"stages = [nets.MBConvConfig(*s, width_mult={width}, depth_mult={depth}) for s in stages]",
            f"model = nets.EfficientNet(stages, dropout=0.0, num_classes={a.num_classes}, "
            "norm_layer=lambda c: torch.nn.BatchNorm2d(c, eps=0.001, momentum=0.01))",
        ]
    elif a.name == "vit_1b_14":
        shape = "".join(f", {name}={value}" for name, value in _LARGE_VIT.items())
        side = f"image_size={a.image_size or 224}"
        lines = [f"model = torchvision.models.VisionTransformer({side}{shape}, num_classes={a.num_classes})"]
    else:
        lines = [f"model = torchvision.models.{a.name.removesuffix('_svhn')}(num_classes={a.num_classes}{size})"]
    if a.name.endswith("_svhn"):
        lines += [f"for stage in {_KEEPING_STAGES}:", "    model.features[stage][0].block[1][0].stride = (1, 1)"]
    if a.in_channels != 3:
        import torch

        with torch.device("meta"):
            conv = FAMILIES[a.name].build(a).get_submodule(stem)
        head, *indices = stem.split(".")
        lines.append(f"model.{head}{''.join(f'[{i}]' for i in indices)} = torch.nn.{conv}")
    return lines


def _interpolate(module: nn.Module, state: dict[str, Tensor]) -> tuple[str, ...]:
    """Position embeddings of another resolution, by torchvision's own rule."""
    from torchvision.models.vision_transformer import interpolate_embeddings

    key = "encoder.pos_embedding"
    own = module.state_dict()[key]
    if key not in state or state[key].shape == own.shape or state[key].ndim != 3 or len(state[key]) != 1:
        return ()
    size, patch = int(module.image_size), int(module.patch_size)  # type: ignore[arg-type]
    try:
        interpolate_embeddings(size, patch, state)
    except ValueError as error:
        raise MetaplError(f"{key} in the file cannot be interpolated to pictures of {size} pixels: {error}.") from error
    return (key,)


def _family(stem: str, head: str, build: Any, **has: Any) -> Family:
    return Family(
        library="torchvision",
        build=build,
        code=lambda a: _code(a, stem),
        heads=lambda _module: (head,),
        **has,
    )


_RESNET = _family("conv1", "fc", _build_resnet, dropout=True)
_EFFICIENTNET = _family("features.0.0", "classifier.1", _build_efficientnet, dropout=True, stochastic_depth=True)
_VIT = _family("conv_proj", "heads.head", _build_vit, dropout=True, adapt=_interpolate)

FAMILIES: dict[str, Family] = {
    **{f"resnet{depth}": _RESNET for depth in (18, 34, 50, 101, 152)},
    **{f"efficientnet_b{scale}": _EFFICIENTNET for scale in range(8)},
    "efficientnet_b0_svhn": _EFFICIENTNET,
    **dict.fromkeys(_SCALES, _EFFICIENTNET),
    **{
        f"vit_{size}": replace(_VIT, patch=int(size[-2:])) for size in ("b_16", "b_32", "l_16", "l_32", "h_14", "1b_14")
    },
}
