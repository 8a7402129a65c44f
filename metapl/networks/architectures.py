"""Networks by name: metapl's own, torchvision's and timm's."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from torch import nn

from metapl.errors import MetaplError, needed_for, reason_of
from metapl.models import PooledFeatures, small_cnn, wide_resnet
from metapl.networks.airbench import airbench_small
from metapl.networks.weights import load_weights
from metapl.runs.fields import AtLeastOne, Range, check_arguments, check_fields
from metapl.words import did_you_mean

Noise = Annotated[float, Range(0, 1)]

# The factors of width and depth beyond B7. L2: Noisy Student, Table 8. B6-Wide: Meta Pseudo Labels'
# largest experiments, which say the depth of B6 and a width of 5.0; that makes 317 million weights,
# and the printed 390 million follow from no depth at this width.
_SCALES = {"efficientnet_b6_wide": (5.0, 2.6), "efficientnet_l2": (4.3, 5.3)}

# A vision transformer of 1.2 billion weights, of the usual shape: twice the width of ViT-L at its
# depth.
_LARGE_VIT = {
    "patch_size": 14,
    "num_layers": 24,
    "num_heads": 16,
    "hidden_dim": 2048,
    "mlp_dim": 8192,
}

# Stages of EfficientNet-B0 whose stride is 1 instead of 2 on SVHN: a total of 8 instead of 32.
_KEEPING_STAGES = (2, 3)


def pooled_cnn(
    num_classes: AtLeastOne = 10,
    in_channels: AtLeastOne = 3,
    dropout: Noise = 0.0,
    image_size: AtLeastOne | None = None,
) -> nn.Module:
    """Build a network that learns fast from few pictures of 16 to 96 pixels.

    ``image_size`` is their side; None: 32. Stages of 32, 64, 128, 192, 192, ... channels (64 and
    128, where there are two), each a 3x3 convolution, pooling, batch norm and ReLU, pool by the
    greatest of 2x2 values until the side is 6 to 11 pixels; one more stage does not. Above 40
    pixels, the first convolution has a stride of 2 and no pooling. Then the mean over positions,
    dropout and a linear layer. It takes larger pictures too, and smaller ones that do not vanish in
    the pooling.
    """
    check_arguments(pooled_cnn, locals())
    side = 32 if image_size is None else image_size
    # The stride of each stage's convolution, and whether the stage pools.
    plan = []
    if side > 40:
        plan.append((2, False))
        side = -(-side // 2)
    while side >= 12:
        plan.append((1, True))
        side //= 2
    plan.append((1, False))
    # Two stages begin at 64 channels, one alone at 128; from the fourth on there are 192.
    first_width = max(0, 3 - len(plan))
    all_widths = (32, 64, 128, 192)
    stages = []
    channels = in_channels
    for number, (stride, pools) in enumerate(plan):
        width = all_widths[min(first_width + number, 3)]
        # Pooling before batch norm leaves the others a quarter of the values: a step is up to 1.25
        # times as fast.
        stage = nn.Sequential(
            nn.Conv2d(channels, width, 3, stride=stride, padding=1, bias=False),
            nn.MaxPool2d(2) if pools else nn.Identity(),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        stages.append(stage)
        channels = width
    return PooledFeatures(nn.Sequential(*stages), channels, num_classes, dropout)


OWN: dict[str, Callable[..., nn.Module]] = {
    "airbench_small": airbench_small,
    "pooled_cnn": pooled_cnn,
    "small_cnn": small_cnn,
    "wide_resnet10_1": partial(wide_resnet, 10, 1),
    "wide_resnet28_2": partial(wide_resnet, 28, 2),
    "wide_resnet28_10": partial(wide_resnet, 28, 10),
}
RESNETS = tuple(f"resnet{depth}" for depth in (18, 34, 50, 101, 152))
EFFICIENTNETS = (*(f"efficientnet_b{scale}" for scale in (*range(8), "0_svhn")), *_SCALES)
TRANSFORMERS = tuple(f"vit_{size}" for size in ("b_16", "b_32", "l_16", "l_32", "h_14", "1b_14"))

NAMES = (*OWN, *RESNETS, *EFFICIENTNETS, *TRANSFORMERS)
"""What :func:`create` builds; beside them, ``timm:NAME`` stands for every network of timm."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Describes a network that :func:`create` builds, as a plain value.

    It stands in a recipe, or beside exported weights.

    >>> Architecture(name="small_cnn", num_classes=10, in_channels=1).create().head.out_features
    10
    """

    name: str
    num_classes: AtLeastOne
    dropout: Noise = 0.0
    stochastic_depth: Noise = 0.0
    in_channels: AtLeastOne = 3
    image_size: AtLeastOne | None = None

    def __post_init__(self) -> None:
        if self.name not in NAMES and (self.name == "timm:" or self.library != "timm"):
            meant = did_you_mean(self.name, NAMES) or "."
            raise MetaplError(
                f"there is no network {self.name!r}{meant} Expected {', '.join(NAMES)}, or "
                "timm:NAME."
            )
        check_fields(self)
        if self.stochastic_depth > 0.0 and not self.has_stochastic_depth:
            having = ", ".join(EFFICIENTNETS)
            raise MetaplError(
                f"{self.name} has no stochastic_depth; leave it out, or take one that has it: "
                f"{having}."
            )
        if self.image_size is not None and self.image_size % (self.patch or 1):
            raise MetaplError(
                f"{self.name} got image_size={self.image_size}; expected a multiple of its patch, "
                f"{self.patch}."
            )

    @property
    def library(self) -> str:
        """Return the package whose names its weights have: torchvision, timm or metapl."""
        if self.name in OWN:
            return "metapl"
        if self.name.startswith("timm:"):
            return "timm"
        return "torchvision"

    @property
    def has_stochastic_depth(self) -> bool:
        """Return whether blocks can be dropped; of timm's networks one knows when one is built."""
        return self.name in EFFICIENTNETS or self.library == "timm"

    @property
    def patch(self) -> int | None:
        """Return what the side of a picture is a multiple of; None: it can have any size.

        torchvision builds its vision transformers for one size.
        """
        if self.name in TRANSFORMERS:
            return int(self.name.rpartition("_")[2])
        return None

    def create(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        """Build the network, with fresh weights from the default generator or those of a file.

        See :func:`create`.
        """
        module: nn.Module
        if self.library == "metapl":
            sized: dict[str, int | None] = {}
            if self.name == "pooled_cnn":
                sized["image_size"] = self.image_size
            module = OWN[self.name](
                in_channels=self.in_channels,
                num_classes=self.num_classes,
                dropout=self.dropout,
                **sized,
            )
        elif self.library == "timm":
            module = self._of_timm()
        else:
            module = self._of_torchvision()
            if self.name in EFFICIENTNETS:
                self._adapt_efficientnet(module)
            self._adapt_stem(module)
        if weights is not None:
            load_weights(module, weights, heads=self.heads(module))
        return module

    def _of_timm(self) -> nn.Module:
        """Build a network of timm."""
        with needed_for(f"the network {self.name}"):
            import timm

        name = self.name.removeprefix("timm:")
        if not timm.is_model(name):
            meant = did_you_mean(name, timm.list_models())
            raise MetaplError(f"timm {timm.__version__} has no network {name!r}{meant}")
        has_fixed_size = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", True)
        try:
            module: nn.Module = timm.create_model(
                name,
                num_classes=self.num_classes,
                # Not every network takes these. None is timm's default.
                in_chans=None if self.in_channels == 3 else self.in_channels,
                drop_rate=self.dropout or None,
                drop_path_rate=self.stochastic_depth or None,
                img_size=self.image_size if has_fixed_size else None,
            )
        except TypeError as error:
            raise MetaplError(
                f"{self.name} cannot be built: {reason_of(error)}; leave out, or give as 0, the "
                "dropout, stochastic_depth or in_channels that it does not have."
            ) from error
        return module

    def _of_torchvision(self) -> nn.Module:
        """Build a network of torchvision, for pictures of three channels."""
        with needed_for(f"the network {self.name}"):
            from torchvision import models
            from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf

        module: Any
        if self.name in _SCALES:
            # By name, torchvision goes up to B7.
            width, depth = _SCALES[self.name]
            stages, _ = _efficientnet_conf("efficientnet_b7", width_mult=width, depth_mult=depth)
            module = EfficientNet(
                stages,
                norm_layer=partial(nn.BatchNorm2d, eps=0.001, momentum=0.01),
                num_classes=self.num_classes,
                dropout=self.dropout,
            )
            return module  # type: ignore[no-any-return]
        if self.name in TRANSFORMERS:
            build: Callable[..., nn.Module]
            if self.name == "vit_1b_14":
                build = partial(models.VisionTransformer, **_LARGE_VIT)
            else:
                build = models.get_model_builder(self.name)
            return build(
                image_size=self.image_size or 224,
                num_classes=self.num_classes,
                dropout=self.dropout,
            )
        if self.name in EFFICIENTNETS:
            module = models.get_model(
                self.name.removesuffix("_svhn"), num_classes=self.num_classes, dropout=self.dropout
            )
            return module  # type: ignore[no-any-return]
        module = models.get_model(self.name, num_classes=self.num_classes)
        # Dropout comes before the head, whose name stays.
        module.avgpool = nn.Sequential(module.avgpool, nn.Dropout(self.dropout))
        return module  # type: ignore[no-any-return]

    def _adapt_efficientnet(self, module: nn.Module) -> None:
        """Set the strides, the stochastic depth and the head of an EfficientNet."""
        with needed_for(f"the network {self.name}"):
            from torchvision.ops import StochasticDepth

        if self.name.endswith("_svhn"):
            for stage in _KEEPING_STAGES:
                # The first block of a stage: expansion, then the depthwise convolution that
                # strides.
                depthwise: Any = module.get_submodule(f"features.{stage}.0.block.1.0")
                depthwise.stride = (1, 1)
        # torchvision counts blocks from 0, so with it the last block is dropped less often than
        # the rule says.
        blocks = [layer for layer in module.modules() if isinstance(layer, StochasticDepth)]
        for number, block in enumerate(blocks, start=1):
            block.p = self.stochastic_depth * number / len(blocks)
        # The head is drawn from ±1/sqrt(classes). For three classes that makes logits of ten,
        # which takes long to unlearn; so it is drawn as for ImageNet's thousand at least.
        with torch.no_grad():
            weight = module.get_parameter("classifier.1.weight")
            weight.mul_(min(1.0, self.num_classes / 1000) ** 0.5)

    def _adapt_stem(self, module: nn.Module) -> None:
        """Give the network a first convolution for another number of channels, if need be."""
        name, stem = next(
            (name, layer) for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)
        )
        if stem.in_channels == self.in_channels:
            return
        kernel_size: Any = stem.kernel_size
        stride: Any = stem.stride
        convolution = nn.Conv2d(
            self.in_channels,
            stem.out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=stem.padding,  # type: ignore[arg-type]
            bias=stem.bias is not None,
        )
        if convolution.bias is None:
            nn.init.kaiming_normal_(convolution.weight, mode="fan_out", nonlinearity="relu")
        else:
            # The patches of a vision transformer.
            inputs = convolution.weight[0].numel()
            nn.init.trunc_normal_(convolution.weight, std=inputs**-0.5)
            nn.init.zeros_(convolution.bias)
        module.set_submodule(name, convolution)

    def heads(self, module: nn.Module) -> tuple[str, ...]:
        """Return the names of the layers that turn features into classes.

        A distilled network of timm has several.
        """
        if self.library == "timm":
            # Every network of timm has such a configuration.
            of_timm: Any = module
            classifier = of_timm.pretrained_cfg["classifier"]
            return (classifier,) if isinstance(classifier, str) else tuple(classifier or ())
        linear = [name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)]
        return (linear[-1],)


