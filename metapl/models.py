"""Networks for teachers and students.

All work out of place: feedback differentiates the same pass forward and twice backward.
"""

from __future__ import annotations

import inspect
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import PackedSequence

from metapl.errors import MetaplError, few
from metapl.execution.batch import Inputs
from metapl.execution.checks import class_labels, tensor_in, unexpected
from metapl.execution.numerics import in_type_of, wide
from metapl.runs.fields import AtLeastOne, Range, check_arguments

__all__ = [
    "Corrector",
    "LabelAdjuster",
    "Logits",
    "attention",
    "mlp",
    "small_cnn",
    "wide_resnet",
    "wide_resnet28_2",
    "wide_resnet28_10",
]
__dir__ = __all__.copy

AtLeastTwo = Annotated[int, Range(2)]
Dropout = Annotated[float, Range(0, 1, of="a probability")]

# A stored probability below this counts as this: what was stored as impossible may become possible
# again.
LEAST = 1e-8


def mlp(
    sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, dropout: Dropout = 0.0
) -> nn.Sequential:
    """Return a multi-layer perceptron that flattens its input.

    x₀ = flatten(x), x_{i+1} = dropout(activation(W_i x_i + b_i)), and the last layer is linear.

    Args:
        sizes: widths from the flattened input (B, ``sizes[0]``) to the outputs (B, ``sizes[-1]``),
            at least two.
        activation: makes the module between two layers, ``nn.ReLU`` or ``lambda:
            nn.LeakyReLU(0.1)``.
        dropout: probability in [0, 1) of zeroing a hidden unit; 0 adds no dropout layer.

    >>> mlp([64, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise MetaplError(f"mlp got sizes {list(sizes)}; expected widths, such as [64, 32, 10].")
    check_arguments(mlp, locals())
    layers: list[nn.Module] = [nn.Flatten()]
    *hidden_widths, last_widths = pairwise(sizes)
    for fan_in, fan_out in hidden_widths:
        layers.append(nn.Linear(fan_in, fan_out))
        layers.append(activation())
        if dropout > 0:
            layers.append(nn.Dropout(dropout))
    layers.append(nn.Linear(*last_widths))
    return nn.Sequential(*layers)


class MeanOverPositions(nn.Module):
    """The mean of features (B, C, H, W) over their positions, (B, C).

    In the channels-last format its gradient lies in memory as the features do. That of
    ``nn.AdaptiveAvgPool2d`` does not: ReLU and batch norm below it would read two formats at once,
    by slow loops, which took 5 % of a training step of ``pooled_cnn`` on a CPU.
    """

    def forward(self, features: Tensor) -> Tensor:
        is_channels_last = features.stride(1) == 1
        if is_channels_last:
            return features.movedim(1, -1).flatten(1, 2).mean(1)
        return F.adaptive_avg_pool2d(features, 1).flatten(1)


class PooledFeatures(nn.Module):
    """Features of pictures, their mean over positions, dropout and a linear layer."""

    def __init__(
        self, features: nn.Module, channels: int, num_classes: int, dropout: float
    ) -> None:
        super().__init__()
        self.features = features
        self.pool = MeanOverPositions()
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.pool(self.features(images))))
        return logits


def small_cnn(
    num_classes: AtLeastOne = 10, in_channels: AtLeastOne = 3, dropout: Dropout = 0.0
) -> nn.Module:
    """Return a network of four 3x3 convolutions for pictures of about 16x16.

    The convolutions have 32, 48, 64 and 64 channels, each with group norm, which keeps the examples
    of a batch apart, and ReLU; the second and third halve the resolution; then the mean over
    positions, dropout and a linear layer.

    Args:
        num_classes, in_channels: from images (B, ``in_channels``, H, W) to logits (B,
            ``num_classes``).
        dropout: probability in [0, 1) of zeroing one of the 64 features before the linear layer.

    Cost: 80,266 weights with 3 channels and 10 classes.

    >>> small_cnn(num_classes=7, in_channels=1)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 7])
    """
    check_arguments(small_cnn, locals())
    channels = pairwise((in_channels, 32, 48, 64, 64))
    strides = (1, 2, 2, 1)
    features = nn.Sequential()
    for (channels_in, channels_out), stride in zip(channels, strides, strict=True):
        layers = OrderedDict(
            conv=nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False),
            norm=nn.GroupNorm(8, channels_out),
            relu=nn.ReLU(),
        )
        features.append(nn.Sequential(layers))
    network = PooledFeatures(features, 64, num_classes=num_classes, dropout=dropout)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network


class _Block(nn.Module):
    """Pre-activation residual block: BN, ReLU, 3x3, BN, ReLU, dropout, 3x3."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        self.shortcut = None
        keeps_shape = channels_in == channels_out and stride == 1
        if not keeps_shape:
            self.shortcut = nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        activated = F.relu(self.norm1(x))
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(self.dropout(F.relu(self.norm2(residual))))
        # As in the authors' code, a shortcut that changes the shape starts from the activated
        # input.
        skipped: Tensor = x if self.shortcut is None else self.shortcut(activated)
        return skipped + residual


