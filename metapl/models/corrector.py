"""A network that corrects labels."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.checks import row_indices


class Corrector(nn.Module):
    r"""Logits of the right label, from an input and the label that was given to it.

    .. math:: T(x, y) = f(x) + A_y, \qquad A = \mathrm{trusted} \cdot I \text{ at first}

    Args:
        network: f, from inputs (B, ...) to class logits (B, C).
        classes: C.
        trusted: how much is added to the logit of the given label at first.

    Raises: :class:`metapl.MetaplError` for given labels that are not integers in 0..C − 1, and fewer than two classes.

    >>> Corrector(nn.Linear(4, 3), classes=3)(torch.zeros(2, 4), torch.tensor([0, 2])).argmax(1)
    tensor([0, 2])

    Source: Zheng, Awadallah and Dumais, "Meta label correction for noisy label learning" (AAAI 2021), for a corrector
    that reads an input and its given label; theirs is another network, of the student's features and an embedding.
    """

    def __init__(self, network: nn.Module, classes: int, trusted: float = 4.0) -> None:
        if isinstance(classes, bool) or not isinstance(classes, int) or classes < 2:
            raise MetaplError(f"Corrector(classes={classes!r}): expected the number of classes, 2 or more.")
        super().__init__()
        self.network = network
        self.of_given = nn.Parameter(trusted * torch.eye(classes))

    def forward(self, x: Tensor, given: Tensor) -> Tensor:
        """(B, ...), (B,) to (B, C)."""
        logits: Tensor = self.network(x) + self.of_given[row_indices(given, len(self.of_given), "Corrector")]
        return logits
