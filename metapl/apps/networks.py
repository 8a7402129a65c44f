"""Networks by name, from here, torchvision and timm.

Weights of files for them, of which all or a part is trained.
"""

from __future__ import annotations

import math
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.error import URLError
from urllib.parse import urlparse

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.utils import consume_prefix_in_state_dict_if_present
from torch.nn.parallel import DistributedDataParallel
from torch.utils.weak import WeakIdKeyDictionary

from metapl.apps.words import require_packages
from metapl.errors import MetaplError, few, reason_of
from metapl.models import PooledFeatures, small_cnn, wide_resnet
from metapl.runs.fields import AtLeastOne, Range, check_arguments, check_fields
from metapl.words import did_you_mean

Noise = Annotated[float, Range(0, 1)]
Tuning = Literal["head", "lora", "all"]

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
    """Build a network that learns fast from few pictures of ``image_size`` (None: 32) pixels, 16 to 96.

    Stages of 32, 64, 128, 192, 192, ... channels (64 and 128, where there are two), each a 3x3
    convolution, pooling, batch norm and ReLU, pool by the greatest of 2x2 values until the side is
    6 to 11 pixels; one more stage does not. Above 40 pixels, the first convolution has a stride of
    2 and no pooling. Then the mean over positions, dropout and a linear layer. It takes larger
    pictures too, and smaller ones that do not vanish in the pooling.
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
    widths = [
        (32, 64, 128, 192)[min(max(0, 3 - len(plan)) + stage, 3)] for stage in range(len(plan))
    ]
    # Pooling before batch norm leaves the others a quarter of the values: a step is up to 1.25
    # times as fast.
    stages = (
        nn.Sequential(
            nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
            nn.MaxPool2d(2) if pool else nn.Identity(),
            nn.BatchNorm2d(after),
            nn.ReLU(),
        )
        for before, after, (stride, pool) in zip([in_channels, *widths], widths, plan, strict=False)
    )
    return PooledFeatures(nn.Sequential(*stages), widths[-1], num_classes, dropout)


OWN: dict[str, Callable[..., nn.Module]] = {
    "pooled_cnn": pooled_cnn,
    "small_cnn": small_cnn,
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
    """What :func:`create` takes but for weights: a plain value, to stand in a recipe or beside exported weights.

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
            expected = f"expected a multiple of its patch, {self.patch}"
            raise MetaplError(f"{self.name} got image_size={self.image_size}; {expected}.")

    @property
    def library(self) -> str:
        """The package whose names its weights have: torchvision, timm or metapl."""
        return (
            "metapl"
            if self.name in OWN
            else "timm"
            if self.name.startswith("timm:")
            else "torchvision"
        )

    @property
    def has_stochastic_depth(self) -> bool:
        """Whether blocks can be dropped; of timm's networks that is known when one is built."""
        return self.name in EFFICIENTNETS or self.library == "timm"

    @property
    def patch(self) -> int | None:
        """What the side of a picture is a multiple of, where torchvision builds the network for one size."""
        return int(self.name.rpartition("_")[2]) if self.name in TRANSFORMERS else None

    def create(self, weights: str | os.PathLike[str] | None = None) -> nn.Module:
        """The network, with fresh weights from the default generator or with those of a file.

        See :func:`create`.
        """
        how: dict[str, Any] = {"num_classes": self.num_classes, "dropout": self.dropout}
        module: Any
        if self.library == "metapl":
            sized = {"image_size": self.image_size} if self.name == "pooled_cnn" else {}
            module = OWN[self.name](in_channels=self.in_channels, **how, **sized)
        elif self.library == "timm":
            require_packages(f"the network {self.name}", "timm")
            import timm

            name = self.name.removeprefix("timm:")
            if not timm.is_model(name):
                meant = did_you_mean(name, timm.list_models())
                raise MetaplError(f"timm {timm.__version__} has no network {name!r}{meant}")
            resized = getattr(timm.get_pretrained_cfg(name), "fixed_input_size", True)
            try:
                module = timm.create_model(
                    name,
                    num_classes=self.num_classes,
                    # Not every network takes these. None is timm's default.
                    in_chans=None if self.in_channels == 3 else self.in_channels,
                    drop_rate=self.dropout or None,
                    drop_path_rate=self.stochastic_depth or None,
                    img_size=self.image_size if resized else None,
                )
            except TypeError as error:
                lacks = (
                    "leave out, or give as 0, the dropout, stochastic_depth or in_channels that "
                    "it does not have"
                )
                raise MetaplError(
                    f"{self.name} cannot be built: {reason_of(error)}; {lacks}."
                ) from error
        else:
            module = self._of_torchvision(how)
        if weights is not None:
            load_weights(module, weights, heads=self.heads(module))
        return module  # type: ignore[no-any-return]

    def _of_torchvision(self, how: dict[str, Any]) -> nn.Module:
        from torchvision import models
        from torchvision.models.efficientnet import EfficientNet, _efficientnet_conf
        from torchvision.ops import StochasticDepth

        module: Any
        if self.name in _SCALES:  # by name, torchvision goes up to B7
            width, depth = _SCALES[self.name]
            stages, _ = _efficientnet_conf("efficientnet_b7", width_mult=width, depth_mult=depth)
            module = EfficientNet(
                stages, norm_layer=partial(nn.BatchNorm2d, eps=0.001, momentum=0.01), **how
            )
        elif self.name in TRANSFORMERS:
            build = (
                partial(models.VisionTransformer, **_LARGE_VIT)
                if self.name == "vit_1b_14"
                else None
            )
            module = (build or models.get_model_builder(self.name))(
                image_size=self.image_size or 224, **how
            )
        elif self.name in EFFICIENTNETS:
            module = models.get_model(self.name.removesuffix("_svhn"), **how)
        else:
            module = models.get_model(self.name, num_classes=self.num_classes)
            noise = nn.Dropout(self.dropout)
            module.avgpool = nn.Sequential(
                module.avgpool, noise
            )  # before the head, whose name stays
        if self.name in EFFICIENTNETS:
            for stage in _KEEPING_STAGES if self.name.endswith("_svhn") else ():
                # The first block of a stage: expansion, then the depthwise convolution that
                # strides.
                module.get_submodule(f"features.{stage}.0.block.1.0").stride = (1, 1)
            # torchvision counts blocks from 0, so with it the last block is dropped less often than
            # the rule says.
            blocks = [m for m in module.modules() if isinstance(m, StochasticDepth)]
            for number, block in enumerate(blocks, start=1):
                block.p = self.stochastic_depth * number / len(blocks)
            # The head is drawn from ±1/sqrt(classes). For three classes that makes logits of ten,
            # which takes long to unlearn; so it is drawn as for ImageNet's thousand at least.
            with torch.no_grad():
                module.get_parameter("classifier.1.weight").mul_(
                    min(1.0, self.num_classes / 1000) ** 0.5
                )
        stem, old = next(
            (name, part) for name, part in module.named_modules() if isinstance(part, nn.Conv2d)
        )
        if old.in_channels != self.in_channels:
            how = {"kernel_size": old.kernel_size, "stride": old.stride, "padding": old.padding}
            new = nn.Conv2d(self.in_channels, old.out_channels, **how, bias=old.bias is not None)
            if new.bias is None:
                nn.init.kaiming_normal_(new.weight, mode="fan_out", nonlinearity="relu")
            else:  # a vision transformer's patches
                nn.init.trunc_normal_(new.weight, std=new.weight[0].numel() ** -0.5)
                nn.init.zeros_(new.bias)
            module.set_submodule(stem, new)
        return module  # type: ignore[no-any-return]

    def heads(self, module: nn.Module) -> tuple[str, ...]:
        """The names of the layers that turn features into classes.

        A distilled network of timm has several.
        """
        if self.library == "timm":
            named: Any = module.pretrained_cfg["classifier"]  # type: ignore[index]  # every network of timm has it
            return (named,) if isinstance(named, str) else tuple(named or ())
        return ([name for name, part in module.named_modules() if isinstance(part, nn.Linear)][-1],)


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

    ====================  ==================================  =====================  ================
    name                  network                             dropout                stochastic depth
    ====================  ==================================  =====================  ================
    pooled_cnn            convolutions with batch norm and    before the head        none
                          pooling, for 16x16 to 96x96
    small_cnn             four convolutions, for 16x16        before the head        none
    wide_resnet28_2/_10   WRN-28-2 and WRN-28-10, for 32x32   inside each block      none
    resnet18 … resnet152  torchvision's                       before the head        none
    efficientnet_b0 … b7  torchvision's                       before the head        linear rule
    efficientnet_b0_svhn  B0 whose stages 2 and 3 keep the    before the head        linear rule
                          resolution: 32x32 ends as 4x4
    efficientnet_l2,      torchvision's blocks, wider and     before the head        linear rule
    efficientnet_b6_wide  deeper than B7
    vit_b_16 … vit_h_14   torchvision's                       after the embedding    none
                                                              and in each block
    vit_1b_14             torchvision's, of 1.2 billion       as above               none
                          weights
    timm:NAME             timm's, with timm installed         timm's ``drop_rate``   timm's ``drop_path_rate``
    ====================  ==================================  =====================  ================

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
            left out, see :func:`metapl.apps.networks.load_weights`. None: fresh weights from the
            default generator.

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
    noise = {"dropout": dropout, "stochastic_depth": stochastic_depth}
    a = Architecture(
        name=name, num_classes=num_classes, in_channels=in_channels, image_size=image_size, **noise
    )
    return a.create(weights)


