"""A network on one device: passes of record, passes at other weights that leave nothing behind, and replays.

Several processes may each hold the whole network and take a share of every batch: losses and gradients are then the
means over these ranks, and outputs are those of this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import BackwardCFunction

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import (
    BY_DIFFERENCE,
    BY_FORWARD_MODE,
    check_loss,
    check_outputs,
    check_same_gradient,
    coarsest,
)
from metapl.execution.buffers import Slots, State, stand_in, swapped
from metapl.execution.compiled import runs_compiled, uncompiled
from metapl.execution.hessians import hessian_graph
from metapl.execution.kernels import explained, forward_mode, no_fast_path, refuse_once_differentiable
from metapl.execution.numerics import WHOLE, Space, Tree, full_float32, mean_tree, reduced_float32, wide, wide_tree
from metapl.execution.ranks import ALONE, Ranks
from metapl.execution.rng import RandomState, replayed
from metapl.execution.writes import (
    Made,
    Slot,
    Watch,
    Weights,
    changes_noted,
    hook_changes,
    hooks_of,
    journal,
    refuse_hooks,
    refuse_stranger,
    stranger,
    tensors_in,
    weights_watched,
)

NOTHING: AbstractContextManager[Any] = nullcontext()

_HALF = {torch.float16, torch.bfloat16}
RECORDED = ("cut", "own_functions", "changed", "loss", "sizes", "_sample")  # that a pass's record holds as they are
GRAPHS = 32  # that are looked at; a network of more, such as one that drops layers, makes them as it goes

# A scalar of outputs and of the weights that they were computed at.
Loss = Callable[[Tensor, Tree], Tensor]
# (∂²ℓ/∂θ²) w, and the same in leaves, of w.
Product = Callable[..., tuple[Tree, list[Tensor | None]]]
# A loss of outputs as a sum, and the weight that it is to be divided by: a number where it is 1.
WeightedLoss = Callable[[Tensor], tuple[Tensor, Tensor | float]]


class LocalStudent:
    """A student on one device; ``first``: its first step, whose operators are looked at on an accelerator too.

    ``double_backward`` keeps the gradients of its passes of record differentiable.
    """

    pass_type: type[Pass]
    readable = True  # whether this process holds whole weights, which a loss of the problem may read

    def __init__(
        self,
        module: nn.Module,
        parameters: dict[str, nn.Parameter] | None = None,
        *,
        double_backward: bool = False,
        ranks: Ranks = ALONE,
        space: Space = WHOLE,
        first: bool = False,
    ) -> None:
        self.module, self.double_backward, self.ranks, self.space = module, double_backward, ranks, space
        self.slots = Slots(module)
        self.parameters = self.slots.learned if parameters is None else parameters
        self.weights: Tree = dict(self.parameters)
        for name, p in self.parameters.items():
            if p.is_complex():
                raise MetaplError(
                    f"the student's {name} is complex ({checks.described(p)}), and its step is differentiated in real "
                    "numbers; hold torch.view_as_real(w) as the parameter, and torch.view_as_complex(self.weight) in "
                    "forward."
                )
        self.own = {id(p) for _, _, p in self.slots.parameters}
        self.device = next(iter(self.parameters.values())).device
        self.formats = [p.dtype for p in self.parameters.values()]
        self.half = bool(_HALF & {*self.formats})
        self.narrowed: frozenset[torch.dtype] = frozenset()  # as Watch has it, as self.cut is
        self.cut = False
        self.graphs: set[int] = set()  # the operations of its passes of record, as hashes
        self._autocast = torch.is_autocast_enabled(self.device.type)
        refuse_hooks(self.parameters, late=True)
        self.slots.looked_at = not first
        self.begin()

    def begin(self) -> bool:
        """Begin a step, if all that was found out about the network still stands."""
        if not self.slots.hold() or self._autocast != torch.is_autocast_enabled(self.device.type):
            return False
        self.first = not self.slots.looked_at
        self.seen = self.hooks_seen = self.slots.looked_at  # in the first step, set by its first pass
        self.params: Tree = {name: p.detach() for name, p in self.parameters.items()}
        self.waits = checks.waits(next(iter(self.parameters.values())))
        return True

    def loss(self, params: Tree, batches: Sequence[Any], losses: Sequence[WeightedLoss], start: RandomState) -> Tensor:
        """Σ sum / Σ weight of losses on batches, of all ranks, at ``params``, without a graph: on the buffers as they
        are now, and draws from ``start`` on."""
        # The weights require a gradient, as in the pass that learns: a forward may ask.
        at, values = self.as_leaves(params), list[tuple[Tensor, Tensor | float]]()
        with no_fast_path(), self._beside(at, start):
            for x, loss in zip(batches, losses, strict=True):
                value, weight = loss(self.forward(x, at))
                if value.requires_grad:
                    self.gradient(value, params)  # of which none is wanted, so that no node of the graph runs
                values.append((value.detach(), weight))
        return self.mean_of_all(values)[0]

    def loss_and_gradient(
        self, params: Tree, batches: Sequence[Any], losses: Sequence[WeightedLoss], start: RandomState
    ) -> tuple[Tensor, Tree]:
        """The value of :meth:`loss`, and its gradient."""
        at = self.as_leaves(params)
        values: list[tuple[Tensor, Tensor | float]] = []
        gradients: list[Tree] = []
        reached = False
        # The backward pass belongs into the block: checkpoints run the student again in it.
        with no_fast_path(math=True) if self.double_backward else NOTHING, self._beside(at, start):
            for x, loss in zip(batches, losses, strict=True):
                value, weight = loss(self.forward(x, at))
                v = self.gradient(value, at) if value.requires_grad else {}
                reached = reached or bool(v)
                gradients.append({name: v[name] if name in v else torch.zeros_like(p) for name, p in at.items()})
                values.append((value.detach(), weight))
        if not reached:
            raise MetaplError(
                "the outer loss has no gradient in any weight of the student, so there is no feedback to learn from. "
                "Likely causes: outer_loss does not use the student's outputs, or detaches them (.detach(), .data, "
                "numpy), or the student's weights that they depend on have requires_grad=False; to train without "
                "feedback, take mode='none'."
            )
        mean, weight = self.mean_of_all(values)
        v = mean_tree(gradients)
        return mean, {n: len(values) / weight * t for n, t in v.items()} if isinstance(weight, Tensor) else v

    def mean_of_all(self, values: Sequence[tuple[Tensor, Tensor | float]]) -> tuple[Tensor, Tensor | float]:
        """Σ sum / Σ weight over micro-batches and ranks, and the mean of the ranks' weights; without a graph."""
        if len(values) == 1 and self.ranks.alone and not isinstance(values[0][1], Tensor) and values[0][1] == 1.0:
            return values[0][0].detach(), 1.0
        total = torch.stack([value.detach() for value, _ in values]).sum(0)
        weight: Tensor | float = sum(weight for _, weight in values)
        if not self.ranks.alone:
            weight = weight if isinstance(weight, Tensor) else total.new_full((), weight)
            total, weight = self.ranks.mean(torch.stack([total, weight.to(total)])).unbind()
        if isinstance(weight, Tensor):
            checks.refuse(
                ~((weight > 0) & weight.isfinite()),
                "the weights of the problem's outer_loss sum to zero or less, or to no number, over the whole outer "
                "batch; expected (sum, weight) with a weight above zero in all: are all of its labels left out?",
            )
        return total / weight, weight

    def gradient(self, value: Tensor, at: Tree, *, create_graph: bool = False, sizes: Tree | None = None) -> Tree:
        """The gradient of a scalar in the weights that it reaches, the mean over the ranks; refused where it reaches
        the student's own although others stand in for them. ``sizes`` gets the norms of this rank's."""
        wanted = {name: p for name, p in at.items() if p.requires_grad}
        own = {} if at is self.weights else {n: p for n, p in self.parameters.items() if at.get(n) is not p}
        tensors = [*wanted.values(), *own.values()]
        # Hooks may write to weights, from the first time on.
        with self.watched() if self.slots.has_frozen or not self.hooks_seen else NOTHING:
            found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
        self.hooks_seen = True
        for name, g in zip(own, found[len(wanted) :], strict=True):
            if g is not None:
                raise MetaplError(
                    f"the student, or a loss of the problem, reads the parameter {name} from elsewhere than the module "
                    "that holds it (a list, a closure, an attribute of another object), so it cannot be run at other "
                    "weights and the feedback would be wrong. In a module, hold a weight that is used twice as a "
                    "parameter in both places (self.weight = other.weight); in inner_loss, read it from params."
                )
        grads = {n: g for n, g in zip(wanted, found, strict=False) if g is not None}
        checks.dense_gradients(grads)
        if sizes is not None and grads:
            sizes |= zip(grads, torch._foreach_norm([g.detach() for g in grads.values()]), strict=True)
        return grads if self.ranks.alone else self.ranks.mean_tree(grads, wanted)

    def forward(self, inputs: Any, at: Tree | None = None) -> Tensor:
        """The outputs as the student is now, in float32 or wider, of a replay; or of a pass ``at`` other weights, which
        is looked over."""
        looked_into = at is not None and self.first and not runs_compiled(self.module)
        made: AbstractContextManager[Made | None] = Made(inputs) if looked_into else NOTHING
        with self.watched(inputs, replay=at is None), made as making:
            outputs = checks.logits(self.module(inputs), "student")
        if at is not None:
            self.looked_over(outputs, at, inputs, making)
        return wide(outputs)

    def looked_over(
        self, outputs: Tensor, at: Tree, inputs: Any, made: Made | None, *, record: bool = False
    ) -> tuple[bool, list[type]]:
        """Refuse outputs that depend on tensors other than these weights, the inputs, and what was made; after the
        first step, on parameters of others. Whether a pass of ``record`` is of other operations than those before, and
        the operations."""
        operations: list[type] = []
        known = [*at.values(), *tensors_in(inputs)]
        alone = self.seen if record else not self.first
        found = stranger([outputs], known, self.own, made, parameters_alone=alone, operations=operations)
        if found is not None:
            remedy = "give it in the signal, and make the student's input of it: student_input(batch, signal)."
            refuse_stranger("the student's forward", found, remedy)
        # A forward that asks an attribute or a counter is another function from some step on, and nothing else tells;
        # that step is looked at as the first one is.
        graph = hash(tuple(operations))
        if not record or graph in self.graphs or len(self.graphs) == GRAPHS:
            return False, operations
        self.graphs.add(graph)
        another = self.seen and self.ranks.alone and not runs_compiled(self.module)
        if another:
            self.first, self.seen, self.slots.looked_at = True, False, False
        return another, operations

    def watched(self, inputs: Any = None, *, replay: bool = False) -> AbstractContextManager[Watch | None]:
        """Refuse a pass that moves the weights, before it does where passes are looked at."""
        if self.slots.weights is not None:
            return NOTHING  # they are compared at the end of the step
        # PyTorch's forward-mode rules of some operators fail in a dispatch mode; that pass has copies of the weights.
        # A compiled pass is not looked into. On an accelerator the host is busy starting operators.
        eager = forward_ad._current_level < 0 and not runs_compiled(self.module)
        compared = self.seen and self.slots.comparable
        looking = eager and not compared and (self.first or not self.waits or self.slots.has_frozen)
        values = compared and not self.waits
        return weights_watched(self.slots.by_part, "student", inputs, looking=looking, replay=replay, values=values)

    def as_leaves(self, params: Tree) -> Tree:
        """Weights as leaves of a graph, which are parameters for a forward that asks."""
        return {name: stand_in(p.detach(), self.parameters[name]) for name, p in params.items()}

    def over_ranks(self, tree: Tree) -> Tree:
        """The mean over the ranks of what each has found of whole weights, of which this process holds its parts."""
        return self.ranks.mean_tree(tree, self.params)

    def held_at(self, params: Tree) -> list[Slot]:
        """The student's slots with these weights in them."""
        at = {id(own := self.parameters[name]): stand_in(p, own) for name, p in params.items()}
        return [(table, name, at[id(p)]) for table, name, p in self.slots.parameters if id(p) in at]

    def holding(self, params: Tree) -> AbstractContextManager[None]:
        """The student with these weights, for others that read it in this block."""
        return swapped(self.held_at(self.as_leaves(params)))

    @contextmanager
    def _beside(self, params: Tree, start: RandomState) -> Iterator[None]:
        """Other weights, copies of the state, and a stream of draws beside the caller's."""
        state, at = State(self.slots.parts), self.held_at(params)
        guard = None
        if self.slots.weights is not None:
            guard = Weights([("", params, frozenset(params))], "student", values=not self.waits)
        with replayed(start), state.again(self.slots, once=True), swapped(at):
            yield
        if guard is not None:
            guard.check()


