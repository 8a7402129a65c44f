r"""What the mathematics asks of PyTorch: to run a student, and to differentiate what it says.

All that stands above this file is written once. An engine says how a network is run and
differentiated at given weights, state and draws:

- :mod:`metapl.engines.eager`: ``torch.autograd`` on the module itself, whose tensors are exchanged;
  in several processes, each of which holds it whole, its means are those over the ranks;
- :mod:`metapl.engines.accumulated`: the same in micro-batches;
- :mod:`metapl.engines.sharded`: a network whose blocks gather their weights while they run;
- :mod:`metapl.engines.recorded`: a step of given tensors, in which no pass is run twice.

The symbols: θ the weights, x the inputs and z = S(x; θ) the outputs of an inner pass; ℓ the inner
loss and g = ∇_θ ℓ its gradient; w a direction in the space of the weights; ż = d/dε S(x; θ + εw).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from metapl.core.lesson import Ask, GraphLook, Lesson
from metapl.execution.batch import Batch, Inputs
from metapl.execution.layout import Capability
from metapl.execution.numerics import Space, Tree
from metapl.execution.ranks import Ranks
from metapl.execution.state import RandomState, Slots, State
from metapl.problems.base import OuterLoss, Signal

Derivatives = dict[str, Tensor | None]
"""Of ⟨g, w⟩ in fields of a signal, by name; None where nothing depends on a field."""

Weighted = tuple[Tensor, Tensor | float]
"""A loss as a sum over rows, and the weight that it is to be divided by: the number 1.0 for a loss
that is a mean already."""

OuterLossOf = Callable[[Tensor, Any], OuterLoss]
"""A problem's ``outer_loss``, of outputs on a batch."""

MicroBatches = Sequence[tuple[Any, Any]]
"""The inputs of each micro-batch, and the batch that the loss reads."""


class Descent(Protocol):
    """One inner pass of the student on a lesson, its loss ℓ and g = ∇_θ ℓ, and its replays.

    A replay runs on the draws of the pass, and from copies of the state that it began with, and
    leaves nothing changed.

    Attributes:
        lesson: what the student is taught.
        parts: the number of micro-batches.
        params: θ; empty after :meth:`forget`.
        signal: the teacher's, without its graph.
        inner_loss: ℓ, a scalar.
        gradient: g, with a graph if the path keeps it; empty after :meth:`forget`.
        random_state_after: the generators where the pass has ended.
    """

    lesson: Lesson
    parts: int
    params: Tree
    signal: Signal
    inner_loss: Tensor
    gradient: Tree
    random_state_after: RandomState

    @property
    def student(self) -> Engine:
        """Whose pass it is."""

    @property
    def outputs(self) -> Tensor:
        """z, (B, ...), float32 or wider, without a graph."""

    @property
    def rounded_to(self) -> torch.dtype:
        """The coarsest type of the pass, by which :mod:`metapl.execution.compare` tolerates."""

    def mean_loss(self, outputs: Tensor, params: Tree, leaves: Tree) -> Tensor:
        """Return this rank's share of (1/B) Σ_i factor_i ℓ_i(z, signal, θ), a scalar.

        Args:
            outputs: z, (B, ...).
            params: θ.
            leaves: in the places of what gets the feedback.
        """

    def again(self, signal: Signal) -> Descent:
        """Return the same pass on another signal, by a forward and a backward pass."""

    def along_kept_graph(self, w: Tree, *, curved: bool = False) -> tuple[Tree, Derivatives] | None:
        """Return the derivatives of ⟨g, w⟩ by a graph of g that was kept, or None; it serves once.

        Args:
            curved: whether the product with ∂²ℓ/∂θ² is asked for; else it is empty.

        Returns: the product, and the derivatives in what gets the feedback.
        """

    def second_derivatives(
        self, w: Tree, fields: Mapping[str, Tensor], *, curved: bool, with_slope: bool = False
    ) -> tuple[Tree, Derivatives, Tensor | None]:
        """Return the derivatives of ⟨g, w⟩ in the weights, and in fields of the signal.

        Args:
            curved: whether the Hessian product (∂²ℓ/∂θ²) w is asked for; else it is empty.
            with_slope: return ⟨g, w⟩ too.

        Returns: the product on this rank's rows; the derivative in each field; and ⟨g, w⟩ on this
            rank's rows, or None.
        """

    def hessian(self) -> AbstractContextManager[Callable[[Tree], Tree]]:
        """Yield a function that returns products with ∂²ℓ/∂θ², valid inside the block."""

    def tangent(self, w: Tree) -> Tensor:
        """Return ż, (B, ...), by forward-mode AD."""

    def shifted(self, step: Tensor, direction: Tree) -> Tensor:
        """Return S(x; θ + step·direction), (B, ...), in float32 or wider."""

    def check_shifted(self, ahead: Tensor, behind: Tensor) -> None:
        """Flag shifted outputs whose mean is not that of the pass at θ."""

    def forget(self, *, batch_too: bool) -> None:
        """Drop θ, g and, with ``batch_too``, the batch, until :meth:`recompute`."""

    def recompute(self, params: Tree, batch: Batch = None) -> None:
        """Compute the gradient once more, at θ, and on the batch where that was forgotten too."""