# ---------------------------------------------------------------------------- weights and their use


def load_weights(
    module: nn.Module, file: str | os.PathLike[str], *, heads: Iterable[str] = ()
) -> list[str]:
    """Put the weights of a local file into a network, which is changed in place, or not at all.

    Args:
        module: the network. Position embeddings of a vision transformer of timm are brought to its
            resolution.
        file: a state dict, ``.safetensors`` or by ``torch.save``, alone or under "state_dict" or
            "model". It is read without running code from it. Prefixes of data parallelism and
            ``torch.compile`` are taken off its names.
        heads: names of the layers that give the classes. One whose number of classes differs from
            the file's, or that the file does not have, keeps the weights that it has.

    Returns:
        Names of the heads' tensors that stayed as they were.

    Raises:
        MetaplError: the file is missing, damaged, holds something else than finite tensors, or its
            names or shapes outside the heads differ from the network's.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp())
    >>> torch.save(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 1000)).state_dict(), folder / "weights.pt")
    >>> load_weights(nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3)), folder / "weights.pt", heads=["1"])
    ['1.weight', '1.bias']
    """
    own, state = module.state_dict(), read_weights(file)
    state = {
        name: t for name, t in state.items() if name in own or name not in ("mean", "std")
    }  # see Normalized
    vit: Any = module
    embedded, grid = state.get("pos_embed"), getattr(vit, "patch_embed", None)
    if (
        embedded is not None
        and grid is not None
        and embedded.ndim == 3
        and embedded.shape != own["pos_embed"].shape
    ):
        from timm.layers.pos_embed import resample_abs_pos_embed

        first = 0 if getattr(vit, "no_embed_class", False) else vit.num_prefix_tokens
        state["pos_embed"] = resample_abs_pos_embed(
            embedded, [*grid.grid_size], num_prefix_tokens=first
        )
    fresh: list[str] = []
    for head in heads:
        names = [name for name in own if name.startswith(f"{head}.")]
        same = all(name in state and state[name].shape == own[name].shape for name in names)
        other_features = any(
            name in state and state[name].shape[1:] != own[name].shape[1:] for name in names
        )
        fresh += [] if same or other_features else names
    fits = {name: t for name, t in state.items() if name not in fresh}
    # Files from before PyTorch 0.4.1 do not count batches; only momentum=None would ask for the
    # count.
    optional = {
        *fresh,
        *(name for name in own if name.endswith("num_batches_tracked") and name not in state),
    }
    expected = {name: t for name, t in own.items() if name not in optional}
    kinds = {
        name: (_kind(fits.get(name)), _kind(expected.get(name))) for name in {**expected, **fits}
    }
    if faults := [f"{name} {a} instead of {b}" for name, (a, b) in kinds.items() if a != b]:
        raise MetaplError(
            f"the weights in {file} are not of this network: {few(faults)}; only the head may "
            "differ."
        )
    module.load_state_dict({**own, **fits})
    return fresh


