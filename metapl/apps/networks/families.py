"""The families that networks by name come from: metapl's own, torchvision's and timm's."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from metapl.apps.networks.pooled_cnn import pooled_cnn
from metapl.errors import MetaplError, require_extra
from metapl.models.small_cnn import small_cnn
from metapl.models.wide_resnet import wide_resnet


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The name and the sizes of a network; its fields are those of :class:`metapl.apps.networks.Architecture`."""

    name: str
    num_classes: int
    dropout: float = 0.0
    stochastic_depth: float = 0.0
    in_channels: int = 3
    image_size: int | None = None


@dataclass(frozen=True, kw_only=True)
class Family(ABC):
    """How networks of one kind are built, and what they have.

    Args:
        library: the package that builds them: torchvision, timm or metapl.
        stem, head: the names of the layers that see the channels, and that turn features into classes.
        dropout, stochastic_depth: whether they have it.
        patch: the side in pixels that a picture's must be a multiple of, where the network is built for one size.
    """

    library: str
    stem: str = ""
    head: str = "head"
    dropout: bool = True
    stochastic_depth: bool = False
    patch: int | None = None

    @abstractmethod
    def build(self, a: Sizes) -> nn.Module:
        """Make one."""

    @abstractmethod
    def code(self, a: Sizes) -> list[str]:
        """The lines of Python that make one by ``library`` alone, as ``model``; noise, which has no weights, is left
        out."""

    def heads(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the layers that turn features into classes."""
        return (self.head,)

    def adapt(self, module: nn.Module, state: dict[str, Tensor]) -> tuple[str, ...]:
        """Fit the weights of a file in place to a network of another resolution, and name what was changed."""
        return ()


# ----------------------------------------------------------------------------------------------------------------- own

_WIDTHS = {"wide_resnet28_2": 2, "wide_resnet28_10": 10}


class _Own(Family):
    def build(self, a: Sizes) -> nn.Module:
        fields: dict[str, Any] = {"in_channels": a.in_channels, "dropout": a.dropout}
        if a.name == "pooled_cnn":
            return pooled_cnn(a.num_classes, image_size=a.image_size, **fields)
        if a.name == "small_cnn":
            return small_cnn(a.num_classes, **fields)
        return wide_resnet(28, _WIDTHS[a.name], a.num_classes, **fields)

    def code(self, a: Sizes) -> list[str]:
        channels = f", in_channels={a.in_channels}" * (a.in_channels != 3)
        size = f", image_size={a.image_size}" * (a.name == "pooled_cnn" and a.image_size is not None)
        return [f'model = metapl.apps.networks.create("{a.name}", num_classes={a.num_classes}{channels}{size})']


# --------------------------------------------------------------------------------------------------------- torchvision

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
"""Of each stage of EfficientNet-B0 expansion, kernel, stride, channels before and after, blocks. torchvision scales
them up to B7 by name; further than that it has the parts alone."""

_SCALES = {"efficientnet_b6_wide": (5.0, 2.6), "efficientnet_l2": (4.3, 5.3)}
"""The factors of width and depth beyond B7. L2: Noisy Student, Table 8. B6-Wide: Meta Pseudo Labels, section 4, which
says the depth of B6 and a width of 5.0; that makes 317 million weights, and the 390 million that it prints follow from
no depth at this width."""

_LARGE_VIT = {"patch_size": 14, "num_layers": 24, "num_heads": 16, "hidden_dim": 2048, "mlp_dim": 8192}
"""A vision transformer of 1.2 billion weights, of the usual shape: twice the width of ViT-L at its depth."""


class _Torchvision(Family):
    def build(self, a: Sizes) -> nn.Module:
        return _with_channels(self._made(a), self.stem, a.in_channels)

    def code(self, a: Sizes) -> list[str]:
        lines = self._lines(a)
        if a.in_channels != 3:
            with torch.device("meta"):
                conv = self.build(a).get_submodule(self.stem)
            head, *indices = self.stem.split(".")
            lines.append(f"model.{head}{''.join(f'[{i}]' for i in indices)} = torch.nn.{conv}")
        return lines

    def _call(self, a: Sizes) -> tuple[str, dict[str, Any]]:
        """What torchvision calls it, and the arguments without those of noise."""
        return a.name.removesuffix("_svhn"), {"num_classes": a.num_classes}

    def _made(self, a: Sizes, **noise: float) -> nn.Module:
        from torchvision import models

        name, given = self._call(a)
        return getattr(models, name)(**given, **noise)  # type: ignore[no-any-return]

    def _lines(self, a: Sizes) -> list[str]:
        name, given = self._call(a)
        return [f"model = torchvision.models.{name}({_arguments(given)})"]


class _ResNet(_Torchvision):
    def _made(self, a: Sizes, **noise: float) -> nn.Module:
        module: Any = super()._made(a)
        if a.dropout > 0:
            module.fc = _DroppedLinear(module.fc.in_features, a.num_classes, a.dropout)
        return module  # type: ignore[no-any-return]


class _EfficientNet(_Torchvision):
    def _made(self, a: Sizes, **noise: float) -> nn.Module:
        from torchvision.models.efficientnet import EfficientNet, MBConvConfig
        from torchvision.ops import StochasticDepth

        if a.name in _SCALES:
            width, depth = _SCALES[a.name]
            stages = [MBConvConfig(*stage, width_mult=width, depth_mult=depth) for stage in _STAGES]
            # The batch norm of B5 to B7.
            norm = partial(nn.BatchNorm2d, eps=0.001, momentum=0.01)
            module: nn.Module = EfficientNet(stages, a.dropout, num_classes=a.num_classes, norm_layer=norm)
        else:
            module = super()._made(a, dropout=a.dropout)
        for stage in _KEEPING_STAGES if a.name.endswith("_svhn") else ():
            # The first block of a stage: expansion, then the depthwise convolution that strides.
            convolution: Any = module.get_submodule(f"features.{stage}.0.block.1.0")
            convolution.stride = (1, 1)
        # torchvision counts blocks from 0, so with it the last block is dropped less often than the rule says.
        blocks = [m for m in module.modules() if isinstance(m, StochasticDepth)]
        for number, block in enumerate(blocks, start=1):
            block.p = a.stochastic_depth * number / len(blocks)
        with torch.no_grad():
            module.get_parameter("classifier.1.weight").mul_(min(1.0, a.num_classes / _IMAGENET_CLASSES) ** 0.5)
        return module

    def _lines(self, a: Sizes) -> list[str]:
        if a.name in _SCALES:
            width, depth = _SCALES[a.name]
            return [
                "nets = torchvision.models.efficientnet",
                f"stages = {_STAGES}",
                f"stages = [nets.MBConvConfig(*s, width_mult={width}, depth_mult={depth}) for s in stages]",
                f"model = nets.EfficientNet(stages, dropout=0.0, num_classes={a.num_classes}, "
                "norm_layer=lambda c: torch.nn.BatchNorm2d(c, eps=0.001, momentum=0.01))",
            ]
        keeping = [f"for stage in {_KEEPING_STAGES}:", "    model.features[stage][0].block[1][0].stride = (1, 1)"]
        return super()._lines(a) + (keeping if a.name.endswith("_svhn") else [])


class _VisionTransformer(_Torchvision):
    def _call(self, a: Sizes) -> tuple[str, dict[str, Any]]:
        if a.name == "vit_1b_14":
            size = {"image_size": a.image_size or 224}
            return "VisionTransformer", {**size, **_LARGE_VIT, "num_classes": a.num_classes}
        size = {} if a.image_size is None else {"image_size": a.image_size}
        return a.name, {"num_classes": a.num_classes, **size}

    def _made(self, a: Sizes, **noise: float) -> nn.Module:
        return super()._made(a, dropout=a.dropout)

    def adapt(self, module: nn.Module, state: dict[str, Tensor]) -> tuple[str, ...]:
        """Position embeddings of another resolution, by torchvision's own rule."""
        from torchvision.models.vision_transformer import interpolate_embeddings

        key = "encoder.pos_embedding"
        own = module.state_dict()[key]
        if key not in state or state[key].shape == own.shape or state[key].ndim != 3 or len(state[key]) != 1:
            return ()
        try:
            interpolate_embeddings(module.image_size, module.patch_size, state)
        except ValueError as error:
            raise MetaplError(
                f"{key} in the file cannot be interpolated to pictures of {module.image_size} pixels: {error}."
            ) from error
        return (key,)


class _DroppedLinear(nn.Linear):
    """A linear layer behind dropout, under the names of a plain one."""

    def __init__(self, features: int, outputs: int, p: float) -> None:
        super().__init__(features, outputs)
        self.dropout = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.dropout(x))


