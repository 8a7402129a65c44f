"""A small network for pictures of 28 to 64 pixels that learns fast: half of the width of airbench.

Its first layer whitens patches of 2 x 2 pixels and is not trained, so that what follows begins with
inputs of equal size in every direction.

Source: Keller Jordan, arXiv:2404.00498, whose network of 94 % on CIFAR-10 has twice these widths.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.networks.tuned import Normalized
from metapl.runs.fields import AtLeastOne, Range, check_arguments

# The side of the patches that are whitened, and the channels of the three blocks.
PATCH = 2
WIDTHS = (32, 128, 128)

# Added to the variances of patches, so that directions that hardly vary are not blown up.
LEAST_VARIANCE = 5e-4

# The share of a batch in the running statistics of batch norm.
MOMENTUM = 0.2

# Logits are divided by it, so that the first predictions are mild.
TEMPERATURE = 3.0


class AirbenchSmall(nn.Module):
    """Whitening, three blocks of two convolutions, the maximum over positions, a linear layer.

    A block is a 3 x 3 convolution, pooling by 2, batch norm, GELU, and a 3 x 3 convolution, batch
    norm, GELU. Pictures have 16 pixels a side or more. Cost: 66 million multiplications for a
    forward pass of a picture of 32 x 32.
    """

    def __init__(self, num_classes: int, in_channels: int, dropout: float) -> None:
        super().__init__()
        inputs = in_channels * PATCH**2
        self.whitening = nn.Conv2d(in_channels, 2 * inputs, PATCH, bias=False)
        self.whitening.requires_grad_(requires_grad=False)
        layers: list[nn.Module] = [nn.GELU()]
        channels = 2 * inputs
        for width in WIDTHS:
            layers += [
                nn.Conv2d(channels, width, 3, padding=1, bias=False),
                nn.MaxPool2d(2),
                nn.BatchNorm2d(width, momentum=MOMENTUM),
                nn.GELU(),
                nn.Conv2d(width, width, 3, padding=1, bias=False),
                nn.BatchNorm2d(width, momentum=MOMENTUM),
                nn.GELU(),
            ]
            channels = width
        self.features = nn.Sequential(*layers)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        features = self.features(self.whitening(images)).amax((2, 3))
        logits: Tensor = self.head(self.dropout(features)) / TEMPERATURE
        return logits

    @torch.no_grad()
    def whiten(self, covariance: Tensor) -> None:
        """Set the filters of the first layer: each whitens a direction of patches, or is minus it.

        Args:
            covariance: of the patches of normalized pictures, by :func:`patch_covariance`.
        """
        inputs = self.whitening.weight[0].numel()
        if covariance.shape != (inputs, inputs):
            raise MetaplError(
                f"whiten got a covariance {tuple(covariance.shape)}; expected {(inputs, inputs)}, "
                "of the patches of normalized pictures."
            )
        variances, directions = torch.linalg.eigh(covariance.double())
        # Rounding may leave a variance of 0 slightly below it.
        scales = (variances.clamp_min(0.0) + LEAST_VARIANCE).rsqrt()
        filters = (directions * scales).T.reshape(inputs, *self.whitening.weight.shape[1:])
        self.whitening.weight.copy_(torch.cat([filters, -filters]))


def patch_covariance(pictures: Tensor) -> Tensor:
    """Return the covariance of the 2 x 2 patches of pictures (B, C, H, W), float64 (4C, 4C).

    A patch is laid out as a filter is: by channel, row and column.

    >>> patch_covariance(torch.zeros(2, 3, 8, 8)).shape
    torch.Size([12, 12])
    """
    patches = pictures.double().unfold(2, PATCH, 1).unfold(3, PATCH, 1)
    return torch.cov(patches.permute(1, 4, 5, 0, 2, 3).flatten(3).flatten(0, 2))


def whiten(network: nn.Module, pictures: Tensor) -> None:
    """Set the first layer of an ``airbench_small`` by pictures; other networks stay as they are.

    Args:
        network: behind its normalization, :class:`~metapl.networks.Normalized`.
        pictures: some that it is to learn, (B, C, H, W) in [0, 1]; a few hundred suffice.
    """
    if isinstance(network, Normalized) and isinstance(network.module, AirbenchSmall):
        pictures = pictures.to(network.mean.device)
        network.module.whiten(patch_covariance((pictures - network.mean) / network.std))


def airbench_small(
    num_classes: AtLeastOne = 10,
    in_channels: AtLeastOne = 3,
    dropout: Annotated[float, Range(0, 1)] = 0.0,
) -> AirbenchSmall:
    """Build the network; its first layer is random until :func:`whiten` sets it."""
    check_arguments(airbench_small, locals())
    return AirbenchSmall(num_classes, in_channels, dropout)