def _kind(tensor: Tensor | None) -> str:
    if tensor is None:
        return "missing"
    return f"{(*tensor.shape,)}" + " of whole numbers" * (not tensor.is_floating_point())


def read_weights(file: str | os.PathLike[str]) -> dict[str, Tensor]:
    """The tensors in a file, by their names without prefixes of data parallelism and ``torch.compile``."""
    path = Path(file)
    if not path.is_file():
        raise MetaplError(
            f"there is no file of weights {path}; expected a .safetensors or .pt file on this "
            "machine."
        )
    try:
        if path.suffix == ".safetensors":
            stored: Any = load_file(path)
        else:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # about how others have written it
                stored = torch.load(path, map_location="cpu", weights_only=True)
        for key in ("state_dict", "model"):
            stored = stored[key] if isinstance(stored.get(key), Mapping) else stored
        if not stored or not all(bool(t.isfinite().all()) for t in stored.values()):
            raise ValueError("it holds no tensors, or some that are not finite")
    except (
        Exception
    ) as error:  # damage shows in many types: safetensors' own, pickle's, zip's, OSError, EOFError
        raise MetaplError(
            f"{path} cannot be read as weights ({type(error).__name__}: {reason_of(error):.80}); "
            "expected a state dict of finite tensors, as .safetensors or as "
            "torch.save(model.state_dict(), path) writes it."
        ) from error
    state = dict(stored)
    for prefix in ("module.", "_orig_mod.", "module."):  # DDP(compile(m)), compile(DDP(m))
        consume_prefix_in_state_dict_if_present(state, prefix)
    return state


