"""Teachers that are no networks on inputs: a table, and a function of losses."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metapl.checks import described
from metapl.errors import MetaplError


class Table(nn.Module):
    """Numbers that are learned, a row for each index; without an index, all of them.

    Args:
        initial: where they begin, (n, ...), floating point.

    >>> Table(torch.zeros(5, 3))(torch.tensor([4, 0])).shape, Table(torch.zeros(5))().shape
    (torch.Size([2, 3]), torch.Size([5]))
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        if not isinstance(initial, Tensor) or not initial.is_floating_point() or initial.ndim == 0:
            raise MetaplError(
                f"Table was given {described(initial)}; expected a floating-point tensor with a row for each example, "
                "such as torch.zeros(n) or torch.zeros(n, classes)."
            )
        self.values = nn.Parameter(initial.detach().clone())

    def forward(self, index: Tensor | None = None) -> Tensor:
        """The rows of ``index``, (B, ...)."""
        if index is None:
            return self.values
        if index.is_floating_point() or index.dtype == torch.bool:
            raise MetaplError(f"Table was asked for the rows {described(index)}; expected integers, index.long().")
        return self.values[index]


class WeightNet(nn.Module):
    """Losses (B,) to weights (B,) in (0, 1): a perceptron with one hidden layer, as Meta-Weight-Net has it.

    Args:
        hidden: units of the hidden layer.

    >>> WeightNet()(torch.tensor([0.1, 2.0])).shape
    torch.Size([2])
    """

    def __init__(self, hidden: int = 100) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """A weight for each loss."""
        weights: Tensor = self.layers(losses[:, None])[:, 0]
        return weights