def _with_channels(module: nn.Module, stem: str, in_channels: int) -> nn.Module:
    """The network with a fresh first convolution for pictures that do not have three channels."""
    old: Any = module.get_submodule(stem)
    if old.in_channels != in_channels:
        has_bias = old.bias is not None
        new = nn.Conv2d(in_channels, old.out_channels, old.kernel_size, old.stride, old.padding, bias=has_bias)
        if new.bias is None:
            nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
        else:  # a vision transformer's patches
            nn.init.trunc_normal_(new.weight, std=new.weight[0].numel() ** -0.5)
            nn.init.zeros_(new.bias)
        module.set_submodule(stem, new)
    return module


# ---------------------------------------------------------------------------------------------------------------- timm

_OWN_NAMES = {"drop_rate": "dropout", "drop_path_rate": "stochastic_depth", "in_chans": "in_channels"}
"""What timm's arguments are called here."""


class _Timm(Family):
    def build(self, a: Sizes) -> nn.Module:
        return self._made(a)[0]

    def _made(self, a: Sizes) -> tuple[nn.Module, dict[str, Any]]:
        """The network, and the arguments that timm took for it."""
        require_extra("timm", f"{a.name} needs", "timm")
        import timm

        name = a.name.removeprefix("timm:")
        if not timm.is_model(name):
            near = difflib.get_close_matches(name, timm.list_models(), n=5, cutoff=0.0)
            raise MetaplError(
                f"timm {timm.__version__} has no network {name!r}; the likest of those it has: {', '.join(near)}."
            )
        # Only what differs from timm's defaults, for not every network takes every argument.
        given = {
            "num_classes": (a.num_classes, None),
            "in_chans": (a.in_channels, 3),
            "drop_rate": (a.dropout, 0),
            "drop_path_rate": (a.stochastic_depth, 0),
            "img_size": (a.image_size, None),
        }
        fields: dict[str, Any] = {field: value for field, (value, usual) in given.items() if value != usual}
        while True:
            try:
                return timm.create_model(name, pretrained=False, **fields), fields
            except TypeError as error:
                refused = next((field for field in fields if f"'{field}'" in str(error)), "")
                if refused in _OWN_NAMES:
                    raise MetaplError(f"{a.name} has no {_OWN_NAMES[refused]}; leave it out.") from error
                if refused != "img_size":
                    raise
                del fields["img_size"]  # a network that takes any

    def code(self, a: Sizes) -> list[str]:
        with torch.device("meta"):
            _, fields = self._made(a)
        given = {name: value for name, value in fields.items() if name not in ("drop_rate", "drop_path_rate")}
        return [f'model = timm.create_model("{a.name.removeprefix("timm:")}", {_arguments(given)})']

    def heads(self, module: nn.Module) -> tuple[str, ...]:
        """The classifier, or the several of a distilled network."""
        classifier = module.get_classifier()  # type: ignore[operator]  # every network of timm has it
        wanted = {id(m) for m in (classifier if isinstance(classifier, tuple) else (classifier,))}
        return tuple(name for name, part in module.named_modules() if id(part) in wanted)


def _arguments(given: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value}" for name, value in given.items())


_OWN = _Own(library="metapl")
_RESNET = _ResNet(library="torchvision", stem="conv1", head="fc")
_EFFICIENTNET = _EfficientNet(library="torchvision", stem="features.0.0", head="classifier.1", stochastic_depth=True)
_VITS = {"b_16": 16, "b_32": 32, "l_16": 16, "l_32": 32, "h_14": 14, "1b_14": 14}

TIMM = _Timm(library="timm", stochastic_depth=True)

FAMILIES: dict[str, Family] = {
    **dict.fromkeys(("pooled_cnn", "small_cnn", *_WIDTHS), _OWN),
    **{f"resnet{depth}": _RESNET for depth in (18, 34, 50, 101, 152)},
    **{f"efficientnet_b{scale}": _EFFICIENTNET for scale in (*range(8), "0_svhn")},
    **dict.fromkeys(_SCALES, _EFFICIENTNET),
    **{
        f"vit_{size}": _VisionTransformer(library="torchvision", stem="conv_proj", head="heads.head", patch=patch)
        for size, patch in _VITS.items()
    },
}
"""The networks by name; beside them, ``timm:NAME`` stands for every network of timm."""
