"""The small teacher of Reduced Meta Pseudo Labels: from a stored class distribution to an adjusted one."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.checks import described
from metapl.execution.numerics import in_type_of, wide
from metapl.models.mlp import mlp

LEAST = 1e-8
"""A stored probability below this counts as this; a class that was stored as impossible may become possible again."""


class LabelAdjuster(nn.Module):
    r"""Adjusted logits of stored class distributions, (B, C) to (B, C); first the identity.

    .. math:: T(q) = \log q + f\big(q, \log q / \log(1/\epsilon)\big)

    f is a network of linear layers with ReLUs, whose last layer begins at zero, so that softmax T(q) = q at first.

    Args:
        num_classes: C.
        hidden: the width of the hidden layers.
        layers: the number of linear layers.

    Cost: 2·C·hidden + (layers − 2)·hidden² + hidden·C weights, and no pass over the inputs.
    Raises: :class:`metapl.MetaplError` for sizes that are no network, and for inputs of another number of classes.

    >>> stored = torch.tensor([[0.9, 0.1, 0.0], [0.2, 0.3, 0.5]])
    >>> torch.allclose(label_adjuster(3)(stored).softmax(-1), stored, atol=1e-7)
    True

    Source: Meta Pseudo Labels, section 4, "Reduced Meta Pseudo Labels", a network of five layers and width 128; the
    identity at the start is ours.
    """

    def __init__(self, num_classes: int, hidden: int = 128, layers: int = 5) -> None:
        super().__init__()
        if num_classes < 2 or hidden < 1 or layers < 2:
            raise MetaplError(
                f"label_adjuster(num_classes={num_classes}, hidden={hidden}, layers={layers}): expected two classes or "
                "more, a width of 1 or more, and two layers or more."
            )
        self.num_classes = num_classes
        _, *linear = mlp([2 * num_classes, *[hidden] * (layers - 1), num_classes])
        for weight in linear[-1].parameters():
            nn.init.zeros_(weight)
        self.correction = nn.Sequential(*linear)

    def forward(self, stored_BC: Tensor) -> Tensor:
        """Logits (B, C) of the adjusted distributions."""
        if stored_BC.ndim != 2 or stored_BC.shape[1] != self.num_classes:
            raise MetaplError(
                f"label_adjuster got {described(stored_BC)}; expected stored distributions (B, {self.num_classes})."
            )
        q = wide(stored_BC)
        log_q = q.clamp_min(LEAST).log()
        read = torch.cat([q, log_q / -math.log(LEAST)], dim=1)
        correction: Tensor = self.correction(in_type_of(self.correction, read))
        return log_q + correction


label_adjuster = LabelAdjuster
"""The name beside those of the other networks."""
