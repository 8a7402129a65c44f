"""A network on one device: its inner pass, passes at other weights, and replays.

Passes at other weights and replays leave nothing behind.

Several processes may each hold the whole network and take a share of every batch: losses and
gradients are then the means over these ranks, and outputs are those of this rank's rows.

:class:`EagerEngine` is the network in one step, and :class:`EagerDescent` an inner pass of it.

The symbols: θ the weights, x the inputs and z = S(x; θ) the outputs of the inner pass; ℓ the inner
loss and g = ∇_θ ℓ its gradient; v the gradient of the outer loss after the step; w a direction in
the space of the weights, v as the step's adjoint returns it; ż = d/dε S(x; θ + εw).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metapl.core.lesson import Ask, GraphLook, Lesson, Loss, SignalInput, credited, plain_leaves
from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.batch import Batch, Inputs, map_tensors, returned_by
from metapl.execution.compare import BY_DIFFERENCE, EXACTLY, check_same_outputs, coarsest_dtype
from metapl.execution.graphs import refuse_once_differentiable, types_in_graphs
from metapl.execution.layout import Layout
from metapl.execution.numerics import (
    DTYPE,
    HALF,
    MissingDerivative,
    Tree,
    add_to,
    asks_for_gradient,
    dual_numbers,
    full_float32,
    is_layout_refused,
    no_fast_path,
    wide,
    without_checkpoints,
)
from metapl.execution.ranks import NOTHING
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
from metapl.execution.tangents import norms_by_backward_kernels
from metapl.problems.base import Signal, enters_input, sum_and_weight

if TYPE_CHECKING:
    from metapl.core.engine import Derivatives, Descent, MicroBatches, OuterLossOf, Weighted

# What errors call the network in its pass on the inner batch.
ON_INNER = "student, on the inner batch"

# A function of w that returns (∂²ℓ/∂θ²) w, and the derivatives of ⟨g, w⟩ in leaves.
Product = Callable[..., tuple[Tree, list[Tensor | None]]]


class EagerEngine:
    """A student on one device, as it is in one step: an :class:`metapl.core.engine.Engine`.

    Args:
        slots: the module's tables, if this step has read them already.
        double_backward: keep the gradients of its inner passes differentiable in the signal.
        parts: micro-batches that each batch is split into.

    Attributes:
        descent_type: the class of its passes.
        dtypes: the types of the weights that are learned.
        chooses_order: whether this step chooses the order of differentiation. It stays so for the
            whole step, while the first graph that is searched ends ``inspects_graph``.
    """

    descent_type: type[EagerDescent]
    has_whole_weights = True
    shard = 0
    returns_state = False

    def __init__(
        self,
        layout: Layout,
        slots: Slots | None = None,
        *,
        double_backward: bool = False,
        parts: int = 1,
    ) -> None:
        self.module = layout.network
        self.parts = parts
        self.ranks = layout.ranks
        self.space = layout.space
        self.capabilities = layout.capabilities
        self.double_backward = double_backward
        self.slots = slots or Slots(layout.network)
        self.parameters: dict[str, nn.Parameter] = self.slots.learned
        if layout.is_sharded:
            self.parameters = layout.parameters()
        # Plain weights are of no subclass, and have no attributes of their own, which leaves in
        # their places would have to carry.
        self._has_plain_weights = all(
            type(p) is nn.Parameter and not vars(p) for p in self.parameters.values()
        )
        self.device = next(iter(self.parameters.values())).device
        self.dtypes = set(map(DTYPE, self.parameters.values()))
        self.has_half_precision = not HALF.isdisjoint(self.dtypes)
        self.begin()

    def begin(self) -> None:
        """Begin a step at the weights that the module holds now."""
        self.params: Tree = {name: p.detach() for name, p in self.parameters.items()}
        self.inspects_graph = self.chooses_order = self.compares_gradients = False

    # ----------------------------------------------------------------------------- inner passes

    def descend(self, params: Tree, lesson: Lesson, ask: Ask) -> Descent:
        """Run the student on a lesson, at weights θ, up to g: Algorithm 1, lines 2 and 3.

        Buffers and generators advance as in training.

        Args:
            ask: asks the teacher.
        """
        if self.parts > 1:
            from metapl.engines.accumulated import AccumulatedDescent

            run = partial(self.descent_type, self)
            return AccumulatedDescent(self, params, lesson, ask=ask, run=run)
        # Line 2: ŷ ~ T(x), or the soft label.
        signal = None
        if lesson.asks_first:
            signal = lesson.heard(ask(lesson.batch, None))
        inner_pass = self.descent_type(self, params, lesson, signal)
        if signal is None:
            signal = lesson.heard(ask(lesson.batch, inner_pass.outputs))
        # Line 3: g = ∇ (1/B) Σ ℓ_i(z, signal).
        inner_pass.learn(signal)
        return inner_pass

    # ---------------------------------------------------------------- a loss at given weights

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
        """Return the outer loss, Σ sum / Σ weight over batches and ranks, and its gradient.

        Args:
            params: the weights at which it is taken.
            batches: the micro-batches of this process.
            judge: the outer loss of the outputs on a micro-batch.
            start: where draws begin.
            gradient: whether the gradient is asked for. It has zeros for weights that no loss
                reaches. Without it the tree is empty.
            look: is shown the graph of the loss.

        Cost: one pass on each micro-batch, with its backward pass for the gradient.
        """
        # The weights require a gradient also where none is taken: a forward may ask.
        leaves = self.as_leaves(params)
        values: list[Weighted] = []
        total: Tree = {}
        # The backward pass belongs into the block: checkpoints run the student again in it.
        with (
            NOTHING if gradient else no_fast_path(),
            self.at_weights(leaves, start, state=self.slots),
        ):
            for inputs, batch in batches:
                outputs = self.forward(inputs, "student, on the outer batch")
                value, weight = sum_and_weight(judge(outputs, batch))
                if look is not None and gradient:
                    judged_again = partial(self._judged, judge, inputs, batch)
                    look(value, [*leaves.values()], judged_again)
                if gradient and value.requires_grad:
                    _, of_batch = self.gradient(value, leaves)
                    add_to(total, of_batch)
                values.append((value.detach(), weight))
        if len(values) > 1 or isinstance(weight, Tensor) or not self.ranks.alone:
            mean, weight = self.mean_of_all(values)
        else:
            # The usual case, in which there is nothing to add up and to divide.
            mean = values[0][0]
        if not gradient:
            return mean, {}
        if not total:
            if value.requires_grad:
                raise MetaplError(f"the outer loss {checks.READS_OTHER_WEIGHTS}")
            raise MetaplError(
                "the outer loss has no gradient in the student; expected one of its undetached "
                "outputs."
            )
        if len(total) < len(leaves):
            zeros = {name: torch.zeros_like(p) for name, p in leaves.items() if name not in total}
            total = {name: total[name] if name in total else zeros[name] for name in leaves}
        if len(values) > 1 or isinstance(weight, Tensor):
            total = _mean_gradient(total, weight, count=len(values))
        return mean, total

    def losses(
        self,
        points: Sequence[Tree],
        batches: MicroBatches,
        judge: OuterLossOf,
        start: RandomState,
    ) -> list[Tensor]:
        """Return the outer loss at several weights, with the same draws.

        For the arguments see :meth:`loss`.
        """
        return [self.loss(params, batches, judge, start)[0] for params in points]

    def _judged(self, judge: OuterLossOf, inputs: Inputs, batch: Batch) -> Tensor:
        value, _ = sum_and_weight(judge(self.forward(inputs), batch))
        return value

    def mean_of_all(self, values: Sequence[Weighted]) -> Weighted:
        """Return Σ sum / Σ weight over micro-batches and ranks, without a graph, and a weight.

        The weight is the sum over the micro-batches of this process; in several processes it is the
        mean of these sums over the ranks.
        """
        total = torch.stack([value for value, _ in values]).sum(0)
        weight: Tensor | float = sum(weight for _, weight in values)
        if not self.ranks.alone:
            if not isinstance(weight, Tensor):
                weight = total.new_full((), weight)
            total, weight = self.ranks.mean(torch.stack([total, weight.to(total)])).unbind()
        if isinstance(weight, Tensor):
            checks.refuse(~((weight > 0) & weight.isfinite()), checks.NO_WEIGHT)
        return total / weight, weight

    def gradient(
        self, value: Tensor, leaves: Tree, *, create_graph: bool = False
    ) -> tuple[Tree, Tree]:
        """Return the gradient of a scalar in the weights that it reaches.

        The first is of this rank's rows, the second the mean over the ranks.
        """
        tensors = torch.autograd.grad(
            value, [*leaves.values()], create_graph=create_graph, allow_unused=True
        )
        of_rank = {name: g for name, g in zip(leaves, tensors, strict=True) if g is not None}
        if self.ranks.alone:
            return of_rank, of_rank
        return of_rank, self.ranks.mean_tree(of_rank, leaves)

    def over_ranks(self, tree: Tree) -> Tree:
        """Return the mean over the ranks of second derivatives, which each has of its own rows."""
        return self.ranks.mean_tree(tree, self.params)

    def inspect_graph(self, gradients: Tree, value: Tensor) -> None:
        """Refuse, once, a gradient whose graph lacks derivatives.

        PyTorch would leave these out without an error.
        """
        self.inspects_graph = False
        refuse_once_differentiable(gradients.values(), value)

    # --------------------------------------------------------------- the module at other weights

    def forward(self, inputs: Inputs, role: str = "student") -> Tensor:
        """Return the module's outputs, in float32 or wider; an error has the role."""
        return wide(checks.logits(returned_by(self.module, inputs, role), "student"))

    def as_leaves(self, params: Tree) -> Tree:
        """Return weights as leaves of the types that the module's own have, by name."""
        if self._has_plain_weights:
            # The usual case, without a call for each weight that asks for its type.
            make = Tensor._make_subclass
            return {name: make(nn.Parameter, t, require_grad=True) for name, t in params.items()}
        return {name: stand_in(t.detach(), self.parameters[name]) for name, t in params.items()}

    def slots_of(self, params: Tree) -> list[Slot]:
        """Return the places of these weights, with the weights."""
        return [
            (table, name, params[first_name])
            for table, name, first_name in self.slots.places
            if first_name in params
        ]

    def with_weights(self, params: Tree) -> AbstractContextManager[None]:
        """Hold these weights in a block, without a pass."""
        return swapped(self.slots_of(self.as_leaves(params)))

    @contextmanager
    def with_leaves(self, params: Tree) -> Iterator[Tree]:
        """Hold these weights as leaves in this block, and yield them.

        For a loss that is called without a pass.
        """
        leaves = self.as_leaves(params)
        with swapped(self.slots_of(leaves)):
            yield leaves

    def at_weights(
        self, params: Tree, random: RandomState, state: State | Slots, *, upcast: bool = False
    ) -> AbstractContextManager[None]:
        """Run the student in a block at other weights, as if from a saved state.

        Args:
            random: where draws begin.
            state: of which the student has fresh copies.
            upcast: have these in float32 or wider.
        """
        slots = self.slots_of(params)
        if self.slots.formulas:
            slots += self.slots.in_formulas()
        return replay(random, state, slots=slots, upcast=upcast)

    def along(
        self, params: Tree, w: Tree, random: RandomState, state: State
    ) -> AbstractContextManager[None]:
        """Run the student as :meth:`at_weights`, with dual numbers for weights.

        Their tangent is w. A weight that w lacks is the module's own in this block. The inner loss
        does not reach it, nor do the outputs depend on it; :meth:`EagerDescent.tangent` compares.
        """
        duals: Tree = {}
        for name, p in params.items():
            if name in w:
                dual = forward_ad.make_dual(p.clone(), w[name].to_dense())
                duals[name] = stand_in(dual, self.parameters[name])
        return self.at_weights(duals, random, state=state)