class _WideResNet(nn.Module):
    """The network of :func:`wide_resnet`."""

    def __init__(
        self, depth: int, widen: int, num_classes: int, dropout: float, in_channels: int
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        blocks_in_group = (depth - 4) // 6
        channels = 16
        blocks = []
        for width, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for number in range(blocks_in_group):
                stride = first_stride if number == 0 else 1
                blocks.append(_Block(channels, width, stride=stride, dropout=dropout))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = MeanOverPositions()
        self.head = nn.Linear(channels, num_classes)
        # A batch norm starts at scale 1 and shift 0 by itself.
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            elif isinstance(module, nn.Linear):
                nn.init.xavier_normal_(module.weight)
                nn.init.zeros_(module.bias)

    def forward(self, images: Tensor) -> Tensor:
        features = F.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(self.pool(features))
        return logits


def wide_resnet(
    depth: int,
    widen: AtLeastOne,
    num_classes: AtLeastOne = 10,
    dropout: Dropout = 0.0,
    in_channels: AtLeastOne = 3,
) -> nn.Module:
    """Return a pre-activation wide residual network WRN-depth-widen.

    It has three groups of n = (depth − 4) / 6 blocks with 16, 32 and 64 times ``widen`` channels;
    the second and third group halve the resolution; then batch norm, ReLU, the mean over positions
    and a linear layer.

    Args:
        depth: number of convolutions counted as in the paper: 10, 16, 22, 28, 34, 40, ...
        widen: width factor, 1 or more.
        num_classes, in_channels: from images (B, ``in_channels``, H, W), meant for 32x32, to
            logits.
        dropout: probability in [0, 1) of zeroing a value between the two convolutions of a block.

    Cost: 1,467,610 weights for WRN-28-2 and 36.5 million for WRN-28-10, with 10 classes.
    Source: Zagoruyko and Komodakis, "Wide residual networks" (arXiv:1605.07146), table 1.

    >>> wide_resnet(10, 1, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise MetaplError(f"wide_resnet got depth {depth}; expected 6n + 4: 10, 16, 22, 28, say")
    check_arguments(wide_resnet, locals())
    return _WideResNet(
        depth, widen, num_classes=num_classes, dropout=dropout, in_channels=in_channels
    )


def wide_resnet28_2(num_classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """Return WRN-28-2, the network of the CIFAR-10 and SVHN experiments.

    See :func:`wide_resnet`.
    """
    return wide_resnet(28, 2, num_classes=num_classes, dropout=dropout)


def wide_resnet28_10(num_classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """Return WRN-28-10, the widest network in common use on 32x32 images.

    See :func:`wide_resnet`.
    """
    return wide_resnet(28, 10, num_classes=num_classes, dropout=dropout)


# torch's switches of fused attention, read on every device; torch.compile traces no public name of
# them.
_SWITCHES: Any = torch._C


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    is_causal: bool = False,
    scale: float | None = None,
    rows: int = 256,
) -> Tensor:
    r"""Attend as ``F.scaled_dot_product_attention``, in blocks where no fused kernel may be used.

    .. math:: o_i = \sum_j \mathrm{softmax}_j(s\, q_i^\top k_j)\, v_j

    PyTorch's fused kernels hold no matrix of all queries by all keys, and have neither a second
    derivative nor a forward mode. A pass that needs one of these takes the math kernel, which holds
    several such matrices at once. This function asks whether fused kernels are switched off, as
    metapl does in such a pass, and then calls the math kernel for ``rows`` queries at a time; a
    causal block leaves out the keys behind it. Elsewhere it is PyTorch's function.

    Args:
        query: (..., T, E).
        key: (..., L, E).
        value: (..., L, V).
        is_causal: whether query i sees the keys up to i alone.
        scale: s; None: 1/sqrt(E).
        rows: queries in a block.

    Returns: (..., T, V). Cost: the operations of the math kernel, and half of them if causal. The
    pass in forward mode of ``forward`` holds ``rows`` / T of its matrices. A graph that is
    differentiated twice keeps those of all blocks, unless the layer is checkpointed. There is no
    dropout: blocks would draw other masks than the fused kernel.

    >>> q, k, v = torch.randn(3, 2, 4, 600, 8)
    >>> attention(q, k, v, is_causal=True).shape
    torch.Size([2, 4, 600, 8])
    """
    # Not by check_arguments, which torch.compile does not trace.
    if rows < 1:
        raise MetaplError(f"attention got rows={rows}; expected a whole number, 1 or more.")
    has_fused_kernel = (
        _SWITCHES._get_flash_sdp_enabled()
        or _SWITCHES._get_mem_efficient_sdp_enabled()
        or _SWITCHES._get_cudnn_sdp_enabled()
    )
    queries = query.shape[-2]
    if has_fused_kernel or queries <= rows:
        return F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, scale=scale)
    blocks: list[Tensor] = []
    for start in range(0, queries, rows):
        block = query[..., start : start + rows, :]
        if not is_causal:
            blocks.append(F.scaled_dot_product_attention(block, key, value, scale=scale))
            continue
        # A key behind the last query of the block is seen by none of them.
        end = min(start + block.shape[-2], key.shape[-2])
        pairs = torch.ones(block.shape[-2], end, dtype=torch.bool, device=query.device)
        is_seen = pairs.tril(start)
        attended = F.scaled_dot_product_attention(
            block, key[..., :end, :], value[..., :end, :], attn_mask=is_seen, scale=scale
        )
        blocks.append(attended)
    return torch.cat(blocks, dim=-2)


class LabelAdjuster(nn.Module):
    r"""The small teacher of Reduced Meta Pseudo Labels.

    It maps stored class distributions (B, C) to adjusted logits (B, C).

    .. math:: T(q) = \log q + f\big(q, \log q / \log(1/\epsilon)\big)

    f is a network of linear layers with ReLUs, whose last layer begins at zero, so that softmax
    T(q) = q at first.

    Args:
        num_classes, hidden, layers: C, the width of the hidden layers, and the number of linear
            layers.

    >>> stored = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    >>> torch.allclose(LabelAdjuster(3)(stored).softmax(-1), stored, atol=1e-7)
    True

    Source: Meta Pseudo Labels, section 4, "Reduced Meta Pseudo Labels", a network of five layers
    and width 128; the identity at the start is ours.
    """

    def __init__(
        self, num_classes: AtLeastTwo, hidden: AtLeastOne = 128, layers: AtLeastTwo = 5
    ) -> None:
        super().__init__()
        check_arguments(LabelAdjuster.__init__, locals())
        hidden_widths = [hidden] * (layers - 1)
        # The input is flat already, so that the first module of the perceptron is left out.
        _, *correction = mlp([2 * num_classes, *hidden_widths, num_classes])
        for weight in correction[-1].parameters():
            nn.init.zeros_(weight)
        self.correction = nn.Sequential(*correction)

    def forward(self, stored_BC: Tensor) -> Tensor:
        q = wide(stored_BC)
        log_q = q.clamp_min(LEAST).log()
        features = torch.cat([q, log_q / -math.log(LEAST)], dim=1)
        correction: Tensor = self.correction(in_type_of(self.correction, features))
        return log_q + correction


# The name beside those of the other networks, which are functions.


class Corrector(nn.Module):
    r"""Logits of the right label, from an input and the label that was given to it.

    .. math:: T(x, y) = f(x) + A_y, \qquad A = \mathrm{trusted} \cdot I \text{ at first}

    Args:
        network: f, from inputs (B, ...) to class logits (B, C), C = ``classes``.
        trusted: how much is added to the logit of the given label at first.

    >>> Corrector(nn.Linear(4, 3), classes=3)(torch.zeros(2, 4), torch.tensor([0, 2])).argmax(1)
    tensor([0, 2])

    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI
    2021), whose network is another one, of the student's features and an embedding.
    """

    def __init__(self, network: nn.Module, classes: AtLeastTwo, trusted: float = 4.0) -> None:
        check_arguments(Corrector.__init__, locals())
        super().__init__()
        self.network = network
        self.of_given = nn.Parameter(trusted * torch.eye(classes))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        labels = class_labels(given, len(self.of_given), "the given labels")
        logits: Tensor = self.network(x) + self.of_given[labels]
        return logits


class Logits(nn.Module):
    """A network, such as those of Hugging Face, as a module from a batch's inputs to one tensor.

    A dict goes in as keyword arguments, a tuple or list as positional ones, a tensor or a
    ``PackedSequence`` alone; where the network's forward takes one argument, which cannot be such a
    dict's or tuple's parts, it gets the whole. What comes out is the tensor that the network
    returns, or its ``logits`` (an attribute, or the entry of a dict), (B, C) or (B, T, words), or
    of a tuple or list, such as (prediction, hidden state) of a recurrent network, the first tensor.
    The network is held, not copied.

    >>> class Scorer(nn.Module):
    ...     def forward(self, input_ids, attention_mask):
    ...         return {"logits": torch.ones(len(input_ids), 3) * attention_mask[:, :1]}
    >>> ids = torch.ones(2, 5, dtype=torch.int64)
    >>> Logits(Scorer())({"input_ids": ids, "attention_mask": torch.ones(2, 5)}).shape
    torch.Size([2, 3])
    >>> recurrent = nn.LSTM(4, 3, batch_first=True)  # which returns its states too
    >>> Logits(recurrent)(torch.zeros(2, 5, 4)).shape
    torch.Size([2, 5, 3])
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.arguments = _Arguments.of(network)

    def forward(self, inputs: Inputs) -> Tensor:
        if isinstance(inputs, Mapping) and self.arguments.take_keywords(inputs):
            if unknown := self.arguments.unknown_keywords(inputs):
                expected = f"{few(self.arguments.names)}, of its forward"
                raise MetaplError(f"the batch has {few(unknown)}; expected {expected}.")
            outputs = self.network(**inputs)
        elif isinstance(inputs, tuple | list) and self.arguments.take_positions(inputs):
            outputs = self.network(*inputs)
        else:
            outputs = self.network(inputs)
        logits = tensor_in(outputs)
        if logits is None:
            raise unexpected("the network returned", outputs, "a tensor, or logits in it")
        return logits


