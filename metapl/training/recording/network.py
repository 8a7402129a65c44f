"""The recorded network at weights, buffers and random numbers that are passed in.

A replay runs the module itself, with other tensors in its places. What it holds afterwards is what
it held before.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from metapl.errors import MetaplError
from metapl.execution.batch import Batch
from metapl.execution.checks import described
from metapl.execution.layout import layouts
from metapl.execution.local import LocalStudent
from metapl.execution.numerics import HALF, Tree, no_fast_path
from metapl.execution.state import RandomState, Slot, named_parts, replayed, swapped, trainable
from metapl.feedback.replays import sketch
from metapl.models import Logits
from metapl.problems.base import BilevelProblem, Signal, sum_and_weight
from metapl.problems.doubtful import EqualWeights

# The name of the recorded network in the module that gives its outputs as one tensor.
PREFIX = "network."


@dataclass(frozen=True)
class Call:
    """A call of the network in a training step.

    Args:
        batch: as the problem reads it.
        draws: the generators before it; None where it drew nothing.
    """

    batch: Batch
    draws: RandomState | None


class Gradient(NamedTuple):
    """The loss of a call, its gradient, and the buffers after it."""

    loss: Tensor
    gradient: Tree
    buffers: Tree


class Derivatives(NamedTuple):
    """The loss of a call, and the derivatives of ⟨g, w⟩.

    Attributes:
        hessian_product: in the weights of the network.
        in_weights: in the weights of the examples, (B,) or (B, T).
        buffers: after the call.
    """

    loss: Tensor
    hessian_product: Tree
    in_weights: Tensor
    buffers: Tree


class RecordedNetwork:
    """A network, and a problem's losses of it, at any weights and buffers.

    Trees have the names that the parameters and buffers have in the network.

    Args:
        model: the network.
        problem: with weights of 1.
        autocast: the type that products were rounded to; None: there was no autocast.
        training_parts: the names of the parts that were in training mode.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: EqualWeights,
        autocast: torch.dtype | None,
        training_parts: Sequence[str],
    ) -> None:
        self.model = model
        self.problem = problem
        self.autocast = autocast
        self.training_parts = frozenset(training_parts)
        _, layout, self.device = layouts(None, Logits(model))
        self._student = LocalStudent(layout)
        self.ranks = layout.ranks
        if not layout.ranks.alone or layout.kind != "plain":
            raise MetaplError(
                "record: the network is trained in several processes; expected one process."
            )
        self.parameters = trainable(model)
        half = [name for name, p in self.parameters.items() if p.dtype in HALF]
        if half:
            raise MetaplError(
                f"record: the weight {half[0]} is in {self.parameters[half[0]].dtype}; expected "
                "weights in float32 or float64, which bfloat16 autocast may round."
            )
        self._buffer_places: list[tuple[dict[str, Any], str, str]] = []
        for prefix, part in named_parts(model):
            for name, buffer in part._buffers.items():
                if buffer is not None:
                    self._buffer_places.append((part._buffers, name, prefix + name))

    def gradient(self, params: Tree, buffers: Tree, call: Call, weights: Tensor | None) -> Gradient:
        """Return the mean loss of a call, its gradient, and the buffers after it.

        Args:
            weights: of its examples, (B,) or as the problem's; None: 1 each.
        """
        with self.at(params, buffers, call.draws) as (leaves, places):
            loss, _ = self._loss(leaves, call.batch, weights)
            buffers_after = {name: table[key] for table, key, name in places if name in buffers}
            gradient = gradient_of(loss, leaves)
        return Gradient(loss.detach(), gradient, buffers_after)

    def loss(self, params: Tree, buffers: Tree, call: Call, outer: Batch = None) -> Tensor:
        """Return the mean loss of a call, without a graph.

        Args:
            outer: an outer batch that is compared with the network's outputs, and refused where its
                labels do not fit; None: there is nothing to compare.
        """
        with torch.no_grad(), self.at(params, buffers, call.draws) as (leaves, _):
            outputs = self._outputs(self.problem.student_input(call.batch))
            if outer is not None:
                self.problem.check(outputs, outer, call.batch)
            loss, _ = self._loss_of(outputs, leaves, call.batch, None)
        return loss

    def derivatives(self, params: Tree, buffers: Tree, call: Call, w: Tree) -> Derivatives:
        """Return the derivatives of ⟨g, w⟩ for the gradient g of a call, by double backward."""
        with no_fast_path(math=True), self.at(params, buffers, call.draws) as (leaves, places):
            loss, example_weights = self._loss(leaves, call.batch, None)
            buffers_after = {name: table[key] for table, key, name in places if name in buffers}
            gradient = gradient_of(loss, leaves, create_graph=True)
            names = [name for name, g in gradient.items() if g.requires_grad]
            in_leaves = torch.autograd.grad(
                [gradient[name] for name in names],
                [*leaves.values(), example_weights],
                [w[name] for name in names],
                allow_unused=True,
                materialize_grads=True,
            )
        *products, in_weights = in_leaves
        hessian_product = dict(zip(leaves, products, strict=True))
        return Derivatives(loss.detach(), hessian_product, in_weights, buffers_after)

    def outer_losses(
        self, params: Tree, buffers: Tree, batch: Batch, judges: Sequence[BilevelProblem]
    ) -> tuple[Tensor, list[Tree]]:
        """Return the outer losses by some problems, (M,), and the gradient of each.

        The network evaluates: dropout is off, and batch norm takes its running statistics.
        """
        losses: list[Tensor] = []
        gradients: list[Tree] = []
        with self.at(params, buffers, None, training=False) as (leaves, _):
            outputs = self._outputs(self.problem.outer_input(batch))
            for judge in judges:
                total, weight = sum_and_weight(judge.outer_loss(outputs, batch))
                loss = total / weight
                gradient = gradient_of(loss, leaves, retain_graph=True)
                whole = {
                    name: gradient.get(name, torch.zeros_like(t)) for name, t in leaves.items()
                }
                losses.append(loss.detach())
                gradients.append(whole)
        return torch.stack(losses), gradients

    @contextmanager
    def at(
        self, params: Tree, buffers: Tree, draws: RandomState | None, *, training: bool = True
    ) -> Iterator[tuple[Tree, list[tuple[dict[str, Any], str, str]]]]:
        """Hold weights as leaves and copies of buffers in this block, and yield the leaves.

        Generators begin at ``draws``, and are as before afterwards. Beside the leaves the places of
        the buffers are yielded, where a pass has moved the copies.

        Args:
            training: whether the parts that trained are in training mode; else all evaluate.
        """
        start = draws or RandomState.now(self.device)
        student = self._student
        leaves = student.as_leaves({PREFIX + name: t for name, t in params.items()})
        copies = {name: t.detach().clone() for name, t in buffers.items()}
        slots: list[Slot] = [*student.slots_of(leaves), *student.slots.in_formulas()]
        for table, key, name in self._buffer_places:
            if name in copies:
                slots.append((table, key, copies[name]))
        parts = self.training_parts if training else frozenset()
        autocast = torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with in_modes(self.model, parts), replayed(start), swapped(slots), autocast:
            yield (
                {name.removeprefix(PREFIX): leaf for name, leaf in leaves.items()},
                self._buffer_places,
            )

    def fixed_digest(self, moving: Sequence[str]) -> Tensor:
        """Return a digest of what a training does not move: frozen weights and other buffers.

        Args:
            moving: the names of the buffers that it moves.
        """
        fixed = [p for p in self.model.parameters() if not p.requires_grad]
        for table, key, name in self._buffer_places:
            if name not in moving:
                fixed.append(table[key])
        return sketch(fixed, self.device)

    def _outputs(self, inputs: Any) -> Tensor:
        return self._student.forward(inputs)

    def _loss(self, leaves: Tree, batch: Batch, weights: Tensor | None) -> tuple[Tensor, Tensor]:
        """Return the mean of the weighted losses of a batch, and the weights."""
        outputs = self._outputs(self.problem.student_input(batch))
        return self._loss_of(outputs, leaves, batch, weights)

    def _loss_of(
        self, outputs: Tensor, leaves: Tree, batch: Batch, weights: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Return the mean of the weighted losses of the outputs on a batch, and the weights."""
        shape = self.problem.weight_shape(outputs)
        if weights is None:
            weights = outputs.new_ones(shape).requires_grad_()
        else:
            if weights.ndim > 1:
                # Examples of another batch may have had more parts.
                weights = weights[:, : shape[1]]
            # Weights of examples are those of all their parts.
            further_dimensions = [1] * (len(shape) - weights.ndim)
            weights = weights.to(outputs).reshape(*weights.shape, *further_dimensions).expand(shape)
        losses = self.problem.inner_loss(outputs, Signal(weights), batch, leaves)
        if not isinstance(losses, Tensor) or losses.shape != outputs.shape[:1]:
            raise MetaplError(
                f"inner_loss returned {described(losses)}; expected one loss per example, "
                f"({len(outputs)},)."
            )
        return losses.mean(), weights


def gradient_of(
    loss: Tensor,
    leaves: Mapping[str, Tensor],
    *,
    create_graph: bool = False,
    retain_graph: bool = False,
) -> Tree:
    """Return the gradient of a loss in the leaves that it reaches."""
    tensors = torch.autograd.grad(
        loss,
        [*leaves.values()],
        create_graph=create_graph,
        retain_graph=create_graph or retain_graph,
        allow_unused=True,
    )
    return {name: g for name, g in zip(leaves, tensors, strict=True) if g is not None}


@contextmanager
def in_modes(model: nn.Module, training_parts: frozenset[str]) -> Iterator[None]:
    """Let these parts of a network train in this block, and the others evaluate."""
    modes = [(part, part.training) for part in model.modules()]
    try:
        for name, part in model.named_modules():
            part.training = name in training_parts
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def parts_in_training(model: nn.Module) -> list[str]:
    """Return the names of the parts of a network that are in training mode."""
    return [name for name, part in model.named_modules() if part.training]
