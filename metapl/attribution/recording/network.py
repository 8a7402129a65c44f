"""The recorded network at weights, buffers and random numbers that are passed in.

A replay runs the module itself, with other tensors in its places. What it holds afterwards is what
it held before.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from metapl.attribution.weighted import WithWeights
from metapl.core.engine import Descent
from metapl.core.lesson import Lesson
from metapl.core.replays import sketch
from metapl.engines.eager import EagerEngine
from metapl.errors import MetaplError
from metapl.execution.batch import Batch
from metapl.execution.graphs import types_in_graphs
from metapl.execution.layout import (
    Layout,
    layout_of,
    refuse_compiled,
    refuse_untrainable,
)
from metapl.execution.numerics import HALF, WHOLE, Tree, no_fast_path
from metapl.execution.state import (
    RandomState,
    Slot,
    Slots,
    in_modes,
    named_parts,
    replayed,
    swapped,
    trainable,
)
from metapl.models import Logits
from metapl.problems.base import BilevelProblem, sum_and_weight
from metapl.problems.doubtful import EqualWeights

IN_SEVERAL_PROCESSES = "record: the network is trained in several processes; expected one process."


@dataclass(frozen=True)
class Call:
    """A call of the network in a training step.

    Args:
        batch: as the problem reads it.
        draws: the generators before it; None where it drew nothing.
        training_parts: the names of the parts that are in training mode in it.
    """

    batch: Batch
    draws: RandomState | None
    training_parts: frozenset[str]


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
        types: further types that a loss is computed in.

    Attributes:
        types: of floating point, from the weights to a loss, by which its rounding is judged.
    """

    def __init__(
        self,
        model: nn.Module,
        problem: EqualWeights,
        autocast: torch.dtype | None,
        types: Iterable[torch.dtype] = (),
    ) -> None:
        self.model = model
        self.problem = problem
        self.autocast = autocast
        # A loop may have wrapped it since the recording began.
        network_in(model)
        layout = Layout(Logits(model))
        # By the names that the tensors have in the network itself.
        self._student = EagerEngine(layout, Slots(model))
        self._problem = WithWeights(problem)
        self.ranks = layout.ranks
        self.device = next(model.parameters()).device
        self.parameters = trainable(model)
        self.types = {*types, *(p.dtype for p in self.parameters.values())}
        if autocast is not None:
            self.types.add(autocast)
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

    def gradient(
        self,
        params: Tree,
        buffers: Tree,
        call: Call,
        weights: Tensor | None = None,
        *,
        factor: float = 1.0,
        outer: Batch = None,
        notes_types: bool = False,
    ) -> Gradient:
        """Return the mean loss of a call, the gradient of its multiple, and the buffers after it.

        Args:
            weights: of its examples, (B,) or as the problem's; None: 1 each.
            factor: by which the loss is multiplied before the backward pass, as the loop does: in
                half precision a gradient that is multiplied afterwards is rounded otherwise.
            outer: an outer batch that is compared with the network's outputs, and refused where its
                labels do not fit; None: there is nothing to compare.
            notes_types: whether the types of the loss's graph are added to :attr:`types`.
        """
        lesson = Lesson(
            WithWeights(self.problem, factor),
            (weights, call.batch),
            outer,
            look=self._note_types if notes_types else None,
        )
        with self.at(params, buffers, call.draws, call.training_parts) as (leaves, places):
            descent = self._descend(leaves, lesson)
            buffers_after = {name: table[key] for table, key, name in places if name in buffers}
        # A batch without a labeled part has the factor 0, and the loss 0.
        loss = descent.inner_loss / (factor or 1.0)
        return Gradient(loss, descent.gradient, buffers_after)

    def derivatives(
        self, params: Tree, buffers: Tree, call: Call, w: Tree, *, inspects_graph: bool = False
    ) -> Derivatives:
        """Return the derivatives of ⟨g, w⟩ for the gradient g of a call, by double backward.

        Args:
            inspects_graph: whether a graph in which derivatives are missing is refused.
        """
        self._student.inspects_graph = inspects_graph
        lesson = Lesson(self._problem, (None, call.batch), None, graph="credited")
        with (
            no_fast_path(math=True),
            self.at(params, buffers, call.draws, call.training_parts) as (leaves, places),
        ):
            descent = self._descend(leaves, lesson)
            buffers_after = {name: table[key] for table, key, name in places if name in buffers}
            by_graph = descent.along_kept_graph(w, curved=True)
        assert by_graph is not None, "the pass has kept the graph"
        hessian_product, in_fields = by_graph
        in_weights = in_fields["value"]
        if in_weights is None:
            in_weights = torch.zeros_like(descent.signal.value)
        return Derivatives(descent.inner_loss, hessian_product, in_weights, buffers_after)

    def _descend(self, params: Tree, lesson: Lesson) -> Descent:
        """Run the network on a lesson, up to g."""
        # No pass runs again, so that frozen weights and buffers are not copied.
        self._student.slots.state = self._student.slots.snapshot(copies=False)
        return self._student.descend(params, lesson, self._problem.ask)

    def _note_types(self, loss: Tensor, *_: Any) -> None:
        """Note the types of a loss's graph."""
        self.types |= types_in_graphs([loss])

    def derivatives_beside_difference(
        self, params: Tree, buffers: Tree, call: Call
    ) -> tuple[Derivatives, float]:
        r"""Return derivatives of ⟨g, w⟩ by double backward, and how far they are from a difference.

        The gradient g is linear in the examples' weights a. Along signs r,

        .. math:: \Big\langle \frac{\partial \langle g, w\rangle}{\partial a}, r\Big\rangle =
                  \langle g(1 + r/2) - g(1 - r/2),\ w\rangle, \qquad
                  w_p = g_p(1) / \|g_p(1)\| \text{ of each parameter } p

        Returns: the derivatives, and the distance of both sides in what rounding allows; more than
        1 for an operation whose second derivative is missing or not that of its first, as of
        torch's embeddings with ``scale_grad_by_freq``. Cost: three passes with gradients and a
        double backward.
        """
        gradient = self.gradient(params, buffers, call).gradient
        # Each parameter counts alike, also one whose gradient is small.
        w = {
            name: g / g.norm().clamp_min(torch.finfo(g.dtype).tiny) for name, g in gradient.items()
        }
        derivatives = self.derivatives(params, buffers, call, w, inspects_graph=True)
        in_weights = derivatives.in_weights
        signs = torch.randint(2, in_weights.shape, generator=torch.Generator().manual_seed(0))
        r = (2 * signs - 1).to(in_weights)
        above = self.gradient(params, buffers, call, 1 + r / 2).gradient
        below = self.gradient(params, buffers, call, 1 - r / 2).gradient
        difference = float(WHOLE.dot(above, w) - WHOLE.dot(below, w))
        derivative = float((in_weights * r).sum())
        rounding = 100 * precision_of(self) + 2 * precision_of_products(self)
        size = float(in_weights.norm() * r.norm())
        allowed = rounding * float(WHOLE.dot(gradient, w)) + 1e-3 * size
        return derivatives, abs(derivative - difference) / max(allowed, 1e-300)

    def moved_buffers_read(
        self, params: Tree, buffers: Tree, buffers_after: Tree, call: Call
    ) -> list[str]:
        """Return the names of the buffers that a training moves and that its losses read.

        Running statistics of batch norm are not among them, unless a part evaluates while the
        others train.

        Args:
            buffers, buffers_after: before and after a call. The loss is taken once more after it,
                and with what it has moved set back: a mean over all passes so far, beside which
                they are counted, says nothing of the past before the first one.
        """
        moved_names: list[str] = []
        for name, b in buffers.items():
            if b.is_floating_point() and not torch.equal(b, buffers_after[name]):
                moved_names.append(name)
        if not moved_names:
            return []
        loss = self.gradient(params, buffers_after, call).loss
        all_set_back = {**buffers_after, **{name: buffers[name] for name in moved_names}}
        if self.gradient(params, all_set_back, call).loss == loss:
            return []
        names_that_count: list[str] = []
        rounding = 100 * precision_of(self) + 2 * precision_of_products(self)
        for name in moved_names:
            one_set_back = {**buffers_after, name: buffers[name]}
            gap = (self.gradient(params, one_set_back, call).loss - loss).abs()
            if bool(gap > rounding * loss.abs()):
                names_that_count.append(name)
        return names_that_count

    def outer_losses(
        self, params: Tree, buffers: Tree, batch: Batch, judges: Sequence[BilevelProblem]
    ) -> tuple[Tensor, list[Tree]]:
        """Return the outer losses by some problems, (M,), and the gradient of each.

        The network evaluates: dropout is off, and batch norm takes its running statistics.
        """
        losses: list[Tensor] = []
        gradients: list[Tree] = []
        with self.at(params, buffers, None, frozenset()) as (leaves, _):
            outputs = self._student.forward(self.problem.outer_input(batch))
            for judge in judges:
                total, weight = sum_and_weight(judge.outer_loss(outputs, batch))
                loss = total / weight
                gradient = torch.autograd.grad(
                    loss,
                    [*leaves.values()],
                    retain_graph=True,
                    allow_unused=True,
                    materialize_grads=True,
                )
                losses.append(loss.detach())
                gradients.append(dict(zip(leaves, gradient, strict=True)))
        return torch.stack(losses), gradients

    @contextmanager
    def at(
        self,
        params: Tree,
        buffers: Tree,
        draws: RandomState | None,
        training_parts: frozenset[str],
    ) -> Iterator[tuple[Tree, list[tuple[dict[str, Any], str, str]]]]:
        """Hold weights as leaves and copies of buffers in this block, and yield the leaves.

        Generators begin at ``draws``, and are as before afterwards. Beside the leaves the places of
        the buffers are yielded, where a pass has moved the copies.

        Args:
            training_parts: the names of the parts in training mode; the others evaluate.
        """
        start = draws or RandomState.now(self.device)
        student = self._student
        leaves = student.as_leaves(params)
        copies = {name: t.detach().clone() for name, t in buffers.items()}
        slots: list[Slot] = [*student.slots_of(leaves), *student.slots.in_formulas()]
        for table, key, name in self._buffer_places:
            if name in copies:
                slots.append((table, key, copies[name]))
        autocast = torch.autocast(
            self.device.type, dtype=self.autocast, enabled=self.autocast is not None
        )
        with in_modes(self.model, training_parts), replayed(start), swapped(slots), autocast:
            yield leaves, self._buffer_places

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


