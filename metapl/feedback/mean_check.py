"""Whether a loss is a mean over examples, as it is taken to be where ranks or micro-batches share a batch."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.execution.batch import joined, rows
from metapl.execution.ranks import Ranks
from metapl.execution.rng import RandomState, replayed
from metapl.feedback.inner_step import InnerStep, as_read
from metapl.problems.base import Problem, sum_and_weight

TOLERANCE = 1e-3
"""Of values, and of gradients in the outputs: far above rounding, also under bfloat16 where a loss runs in float32."""

_MENDS = {
    "inner_loss": "Make an example's loss depend on its own row alone, or let signal() return what the rows share.",
    "outer_loss": "Return (sum, weight) to be exact, such as (losses.sum(), mask.sum()), or a mean over the rows, such "
    'as (weights * F.cross_entropy(outputs, labels, reduction="none")).mean().',
}


class MeanCheck:
    """Lets the first rank warn, once, if a loss of a problem is not the mean of its values on parts of the rows.

    Values alone do not tell: all losses of a network are equal before it has learned anything. So the gradients in
    the outputs are compared too. ``loss`` gives a sum and its weight, of ``parts`` micro-batches.
    """

    def __init__(self, name: str, loss: Callable[[Tensor, Any], tuple[Any, Any]], ranks: Ranks, parts: int) -> None:
        self.name, self.loss, self.ranks = name, loss, ranks
        self.where = " and ".join(["the ranks' rows"] * (ranks.size > 1) + ["micro-batches"] * (parts > 1))
        self._first: tuple[Tensor, Any] | None = None
        self._told = False

    def look(self, outputs: Tensor, batch: Any) -> None:
        """Look at this rank's rows of a micro-batch: the first one's two halves, then each beside the first."""
        if self._told:
            return
        first, self._first = self._first, self._first or (outputs.detach(), batch)
        try:
            found = self._found(first, (outputs.detach(), batch))
        except Exception:  # a loss that takes batches of its own number of rows alone is not looked at
            found = None
        text = next(filter(None, self.ranks.gathered(found)), None)
        if text is not None:
            self._told = True
            if self.ranks.first:
                warnings.warn(text, stacklevel=3)

    def _found(self, one: tuple[Tensor, Any] | None, other: tuple[Tensor, Any]) -> str | None:
        if one is None:
            both, half, count = other, len(other[0]) // 2, len(other[0])
            one, other = ((both[0][a:b], rows(both[1], a, b)) for a, b in ((0, half), (half, count)))
        else:
            both = pytree.tree_map(lambda a, b: torch.cat([a, b]) if isinstance(a, Tensor) else a, one, other)
        sums, weights, slopes = zip(*(self._at(*given) for given in (both, one, other) if len(given[0])), strict=True)
        weight = sum(weights[1:])
        if 0 in (weights[0], weight):  # nothing to judge in these rows
            return None
        value, mean = sums[0] / weights[0], sum(sums[1:]) / weight
        slope, of_parts = slopes[0] / weights[0], joined(slopes[1:]) / weight
        gap, size = (slope - of_parts).norm(), slope.norm() + of_parts.norm()
        apart = abs(value - mean) > TOLERANCE * (abs(value) + abs(mean)) + 1e-6
        if not (apart or gap > TOLERANCE * size):
            return None
        return (
            f"the problem's {self.name} is {value:.4g} on {len(both[0])} examples, and the mean of its values on two "
            f"parts of them is {mean:.4g} (the gradients in the outputs differ by norm {gap:.2g}, of {size / 2:.2g}): "
            f"it is not a mean over examples. Here it is the mean of its values on {self.where}, so the feedback is "
            f"that of another loss than of the batch as a whole. {_MENDS[self.name]}"
        )

    def _at(self, outputs: Tensor, batch: Any) -> tuple[float, float, Tensor]:
        z = outputs.clone().requires_grad_()
        with torch.enable_grad():
            total, weight = self.loss(z, batch)
        slope = torch.autograd.grad(total, z, materialize_grads=True)[0] if total.requires_grad else torch.zeros_like(z)
        return float(total.detach()), float(weight), slope


def outer_check(problem: Problem, ranks: Ranks, parts: int) -> MeanCheck:
    """Of the outer loss, of so many micro-batches."""

    def loss(outputs: Tensor, batch: Any) -> tuple[Tensor, Tensor | float]:
        value, weight = sum_and_weight(problem.outer_loss(outputs, batch))
        return (value, weight) if isinstance(weight, Tensor) else (len(outputs) * value, len(outputs))

    return MeanCheck("outer_loss", loss, ranks, parts)


def look_at_inner_losses(step: InnerStep) -> None:
    """Warn if the inner losses of a step depend on other rows of the batch."""
    params = as_read(step.params, step.student)
    (_, whole, _), *_ = pieces = list(step.pieces())

    def loss(outputs: Tensor, given: Any) -> tuple[Tensor, float]:
        batch, fields = given
        losses = step.problem.inner_loss(outputs, whole.having(fields), batch, params)
        return losses.sum(), len(losses)

    check = MeanCheck("inner_loss", loss, step.student.ranks, len(pieces))
    has_rows = {name: step.has_rows(name) for name in whole.fields()}
    with replayed(RandomState.now(step.outputs.device)):
        # Of a field without rows, each micro-batch has one of its own, and two of them have none.
        for record, signal, batch in pieces if all(has_rows.values()) else pieces[:1]:
            fields = {name: t for name, t in signal.detached().fields().items() if has_rows[name]}
            check.look(record.outputs, (batch, fields))