class _KeptGraph(NamedTuple):
    """The gradient of an inner loss, with its graph, and leaves in which it may be derived."""

    gradient: Tree
    leaves: Tree


class EagerDescent:
    """One inner pass z = S(x; θ) on a lesson, its loss ℓ and g = ∇_θ ℓ, and its replays.

    A replay runs on the draws of the pass, and from copies of the state that it began with. The
    pass itself moves buffers and generators as in training.

    Args:
        student: whose pass it is.
        params: θ.
        lesson: what the student is taught.
        signal: about the lesson, where the teacher was asked first; None: it is asked about the
            outputs.

    Attributes:
        inputs: x.
        outputs: z, (B, ...), float32 or wider, without a graph.
        graph: the same with its graph, until :meth:`learn` has used it.
    """

    parts = 1
    signal: Signal
    inner_loss: Tensor
    gradient: Tree
    # What makes the input of the signal, where the signal enters it.
    signal_input: SignalInput | None = None
    # A sample of the outputs, where the outputs themselves are dropped.
    _output_sample: Tensor | None = None
    # The generators as the loss begins: other draws may lie between the pass and its loss.
    _random_state_of_loss: RandomState | None = None
    _kept_graph: _KeptGraph | None = None

    def __init__(
        self, student: EagerEngine, params: Tree, lesson: Lesson, signal: Signal | None = None
    ) -> None:
        self.student = student
        self.params = params
        self.lesson = lesson
        if signal is not None and enters_input(lesson.problem):
            self.signal_input = SignalInput(
                lesson.problem, lesson.batch, signal, in_graph=lesson.graph == "path"
            )
            self.inputs: Inputs = self.signal_input.inputs
        else:
            self.inputs = lesson.problem.student_input(lesson.batch)

        slots = student.slots
        if params is student.params:
            # The module holds these weights already. What is put into its slots besides them are
            # formulas in the place of fused kernels, such as that of weight norm.
            self._weights: Tree = {**student.parameters}
            self._held_slots = slots.in_formulas() if slots.formulas else []
        else:
            if student.double_backward:
                self._weights = {
                    name: stand_in(p, student.parameters[name]) for name, p in params.items()
                }
            else:
                self._weights = student.as_leaves(params)
            self._held_slots = [*student.slots_of(self._weights), *slots.in_formulas()]

        self._random_state = RandomState.now(student.device)
        # The first pass of a step takes over the snapshot that the step has made.
        self._state = slots.state or slots.snapshot()
        slots.state = None
        with self._running():
            outputs = checks.logits(returned_by(student.module, self.inputs, ON_INNER), "student")
        self.random_state_after = RandomState.now(student.device)
        self._output_dtype = outputs.dtype
        if slots.half_types is None and outputs.grad_fn is not None:
            slots.half_types = HALF.intersection(types_in_graphs([outputs]))
        self.graph: Tensor | None = wide(outputs)
        self.outputs = self.graph.detach()
        with NOTHING if student.ranks.alone else student.ranks.agreed():
            lesson.problem.check(self.outputs, lesson.outer_batch, lesson.batch)

    @property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the pass.

        A key of the tolerances in :mod:`metapl.execution.compare`.
        """
        half_types = self.student.slots.half_types or ()
        dtypes = [self._output_dtype, *self.student.dtypes, *half_types]
        return coarsest_dtype(dtypes, self.student.device)

    def _running(self) -> AbstractContextManager[None]:
        """Hold the weights of this pass in a block, as its forward did."""
        if not self._held_slots:
            return NOTHING
        student = self.student
        if student.double_backward and self.params is not student.params:
            # The graph of a path of several steps is differentiated at weights of one of them.
            return without_checkpoints(swapped(self._held_slots))
        return swapped(self._held_slots)

    # ------------------------------------------------------------------- the loss and its gradient

    def learn(self, signal: Signal) -> None:
        """Take the loss on a signal, and its gradient g, the means over the ranks.

        A graph of g in what gets the feedback is kept for :meth:`along_kept_graph`.
        """
        assert self.graph is not None, "a pass learns once"
        student, lesson = self.student, self.lesson
        self.signal = signal
        leaves: Tree = {}
        if lesson.graph == "credited":
            leaves = plain_leaves(credited(signal, lesson.credits))
            signal = signal.having(leaves)
        loss = lesson.loss(signal, leaves.get("factors"))
        keeps_graph = student.double_backward or bool(leaves)
        # A loss may read ``student.parameters()``, which have to be those of this pass; and the
        # backward pass of a checkpoint runs the module again.
        with self._running():
            self._random_state_of_loss = RandomState.now(student.device)
            value = loss(self.graph, self._weights)
            if lesson.look is not None:
                made_here = [*self.params.values(), *signal.fields().values(), *leaves.values()]
                lesson.look(
                    value, [*self._weights.values(), *made_here], partial(self._loss_again, loss)
                )
            if not value.requires_grad:
                raise MetaplError(f"the student's loss {checks.NO_GRADIENT}")
            of_rank, mean = student.gradient(value, self._weights, create_graph=keeps_graph)
        if keeps_graph and student.inspects_graph:
            student.inspect_graph(of_rank, value)
        if leaves:
            self._kept_graph = _KeptGraph(of_rank, leaves)
            mean = {name: g.detach() for name, g in mean.items()}
        if not mean:
            reason = checks.READS_OTHER_WEIGHTS if self.graph.requires_grad else checks.NO_GRADIENT
            raise MetaplError(f"the student's loss {reason}")
        self.graph = None
        if not keeps_graph:
            self._weights = {}
            self._held_slots = []
        self.inner_loss = value.detach()
        if not student.ranks.alone:
            self.inner_loss = student.ranks.mean(self.inner_loss)
        self.gradient = mean

    def _loss_again(self, loss: Loss) -> Tensor:
        """Return a loss of this pass once more, by a replay."""
        with self.once_more(self.inputs) as (params, outputs):
            return loss(outputs, params)

    def drawing_as_loss(self) -> AbstractContextManager[None]:
        """Draw in this block as the loss of this pass drew."""
        if self._random_state_of_loss is None:
            return NOTHING
        return replayed(self._random_state_of_loss)

    def mean_loss(self, outputs: Tensor, params: Tree, leaves: Tree) -> Tensor:
        """Return this rank's share of (1/B) Σ_i factor_i ℓ_i(z, signal, θ), a scalar.

        Args:
            outputs: z, (B, ...).
            params: θ.
            leaves: in the places of what gets the feedback.
        """
        loss = self.lesson.loss(self.signal.having(leaves), leaves.get("factors"))
        with self.drawing_as_loss():
            value = loss(outputs, params)
        ranks = self.student.ranks
        # The ranks' shares add up to the mean.
        return value if ranks.alone else value / ranks.size

    def again(self, signal: Signal) -> EagerDescent:
        """Return the same pass on another signal.

        Cost: a forward and a backward pass of the student.
        """
        again = copy.copy(self)
        again.signal = signal
        again.recompute(self.params)
        with again.drawing_as_loss():
            value = self.lesson.loss(signal)(again.outputs, again.params)
        ranks = self.student.ranks
        again.inner_loss = value if ranks.alone else ranks.mean(value)
        return again

    def along_kept_graph(self, w: Tree, *, curved: bool = False) -> tuple[Tree, Derivatives] | None:
        """Return (∂²ℓ/∂θ²) w, if ``curved``, and ∂⟨g, w⟩/∂(what gets the feedback).

        By the graph that was kept, which serves once: a second call returns None, as does one where
        :meth:`learn` has kept none.
        """
        if self._kept_graph is None:
            return None
        g, leaves = self._kept_graph
        self._kept_graph = None
        with self._running():
            found = _derivatives(g, self._weights, [*leaves.values()], w, free=True, curved=curved)
        return found[0], self._in_fields(leaves, found[1])

    def _in_fields(
        self, fields: Mapping[str, Tensor], in_leaves: Sequence[Tensor | None]
    ) -> Derivatives:
        """Return derivatives in leaves as those in fields of the signal.

        Args:
            in_leaves: those in the fields, and then in the leaves of the input. They are of the
                mean over this rank's rows.

        Returns: the derivatives of the mean over the rows of all ranks.
        """
        ranks = self.student.ranks
        if ranks.alone and self.signal_input is None:
            return dict(zip(fields, in_leaves, strict=True))
        through_input: Derivatives = {}
        if self.signal_input is not None:
            through_input = self.signal_input.in_fields(in_leaves[len(fields) :])
        derivatives: Derivatives = {}
        for name, direct in zip(fields, in_leaves, strict=False):
            terms = [t for t in (direct, through_input.get(name)) if t is not None]
            derivatives[name] = sum(terms[1:], terms[0]) / ranks.size if terms else None
        return derivatives

    def forget(self, *, batch_too: bool) -> None:
        """Drop θ, g and, with ``batch_too``, the batch, until :meth:`recompute`.

        Of outputs that are dropped with the batch their shape is kept, and a sample of their
        entries, with which those of a replay are compared; all entries where they are fewer than
        4096. A batch that the signal enters stays.
        """
        self.params = {}
        self.gradient = {}
        self._kept_graph = None
        if batch_too and self.signal_input is None:
            self.inputs = None
            self.lesson = replace(self.lesson, batch=None)
            self._output_sample = _sample(self.outputs)
            # A tensor that tells the outputs' shape, and takes the memory of one number.
            self.outputs = self.outputs.new_zeros(()).expand(self.outputs.shape)

    def recompute(self, params: Tree, batch: Batch = None) -> None:
        """Compute the gradient of this pass once more.

        Args:
            params: its θ, which was forgotten.
            batch: its batch, where that was forgotten too.
        """
        self.params = params
        if batch is not None:
            self.lesson = replace(self.lesson, batch=batch)
            if self.inputs is None:
                self.inputs = self.lesson.problem.student_input(batch)
        loss = self.lesson.loss(self.signal)
        with self.once_more(self.inputs) as (leaves, outputs):
            self.outputs = outputs.detach()
            self._output_sample = None
            _, self.gradient = self.student.gradient(loss(outputs, leaves), leaves)

    # ------------------------------------------------------------------------------------- replays

    @contextmanager
    def once_more(self, inputs: Inputs) -> Iterator[tuple[Tree, Tensor]]:
        """Run the pass again in this block; yield θ as leaves, and the outputs there.

        The outputs are compared with those of this pass. A backward pass belongs into the block.
        """
        leaves = self.student.as_leaves(self.params)
        with self.student.at_weights(leaves, self._random_state, state=self._state):
            outputs = self._checked(self.student.forward(inputs))
            with self.drawing_as_loss():
                yield leaves, outputs

    def _twice_differentiable(self, inputs: Inputs) -> AbstractContextManager[tuple[Tree, Tensor]]:
        """Run the pass again as :meth:`once_more`, with a graph that has second derivatives.

        On one device every graph has.
        """
        return self.once_more(inputs)

    def _checked(self, outputs: Tensor) -> Tensor:
        """Return the outputs of a replay, which have to be those of this pass."""
        new_outputs = outputs.detach()
        first_outputs = self.outputs
        if self._output_sample is not None:
            new_outputs = _sample(new_outputs)
            first_outputs = self._output_sample
        check_same_outputs(
            new_outputs,
            first_outputs,
            tolerance=EXACTLY[self.rounded_to].outputs,
            ranks=self.student.ranks,
        )
        return outputs

    def tangent(self, w: Tree) -> Tensor:
        """Return ż = d/dε S(x; θ + εw) by forward-mode AD.

        Exact, one pass of about three plain ones, no graph.
        """
        with dual_numbers(), norms_by_backward_kernels(self.student.module):
            try:
                with self.student.along(
                    self.params, w, random=self._random_state, state=self._state
                ):
                    dual = self.student.forward(self.inputs)
                    outputs, tangent = forward_ad.unpack_dual(dual)
            except RuntimeError as error:
                reason = _why_no_tangent(error)
                if reason is None:
                    raise
                raise MissingDerivative(reason) from error
            self._checked(outputs)
            if tangent is None:
                return torch.zeros_like(self.outputs)
            output_tangent: Tensor = tangent.clone()
            return output_tangent

    def shifted(self, step: Tensor, direction: Tree) -> Tensor:
        """Return S(x; θ + step·direction), (B, ...), in float32 or wider.

        Without autocast, TF32 and a graph.
        """
        with torch.no_grad():
            params = self._shifted_params(step, direction)
        slots = self.student.slots
        if not slots.takes_gradients:
            try:
                with torch.no_grad():
                    return self._outputs_at(params)
            except RuntimeError as error:
                if not asks_for_gradient(error):
                    raise
                slots.takes_gradients = True
        with torch.enable_grad():
            return self._outputs_at(params).detach()

    def _shifted_params(self, step: Tensor, direction: Tree) -> Tree:
        """Return θ + step·direction, in float32 or wider."""
        params: Tree = {}
        for name, p in self.params.items():
            params[name] = wide(p)
            if name in direction:
                params[name] = params[name] + step * wide(direction[name])
        return params

    def _outputs_at(self, params: Tree) -> Tensor:
        """Return the outputs at other weights, in float32 or wider, without autocast and TF32."""
        student = self.student
        at_weights = student.at_weights(
            student.as_leaves(params), self._random_state, state=self._state, upcast=True
        )
        with (
            torch.autocast(student.device.type, enabled=False),
            full_float32(student.device),
            no_fast_path(),
            at_weights,
        ):
            return student.forward(map_tensors(wide, self.inputs))

    def check_shifted(self, ahead: Tensor, behind: Tensor) -> None:
        """Flag outputs of shifted passes whose mean is not what this pass returned.

        The mean is S(x; θ) to the second order of the shift. The tolerance is relative to the norms
        of this pass's outputs and of those ahead, which the rounding of the mean grows with.
        """
        check_same_outputs(
            (ahead + behind) / 2,
            self.outputs,
            tolerance=BY_DIFFERENCE[self.rounded_to].outputs,
            ranks=self.student.ranks,
            moved=ahead,
        )

    # -------------------------------------------------------------------------- second derivatives

    @contextmanager
    def hessian(self) -> Iterator[Callable[[Tree], Tree]]:
        """Yield a function that returns products with ∂²ℓ/∂θ², valid inside the block."""
        with self._derivatives_of(self.lesson.loss(self.signal), (), self.inputs) as product:

            def hessian_product(w: Tree) -> Tree:
                in_weights, _ = product(w)
                return in_weights

            yield hessian_product

    @contextmanager
    def _derivatives_of(
        self, loss: Loss, leaves: Sequence[Tensor], inputs: Inputs
    ) -> Iterator[Product]:
        """Yield the derivatives of ⟨g, w⟩ as a function of w, by double backward.

        They are (∂²ℓ/∂θ²) w, and those in leaves of the loss and of the ``inputs``, on this rank's
        rows. The last call may ``free`` the graph.
        """
        with no_fast_path(math=True), self._twice_differentiable(inputs) as (weights, outputs):
            value = loss(outputs, weights)
            tensors = torch.autograd.grad(
                value, [*weights.values()], create_graph=True, allow_unused=True
            )
            g = {name: t for name, t in zip(weights, tensors, strict=True) if t is not None}
            if self.student.inspects_graph:
                self.student.inspect_graph(g, value)
            yield partial(_derivatives, g, weights, leaves)

    def second_derivatives(
        self, w: Tree, fields: Mapping[str, Tensor], *, curved: bool, with_slope: bool = False
    ) -> tuple[Tree, Derivatives, Tensor | None]:
        """Return the derivatives of ⟨g, w⟩ in the weights, and in fields of the signal.

        Args:
            fields: what of the signal to differentiate in.
            curved: whether the Hessian product (∂²ℓ/∂θ²) w is asked for; else it is empty.
            with_slope: return ⟨g, w⟩ too, the derivative in a factor of the loss.

        Returns: the product on this rank's rows; the derivative in each field, None where nothing
            depends on it; and ⟨g, w⟩ on this rank's rows, or None.
        """
        by_kept_graph = self.along_kept_graph(w, curved=curved)
        if by_kept_graph is not None:
            return *by_kept_graph, None
        field_leaves = plain_leaves(dict(fields))
        input_leaves: list[Tensor] = []
        inputs = self.inputs
        if self.signal_input is not None:
            input_leaves, inputs = self.signal_input.as_leaves()
        loss = self.lesson.loss(self.signal.having(field_leaves), field_leaves.get("factors"))
        leaves = [*field_leaves.values(), *input_leaves]
        if with_slope:
            factor = torch.ones_like(self.inner_loss, requires_grad=True)
            loss = partial(_scaled, loss, factor)
            leaves.append(factor)
        with self._derivatives_of(loss, leaves, inputs) as product:
            in_weights, in_leaves = product(w, free=True, curved=curved)
        slope = in_leaves.pop() if with_slope else None
        return in_weights, self._in_fields(fields, in_leaves), slope


EagerEngine.descent_type = EagerDescent


def _mean_gradient(total: Tree, weight: Tensor | float, count: int) -> Tree:
    """Return the gradient of a loss over micro-batches from the sum of theirs.

    Args:
        total: of the gradients of each micro-batch, means over the ranks.
        weight: the second value of :meth:`EagerEngine.mean_of_all`; a number for losses that are
            means themselves.
        count: the number of micro-batches.
    """
    v = {name: t / count for name, t in total.items()} if count > 1 else total
    if isinstance(weight, Tensor):
        # Each gradient is of a sum over rows, so that the gradient of the loss is the sum of them
        # over the weight. The mean has divided that sum by the number of micro-batches, which the
        # factor undoes. In several processes the gradients and the weight are both means over the
        # ranks, whose number cancels. A loss that is a mean itself has a weight in a tensor there
        # too, the mean number of micro-batches, so that the factor is 1 where the ranks have
        # equally many.
        factor = count / weight
        v = {name: factor * t for name, t in v.items()}
    return v


def _derivatives(
    g: Tree,
    weights: Tree,
    leaves: Sequence[Tensor],
    w: Tree,
    *,
    free: bool = False,
    curved: bool = True,
) -> tuple[Tree, list[Tensor | None]]:
    """Return the derivatives of ⟨g, w⟩ in weights, and in leaves.

    Args:
        free: whether the graph is not needed again.
        curved: False: leave the weights out.
    """
    if not curved:
        weights = {}
    pairs = [(t, w[name]) for name, t in g.items() if name in w and t.requires_grad]
    inputs = [*weights.values(), *leaves]
    grads: Sequence[Tensor | None] = [None] * len(inputs)
    if pairs:
        tensors, directions = zip(*pairs, strict=True)
        grads = torch.autograd.grad(
            tensors, inputs, directions, retain_graph=not free, allow_unused=True
        )
    in_weights: Tree = {}
    for (name, p), grad in zip(weights.items(), grads, strict=False):
        in_weights[name] = torch.zeros_like(p) if grad is None else grad
    return in_weights, list(grads[len(weights) :])


def _why_no_tangent(error: RuntimeError) -> str | None:
    """Return why a pass has no forward mode, or None where an error says something else."""
    if asks_for_gradient(error):
        return "the student's forward takes a gradient, and a pass in forward mode has no graph"
    if is_layout_refused(error):
        # The plain pass took these tensors, so it is a rule of forward mode: group norm's, on torch
        # 2.12.
        first_line = str(error).splitlines()[0].rstrip(".")
        return (
            "the forward mode of an operation of the student takes contiguous tensors alone here "
            f"({first_line})"
        )
    return None


def _scaled(loss: Loss, factor: Tensor, outputs: Tensor, params: Tree) -> Tensor:
    """Return a loss times a number."""
    return factor * loss(outputs, params)


# No sample of a tensor has more entries.
_SAMPLE_SIZE = 4096


def _sample(t: Tensor) -> Tensor:
    """Return at most ``_SAMPLE_SIZE`` entries of a tensor, at equal distances."""
    return t.flatten()[:: t.numel() // _SAMPLE_SIZE + 1].clone()
