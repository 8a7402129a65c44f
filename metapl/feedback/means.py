"""Whether a loss is a mean over examples, as it has to be where ranks or micro-batches share a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution.batch import joined, rows
from metapl.execution.ranks import Ranks

TOLERANCE = 1e-3
"""Of values, and of gradients in the outputs: far above rounding, also under bfloat16 where a loss runs in float32."""


class MeanCheck:
    """Lets the first rank warn, once, if a loss of a problem is not the mean of its values on parts of the rows.

    Values alone do not tell: all losses of a network are equal before it has learned anything. So the gradients in
    the outputs are compared too. ``loss`` gives a sum and its weight, of ``parts`` micro-batches; ``mend`` ends the
    warning.
    """

    def __init__(
        self, name: str, loss: Callable[[Tensor, Any], tuple[Any, Any]], ranks: Ranks, parts: int, mend: str
    ) -> None:
        self.name, self.loss, self.ranks, self.mend = name, loss, ranks, mend
        self.where = " and ".join(["the ranks' rows"] * (ranks.size > 1) + ["micro-batches"] * (parts > 1))
        self._first: tuple[Tensor, Any] | None = None
        self._told = False

    def look(self, outputs: Tensor, batch: Any) -> None:
        """Look at this rank's rows of a micro-batch: the first one's two halves, then each beside the first."""
        if self._told:
            return
        first, self._first = self._first, self._first or (outputs.detach(), batch)
        text = next(filter(None, self.ranks.gathered(self._found(first, (outputs.detach(), batch)))), None)
        if text is not None:
            self._told = True
            if self.ranks.first:
                warnings.warn(text, stacklevel=3)

    def _found(self, one: tuple[Tensor, Any] | None, other: tuple[Tensor, Any]) -> str | None:
        try:
            if one is None:
                both, half, count = other, len(other[0]) // 2, len(other[0])
                one, other = ((both[0][a:b], rows(both[1], a, b)) for a, b in ((0, half), (half, count)))
                if not half:
                    return None
            else:
                both = pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, one, other)
            sums, weights, slopes = zip(*(self._at(*given) for given in (both, one, other)), strict=True)
        except Exception:  # a loss that takes batches of its own number of rows alone is not looked at
            return None
        weight = weights[1] + weights[2]
        if 0 in (weights[0], weight):  # nothing to judge in these rows
            return None
        value, mean = sums[0] / weights[0], (sums[1] + sums[2]) / weight
        slope, of_parts = slopes[0] / weights[0], joined(slopes[1:]) / weight
        gap, size = (slope - of_parts).norm(), slope.norm() + of_parts.norm()
        if not (abs(value - mean) > TOLERANCE * (abs(value) + abs(mean)) + 1e-6 or gap > TOLERANCE * size):
            return None
        return (
            f"the problem's {self.name} is {value:.4g} on {len(both[0])} examples, and the mean of its values on two "
            f"parts of them is {mean:.4g} (the gradients in the outputs differ by norm {gap:.2g}, of {size / 2:.2g}): "
            f"it is not a mean over examples. Here it is the mean of its values on {self.where}, so the feedback is "
            f"that of another loss than of the batch as a whole. {self.mend}"
        )

    def _at(self, outputs: Tensor, batch: Any) -> tuple[float, float, Tensor]:
        z = outputs.clone().requires_grad_()
        with torch.enable_grad():
            total, weight = self.loss(z, batch)
        slope = torch.autograd.grad(total, z, materialize_grads=True)[0] if total.requires_grad else torch.zeros_like(z)
        return float(total.detach()), float(weight), slope