def fetch_imagenet_weights(name: str) -> Path:
    """The file of a torchvision network's newest ImageNet weights, downloaded once into torch's cache and checked."""
    from torchvision.models import get_model_weights

    try:
        url = get_model_weights(name).DEFAULT.url
        file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urlparse(url).path).name
        if not file.exists():
            torch.hub.load_state_dict_from_url(
                url, str(file.parent), check_hash=True, weights_only=True
            )
    except ValueError as error:
        raise MetaplError(
            f"torchvision has no ImageNet weights of {name!r}; take resnet18, or --weights FILE."
        ) from error
    except (URLError, OSError, RuntimeError) as error:
        mend = (
            f"download {url} elsewhere and give it as --weights {file.name}, or leave --weights out"
        )
        raise MetaplError(
            f"the ImageNet weights of {name} could not be downloaded ({error}); {mend}."
        ) from error
    return file


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a network's parameters by whether weight decay acts on them, for ``torch.optim``.

    Decay leaves alone vectors and single numbers (biases, scales and shifts of norms, layer scales)
    and every parameter of a norm layer: to shrink these does not make the function simpler. Frozen
    parameters are in no group.

    Args:
        module: the network.
        weight_decay: λ of the decayed parameters, 0 or more.

    Returns:
        Groups ``{"params": [...], "weight_decay": λ}`` in the order of ``module.parameters()``,
        none of them empty: one without decay; with it two, the decayed one first.

    Raises:
        MetaplError: a weight decay below 0.

    >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    >>> [(len(g["params"]), g["weight_decay"]) for g in parameter_groups(net, 5e-4)]
    [(1, 0.0005), (3, 0.0)]
    """
    if not weight_decay >= 0:
        raise MetaplError(
            f"parameter_groups got weight_decay={weight_decay}; expected a number of 0 or more."
        )
    norms = (_NormBase, nn.GroupNorm, nn.LayerNorm, nn.RMSNorm)
    of_norms = {
        id(p) for m in module.modules() if isinstance(m, norms) for p in m.parameters(recurse=False)
    }
    trained = [p for p in module.parameters() if p.requires_grad]
    is_spared = {p: weight_decay > 0 and (p.ndim <= 1 or id(p) in of_norms) for p in trained}
    decays = ((False, weight_decay), (True, 0.0))
    groups = [
        {"params": [p for p in is_spared if is_spared[p] == spared], "weight_decay": w}
        for spared, w in decays
    ]
    return [group for group in groups if group["params"]]


class Normalized(nn.Module):
    r"""A network behind the normalization of pictures: what goes in is in [0, 1].

    .. math:: \mathrm{logits} = f\big((x_c - \mathrm{mean}_c) / \mathrm{std}_c\big)

    It takes images (B, C, H, W) to logits (B, K). :func:`metapl.apps.export.export` writes the
    weights of ``module`` under its own names, and mean and std beside them.

    Args:
        module: a network f of normalized pictures.
        mean, std: one finite number per channel, in units of [0, 1], ``std`` above 0. They are
            buffers, saved with the weights (beside ``module.…``) and never trained.

    Raises:
        MetaplError: another mean or std; on a call, pictures of whole numbers.

    >>> Normalized(nn.Flatten(), mean=[0.5], std=[0.25])(torch.ones(2, 1, 1, 1))
    tensor([[2.],
            [2.]])
    """

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        if (
            not mean
            or len(mean) != len(std)
            or not all(map(math.isfinite, [*mean, *std]))
            or min(std) <= 0
        ):
            expected = "one finite number per channel in each, those of std above 0"
            raise MetaplError(
                f"Normalized got mean={list(mean)}, std={list(std)}; expected {expected}."
            )
        self.module = module
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            raise MetaplError(
                f"the network got {images.dtype} pictures; expected values in [0, 1]: images / 255."
            )
        # Mean and std are float32; in a network of bfloat16 weights, the pictures stay as they
        # came.
        logits: Tensor = self.module(((images - self.mean) / self.std).to(images.dtype))
        return logits

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


# --------------------------------------------------- pretrained networks of which a part is trained


class LowRankLinear(nn.Linear):
    """A frozen layer with a trained change, :math:`W + BA`, which is zero at the start (LoRA, arXiv:2106.09685)."""

    down: Tensor  # A, (rank, the sizes of an output's weights)
    up: Tensor  # B, (out, rank)

    def forward(self, input: Tensor) -> Tensor:
        # BA is not multiplied: its gradient would cost as much as that of all of W.
        return super().forward(input) + F.linear(F.linear(input, self.down), self.up)


class LowRankConv2d(nn.Conv2d):
    """A convolution, likewise."""

    down: Tensor
    up: Tensor

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) + F.conv2d(
            self._conv_forward(input, self.down, None), self.up[:, :, None, None]
        )


class Tuned(Normalized):
    """A pretrained network behind the normalization of its input; see :class:`Normalized`, whose names it has.

    What is frozen runs as in evaluation: no running statistics move, and nothing is dropped. The
    change of low rank of a layer whose weight its parent reads, as some attention does, is not
    used.

    Args:
        heads: the names of its layers that turn features into classes.
        tuning: "head" trains the head alone; "lora" also changes of each linear layer and
            convolution of this rank; "all" everything.

    Cost: with "head", one pass of what is frozen for each batch, however many passes a step has:
    what the head sees is kept as long as the batch.

    Raises: MetaplError for several heads.
    """

    def __init__(
        self,
        module: nn.Module,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        heads: Sequence[str],
        tuning: Tuning,
        rank: int,
    ) -> None:
        super().__init__(module, mean, std)
        if len(heads) != 1:
            raise MetaplError(
                f"this backbone has the heads {', '.join(heads)}; expected a network with one."
            )
        self.head, self.tuning = heads[0], tuning
        self.seen = WeakIdKeyDictionary()  # what the head sees of batches that are alive
        if tuning != "all":
            module.requires_grad_(False)
            module.get_submodule(self.head).requires_grad_(True)
        for name, layer in module.named_modules() if tuning == "lora" else ():
            kind = {nn.Linear: LowRankLinear, nn.Conv2d: LowRankConv2d}.get(type(layer))
            if (
                kind is None
                or f"{name}.".startswith(f"{self.head}.")
                or getattr(layer, "groups", 1) > 1
            ):
                continue
            weight: Any = layer.weight
            if (
                rank * (len(weight) + weight[0].numel()) < weight.numel()
            ):  # fewer weights than it has
                layer.__class__ = kind  # whoever reads its sizes or its weight finds them
                layer.down = nn.Parameter(weight.new_empty(rank, *weight.shape[1:]))
                layer.up = nn.Parameter(weight.new_zeros(len(weight), rank))
                nn.init.kaiming_uniform_(layer.down, a=math.sqrt(5))
        self.train()

    def train(self, mode: bool = True) -> Tuned:
        super().train(mode)
        if self.tuning != "all":
            self.module.eval()
            self.module.get_submodule(self.head).train(mode)
        return self

    def forward(self, images: Tensor) -> Tensor:
        # What a wrapper of vmap or an inference tensor has seen is of no use later.
        passing = (
            torch._C._functorch.peek_interpreter_stack() is not None
            or torch.is_inference_mode_enabled()
        )
        if self.tuning != "head" or passing or images.requires_grad or images.is_inference():
            return super().forward(images)
        head, kind = self.module.get_submodule(self.head), images.device.type
        frozen = [
            p for name, p in self.module.named_parameters() if not name.startswith(f"{self.head}.")
        ]
        if any(p.requires_grad for p in frozen):
            return super().forward(images)
        # What the features depend on: these pictures, autocast, and these weights, or copies of
        # them in a replay.
        cast = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        now = images.data_ptr(), images._version, cast
        then, weights, features = self.seen.get(images, (None, (), None))
        same = then == now and all(
            p._version == version and (p is q or torch.equal(p, q))
            for (p, version), q in zip(weights, frozen, strict=True)
        )
        if not same:
            features = self.features(images)
            self.seen[images] = now, [(p, p._version) for p in frozen], features
        logits: Tensor = head(features)
        return logits

    @torch.no_grad()
    def features(self, images: Tensor) -> Tensor:
        """What the head sees of pictures (B, C, H, W) in [0, 1]: (B, F)."""
        found: list[Tensor] = []
        head = self.module.get_submodule(self.head)
        hook = head.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0]))
        try:
            super().forward(images)
        finally:
            hook.remove()
        return found[0]


def begin_as(first: nn.Module, second: nn.Module) -> None:
    """Let the second network begin as the first one, and hold its frozen weights, so that they are stored once."""
    first = first.module if isinstance(first, DistributedDataParallel) else first
    if not isinstance(first, Tuned) or not isinstance(second, Tuned):
        return
    second.load_state_dict(first.state_dict())
    frozen = {name: p for name, p in first.named_parameters() if not p.requires_grad}
    for prefix, part in second.named_modules():
        for name in part._parameters:
            if (shared := frozen.get(f"{prefix}.{name}")) is not None:
                part._parameters[name] = shared
    second.seen = first.seen


def merged(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of the network as it is built by its name, low-rank changes added to what they change."""
    found = dict(state)
    for name in state:
        stem, _, last = name.rpartition(".")
        if last == "up" and f"{stem}.down" in state:
            weight, up, down = (found.pop(f"{stem}.{part}") for part in ("weight", "up", "down"))
            found[f"{stem}.weight"] = weight + (up @ down.flatten(1)).reshape(weight.shape)
    return found
