"""A network on one device: its inner pass, passes at other weights that leave nothing behind, and replays.

Several processes may each hold the whole network and take a share of every batch: losses and
gradients are then the means over these ranks, and outputs are those of this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import joined, map_tensors
from metapl.execution.compare import BY_DIFFERENCE, EXACTLY, check_same_outputs, coarsest_dtype
from metapl.execution.graphs import refuse_once_differentiable
from metapl.execution.layout import Layout
from metapl.execution.numerics import (
    DTYPE,
    HALF,
    MissingDerivative,
    Tree,
    asks_for_gradient,
    forward_mode,
    full_float32,
    is_layout_refused,
    mean_tree,
    no_fast_path,
    sum_tree,
    wide,
)
from metapl.execution.state import (
    RandomState,
    Slot,
    Slots,
    State,
    replay,
    replayed,
    stand_in,
    swapped,
)

NOTHING: AbstractContextManager[Any] = nullcontext()

# A scalar of outputs and of the weights that they were computed at.
Loss = Callable[[Tensor, Tree], Tensor]
# A function of w: (∂²ℓ/∂θ²) w, and the derivatives of ⟨g, w⟩ in leaves.
Product = Callable[..., tuple[Tree, list[Tensor | None]]]
# Looks at the graph of a loss, of which some leaves were made here, and which it may compute again.
GraphLook = Callable[[Tensor, Sequence[Tensor], Callable[[], Tensor]], None]
# A loss of outputs on a batch as a sum, and the weight that it is to be divided by: a number where
# it is 1.
WeightedLoss = Callable[[Tensor, Any], tuple[Tensor, Tensor | float]]


@dataclass
class _AllRows:
    """The outputs on a batch that came in micro-batches, and the derivatives of a loss of all of them."""

    parts: Sequence[Tensor]  # the outputs on each micro-batch
    outputs: Tensor  # of all rows, a leaf
    cotangents: Sequence[Tensor] = ()  # the derivative in the outputs, of each micro-batch
    direct: Tree = field(default_factory=dict)  # that in weights which the loss itself reads


class LocalStudent:
    """A student on one device, as it is in one step.

    Args:
        slots: the module's tables, if this step has read them already.
        double_backward: keep the gradients of its inner passes differentiable in the signal.
    """

    pass_type: type[Pass]
    has_whole_weights = (
        True  # whether this process holds whole weights, which a loss of the problem may read
    )

    def __init__(
        self, layout: Layout, slots: Slots | None = None, *, double_backward: bool = False
    ) -> None:
        self.module, self.ranks, self.space = layout.network, layout.ranks, layout.space
        self.capabilities = layout.capabilities
        # Set at a first step: the next graph of a gradient is searched for derivatives that PyTorch
        # would leave out.
        self.inspects_graph = False
        # Whether this step chooses the order of differentiation; and whether ż was none that its
        # gradient knows of, so that gradients which are computed again are compared with the first
        # ones.
        self.chooses_order = False
        self.compares_gradients = False
        self.double_backward, self.slots = double_backward, slots or Slots(layout.network)
        self.parameters: dict[str, nn.Parameter] = (
            layout.parameters() if layout.is_sharded else self.slots.learned
        )
        own = self.parameters.values()
        self.params: Tree = dict(zip(self.parameters, map(Tensor.detach, own), strict=True))
        self.device = next(iter(own)).device
        self.dtypes = set(map(DTYPE, own))
        self.has_half_precision = not HALF.isdisjoint(self.dtypes)

    def loss(
        self,
        params: Tree,
        batches: Sequence[
            tuple[Any, Any]
        ],  # the inputs, and the batch that the loss reads, of each micro-batch
        judge: WeightedLoss,
        start: RandomState,
        *,
        gradient: bool = False,
        state: State | None = None,
        look: GraphLook | None = None,
        whole: Any = None,
    ) -> tuple[Tensor, Tree]:
        """Return Σ sum / Σ weight of a loss over batches, of all ranks, at ``params``, and the
        ``gradient`` where it is asked for, with zeros for weights that no loss reaches. The buffers
        are those of a ``state``; None: as now.

        ``whole`` is the batch that the micro-batches are of, where a scalar loss of it may be
        another function of the rows than the mean over micro-batches. The loss is then taken once,
        of all rows; cost: for a gradient one more forward pass on each micro-batch, and the outputs
        of all rows in memory. A loss that returns (sum, weight) costs neither.
        """
        # The weights require a gradient also where none is taken: a forward may ask.
        at = self.as_leaves(params)
        values, gradients = list[tuple[Tensor, Tensor | float]](), list[Tree]()
        rows: _AllRows | None = None
        # The backward pass belongs into the block: checkpoints run the student again in it.
        with (
            NOTHING if gradient else no_fast_path(),
            self.at_weights(at, start, state or self.slots),
        ):
            # A loss that draws from Python's or NumPy's generators has the same draws in each of
            # its passes.
            is_watched = self.slots.draws_outside is None and start.is_whole
            for inputs, batch in batches:
                outputs = self.forward(inputs)
                value, weight = judge(outputs, batch)
                if is_watched:
                    self.slots.watch(start, self.slots.random_state(self.device))
                if look is not None and gradient:
                    look(value, [*at.values()], partial(self._judged, judge, inputs, batch))
                if whole is not None and not values and not isinstance(weight, Tensor):
                    rows = self._all_rows(outputs.detach(), batches[1:])
                    value, weight = judge(rows.outputs, whole)
                    values.append((value.detach(), weight))
                    if gradient and value.requires_grad:
                        self._differentiate(value, rows, at)
                    break
                if gradient:
                    gradients.append(self.gradient(value, at)[1] if value.requires_grad else {})
                values.append((value.detach(), weight))
        if rows is not None and gradient:
            gradients = [self._pulled_back(at, batches, rows, start, state or self.slots)]
        simple = len(values) == 1 and self.ranks.alone and not isinstance(weight, Tensor)
        mean, weight = values[0] if simple else self.mean_of_all(values)
        if not gradient:
            return mean, {}
        if not any(gradients):
            if outputs.requires_grad:
                raise MetaplError(f"the outer loss {checks.READS_OTHER_WEIGHTS}")
            raise MetaplError(
                "the outer loss has no gradient in the student; expected one of its undetached "
                "outputs."
            )
        v = gradients[0] if len(gradients) == 1 else mean_tree(gradients)
        if len(v) < len(at):
            v = {name: v[name] if name in v else torch.zeros_like(p) for name, p in at.items()}
        return mean, {n: len(values) / weight * t for n, t in v.items()} if isinstance(
            weight, Tensor
        ) else v

    def _all_rows(self, first: Tensor, others: Sequence[tuple[Any, Any]]) -> _AllRows:
        """Return the outputs of all micro-batches, of which the first are known, without the graph of a pass.

        Each pass has a graph, for a forward that takes a gradient itself, and drops it.
        """
        parts = [first, *(self.forward(inputs).detach() for inputs, _ in others)]
        return _AllRows(parts, joined(parts).requires_grad_())

    def _differentiate(self, value: Tensor, rows: _AllRows, at: Tree) -> None:
        """Find the derivatives of a loss of all rows.

        In their outputs, and in the weights that it reads itself.
        """
        (cotangent,) = torch.autograd.grad(
            value, [rows.outputs], retain_graph=True, allow_unused=True
        )
        if cotangent is not None:
            rows.cotangents = [*cotangent.split([len(part) for part in rows.parts])]
        if self.has_whole_weights:
            rows.direct = self.gradient(value, at)[1]

    def _pulled_back(
        self,
        at: Tree,
        batches: Sequence[tuple[Any, Any]],
        rows: _AllRows,
        start: RandomState,
        state: State | Slots,
    ) -> Tree:
        """Return the gradient of a loss of all rows, by running each micro-batch again, on the same draws and state."""
        if not rows.cotangents:
            return rows.direct
        found = [rows.direct]
        with self.at_weights(at, start, state):
            for (inputs, _), first, cotangent in zip(
                batches, rows.parts, rows.cotangents, strict=True
            ):
                outputs = self.forward(inputs)
                tolerance = EXACTLY[
                    coarsest_dtype([outputs.dtype, *self.dtypes], self.device)
                ].outputs
                check_same_outputs(outputs.detach(), first, tolerance, ranks=self.ranks)
                if outputs.requires_grad:
                    found.append(self.gradient((outputs * cotangent).sum(), at)[1])
        return sum_tree(found)

    def _judged(self, judge: WeightedLoss, inputs: Any, batch: Any) -> Tensor:
        value, _ = judge(self.forward(inputs), batch)
        return value

    def mean_of_all(
        self, values: Sequence[tuple[Tensor, Tensor | float]]
    ) -> tuple[Tensor, Tensor | float]:
        """Σ sum / Σ weight over micro-batches and ranks, and the mean of the ranks' weights.

        Without a graph.
        """
        total = torch.stack([value for value, _ in values]).sum(0)
        weight: Tensor | float = sum(weight for _, weight in values)
        if not self.ranks.alone:
            weight = weight if isinstance(weight, Tensor) else total.new_full((), weight)
            total, weight = self.ranks.mean(torch.stack([total, weight.to(total)])).unbind()
        if isinstance(weight, Tensor):
            text = (
                "the weights of the problem's outer_loss sum to zero or less; expected more: are "
                "all labels left out?"
            )
            checks.refuse(~((weight > 0) & weight.isfinite()), text)
        return total / weight, weight

    def gradient(self, value: Tensor, at: Tree, *, create_graph: bool = False) -> tuple[Tree, Tree]:
        """The gradient of a scalar in the weights that it reaches.

        On this rank's rows, and the mean over the ranks.
        """
        tensors = torch.autograd.grad(
            value, [*at.values()], create_graph=create_graph, allow_unused=True
        )
        own = {name: g for name, g in zip(at, tensors, strict=True) if g is not None}
        return own, own if self.ranks.alone else self.ranks.mean_tree(own, at)

    def forward(self, inputs: Any) -> Tensor:
        return wide(checks.logits(self.module(inputs), "student"))

    def as_leaves(self, params: Tree) -> Tree:
        own, make = self.parameters, Tensor._make_subclass
        if {*map(type, own.values())} == {nn.Parameter} and not any(
            map(vars, own.values())
        ):  # the usual ones
            return {name: make(nn.Parameter, t, True) for name, t in params.items()}
        return {name: stand_in(t.detach(), own[name]) for name, t in params.items()}

    def over_ranks(self, tree: Tree) -> Tree:
        """The mean over the ranks of second derivatives, which each has of its own rows."""
        return self.ranks.mean_tree(tree, self.params)

    def inspect_graph(self, gradients: Tree, value: Tensor) -> None:
        """Refuse, once, a gradient whose graph lacks derivatives that PyTorch would leave out without an error."""
        if self.inspects_graph:
            self.inspects_graph = False
            refuse_once_differentiable(gradients.values(), value)

    def held_at(self, params: Tree) -> list[Slot]:
        return [
            (table, name, params[first])
            for table, name, first in self.slots.places
            if first in params
        ]

    def with_weights(self, params: Tree) -> AbstractContextManager[None]:
        return swapped(self.held_at(self.as_leaves(params)))

    @contextmanager
    def with_leaves(self, params: Tree) -> Iterator[Tree]:
        """Hold these weights as leaves in this block, and yield them.

        For a loss that is called without a pass.
        """
        leaves = self.as_leaves(params)
        with swapped(self.held_at(leaves)):
            yield leaves

    def at_weights(
        self, params: Tree, random: RandomState, state: State | Slots, *, upcast: bool = False
    ) -> AbstractContextManager[None]:
        """The student at other weights, on copies of a state (``upcast``: in float32 or wider),
        with draws from ``random`` on."""
        held = [*self.held_at(params), *self.slots.in_formulas(), *self.slots.made()]
        return replay(random, state, held, upcast=upcast)

    def along(
        self, params: Tree, w: Tree, random: RandomState, state: State
    ) -> AbstractContextManager[None]:
        """As :meth:`at_weights`, with dual numbers for weights, whose tangent is w."""
        duals = {
            name: forward_ad.make_dual(p.clone(), w[name].to_dense())
            for name, p in params.items()
            if name in w
        }
        return self.at_weights(
            {name: stand_in(dual, self.parameters[name]) for name, dual in duals.items()},
            random,
            state,
        )


class Pass:
    """One inner pass, z = S(x; θ), and its replays: on its draws, and from copies of the state that it began with.

    Buffers and generators move as in training. ``outputs`` are z, (B, ...), float32 or wider,
    without a graph; ``graph`` has it until :meth:`gradient` has used it.
    """

    def __init__(self, student: LocalStudent, params: Tree, inputs: Any) -> None:
        self.student, self.params, self.inputs = student, params, inputs
        self._sample: Tensor | None = None  # of the outputs, where these are dropped
        # The generators as the loss begins, where it draws: other draws may lie between it and the
        # pass.
        self._at_loss: RandomState | None = None
        self._graph_of_g: tuple[Tree, list[Tensor]] | None = None  # g, and the leaves of its graph
        if params is student.params:
            self._at: Tree = {**student.parameters}
            self._held = student.slots.in_formulas()
        else:
            own = student.parameters
            graph = student.double_backward
            self._at = (
                {n: stand_in(p, own[n]) for n, p in params.items()}
                if graph
                else student.as_leaves(params)
            )
            self._held = [*student.held_at(self._at), *student.slots.in_formulas()]
        self._before = student.slots.random_state(student.device)
        self._state, student.slots.state = student.slots.state or student.slots.snapshot(), None
        with self._running():
            outputs = checks.logits(student.module(inputs), "student")
        self.random_state_after = student.slots.random_state(student.device)
        student.slots.watch(self._before, self.random_state_after)
        self._dtype, self._half_types = outputs.dtype, student.slots.half_types(outputs)
        self.graph: Tensor | None = wide(outputs)
        self.outputs = self.graph.detach()

    @property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the pass.

        A key of the tolerances in :mod:`metapl.execution.compare`.
        """
        return coarsest_dtype(
            [self._dtype, *self.student.dtypes, *self._half_types], self.student.device
        )

    @property
    def state_before(self) -> State:
        """The student's buffers and frozen parameters as this pass found them."""
        return self._state

    def _running(self) -> AbstractContextManager[None]:
        return swapped(self._held) if self._held else NOTHING

    def gradient(self, loss: Loss, leaves: Sequence[Tensor] = ()) -> tuple[Tensor, Tree]:
        """A loss of this pass and its gradient g.

        The graph is kept for :meth:`in_leaves` where it has leaves.
        """
        assert self.graph is not None, "a pass learns once"
        student, ranks = self.student, self.student.ranks
        # A loss may read ``student.parameters()``, which have to be those of this pass; and the
        # backward pass of a checkpoint runs the module again.
        with self._running():
            value = self._first_value(loss)
            if not value.requires_grad:
                raise MetaplError(f"the student's loss {checks.NO_GRADIENT}")
            own, grads = student.gradient(
                value, self._at, create_graph=student.double_backward or bool(leaves)
            )
        if student.double_backward or leaves:
            student.inspect_graph(own, value)
        if leaves:
            self._graph_of_g = own, list(leaves)
            grads = {name: g.detach() for name, g in grads.items()}
        if not grads:
            why = checks.READS_OTHER_WEIGHTS if self.graph.requires_grad else checks.NO_GRADIENT
            raise MetaplError(f"the student's loss {why}")
        self.graph = None
        if not student.double_backward and not leaves:
            self._at, self._held = {}, []
        value = value.detach()
        return value if ranks.alone else ranks.mean(value), grads

    def _first_value(self, loss: Loss) -> Tensor:
        """Return the loss of this pass, and keep the state of the generators where it draws.

        Whether it does is found in the first step; a loss that did not draw there is not watched in
        later ones.
        """
        assert self.graph is not None, "a pass learns once"
        slots = self.student.slots
        device = self.student.device
        if slots.findings.draws_in_loss is False:
            return loss(self.graph, self._at)
        before = slots.random_state(device)
        value = loss(self.graph, self._at)
        after = slots.random_state(device)
        slots.watch(before, after)
        if not after.is_as(before):
            slots.findings.draws_in_loss = True
            self._at_loss = before
        return value

    def drawing_as_loss(self) -> AbstractContextManager[None]:
        """Draw in this block as the loss of this pass drew."""
        return NOTHING if self._at_loss is None else replayed(self._at_loss)

    def in_leaves(self, w: Tree) -> list[Tensor | None] | None:
        """The derivatives of ⟨g, w⟩ in the leaves of a graph that was kept, on this rank's rows.

        None without one.
        """
        if self._graph_of_g is None:
            return None
        (own, leaves), self._graph_of_g = self._graph_of_g, None
        with self._running():
            return _derivatives(own, {}, leaves, w, free=True)[1]

    def forget(self, inputs_too: bool) -> None:
        """Drop θ, and the inputs and most of the outputs, until :meth:`recompute_gradient`."""
        self.params = {}
        if inputs_too:
            self.inputs, self._sample = None, _sampled(self.outputs)
            self.outputs = self.outputs.new_zeros(()).expand(
                self.outputs.shape
            )  # which tells their shape alone

    def recompute_gradient(self, params: Tree, loss: Loss) -> Tree:
        """The gradient of this pass's loss at its θ once more.

        ``params`` is that θ, which was forgotten.
        """
        self.params = params
        with self.once_more(self.inputs) as (at, outputs):
            self.outputs, self._sample = outputs.detach(), None
            return self.student.gradient(loss(outputs, at), at)[1]

    @contextmanager
    def once_more(self, inputs: Any) -> Iterator[tuple[Tree, Tensor]]:
        """θ as leaves, and the outputs there, compared with this pass's.

        A backward pass belongs into the block.
        """
        at = self.student.as_leaves(self.params)
        with self.student.at_weights(at, self._before, self._state):
            outputs = self._same_outputs(self.student.forward(inputs))
            with self.drawing_as_loss():
                yield at, outputs

    def _same_outputs(self, outputs: Tensor) -> Tensor:
        again, first = outputs.detach(), self.outputs
        if self._sample is not None:
            again, first = _sampled(again), self._sample
        check_same_outputs(again, first, EXACTLY[self.rounded_to].outputs, ranks=self.student.ranks)
        return outputs

    _replay_twice = once_more  # one that can be differentiated twice

    def tangent(self, w: Tree) -> Tensor:
        """ż = d/dε S(x; θ + εw) by forward-mode AD.

        Exact, one pass of about three plain ones, no graph.
        """
        with forward_mode():
            try:
                with self.student.along(self.params, w, self._before, self._state):
                    outputs, tangent = forward_ad.unpack_dual(self.student.forward(self.inputs))
            except RuntimeError as error:
                if asks_for_gradient(error):
                    what = (
                        "the student's forward takes a gradient, and a pass in forward mode has "
                        "no graph"
                    )
                    raise MissingDerivative(what) from error
                if is_layout_refused(error):
                    # The plain pass took these tensors, so it is a rule of forward mode: group
                    # norm's, on torch 2.12.
                    what = (
                        "the forward mode of an operation of the student takes contiguous tensors "
                        "alone here"
                    )
                    raise MissingDerivative(
                        f"{what} ({str(error).splitlines()[0].rstrip('.')})"
                    ) from error
                raise
            self._same_outputs(outputs)
            return torch.zeros_like(self.outputs) if tangent is None else tangent.clone()

    def shifted(self, step: Tensor, direction: Tree) -> Tensor:
        """S(x; θ + step·direction) in float32 or wider, without autocast, TF32 and a graph."""
        with torch.no_grad():
            moved = self._moved(step, direction)
        slots = self.student.slots
        if not slots.takes_gradients:
            try:
                with torch.no_grad():
                    return self._at_weights(moved)
            except RuntimeError as error:
                if not asks_for_gradient(error):
                    raise
                slots.takes_gradients = True
        with torch.enable_grad():
            return self._at_weights(moved).detach()

    def _moved(self, step: Tensor, direction: Tree) -> Tree:
        """θ + step·direction, in float32 or wider."""
        return {
            n: wide(p) + step * wide(direction[n]) if n in direction else wide(p)
            for n, p in self.params.items()
        }

    def _at_weights(self, params: Tree) -> Tensor:
        """The outputs at other weights, in float32 or wider, without autocast and TF32."""
        device = self.student.device
        at = self.student.at_weights(
            self.student.as_leaves(params), self._before, self._state, upcast=True
        )
        with torch.autocast(device.type, enabled=False), full_float32(device), no_fast_path(), at:
            return self.student.forward(map_tensors(wide, self.inputs))

    def check_shifted(self, ahead: Tensor, behind: Tensor) -> None:
        """Flag outputs of shifted passes whose mean, S(x; θ) to the second order of the shift, is not this pass's."""
        tolerance = BY_DIFFERENCE[self.rounded_to].outputs
        check_same_outputs(
            (ahead + behind) / 2, self.outputs, tolerance, ranks=self.student.ranks, moved=ahead
        )

    @contextmanager
    def hessian(
        self, loss: Loss, leaves: Sequence[Tensor] = (), inputs: Any = None
    ) -> Iterator[Product]:
        """The derivatives of ⟨g, w⟩ as a function of w, on this rank's rows, by double backward:
        (∂²ℓ/∂θ²) w, and those in leaves of the loss and of the ``inputs``. The last call may
        ``free`` the graph."""
        replayed = self._replay_twice(self.inputs if inputs is None else inputs)
        with no_fast_path(math=True), replayed as (at, outputs):
            value = loss(outputs, at)
            tensors = torch.autograd.grad(
                value, [*at.values()], create_graph=True, allow_unused=True
            )
            g = {name: t for name, t in zip(at, tensors, strict=True) if t is not None}
            self.student.inspect_graph(g, value)
            yield partial(_derivatives, g, at, leaves)

    def second_derivatives(
        self, w: Tree, loss: Loss, leaves: Sequence[Tensor], inputs: Any, *, curved: bool
    ) -> tuple[Tree, list[Tensor | None]]:
        """Of :meth:`hessian`, for one w. Not ``curved``: in the leaves alone."""
        with self.hessian(loss, leaves, inputs) as product:
            return product(w, free=True, curved=curved)


LocalStudent.pass_type = Pass


def _derivatives(
    g: Tree, at: Tree, leaves: Sequence[Tensor], w: Tree, *, free: bool = False, curved: bool = True
) -> tuple[Tree, list[Tensor | None]]:
    """The derivatives of ⟨g, w⟩ in weights, if ``curved``, and in leaves.

    ``free``: the graph is not needed again.
    """
    at = at if curved else {}
    pairs = [(t, w[name]) for name, t in g.items() if name in w and t.requires_grad]
    ends = [*at.values(), *leaves]
    grads: Sequence[Tensor | None] = [None] * len(ends)
    if pairs:
        tensors, given = zip(*pairs, strict=True)
        grads = torch.autograd.grad(tensors, ends, given, retain_graph=not free, allow_unused=True)
    in_weights = {
        n: torch.zeros_like(p) if t is None else t
        for (n, p), t in zip(at.items(), grads, strict=False)
    }
    return in_weights, list(grads[len(at) :])


def as_leaves(params: Tree) -> Tree:
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _sampled(t: Tensor) -> Tensor:
    return t.flatten()[:: t.numel() // 4096 + 1].clone()


def mean_of(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)