def names_of_statistics(network: nn.Module) -> set[str]:
    """Return the names of the buffers in which batch norms keep running statistics."""
    names: set[str] = set()
    for place, part in network.named_modules():
        if isinstance(part, _NormBase):
            names |= {f"{place}.{name}".lstrip(".") for name in part._buffers}
    return names


def network_in(model: nn.Module) -> nn.Module:
    """Return the network in a wrapper that runs it as it is, in one process on one device.

    Raises: :class:`metapl.MetaplError` for other wrappers of PyTorch, and for several processes.
    """
    network = model
    if isinstance(model, nn.DataParallel) and len(model.device_ids) < 2:
        network = model.get_submodule("module")
    layout = layout_of("network", network)
    if not layout.ranks.alone:
        raise MetaplError(IN_SEVERAL_PROCESSES)
    if layout.is_sharded:
        raise MetaplError(f"record: the network is {layout.description}; expected a plain module.")
    refuse_compiled("network", layout.network)
    refuse_untrainable("network", layout)
    return layout.network


def precision_of(network: RecordedNetwork) -> float:
    """Return the coarsest precision from a network's weights to its loss, 1.2e-7 of float32.

    A network with weights in float64 may take its loss in float32. Types of half precision are
    those of products alone.
    """
    return max(torch.finfo(dtype).eps for dtype in network.types - HALF)


def precision_of_products(network: RecordedNetwork) -> float:
    """Return the precision that products are rounded to, as under autocast; 0 without such ones."""
    return max((torch.finfo(dtype).eps for dtype in network.types & HALF), default=0.0)


def parts_in_training(model: nn.Module) -> list[str]:
    """Return the names of the parts of a network that are in training mode."""
    return [name for name, part in model.named_modules() if part.training]