class Engine(Protocol):
    """A student as it is in one step, and how it is run and differentiated.

    Attributes:
        module: the network.
        has_whole_weights: whether this process holds whole weights, which a loss of the problem may
            read.
        shard: the number of the part of the weights that this process holds; 0 for all of them.
        returns_state: whether a step returns the optimizer's next state, and its own step does not
            make it.
        parameters: the weights that are learned, as the module holds them, by name.
        params: the same without their graph.
        double_backward: whether the gradients of its inner passes stay differentiable in the
            signal.
        inspects_graph: set at a first step. The next graph of a gradient is searched for
            derivatives that PyTorch would leave out.
        chooses_order: whether this step chooses the order of differentiation.
        compares_gradients: whether the derivative along w by the outputs was not the one by the
            gradient. Gradients that are computed again are then compared with the first ones.
    """

    module: nn.Module
    ranks: Ranks
    space: Space
    slots: Slots
    device: torch.device
    dtypes: set[torch.dtype]
    parameters: dict[str, nn.Parameter]
    params: Tree
    parts: int
    capabilities: frozenset[Capability]
    has_whole_weights: bool
    shard: int
    returns_state: bool
    has_half_precision: bool
    double_backward: bool
    inspects_graph: bool
    chooses_order: bool
    compares_gradients: bool

    def descend(self, params: Tree, lesson: Lesson, ask: Ask) -> Descent:
        """Run the student on a lesson, at weights θ, up to g: Algorithm 1, lines 2 and 3.

        Buffers and generators advance as in training.
        """

    def loss(
        self,
        params: Tree,
        batches: MicroBatches,
        judge: OuterLossOf,
        start: RandomState,
        *,
        gradient: bool = False,
        look: GraphLook | None = None,
    ) -> tuple[Tensor, Tree]:
        """Return the outer loss, Σ sum / Σ weight over batches and ranks, and its gradient."""

    def losses(
        self,
        points: Sequence[Tree],
        batches: MicroBatches,
        judge: OuterLossOf,
        start: RandomState,
    ) -> list[Tensor]:
        """Return the outer loss at several weights, with the same draws."""

    def forward(self, inputs: Inputs) -> Tensor:
        """Return the module's outputs, in float32 or wider."""

    def over_ranks(self, tree: Tree) -> Tree:
        """Return the mean over the ranks of second derivatives, which each has of its own rows."""

    def as_leaves(self, params: Tree) -> Tree:
        """Return weights as leaves of the types that the module's own have, by name."""

    def with_weights(self, params: Tree) -> AbstractContextManager[None]:
        """Hold these weights in a block, without a pass."""

    def with_leaves(self, params: Tree) -> AbstractContextManager[Tree]:
        """Hold these weights as leaves in a block, and yield them."""

    def at_weights(
        self, params: Tree, random: RandomState, state: State | Slots, *, upcast: bool = False
    ) -> AbstractContextManager[None]:
        """Run the student in a block at other weights, as if from a saved state."""