@dataclass(frozen=True)
class _Arguments:
    """What the forward of a network takes.

    Args:
        names: the names of its arguments.
        required: how many have no default.
        positions: how many may be passed without their names.
        has_any_keyword: whether it takes keywords of any name.
    """

    names: tuple[str, ...] = ()
    required: int = 0
    positions: float = math.inf
    has_any_keyword: bool = True

    @staticmethod
    def of(network: nn.Module) -> _Arguments:
        """Read the signature of a network; a forward that is not Python's takes anything."""
        try:
            parameters = inspect.signature(network.forward).parameters.values()
        except (TypeError, ValueError):
            return _Arguments()
        kinds = {parameter.kind for parameter in parameters}
        named = [
            parameter
            for parameter in parameters
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        ]
        return _Arguments(
            names=tuple(parameter.name for parameter in named),
            required=sum(parameter.default is parameter.empty for parameter in named),
            positions=math.inf if inspect.Parameter.VAR_POSITIONAL in kinds else len(named),
            has_any_keyword=inspect.Parameter.VAR_KEYWORD in kinds,
        )

    def take_keywords(self, inputs: Mapping[Any, Any]) -> bool:
        """Return whether a dict goes in by its names, not as the one required argument."""
        has_a_name = any(name in inputs for name in self.names)
        return self.has_any_keyword or self.required != 1 or has_a_name

    def unknown_keywords(self, inputs: Mapping[Any, Any]) -> list[Any]:
        """Return the keys of a dict that are the names of no argument."""
        if self.has_any_keyword:
            return []
        return [name for name in inputs if name not in self.names]

    def take_positions(self, inputs: Sequence[Any]) -> bool:
        """Return whether a tuple goes in by its elements, not as the one required argument."""
        if isinstance(inputs, PackedSequence):
            return False
        return self.required != 1 or len(inputs) <= self.positions
