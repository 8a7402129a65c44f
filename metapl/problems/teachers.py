"""Teachers that do not read inputs: a table with a row per example, and a function of losses."""

from __future__ import annotations

from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.checks import described, row_indices, whole_number


class Table(nn.Module):
    """Learned numbers: the rows of the given indices, or all rows without an argument.

    Args:
        initial: the initial values, (n, ...), floating point.

    Raises: :class:`metapl.MetaplError` for initial values without rows, and for indices outside 0..n − 1.

    >>> import torch
    >>> Table(torch.zeros(5, 3))(torch.tensor([4, 0])).shape, Table(torch.zeros(5))().shape
    (torch.Size([2, 3]), torch.Size([5]))
    """

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        if not isinstance(initial, Tensor) or not initial.is_floating_point() or initial.ndim == 0:
            raise MetaplError(
                f"Table was given initial values that are {described(initial)}; expected a floating-point tensor with "
                "a row for each example, such as torch.zeros(n) or torch.zeros(n, classes)."
            )
        self.values = nn.Parameter(initial.detach().clone())

    def forward(self, index: Tensor | None = None) -> Tensor:
        """The rows of ``index``, (B, ...)."""
        if index is None:
            return self.values
        return self.values[row_indices(index, len(self.values), "Table")]


class WeightNet(nn.Module):
    """Losses (B,) to weights (B,) in (0, 1): the network of Meta-Weight-Net, with one hidden layer.

    Args:
        hidden: the width of the hidden layer.

    Raises: :class:`metapl.MetaplError` for a width that is not a whole number above 0.

    >>> import torch
    >>> WeightNet()(torch.tensor([0.1, 2.0])).shape
    torch.Size([2])
    """

    def __init__(self, hidden: int = 100) -> None:
        whole_number(hidden, f"WeightNet(hidden={hidden!r})", "a width")
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(1, hidden), nn.ReLU(), nn.Linear(hidden, 1), nn.Sigmoid())

    def forward(self, losses: Tensor) -> Tensor:
        """A weight for each loss."""
        weights: Tensor = self.layers(losses[:, None])[:, 0]
        return weights