class Pass:
    """One pass of record, and its replays: on its draws, and from copies of the state that it began with.

    Its ``outputs`` are z = S(x; θ), (B, ...), float32 or wider, without a graph; ``graph`` has it until
    :meth:`gradient` has used it, which leaves the ``loss`` on this rank. What a pass that ``keeps`` its graph has
    ``kept`` is that of its gradient: the weights as leaves, the gradient, and leaves of the loss.
    """

    keeps = False
    kept: tuple[Tree, Tree, Sequence[Tensor]] | None = None

    def __init__(self, student: LocalStudent, params: Tree, inputs: Any, keeps: bool = False) -> None:
        self.student, self.params, self.inputs, self.keeps = student, params, inputs, keeps
        self._before, slots = RandomState.now(student.device), student.slots
        self._state, slots.state = slots.state or State(slots.parts), None
        self.narrowed: frozenset[torch.dtype] = frozenset()
        self.cut = self.own_functions = False
        self.sizes: Tree = {}  # the norms of its gradient, on this rank, in the weights that it reaches
        self._sample: Tensor | None = None  # of the outputs, where these are dropped
        looked = slots.weights is None or slots.hooked  # else there are none but those that its forward registers
        self._hooks = hooks_of(student.parameters, slots.named_parts) if looked else []
        self.changed: list[str] = []
        if params is student.params:
            self._at: Tree = student.weights
            self._held: list[Slot] = []
        else:
            refuse_hooks(student.parameters)
            self._at = params if student.double_backward else student.as_leaves(params)
            self._held = student.held_at(self._at)

    def run(self) -> Pass:
        """z = S(x; θ), and what is seen on the way: buffers and generators move as in training. At the student's own
        weights the module itself runs; others are swapped in."""
        student, inputs = self.student, self.inputs
        made = NOTHING if student.seen or runs_compiled(student.module) else Made(inputs)
        with self._running(forward=True), student.watched(inputs) as watch, made as making:
            outputs = checks.logits(student.module(inputs), "student")
        self._state.refuse_other_parts("student")
        another, operations = student.looked_over(outputs, self._at, inputs, making, record=True)
        self.after = RandomState.now(student.device)
        if watch is not None:
            student.narrowed, student.cut, student.seen = (
                student.narrowed | watch.narrowed,
                student.cut | watch.cut,
                True,
            )
        self.narrowed, self.cut = student.narrowed, another or student.cut
        # Processes exchange by Functions of their own.
        looked_into = student.first and student.ranks.alone and not runs_compiled(student.module)
        self.own_functions = looked_into and any(issubclass(kind, BackwardCFunction) for kind in operations)
        self._dtype = outputs.dtype
        self.graph: Tensor | None = wide(outputs)
        self.outputs = self.graph.detach()
        return self

    @cached_property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the pass: a key of the tolerances in :mod:`metapl.execution.agreement`."""
        return coarsest([self._dtype, *self.narrowed, *self.student.formats], self.student.device)

    @contextmanager
    def _running(self, *, forward: bool = False) -> Iterator[None]:
        """What this pass, or its backward pass, runs in."""
        with (
            no_fast_path(math=True) if self.student.double_backward or self.keeps else NOTHING,
            swapped(self._held) if self._held else NOTHING,
            changes_noted(self._hooks, self.changed, forward=forward),
            journal(self._state.parameters) if self.student.slots.has_frozen else NOTHING,
        ):
            yield

    def gradient(self, loss: Loss, leaves: Sequence[Tensor] = ()) -> tuple[Tensor, Tree]:
        """A loss of this pass and its gradient, of the weights that it reaches; the graph is gone afterwards, or kept,
        for derivatives in ``leaves`` too."""
        if self.graph is None:
            raise RuntimeError("a pass learns once")
        value = loss(self.graph, self._at)
        if not value.requires_grad:
            raise checks.without_gradient("student")
        keep = self.student.double_backward
        with self._running():
            # The graph of a compiled pass may end elsewhere than that of its replay.
            compiled = "forward" in vars(self.student.module) and runs_compiled(self.student.module)
            sizes = None if compiled else self.sizes
            grads = self.student.gradient(value, self._at, create_graph=keep or self.keeps, sizes=sizes)
        if not grads:
            raise checks.without_gradient("student")
        if self.keeps:
            self.kept, grads = (self._at, grads, leaves), {name: g.detach() for name, g in grads.items()}
        self.graph, self.loss = None, value.detach()
        if not keep:
            self._at, self._held = {}, []
        ranks = self.student.ranks
        return self.loss if ranks.alone else ranks.mean(self.loss), grads

    def refuse_later_graphs(self) -> None:
        """Refuse what makes a graph of this pass and later ones wrong."""
        if self.changed:
            raise hook_changes(self.changed[0])
        if self._state.parameters.written:
            raise MetaplError(
                "the student's forward writes to a frozen parameter, which the graphs that are kept of earlier steps "
                'may have saved; use mode="forward", which is as exact, with keep_graphs=0, or look one step ahead.'
            )

    def forget(self, inputs_too: bool) -> None:
        """Drop θ, and the inputs and most of the outputs, until :meth:`gradient_again`."""
        self.params = {}
        if inputs_too:
            self.inputs, self._sample = None, _some(self.outputs)
            self.outputs = self.outputs.new_zeros(()).expand(self.outputs.shape)  # which tells their shape alone

    def record(self, base: State) -> dict[str, Any]:
        """What :meth:`recorded` makes the pass of again, without θ and the inputs; ``base``: the student's state at the
        beginning of the path."""
        return {name: getattr(self, name) for name in RECORDED} | {
            "outputs": self.outputs if self._sample is None else self.outputs.new_empty(0),
            "shape": self.outputs.shape,
            "state": self._state.values(base),
            "before": self._before.values(),
            "after": self.after.values(),
            "dtypes": [str(dtype).removeprefix("torch.") for dtype in (self._dtype, *self.narrowed)],
        }

    @classmethod
    def recorded(cls, student: LocalStudent, base: State, record: Mapping[str, Any]) -> Pass:
        found = cls.__new__(cls)
        vars(found).update({name: record[name] for name in (*RECORDED, "outputs")})
        found.student, found.params, found.inputs, found.graph = student, {}, None, None
        found._at, found._held, found._hooks = {}, [], []
        found._state = base.having(record["state"])
        found._before, found.after = (RandomState(student.device, **record[name]) for name in ("before", "after"))
        found._dtype, *narrowed = (getattr(torch, name) for name in record["dtypes"])
        found.narrowed = frozenset(narrowed)
        if found._sample is not None:
            found.outputs = found.outputs.new_zeros(()).expand(record["shape"])
        return found

    def gradient_again(self, params: Tree, loss: Loss) -> Tree:
        """The gradient of this pass's loss at its θ once more; ``params`` is that θ, which was forgotten."""
        self.params = params
        with self._replay(self.inputs) as (at, outputs):
            z = outputs.detach()
            same = (z == self.outputs if self._sample is None else _some(z) == self._sample).all()
            self.outputs, self._sample, sizes = z, None, dict[str, Tensor]()
            grads = self.student.gradient(loss(outputs, at), at, sizes=sizes)
            # Outputs that differ in a bit come from other kernels, which may round otherwise where gradients cancel.
            tolerance = torch.where(same, BY_FORWARD_MODE[self.rounded_to].outputs, torch.inf)
            check_same_gradient(sizes, self.sizes, tolerance, self.student.ranks)
            self.sizes = sizes
            return grads

    def slopes(self, w: Tree, cotangents: Sequence[Tensor]) -> list[Tensor]:
        """The derivatives of ⟨u, S(x; θ)⟩ along w by its gradient, for cotangents u: a forward pass, and a backward
        pass each."""
        with self._replay(self.inputs) as (at, outputs):
            found = [
                torch.autograd.grad(outputs, [at[n] for n in w], u, retain_graph=True, materialize_grads=True)
                for u in cotangents
            ]
        return [torch.stack([(g * t).sum() for g, t in zip(grads, w.values(), strict=True)]).sum() for grads in found]

    @contextmanager
    def _replay(self, inputs: Any) -> Iterator[tuple[Tree, Tensor]]:
        """θ as leaves, and the outputs there, which are compared with this pass's; its backward pass belongs into the
        block, for checkpoints run the student again in it."""
        at = self.student.as_leaves(self.params)
        with uncompiled(), self._again(self.student.held_at(at)):
            yield at, self._same_outputs(self.student.forward(inputs))

    def _same_outputs(self, outputs: Tensor) -> Tensor:
        """Outputs of a replay, refused if they are not those of this pass."""
        found, known = outputs.detach(), self.outputs
        if self._sample is not None:
            found, known = _some(found), self._sample
        check_outputs(found, known, BY_FORWARD_MODE[self.rounded_to].outputs, self.student.ranks)
        return outputs

    def _whole_replay(self, inputs: Any) -> AbstractContextManager[tuple[Tree, Tensor]]:
        """:meth:`_replay` with a graph of second derivatives, for which the leaves are whole."""
        return self._replay(inputs)

    def tangent(self, w: Tree) -> Tensor:
        """ż = d/dε S(x; θ + εw) by forward-mode AD: exact, one pass of about three plain ones, no graph."""
        eagerly = uncompiled() if "forward" in vars(self.student.module) else NOTHING
        with eagerly, forward_mode():
            with self._along(w):
                outputs, tangent = forward_ad.unpack_dual(self.student.forward(self.inputs))
            check_outputs(outputs, self.outputs, BY_FORWARD_MODE[self.rounded_to].outputs, self.student.ranks)
            return torch.zeros_like(self.outputs) if tangent is None else tangent.clone()

    def _along(self, w: Tree) -> AbstractContextManager[None]:
        duals = {name: forward_ad.make_dual(p.clone(), w[name]) for name, p in self.params.items() if name in w}
        return self._again(self.student.held_at(duals))

    def shifted(self, step: Tensor, direction: Tree) -> Tensor:
        """S(x; θ + step·direction) in float32 or wider, without autocast and TF32."""
        with torch.no_grad(), self._shifted(step, direction):
            return self.student.forward(wide_tree(self.inputs))

    def shifted_derivatives(
        self, step: Tensor, direction: Tree, loss: Loss, leaves: Sequence[Tensor], inputs: Any
    ) -> tuple[Tensor, list[Tensor | None]]:
        """:meth:`shifted`, and the derivatives of a loss there in leaves, of which the ``inputs`` are made."""
        with torch.enable_grad(), self._shifted(step, direction) as moved:
            outputs = self.student.forward(wide_tree(inputs))
            found = torch.autograd.grad(loss(outputs, moved), leaves, allow_unused=True)
        return outputs.detach(), list(found)

    @contextmanager
    def _shifted(self, step: Tensor, direction: Tree) -> Iterator[Tree]:
        """The student at θ + step·direction, in float32 or wider, as it began this pass."""
        student = self.student
        half = self.narrowed & _HALF
        if half and not (torch.is_autocast_enabled(student.device.type) or half & {*student.formats}):
            raise MetaplError(
                f"the student casts to {min(map(str, half))} in its forward, and a difference of such outputs would be "
                'noise; use mode="forward", or give precision="bfloat16" in place of the casts.'
            )
        moved = {n: wide(p) + step * wide(direction[n]) if n in direction else wide(p) for n, p in self.params.items()}
        with (
            torch.autocast(student.device.type, enabled=False),
            full_float32(student.device),
            no_fast_path(),
            explained(),
            self._moved(moved),
        ):
            yield moved

    def _moved(self, moved: Tree) -> AbstractContextManager[None]:
        slots = self.student.slots.parameters
        frozen = [(table, name, stand_in(wide(t), t)) for table, name, t in slots if not t.requires_grad]
        return self._again([*self.student.held_at(moved), *frozen], upcast=True)

    def check_shifted(self, ahead: Tensor, behind: Tensor) -> None:
        """Refuse outputs of shifted passes whose mean, S(x; θ) to the second order of the shift, is not this pass's."""
        tolerance = BY_DIFFERENCE[self.rounded_to].outputs
        check_outputs((ahead + behind) / 2, self.outputs, tolerance, self.student.ranks, moved=ahead)

    @contextmanager
    def hessian(self, loss: Loss, leaves: Sequence[Tensor] = (), inputs: Any = None) -> Iterator[Product]:
        """The derivatives of ⟨g, w⟩, g being the gradient of a loss of this pass, on this rank's rows, as a function of
        w: (∂²ℓ/∂θ²) w, and that in leaves of the loss and of the ``inputs``, None for one that neither depends on.

        By double backward: a forward pass and a backward pass with a graph, which stays for the block, and one through
        both for every w, the last of which may ``free`` it.
        """
        replay = self._whole_replay(self.inputs if inputs is None else inputs)
        with no_fast_path(math=True), explained(), hessian_graph() as graph, replay as (at, outputs):
            again = loss(self.outputs, self.params).detach()
            check_loss(again, self.loss, self.student.ranks)  # at these outputs, to the last digits
            found = graph.gradient(loss(outputs, at), list(at.values()))
            g = {name: t for name, t in zip(at, found, strict=True) if t is not None}
            check_same_gradient(g, self.sizes, ranks=self.student.ranks)
            refuse_once_differentiable(g.values())
            yield partial(_derivatives, g, at, leaves)

    def second_derivatives(
        self, w: Tree, loss: Loss, leaves: Sequence[Tensor], inputs: Any, *, curved: bool
    ) -> tuple[Tree, list[Tensor | None]]:
        """Of :meth:`hessian`, for one w; of a graph that was kept, without its forward and backward pass. Not
        ``curved``: in the leaves alone."""
        if self.kept is None:
            with self.hessian(loss, leaves, inputs) as product:
                return product(w, free=True, curved=curved)
        (at, g, leaves), self.kept = self.kept, None
        with explained():
            refuse_once_differentiable(g.values())
            return _derivatives(g, at, leaves, w, free=True, curved=curved)

    def ran_in_full_precision(self) -> bool:
        """Whether it computed in float32 or wider throughout, as far as weights and settings tell."""
        formats, device = self.student.formats, self.student.device
        rounded = torch.float32 in formats and reduced_float32(device)
        return not (rounded or _HALF & {*formats} or torch.is_autocast_enabled(device.type))

    @contextmanager
    def _again(self, held: Sequence[Any], *, upcast: bool = False) -> Iterator[None]:
        """These tensors held, on the draws of this pass, with copies of the state that it began with."""
        if self.changed:
            raise hook_changes(self.changed[0])
        with replayed(self._before), swapped(held), self._state.again(self.student.slots, upcast=upcast):
            yield


