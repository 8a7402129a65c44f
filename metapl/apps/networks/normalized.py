"""Networks that take pictures as they are, in [0, 1]."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError


class Normalized(nn.Module):
    """A network behind the normalisation of its input; see :func:`normalized`."""

    mean: Tensor
    std: Tensor

    def __init__(self, module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> None:
        super().__init__()
        self.module = module
        for name, values in (("mean", mean), ("std", std)):
            self.register_buffer(name, torch.tensor(values, dtype=torch.float32).view(-1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        if not images.is_floating_point():
            expected = "expected floating-point values in [0, 1]: images / 255."
            raise MetaplError(f"a normalized network got {images.dtype} pictures; {expected}")
        # Mean and std are float32; in a network of bfloat16 weights, the pictures stay as they came.
        logits: Tensor = self.module(((images - self.mean) / self.std).to(images.dtype))
        return logits

    def extra_repr(self) -> str:
        return f"mean={self.mean.flatten().tolist()}, std={self.std.flatten().tolist()}"


def normalized(module: nn.Module, mean: Sequence[float], std: Sequence[float]) -> Normalized:
    r"""Put the normalisation of pictures into the network: what goes in is in [0, 1].

    .. math:: \mathrm{logits} = f\big((x_c - \mathrm{mean}_c) / \mathrm{std}_c\big)

    Args:
        module: a network f of normalised pictures.
        mean, std: one number per channel, in units of [0, 1]; finite, ``std`` above 0. They are buffers, saved with
            the weights (beside ``module.…``) and never trained.

    Returns:
        A module from images (B, C, H, W) in [0, 1] to logits (B, K). :func:`metapl.apps.export.export` writes the
        weights of ``module`` under its own names, and mean and std beside them.

    Raises:
        MetaplError: mean and std of different lengths or none, a number that is not finite, a std of 0 or less; on a
            call, pictures of whole numbers.

    >>> normalized(nn.Flatten(), mean=[0.5], std=[0.25])(torch.ones(2, 1, 1, 1))
    tensor([[2.],
            [2.]])
    """
    values = [*mean, *std]
    if not mean or len(mean) != len(std) or not all(map(math.isfinite, values)) or min(std) <= 0:
        expected = "one finite number per channel in each, those of std above 0"
        raise MetaplError(f"normalized got mean={list(mean)}, std={list(std)}; expected {expected}.")
    return Normalized(module, mean, std)
