"""A small convolutional network for small pictures."""

from __future__ import annotations

from itertools import pairwise

from torch import Tensor, nn
from torch.nn import functional

from metapl.models.common import PooledFeatures, check_sizes


class _ConvNorm(nn.Module):
    """3x3 convolution, group norm, ReLU, out of place."""

    def __init__(self, channels_in: int, channels_out: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels_in, channels_out, 3, stride=stride, padding=1, bias=False)
        self.norm = nn.GroupNorm(8, channels_out)

    def forward(self, x: Tensor) -> Tensor:
        return functional.relu(self.norm(self.conv(x)))


def small_cnn(num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0) -> nn.Module:
    """Build a network of four 3x3 convolutions for pictures of about 16x16.

    They have 32, 48, 64 and 64 channels, each with group norm and ReLU, the second and third halve the resolution;
    then the mean over positions, dropout and a linear layer. Group norm keeps the examples of a batch apart, so the
    labeled and the unlabeled batch may differ in size and make-up.

    Args:
        num_classes: number of outputs, 1 or more.
        in_channels: channels of a picture: 3 for color, 1 for grey.
        dropout: probability in [0, 1) of zeroing one of the 64 features before the linear layer.

    Returns: a module from images (B, ``in_channels``, H, W) to logits (B, ``num_classes``).
    Cost: 80,266 weights with 3 channels and 10 classes.
    Raises: :class:`metapl.MetaplError` for a size below 1, or a dropout outside [0, 1).

    >>> import torch
    >>> small_cnn(num_classes=7, in_channels=1)(torch.zeros(2, 1, 16, 16)).shape
    torch.Size([2, 7])
    """
    check_sizes("small_cnn", dropout, num_classes=num_classes, in_channels=in_channels)
    widths, strides = pairwise((in_channels, 32, 48, 64, 64)), (1, 2, 2, 1)
    features = nn.Sequential(*(_ConvNorm(*each, stride) for each, stride in zip(widths, strides, strict=True)))
    network = PooledFeatures(features, 64, num_classes, dropout)
    for module in features.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return network