def create(
    name: str,
    num_classes: int,
    *,
    dropout: float = 0.0,
    stochastic_depth: float = 0.0,
    in_channels: int = 3,
    weights: str | os.PathLike[str] | None = None,
    image_size: int | None = None,
) -> nn.Module:
    """Build a network by name.

    Block l of L is dropped with probability (l/L) · ``stochastic_depth``, in training alone.

    ====================  =================================  ===================  ================
    name                  network                            dropout              stochastic depth
    ====================  =================================  ===================  ================
    airbench_small        first layer by ``whiten``, three   before the head      none
                          blocks, for 28x28 to 64x64
    pooled_cnn            convolutions with batch norm and   before the head      none
                          pooling, for 16x16 to 96x96
    small_cnn             four convolutions, for 16x16       before the head      none
    wide_resnet28_2/_10   WRN-28-2 and WRN-28-10, for 32x32  inside each block    none
    wide_resnet10_1       WRN-10-1, of 77,850 weights        inside each block    none
    resnet18 … resnet152  torchvision's                      before the head      none
    efficientnet_b0 … b7  torchvision's                      before the head      linear rule
    efficientnet_b0_svhn  B0 whose stages 2 and 3 keep the   before the head      linear rule
                          resolution: 32x32 ends as 4x4
    efficientnet_l2,      torchvision's blocks, wider than   before the head      linear rule
    efficientnet_b6_wide  B7; L2 is deeper too
    vit_b_16 … vit_h_14   torchvision's                      after the embedding  none
                                                             and in each block
    vit_1b_14             torchvision's, of 1.2 billion      as above             none
                          weights
    timm:NAME             timm's, with timm installed        ``drop_rate``        ``drop_path_rate``
    ====================  =================================  ===================  ================

    Args:
        name: one of :data:`NAMES`, or ``timm:NAME``, such as ``timm:convnext_tiny``.
        num_classes: number of outputs, 1 or more.
        dropout: probability in [0, 1) of zeroing a value.
        stochastic_depth: probability in [0, 1) of dropping the last block.
        in_channels: channels of a picture: 3 for color, 1 for grey.
        image_size: side of the pictures in pixels. Vision transformers (None: 224) and pooled_cnn
            are built for one, and timm's position embeddings of another are interpolated; the
            others take any.
        weights: a local file of a state dict to start from; a head for another number of classes is
            left out, see :func:`metapl.networks.load_weights`. None: fresh weights from
            the default generator.

    Returns:
        A module in training mode from images (B, ``in_channels``, H, W) to logits (B,
        ``num_classes``). It runs with every mode of feedback.

    Raises:
        MetaplError: an unknown name, a number out of its range, or a field that the network does
            not have; timm is not installed; the weights are damaged or of another network.

    >>> import torch
    >>> with torch.device("meta"):
    ...     sum(p.numel() for p in create("efficientnet_b0", 1000).parameters())
    5288548

    Huang et al., arXiv:1603.09382, eq. (4), for the linear rule; Noisy Student's noise of B7 and L2
    for 0.2 and for dropout 0.5.
    """
    architecture = Architecture(
        name=name,
        num_classes=num_classes,
        dropout=dropout,
        stochastic_depth=stochastic_depth,
        in_channels=in_channels,
        image_size=image_size,
    )
    return architecture.create(weights)
