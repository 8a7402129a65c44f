"""Advice on a table whose columns are not on one scale."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

# From this ratio on of the greatest standard deviation to the lower quartile of all, a network sees
# little but the greatest. The least is no measure: pixels at the edge of pictures hardly ever move.
RATIO = 100.0


def advice_on_columns(inputs: Iterable[Any]) -> list[str]:
    """Return what to do about columns that are not on one scale; nothing about other inputs.

    Args:
        inputs: batches of a network's inputs, of which tables are (B, D) of floating point.

    >>> advice_on_columns([torch.tensor([[1.0, 300.0], [2.0, 900.0]])])[0][:65]
    'scale the columns of the inputs, whose standard deviations are fr'
    """
    tables = [x for x in inputs if isinstance(x, Tensor) and x.ndim == 2 and x.is_floating_point()]
    if not tables:
        return []
    deviations = torch.cat(tables).double().std(0, correction=0)
    deviations = deviations[deviations > 0].sort().values
    if len(deviations) < 2 or deviations[-1] < RATIO * deviations[(len(deviations) - 1) // 4]:
        return []
    return [
        "scale the columns of the inputs, whose standard deviations are from "
        f"{float(deviations[0]):.2g} to {float(deviations[-1]):.2g}, by x = (x - mean) / std of "
        "the training rows"
    ]
