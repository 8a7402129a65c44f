"""A fully connected classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

from torch import nn

from metapl.errors import MetaplError
from metapl.models.common import check_sizes


def mlp(sizes: Sequence[int], activation: Callable[[], nn.Module] = nn.ReLU, dropout: float = 0.0) -> nn.Sequential:
    """Build a multi-layer perceptron that flattens its input.

    x₀ = flatten(x), x_{i+1} = dropout(activation(W_i x_i + b_i)), and the last layer is linear.

    Args:
        sizes: widths from the flattened input to the outputs, at least two.
        activation: makes the module between two layers, ``nn.ReLU`` or ``lambda: nn.LeakyReLU(0.1)``.
        dropout: probability in [0, 1) of zeroing a hidden unit; 0 adds no dropout layer.

    Returns: a module from (B, ...) with ``sizes[0]`` values per example to (B, ``sizes[-1]``).
    Raises: :class:`metapl.MetaplError` for fewer than two sizes, a size below 1, or a dropout outside [0, 1).

    >>> import torch
    >>> mlp([64, 32, 10])(torch.zeros(5, 1, 8, 8)).shape
    torch.Size([5, 10])
    """
    if len(sizes) < 2 or min(sizes) < 1:
        raise MetaplError(f"mlp got sizes {list(sizes)}; expected at least two widths of 1 or more: mlp([64, 32, 10]).")
    check_sizes("mlp", dropout)
    layers: list[nn.Module] = [nn.Flatten()]
    *hidden, last = pairwise(sizes)
    for fan_in, fan_out in hidden:
        layers += [nn.Linear(fan_in, fan_out), activation(), *([nn.Dropout(dropout)] if dropout > 0 else [])]
    return nn.Sequential(*layers, nn.Linear(*last))
