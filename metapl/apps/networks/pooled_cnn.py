"""A small convolutional network that learns fast from few pictures of 16 to 96 pixels."""

from __future__ import annotations

from torch import nn

from metapl.models.common import PooledFeatures, check_numbers

WIDTHS = (32, 64, 128, 192)
"""Channels of four stages. Two stages have 64 and 128, one has 128; those after the fourth have as many as it."""


def pooled_cnn(
    num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0, image_size: int | None = None
) -> nn.Module:
    """Build a network of 3x3 convolutions with pooling and batch norm, for pictures of 16 to 96 pixels.

    Stages of 32, 64, 128, 192, 192, ... channels (64 and 128, where there are two), each a convolution, pooling, batch
    norm and ReLU, pool by the greatest of 2x2 values until the side is 6 to 11 pixels; one more stage does not pool.
    Above 40 pixels, the first convolution has a stride of 2 and no pooling. Then the mean over positions, dropout and a
    linear layer.

    Args:
        num_classes: number of outputs, 1 or more.
        in_channels: channels of a picture: 3 for color, 1 for grey.
        dropout: probability in [0, 1) of zeroing a feature before the linear layer.
        image_size: side of the pictures that it is built for, in pixels, 1 or more; None: 32. It takes larger ones too,
            and smaller ones that do not vanish in the pooling.

    Returns:
        A module from images (B, ``in_channels``, H, W) to logits (B, ``num_classes``).

    Cost: 94,762 weights for pictures of 3x32x32 and 10 classes.

    Raises:
        MetaplError: a size below 1, or a dropout outside [0, 1).

    >>> import torch
    >>> network = pooled_cnn(num_classes=7, in_channels=1, image_size=24)
    >>> network(torch.zeros(2, 1, 24, 24)).shape
    torch.Size([2, 7])
    """
    side = 32 if image_size is None else image_size
    example = "pooled_cnn(num_classes=10, in_channels=1, image_size=32)"
    check_numbers("pooled_cnn", dropout, example, num_classes=num_classes, in_channels=in_channels, image_size=side)
    # The stride of each stage's convolution, and whether the stage pools.
    plan = []
    if side > 40:
        plan.append((2, False))
        side = -(-side // 2)
    while side >= 12:
        plan.append((1, True))
        side //= 2
    plan.append((1, False))
    skipped = max(0, 3 - len(plan))
    widths = [WIDTHS[min(skipped + stage, len(WIDTHS) - 1)] for stage in range(len(plan))]
    # Pooling before batch norm leaves the others a quarter of the values: a step is up to 1.25 times as fast.
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
