"""Wide residual networks for 32x32 images (Zagoruyko and Komodakis, arXiv:1605.07146)."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional

from metapl.errors import MetaplError
from metapl.models.common import check_sizes


class _Block(nn.Module):
    """Pre-activation residual block: BN, ReLU, 3x3, BN, ReLU, dropout, 3x3."""

    def __init__(self, channels_in: int, channels_out: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels_in)
        self.conv1 = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels_out)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels_out, channels_out, 3, padding=1, bias=False)
        same_shape = channels_in == channels_out and stride == 1
        self.shortcut = None if same_shape else nn.Conv2d(channels_in, channels_out, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # Out of place throughout: feedback differentiates the same pass forward and twice backward.
        activated = functional.relu(self.norm1(x))
        residual: Tensor = self.conv1(activated)
        residual = self.conv2(self.dropout(functional.relu(self.norm2(residual))))
        # As in the authors' code, a shortcut that changes the shape starts from the activated input.
        skipped: Tensor = x if self.shortcut is None else self.shortcut(activated)
        return skipped + residual


class _WideResNet(nn.Module):
    def __init__(self, depth: int, widen: int, num_classes: int, dropout: float, in_channels: int) -> None:
        super().__init__()
        self.stem = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        channels, blocks = 16, []
        for width, first_stride in ((16 * widen, 1), (32 * widen, 2), (64 * widen, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(_Block(channels, width, first_stride if i == 0 else 1, dropout))
                channels = width
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.BatchNorm2d(channels)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.head = nn.Linear(channels, num_classes)
        self.apply(_initialise)

    def forward(self, images: Tensor) -> Tensor:
        features = functional.relu(self.norm(self.blocks(self.stem(images))))
        logits: Tensor = self.head(self.pool(features).flatten(1))
        return logits


def _initialise(module: nn.Module) -> None:
    # Batch norm starts at scale 1 and shift 0 by itself.
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    elif isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)


def wide_resnet(depth: int, widen: int, num_classes: int = 10, dropout: float = 0.0, in_channels: int = 3) -> nn.Module:
    """Build a pre-activation wide residual network WRN-depth-widen.

    Three groups of n = (depth − 4) / 6 blocks with 16, 32 and 64 times ``widen`` channels; the second and third group
    halve the resolution; then batch norm, ReLU, the mean over positions and a linear layer.

    Args:
        depth: number of convolutions counted as in the paper: 10, 16, 22, 28, 34, 40, ...
        widen: width factor, 1 or more.
        num_classes: number of outputs, 1 or more.
        dropout: probability in [0, 1) of zeroing a value between the two convolutions of a block.
        in_channels: channels of a picture: 3 for color, 1 for grey.

    Returns: a module from images (B, ``in_channels``, H, W), meant for 32x32, to logits (B, ``num_classes``).
    Cost: 1,467,610 weights for WRN-28-2 and 36.5 million for WRN-28-10, with 10 classes.
    Raises: :class:`metapl.MetaplError` for a depth that is not 6n + 4 with n ≥ 1, a size below 1, or a dropout outside
        [0, 1).

    >>> import torch
    >>> wide_resnet(10, 1, num_classes=7)(torch.zeros(2, 3, 32, 32)).shape
    torch.Size([2, 7])

    Zagoruyko and Komodakis, arXiv:1605.07146, table 1.
    """
    if depth < 10 or (depth - 4) % 6 != 0:
        raise MetaplError(f"wide_resnet got depth {depth}; expected 6n + 4, with n blocks a group: 10, 16, 22, 28, say")
    check_sizes("wide_resnet", dropout, widen=widen, num_classes=num_classes, in_channels=in_channels)
    return _WideResNet(depth, widen, num_classes, dropout, in_channels)


def wide_resnet28_2(num_classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """Build WRN-28-2, the network of the CIFAR-10 and SVHN experiments; see :func:`wide_resnet`.

    >>> sum(p.numel() for p in wide_resnet28_2().parameters())
    1467610
    """
    return wide_resnet(28, 2, num_classes, dropout)


def wide_resnet28_10(num_classes: int = 10, dropout: float = 0.0) -> nn.Module:
    """Build WRN-28-10, the widest network in common use on 32x32 images; see :func:`wide_resnet`."""
    return wide_resnet(28, 10, num_classes, dropout)
