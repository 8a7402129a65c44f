"""What the networks have in common."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.runs.fields import AtLeastOne, Range, misfit_entries


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


def check_sizes(network: str, dropout: float = 0.0, **sizes: int) -> None:
    """Refuse sizes below 1 and a dropout that is not a probability in [0, 1)."""
    hints = dict.fromkeys(sizes, AtLeastOne) | {"dropout": Annotated[float, Range(0, 1, of="a probability")]}
    wrong = misfit_entries({**sizes, "dropout": dropout}, hints, network)
    if wrong:
        raise MetaplError(f"{wrong}.")