LocalStudent.pass_type = Pass


def _derivatives(
    g: Tree, at: Tree, leaves: Sequence[Tensor], w: Tree, *, free: bool = False, curved: bool = True
) -> tuple[Tree, list[Tensor | None]]:
    """The derivatives of ⟨g, w⟩ in weights, if ``curved``, and in leaves; ``free``: the graph is not needed again."""
    at = at if curved else {}
    pairs = [(t, w[name]) for name, t in g.items() if name in w and t.requires_grad]
    ends = [*at.values(), *leaves]
    found: Sequence[Tensor | None] = [None] * len(ends)
    if pairs:
        tensors, given = zip(*pairs, strict=True)
        found = torch.autograd.grad(tensors, ends, given, retain_graph=not free, allow_unused=True)
    in_weights = {n: torch.zeros_like(p) if t is None else t for (n, p), t in zip(at.items(), found, strict=False)}
    return in_weights, list(found[len(at) :])


def gradient_through(
    student: LocalStudent, params: Tree, cotangents: Tree, leaves: Sequence[Tensor]
) -> list[Tensor | None]:
    """The derivative of weights that were made from differentiable gradients, in leaves of the inner losses; None of a
    leaf that they do not depend on."""
    moved = {name: p for name, p in params.items() if p.requires_grad}
    if not moved:
        return [None for _ in leaves]
    # A checkpoint of an inner pass runs again here, at θ.
    state = State(student.slots.parts)
    watched = student.watched() if student.slots.has_frozen else NOTHING
    with no_fast_path(math=True), state.again(student.slots, once=True), watched:
        found = torch.autograd.grad(
            list(moved.values()), leaves, [cotangents[name] for name in moved], allow_unused=True
        )
    return list(found)


def as_leaves(params: Tree) -> Tree:
    """The same weights, as tensors that a graph begins at."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def _some(t: Tensor) -> Tensor:
    """A copy of some thousand entries, from all over a tensor."""
    return t.flatten()[:: t.numel() // 4096 + 1].clone()


def mean_of(values: Sequence[Tensor]) -> Tensor:
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)
