"""What the student is taught in one step: an inner batch, the signal about it, and the loss."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, Inputs, leaves_of, map_tensors, micro_batches
from metapl.execution.numerics import Tree
from metapl.problems.base import BilevelProblem, Signal, enters_input

Credits = Literal["signal", "example", "batch", "nothing"]
"""For what feedback has one number each: an entry of the signal, an example, the whole batch; or
there is no feedback."""

Credited = Literal["signal", "example"]
"""In what a step is differentiated: in each entry of the signal, or in a factor of each example's
loss."""

Graph = Literal["none", "credited", "path"]
"""Which graph the gradient g of an inner loss keeps: none; one in what gets the feedback, which is
differentiated once; or that of a path that is differentiable in its signals as a whole."""

# A scalar of outputs and of the weights that they were computed at.
Loss = Callable[[Tensor, Tree], Tensor]

# Returns the signal about an inner batch, without its graph, given the student's outputs on it;
# None: the student has not run yet.
Ask = Callable[[Batch, Tensor | None], Signal]

# Looks at the graph of a loss. Its arguments are the loss; the leaves that stand for the student's
# weights in that graph, so that it can tell them from leaves that should not be there; and a
# function that computes the loss again.
GraphLook = Callable[[Tensor, Sequence[Tensor], Callable[[], Tensor]], None]


@dataclass(frozen=True)
class Lesson:
    """An inner batch, and how the student learns from what the teacher says about it.

    Args:
        problem: makes the student's input and its loss.
        batch: x, or (weak, strong), ...; None: it was dropped, to be read again.
        outer_batch: that of the outer loss, which the problem checks outputs with.
        credits: what gets the feedback.
        graph: which graph g keeps.
        is_readable: whether this process holds the weights whole, so that a loss may read them.
        look: is shown the graph of the loss; None in all steps but the first.
    """

    problem: BilevelProblem
    batch: Batch
    outer_batch: Batch
    credits: Credited = "signal"
    graph: Graph = "none"
    is_readable: bool = True
    look: GraphLook | None = None

    @property
    def asks_first(self) -> bool:
        """Whether the teacher is asked before the student runs.

        Most problems make the signal from the student's outputs.
        """
        return self.problem.signal_of_batch or enters_input(self.problem)

    def heard(self, signal: Signal) -> Signal:
        """Return a signal about the whole batch; the graph of a path begins at its fields."""
        if self.graph == "path":
            for t in signal.differentiable().values():
                t.requires_grad_()
        return signal

    def chunks(self, parts: int) -> list[Lesson]:
        """Return the lessons on so many micro-batches."""
        batches = micro_batches(self.batch, parts, "inner")
        outer_batches = micro_batches(self.outer_batch, parts, "outer")
        return [
            replace(self, batch=batch, outer_batch=outer_batch)
            for batch, outer_batch in zip(batches, outer_batches, strict=True)
        ]

    def loss(self, signal: Signal, factors: Tensor | None = None) -> Loss:
        """Return the inner loss on a signal, as a function of outputs and weights.

        Args:
            factors: of each example's loss, (B,); None: 1 each.
        """
        return partial(inner_loss, self.problem, signal, self.batch, self.is_readable, factors)


def inner_loss(
    problem: BilevelProblem,
    signal: Signal,
    batch: Batch,
    readable: bool,
    factors: Tensor | None,
    outputs: Tensor,
    params: Tree,
) -> Tensor:
    """Return the mean of factor_i ℓ_i, where ℓ is (B,), a scalar.

    Args:
        readable: whether this process holds the weights whole, so that a loss may read them.
        factors: (B,); None: 1 each.
    """
    losses = problem.inner_loss(outputs, signal, batch, params if readable else None)
    if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
        expected = f"one loss per example, ({len(outputs)},), as by reduction='none'"
        raise checks.unexpected("inner_loss returned", losses, expected)
    return losses.mean() if factors is None else (factors * losses).mean()


def credited(signal: Signal, of: Credited = "signal") -> dict[str, Tensor]:
    """Return what gets the feedback, with its values, by name.

    Args:
        of: ``"example"``: the factor of each example's loss. ``"signal"``: the differentiable
            fields of the signal, or of sampled labels their one-hot rows, in the place of their
            distribution.
    """
    if of == "example":
        assert signal.log_prob is not None, "the mode takes sampled labels"
        return {"factors": torch.ones_like(signal.log_prob)}
    if signal.log_prob is None:
        return signal.differentiable()
    if signal.probs is None:
        raise MetaplError("the drawn signal has no probs; expected Signal(..., probs=...).")
    # One-hot rows, by an operation that torch.func.vmap has a rule for.
    one_hot = torch.zeros_like(signal.probs).scatter(-1, signal.value[..., None], 1.0)
    return {"value": one_hot}


def plain_leaves(params: Tree) -> Tree:
    """Return tensors as plain leaves that require a gradient."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


class SignalInput:
    """The student's input where the signal enters it.

    It keeps the graph from the signal to the input, by which a derivative in the input goes on to
    the signal. So the input is computed once, and may draw noise.

    Args:
        in_graph: compute the input from the signal's own tensors; else from leaves in their places.

    Attributes:
        fields: the floating-point fields of the signal that the input is computed from.
        inputs: the student's input; without a graph unless ``in_graph``.
    """

    def __init__(
        self, problem: BilevelProblem, batch: Batch, signal: Signal, *, in_graph: bool
    ) -> None:
        fields = {name: t for name, t in signal.fields().items() if t.is_floating_point()}
        self.fields = fields if in_graph else plain_leaves(fields)
        self._input_with_graph = problem.student_input(batch, signal.having(self.fields))  # type: ignore[call-arg]
        self._entering = [
            t
            for t in leaves_of(self._input_with_graph)
            if isinstance(t, Tensor) and t.requires_grad
        ]
        self.inputs = self._input_with_graph
        if not in_graph:
            self.inputs = map_tensors(Tensor.detach, self._input_with_graph)

    def as_leaves(self) -> tuple[list[Tensor], Inputs]:
        """Return the tensors of the input that depend on the signal, as leaves.

        And the input with these leaves in their places.
        """
        leaves = [t.detach().requires_grad_() for t in self._entering]
        leaf_of = {id(t): leaf for t, leaf in zip(self._entering, leaves, strict=True)}
        return leaves, map_tensors(lambda t: leaf_of.get(id(t), t), self._input_with_graph)

    def in_fields(self, cotangents: Sequence[Tensor | None]) -> dict[str, Tensor | None]:
        """Return derivatives in the leaves of :meth:`as_leaves` as derivatives in the fields."""
        reached: list[Tensor] = []
        cotangents_of_reached: list[Tensor] = []
        for t, cotangent in zip(self._entering, cotangents, strict=True):
            if cotangent is not None:
                reached.append(t)
                cotangents_of_reached.append(cotangent)
        if not reached:
            return dict.fromkeys(self.fields)
        grads = torch.autograd.grad(
            reached,
            list(self.fields.values()),
            cotangents_of_reached,
            retain_graph=True,
            allow_unused=True,
        )
        return dict(zip(self.fields, grads, strict=True))
