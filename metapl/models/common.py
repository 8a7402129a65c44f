"""What the networks for pictures have in common."""

from __future__ import annotations

from torch import Tensor, nn

from metapl.errors import MetaplError


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
