"""The eager engine while its step is recorded as one graph of operations.

A graph has one stream of random numbers, which no pass rewinds
(:class:`metapl.execution.state.OneStream`). So no pass runs twice here: every derivative of the
inner gradient g is taken by the graph of g, which each pass keeps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from metapl.core.lesson import credited
from metapl.engines.eager import EagerDescent, EagerEngine
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Inputs
from metapl.execution.masks import EagerMasks
from metapl.execution.numerics import Tree
from metapl.execution.state import RandomState, Slot, swapped
from metapl.problems.base import Signal, sum_and_weight
from metapl.updates import Options, Update
from metapl.updates.base import OptimizerState, Parameters

if TYPE_CHECKING:
    from metapl.core.engine import Derivatives, MicroBatches, OuterLossOf


class RefusingDraws(TorchDispatchMode):
    """Refuse a student that draws random numbers in this block, where it would draw other ones."""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise MetaplError(
                "compile= or functional() was given a mode of differences and a student that "
                f"draws, as dropout does ({func.overloadpacket.__name__}): passes at other weights "
                "would have other masks; expected mode 'forward', or a step of the trainer itself."
            )
        return func(*args, **(kwargs or {}))


class RecordedDescent(EagerDescent):
    """An inner pass that keeps its graph, by which all that is asked of it later is answered."""

    def learn(self, signal: Signal) -> None:
        """Take the loss on a signal, and its gradient g, with its graph in what gets feedback."""
        assert self.graph is not None, "a pass learns once"
        self.signal = signal
        self._outputs_with_graph = self.graph
        self.graph = None
        fields = signal.differentiable()
        # Labels without probabilities have no derivative in them, which then is not asked for.
        if not signal.sampled or signal.probs is not None or self.lesson.credits == "example":
            fields |= credited(signal, self.lesson.credits)
        leaves: Tree = {}
        for name, t in fields.items():
            leaves[name] = t if t.requires_grad else t.detach().requires_grad_()
        loss = self.lesson.loss(signal.having(leaves), leaves.get("factors"))
        # A backward pass of a checkpoint runs the module again, at these weights.
        with self._running():
            value = loss(self._outputs_with_graph, self._weights)
            if not value.requires_grad:
                raise MetaplError(f"the student's loss {checks.NO_GRADIENT}")
            with_graph, _ = self.student.gradient(value, self._weights, create_graph=True)
        self._gradient_with_graph = with_graph
        self._leaves = leaves
        self.inner_loss = value.detach()
        self.gradient = with_graph
        if not self.student.double_backward:
            self.gradient = {name: g.detach() for name, g in with_graph.items()}

    @contextmanager
    def once_more(self, inputs: Inputs) -> Iterator[tuple[Tree, Tensor]]:
        """Yield θ, and the outputs with the graph of this pass."""
        with self._running():
            yield self._weights, self._outputs_with_graph

    def along_kept_graph(self, w: Tree, *, curved: bool = False) -> tuple[Tree, Derivatives] | None:
        """Return the derivatives of ⟨g, w⟩ in the weights, and in what gets the feedback."""
        names = credited(self.signal, self.lesson.credits)
        product, derivatives, _ = self.second_derivatives(w, names, curved=curved)
        return product, derivatives

    def second_derivatives(
        self, w: Tree, fields: Mapping[str, Tensor], *, curved: bool, with_slope: bool = False
    ) -> tuple[Tree, Derivatives, Tensor | None]:
        """Return the derivatives of ⟨g, w⟩ in the weights, and in fields of the signal."""
        weights = self._weights if curved else {}
        leaves = [self._leaves[name] for name in fields]
        pairs = [
            (g, w[name])
            for name, g in self._gradient_with_graph.items()
            if name in w and g.requires_grad
        ]
        inputs = [*weights.values(), *leaves]
        found: Sequence[Tensor | None] = [None] * len(inputs)
        if pairs and inputs:
            gradients, directions = zip(*pairs, strict=True)
            with self._running():
                found = torch.autograd.grad(
                    gradients, inputs, directions, retain_graph=True, allow_unused=True
                )
        in_weights: Tree = {}
        for (name, p), t in zip(weights.items(), found, strict=False):
            in_weights[name] = torch.zeros_like(p) if t is None else t
        return in_weights, dict(zip(fields, found[len(weights) :], strict=True)), None

    def _outputs_at(self, params: Tree) -> Tensor:
        """Return the outputs at other weights; refuse a student that draws."""
        # PyTorch has no types for the mode.
        with RefusingDraws():  # type: ignore[no-untyped-call]
            return super()._outputs_at(params)

    def tangent(self, w: Tree) -> Tensor:
        """Return ż, (B, ...), as the derivative of the pullback of z, which is linear, along w."""
        cotangent = torch.zeros_like(self.outputs, requires_grad=True)
        weights = {name: p for name, p in self._weights.items() if name in w}
        with self._running():
            pulled = torch.autograd.grad(
                self._outputs_with_graph,
                [*weights.values()],
                cotangent,
                create_graph=True,
                allow_unused=True,
            )
            pairs = [(t, w[name]) for name, t in zip(weights, pulled, strict=True) if t is not None]
            if not pairs:
                return torch.zeros_like(self.outputs)
            tensors, directions = zip(*pairs, strict=True)
            (z_dot,) = torch.autograd.grad(
                tensors, cotangent, directions, retain_graph=True, materialize_grads=True
            )
        return z_dot


class RecordedEngine(EagerEngine):
    """A student whose step is a function of tensors, which its module holds in the meantime."""

    descent_type = RecordedDescent
    returns_state = True

    def gradient(
        self, value: Tensor, leaves: Tree, *, create_graph: bool = False
    ) -> tuple[Tree, Tree]:
        tensors = torch.autograd.grad(
            value,
            [*leaves.values()],
            create_graph=create_graph,
            retain_graph=True,
            allow_unused=True,
        )
        gradient = {name: g for name, g in zip(leaves, tensors, strict=True) if g is not None}
        return gradient, gradient

    def losses(
        self,
        points: Sequence[Tree],
        batches: MicroBatches,
        judge: OuterLossOf,
        start: RandomState,
    ) -> list[Tensor]:
        """Return the outer loss at several weights, by one pass, with the same draws."""
        if len(points) == 1:
            return super().losses(points, batches, judge, start)
        ((inputs, batch),) = batches
        state: list[Slot] = [*self.slots.frozen]
        for table in self.slots.buffers:
            state += [(table, name, t) for name, t in table.items() if t is not None]

        def loss(params: Tree, tensors: list[Tensor]) -> Tensor:
            places = [(table, name, t) for (table, name, _), t in zip(state, tensors, strict=True)]
            with swapped([*self.slots_of(params), *places, *self.slots.in_formulas()]):
                total, weight = sum_and_weight(judge(self.forward(inputs), batch))
            value: Tensor = total / weight
            return value

        stacked = {name: torch.stack([point[name] for point in points]) for name in points[0]}
        copies = [torch.stack([t.detach()] * len(points)) for _, _, t in state]
        # A check inside of the transform has no value outside of it.
        token = checks.deferred.set(None)
        try:
            with torch.no_grad(), EagerMasks():
                mapped = torch.func.vmap(loss, randomness="same")(stacked, copies)
        finally:
            checks.deferred.reset(token)
        return [*mapped.unbind()]


class UpdateOfState(Update):
    """The update of an optimizer whose state and settings are tensors that are given.

    Args:
        inner: the rule.
        options: of the param groups; empty for a transform.
        state: of the optimizer.
    """

    def __init__(self, inner: Update, options: Options, state: OptimizerState) -> None:
        self.inner = inner
        self.given = options
        self.state = state
        self.numbers = inner.numbers
        self.is_rounded = inner.is_rounded

    @property
    def learning_rate(self) -> Any:
        """η of the first param group, a scalar; None for a transform, which has no groups."""
        return self.given[0]["lr"] if self.given else None

    @property
    def options(self) -> Options:
        return self.given

    def with_options(self, options: Options) -> UpdateOfState:
        return UpdateOfState(self.inner, options, self.state)

    def follow(self, parameters: Parameters) -> None:
        """Do nothing: the rule follows the trainer's own."""

    def read_state(self) -> OptimizerState:
        return self.state

    def update(
        self, params: Tree, grads: Tree, state: OptimizerState, options: Options | None = None
    ) -> tuple[Tree, OptimizerState]:
        return self.inner.update(params, grads, state=state, options=options or self.given)

    def pullback(
        self,
        params: Tree,
        grads: Tree,
        state: OptimizerState,
        v: Tree,
        options: Options | None = None,
    ) -> Tree:
        given = options or self.given
        return self.inner.pullback(params, grads, state=state, v=v, options=given)

    def write(self, parameters: Parameters, params: Tree, state: OptimizerState) -> None:
        raise NotImplementedError("a step of given tensors returns the next ones")

    def state_dict(self) -> dict[str, Any]:
        raise NotImplementedError("the state was given")

    def load_state_dict(self, state: dict[str, Any]) -> None:
        raise NotImplementedError("the state was given")
