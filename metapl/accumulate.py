"""A step on a batch that does not fit at once: micro-batches, with the numbers of the whole.

Every mean over the batch is a mean of the micro-batches' means, so these are of equal size. Batch statistics and
dropout masks are those of the micro-batches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.feedback import Feedback
from metapl.inner import InnerStep
from metapl.numerics import Tree
from metapl.problem import Signal


def micro_batches(batch: Any, parts: int, name: str) -> list[Any]:
    """A batch (any pytree of tensors with a row per example) in ``parts`` of equal size.

    >>> [x.tolist() for x in micro_batches(torch.arange(4), 2, "labeled")]
    [[0, 1], [2, 3]]
    """
    if parts == 1:
        return [batch]
    leaves, structure = pytree.tree_flatten(batch)
    rows = {len(t) for t in leaves if isinstance(t, Tensor)}
    if any(n % parts for n in rows):
        raise MetaplError(
            f"accumulate={parts} was asked for, and the {name} batch has {max(rows)} examples; expected a multiple."
        )
    pieces = [t.chunk(parts) if isinstance(t, Tensor) else [t] * parts for t in leaves]
    return [pytree.tree_unflatten(list(piece), structure) for piece in zip(*pieces, strict=True)]


class AccumulatedStep(InnerStep):
    """Several inner steps on micro-batches, seen as the one step on their union.

    Args:
        parts: steps that have learned, on micro-batches of equal size, all at the same θ.
    """

    def __init__(self, parts: Sequence[InnerStep]) -> None:
        first = parts[0]
        self.parts = parts
        self.student, self.optimizer, self.problem = first.student, first.optimizer, first.problem
        self.parameters, self.params, self.device = first.parameters, first.params, first.device
        self.keep_graph = False
        self.state = first.state
        self.outputs = torch.cat([part.outputs for part in parts])
        self.signal = joined_signals([part.signal for part in parts])
        self.inner_loss = _mean([part.inner_loss for part in parts])
        self.gradient: Tree = _mean_tree([part.gradient for part in parts])
        for part in parts:
            part._moved = self._moved

    @property
    def outer_loss(self) -> Tensor:
        return _mean([part.outer_loss for part in self.parts])

    @property
    def outer_loss_before(self) -> Tensor:
        return _mean([part.outer_loss_before for part in self.parts])

    def known_outer_loss(self) -> dict[str, Tensor]:
        known = [part.known_outer_loss() for part in self.parts]
        return {"outer_loss": _mean([one["outer_loss"] for one in known])} if all(known) else {}

    def outer_gradient(self) -> Tree:
        return _mean_tree([part.outer_gradient() for part in self.parts])

    def directional_derivative(self, w: Tree) -> Tensor:
        return torch.cat([part.directional_derivative(w) for part in self.parts])

    def outputs_at(self, step: Tensor, direction: Tree) -> Tensor:
        return torch.cat([part.outputs_at(step, direction) for part in self.parts])

    def check_replay(self, outputs: Tensor) -> None:
        for part, one in zip(self.parts, outputs.chunk(len(self.parts)), strict=True):
            part.check_replay(one)

    def signal_feedback(
        self, z_dot: Tensor, w: Tree, value: Tensor | None = None, *, rounding: Tensor | None = None
    ) -> Tensor:
        n = len(self.parts)
        tangents = z_dot.chunk(n)
        values: Sequence[Tensor | None] = [None] * n if value is None else value.chunk(n)
        pieces = zip(self.parts, tangents, values, strict=True)
        return torch.cat([part.signal_feedback(z, w, one, rounding=rounding) / n for part, z, one in pieces])

    def check_linear(self, z_dot: Tensor, w: Tree, h: Tensor) -> None:
        n = len(self.parts)
        for part, z, one in zip(self.parts, z_dot.chunk(n), h.chunk(n), strict=True):
            part.check_linear(z, w, n * one)  # h is of the mean over the parts

    def example_feedback(self, z_dot: Tensor, w: Tree, *, rounding: Tensor | None = None) -> Tensor:
        n = len(self.parts)
        pieces = zip(self.parts, z_dot.chunk(n), strict=True)
        return torch.cat([part.example_feedback(z, w, rounding=rounding) / n for part, z in pieces])


def union(steps: Sequence[InnerStep]) -> InnerStep:
    """The one step on the union of the micro-batches; a single one is its own union."""
    return steps[0] if len(steps) == 1 else AccumulatedStep(steps)


def split(feedback: Feedback, parts: int) -> list[Feedback]:
    """The whole batch's feedback, for the teacher's passes on the micro-batches."""
    if feedback.h.ndim == 0:
        return [feedback] * parts
    return [replace(feedback, h=h) for h in feedback.h.chunk(parts)]


def joined_signals(signals: Sequence[Signal]) -> Signal:
    """The signal on the union of micro-batches."""

    def column(name: str) -> Tensor | None:
        values = [getattr(signal, name) for signal in signals]
        return None if values[0] is None else torch.cat(values)

    rest = {f.name: column(f.name) for f in fields(Signal) if f.name != "value"}
    return Signal(torch.cat([signal.value for signal in signals]), **rest)


def _mean(values: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(values)).mean(0)


def _mean_tree(trees: Sequence[Tree]) -> Tree:
    names = dict.fromkeys(name for tree in trees for name in tree)
    return {name: torch.stack([tree[name] for tree in trees if name in tree]).sum(0) / len(trees) for name in names}
