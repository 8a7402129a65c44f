"""What the networks of a library have in common, for :mod:`metapl.models.architecture`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

from metapl.errors import MetaplError

if TYPE_CHECKING:
    from metapl.models.architecture import Architecture


@dataclass(frozen=True, kw_only=True)
class Family:
    """How networks of one kind are built, and what they have.

    Args:
        library: the package that builds them: torchvision, timm or metapl.
        build: makes one.
        code: the lines of Python that make one by ``library`` alone, as ``model``.
        heads: the names of the layers that turn features into classes.
        dropout, stochastic_depth: whether they have it.
        patch: the side in pixels that a picture's must be a multiple of, where the network is built for one size.
        adapt: fits the weights of a file in place to a network of another resolution, and names what it changed.
    """

    library: str
    build: Callable[[Architecture], nn.Module]
    code: Callable[[Architecture], list[str]]
    heads: Callable[[nn.Module], tuple[str, ...]]
    dropout: bool = False
    stochastic_depth: bool = False
    patch: int | None = None
    adapt: Callable[[nn.Module, dict[str, Tensor]], tuple[str, ...]] | None = None


class PooledFeatures(nn.Module):
    """Features of pictures, their mean over positions, dropout and a linear layer."""

    def __init__(self, features: nn.Module, channels: int, num_classes: int, dropout: float) -> None:
        super().__init__()
        self.features = features
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.dropout(self.pool(self.features(images)).flatten(1)))
        return logits


def check_numbers(name: str, dropout: float, example: str, **sizes: int) -> None:
    """Refuse sizes below 1 and a dropout that is not a probability."""
    if min(sizes.values()) < 1:
        *given, last = (f"{field} {size}" for field, size in sizes.items())
        raise MetaplError(f"{name} got {', '.join(given)} and {last}; expected each to be 1 or more: {example}")
    if not 0.0 <= dropout < 1.0:
        raise MetaplError(f"{name} got dropout {dropout}; expected a probability in [0, 1): dropout=0.3, say")
