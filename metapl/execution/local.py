"""A network on one device: passes of record, passes at other weights that leave nothing behind, and replays.

Several processes may each hold the whole network and take a share of every batch: losses and gradients are then the
means over these ranks, and outputs are those of this rank's rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from metapl.errors import MetaplError
from metapl.execution import checks
from metapl.execution.agreement import BY_DIFFERENCE, BY_FORWARD_MODE, check_loss, check_outputs, coarsest
from metapl.execution.buffers import Slots, State, stand_ins, swapped
from metapl.execution.compiled import runs_compiled, uncompiled
from metapl.execution.kernels import (
    explained,
    forward_mode,
    no_fast_path,
    only_math_attention,
    refuse_once_differentiable,
)
from metapl.execution.numerics import (
    WHOLE,
    Space,
    Tree,
    full_float32,
    mean_tree,
    reduced_float32,
    scaled,
    wide,
    wide_tree,
)
from metapl.execution.ranks import ALONE, Ranks
from metapl.execution.rng import RandomState, replayed
from metapl.execution.writes import (
    Changing,
    Made,
    Watch,
    Weights,
    has_own_functions,
    journal,
    refuse_hooks,
    refuse_stranger,
    stranger,
    tensors_in,
    weights_watched,
)

NOTHING: AbstractContextManager[Any] = nullcontext()

GRAPHS = 32
"""So many kinds of graphs are looked at; a network of more, such as one that drops layers, makes them as it goes."""

Loss = Callable[[Tensor, Tree], Tensor]
"""A scalar of outputs and of the weights that they were computed at."""
WeightedLoss = Callable[[Tensor, Tree], tuple[Tensor, Tensor | float]]
"""A loss as a sum, and the weight that it is to be divided by: a number where it is 1."""


class LocalStudent:
    """A student on one device.

    Args:
        module: the network, in the mode (train or eval) that its owner left it in.
        parameters: those that it learns, where they are known.
        double_backward: keep the gradients of its passes of record differentiable.
        ranks: the processes that share its batches.
        space: products of trees of its weights.
        first: look closer: at its operators for writes to its weights, where these are otherwise compared after each
            pass.

    Attributes:
        half: whether a weight is in half precision.
        narrowed: the types of numbers that passes rounded to from wider ones, as far as they were looked at.
        graphs: the operations of its passes of record, as hashes.
    """

    pass_type: type[Pass]

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
        checks.real_weights(self.parameters)
        self.own = {id(p) for _, _, p in self.slots.parameters}
        self.device = next(iter(self.parameters.values())).device
        self.half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.parameters.values())
        self.narrowed: frozenset[torch.dtype] = frozenset()
        self.graphs: set[int] = set()
        self._autocast = torch.is_autocast_enabled(self.device.type)
        refuse_hooks(self.parameters, late=True)
        self.begin(first=first)

    def holds(self) -> bool:
        """Whether all that was found out about the network still stands."""
        return self.slots.hold() and self._autocast == torch.is_autocast_enabled(self.device.type)

    def begin(self, *, first: bool = False) -> None:
        """Begin a step, at the weights as they are now."""
        self.first = first
        self.params: Tree = {name: p.detach() for name, p in self.parameters.items()}
        self.waits = checks.waits(next(iter(self.parameters.values())))

    def loss(
        self,
        params: Tree,
        batches: Sequence[Any],
        losses: Sequence[WeightedLoss],
        start: RandomState,
        *,
        learned: bool = False,
    ) -> Tensor:
        """Σ sum / Σ weight of losses on batches, of all ranks, at ``params``, without a graph.

        It begins with the buffers as they are now, and draws from ``start`` on; both stay as they are.

        Args:
            learned: at weights that require a gradient, as those of a pass of record do.
        """
        params = as_leaves(params) if learned else {name: p.detach() for name, p in params.items()}
        # With gradients on, and weights that need none, there is a graph only where other tensors than these are read.
        with no_fast_path(), self._beside(params, start):
            values = [loss(self._outputs(params, x), params) for x, loss in zip(batches, losses, strict=True)]
            for value, _ in values:
                if value.requires_grad and not learned:
                    self.gradient(value, params)
        return self.mean_of_all(values)[0]

    def loss_and_gradient(
        self, params: Tree, batches: Sequence[Any], losses: Sequence[WeightedLoss], start: RandomState
    ) -> tuple[Tensor, Tree]:
        """The value of :meth:`loss`, and its gradient."""
        at = as_leaves(params)
        values: list[tuple[Tensor, Tensor | float]] = []
        gradients: list[Tree] = []
        reached = False
        # The backward pass belongs into the block: checkpoints run the student again in it.
        with only_math_attention() if self.double_backward else NOTHING, self._beside(at, start):
            for x, loss in zip(batches, losses, strict=True):
                value, weight = loss(self._outputs(at, x), self.for_loss(at))
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
        return mean, scaled(v, len(values) / weight) if isinstance(weight, Tensor) else v

    def mean_of_all(self, values: Sequence[tuple[Tensor, Tensor | float]]) -> tuple[Tensor, Tensor | float]:
        """Σ sum / Σ weight over micro-batches and ranks, and the mean of the ranks' weights; without a graph."""
        if len(values) == 1 and self.ranks.alone and values[0][1] == 1.0 and not isinstance(values[0][1], Tensor):
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

    def gradient(self, value: Tensor, at: Tree, *, create_graph: bool = False) -> Tree:
        """The gradient of a scalar in the weights that it reaches, the mean over the ranks; refused where it reaches
        the student's own although others stand in for them."""
        wanted = {name: p for name, p in at.items() if p.requires_grad}
        own = {} if at is self.weights else {n: p for n, p in self.parameters.items() if at.get(n) is not p}
        tensors = [*wanted.values(), *own.values()]
        with self.backward_watched():
            found = torch.autograd.grad(value, tensors, create_graph=create_graph, allow_unused=True)
        for name, g in zip(own, found[len(wanted) :], strict=True):
            if g is not None:
                raise MetaplError(
                    f"the student, or a loss of the problem, reads the parameter {name} from elsewhere than the module "
                    "that holds it (a list, a closure, an attribute of another object), so it cannot be run at other "
                    "weights and the feedback would be wrong. In a module, hold a weight that is used twice as a "
                    "parameter in both places (self.weight = other.weight); in inner_loss, read it from params."
                )
        return self.ranks.mean_tree({n: g for n, g in zip(wanted, found, strict=False) if g is not None}, wanted)

    def for_loss(self, at: Tree) -> Tree:
        """The weights as a loss of the problem may read them."""
        return at

    def formats(self) -> list[torch.dtype]:
        """The types that it computes in, by its weights."""
        return [p.dtype for p in self.params.values()]

    def forward(self, inputs: Any, *, replay: bool = True) -> Tensor:
        """The outputs as the student is now, in float32 or wider; ``replay``: see :meth:`watched`."""
        with self.watched(inputs, replay=replay):
            return wide(checks.logits(self.module(inputs), "student"))

    def _outputs(self, at: Tree, inputs: Any) -> Tensor:
        with self.made(inputs) as made:
            outputs = self.forward(inputs, replay=False)
        self.refuse_strangers(outputs, at, inputs, made)
        return outputs

    def runs_compiled(self) -> bool:
        """Whether a pass would be compiled here."""
        return "forward" in vars(self.module) and runs_compiled(self.module)

    def eagerly(self) -> AbstractContextManager[None]:
        """Run the passes in this block eagerly."""
        return uncompiled(self.module) if "forward" in vars(self.module) else NOTHING

    def made(self, inputs: Any) -> AbstractContextManager[Made | None]:
        """What the student's forward makes in this block, on the first step; a compiled pass is not looked into."""
        return Made(inputs) if self.first and not self.runs_compiled() else NOTHING

    def refuse_strangers(
        self, outputs: Tensor, at: Tree, inputs: Any, made: Made | None, operations: list[type] | None = None
    ) -> None:
        """Refuse outputs that depend on tensors other than these weights and inputs; after the first step, on
        parameters of others. ``operations`` gets those between."""
        known = [*at.values(), *tensors_in(inputs)]
        remedy = "give it in the signal, and make the student's input of it: student_input(batch, signal)."
        alone = not self.first
        found = stranger([outputs], known, self.own, made, parameters_alone=alone, operations=operations)
        refuse_stranger("the student's forward", found, remedy)

    def is_another(self, operations: list[type]) -> bool:
        """Whether a pass is of other operations than those before; its step is then looked at as the first one is.

        A forward that asks an attribute or a counter is another function from some step on, and nothing else tells.
        """
        graph = hash(tuple(operations))
        known = graph in self.graphs or len(self.graphs) == GRAPHS
        if not known:
            self.graphs.add(graph)
        if known or self.first or not self.ranks.alone or self.runs_compiled():
            return False
        self.first, self.slots.looked_at = True, False
        return True

    def watched(self, inputs: Any = None, *, replay: bool = False) -> AbstractContextManager[Watch | None]:
        """Refuse a pass that moves the weights, before it does where passes are looked at."""
        if self.slots.weights is not None:
            return NOTHING  # they are compared at the end of the step
        # PyTorch's forward-mode rules of some operators fail in a dispatch mode; that pass has copies of the weights.
        # A compiled pass is not looked into. On an accelerator the host is busy starting operators.
        eager = forward_ad._current_level < 0 and not self.runs_compiled()
        looking = eager and (self.first or not self.waits or self.slots.has_frozen)
        return weights_watched(self.slots.by_part, "student", inputs, looking=looking, replay=replay)

    def backward_watched(self) -> AbstractContextManager[Watch | None]:
        """Keep what hooks move of frozen parameters in a backward pass, as :meth:`watched` does in a forward one."""
        return self.watched() if self.slots.has_frozen else NOTHING

    def held_at(self, params: Tree) -> list[Any]:
        """The student's slots with these weights in them."""
        return stand_ins(self.slots.parameters, {id(self.parameters[name]): p for name, p in params.items()})

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

    Attributes:
        outputs: z = S(x; θ), (B, ...), float32 or wider, without a graph.
        graph: the same with its graph, until :meth:`gradient` has used it.
        loss: the value of its loss on this rank, once :meth:`gradient` has found it.
        after: the generators at its end.
        narrowed, cut: what was seen where it was looked at (:class:`metapl.execution.writes.Watch`).
    """

    def __init__(self, student: LocalStudent, params: Tree, inputs: Any) -> None:
        self.student, self.params, self.inputs = student, params, inputs
        self._before = RandomState.now(student.device)
        self._state = student.slots.state or State(student.slots.parts)
        student.slots.state = None
        slots = student.slots
        looked = slots.weights is None or slots.hooked  # else there are none but those that its forward registers
        self._hooks = Changing(student.parameters, slots.named_parts) if looked else Changing({}, ())
        if params is student.params:
            self._at: Tree = student.weights
            self._held: list[Any] = []
        else:
            refuse_hooks(student.parameters)
            self._at = params if student.double_backward else as_leaves(params)
            self._held = student.held_at(self._at)

    def run(self) -> Pass:
        """z = S(x; θ), and what is seen on the way: buffers and generators move as in training.

        At the student's own weights (``params is student.params``) the module itself runs; others are swapped in.
        """
        student, inputs = self.student, self.inputs
        with self.running(forward=True), student.watched(inputs) as watch, student.made(inputs) as made:
            outputs = checks.logits(student.module(inputs), "student")
        self._state.refuse_other_parts("student")
        operations: list[type] = []
        student.refuse_strangers(outputs, self._at, inputs, made, operations)
        another = student.is_another(operations)
        self.after = RandomState.now(student.device)
        if watch is not None:
            student.narrowed |= watch.narrowed
        self.narrowed, self.cut = student.narrowed, another or (watch is not None and watch.cut)
        # Processes exchange by Functions of their own.
        looked_into = student.first and (another or watch is not None) and student.ranks.alone
        self.own_functions = looked_into and has_own_functions([outputs])
        self._dtype = outputs.dtype
        self.graph: Tensor | None = wide(outputs)
        self.outputs = self.graph.detach()
        return self

    @cached_property
    def rounded_to(self) -> torch.dtype:
        """The coarsest dtype of the pass: a key of the tolerances in :mod:`metapl.execution.agreement`."""
        return coarsest([self._dtype, *self.narrowed, *self.student.formats()], self.student.device)

    def running(self, *, forward: bool = False) -> AbstractContextManager[Any]:
        """What this pass, or its backward pass, runs in."""
        frozen, math = self.student.slots.has_frozen, self.student.double_backward
        if not (self._held or frozen or math or forward or self._hooks.any):
            return NOTHING
        return self._running(frozen, math, forward)

    @contextmanager
    def _running(self, frozen: bool, math: bool, forward: bool) -> Iterator[None]:
        with (
            only_math_attention() if math else NOTHING,
            swapped(self._held) if self._held else NOTHING,
            self._hooks.noted(forward=forward) if forward or self._hooks.any else NOTHING,
            journal(self._state.parameters) if frozen else NOTHING,
        ):
            yield

    def gradient(self, loss: Loss) -> tuple[Tensor, Tree]:
        """A loss of this pass and its gradient, of the weights that it reaches; the graph is gone afterwards."""
        if self.graph is None:
            raise RuntimeError("a pass learns once")
        value = loss(self.graph, self.student.for_loss(self._at))
        if not value.requires_grad:
            raise checks.without_gradient("student")
        keep = self.student.double_backward
        with self.running():
            grads = self.student.gradient(value, self._at, create_graph=keep)
        if not grads:
            raise checks.without_gradient("student")
        self.graph, self.loss = None, value.detach()
        if not keep:
            self._at, self._held = {}, []
        return self.student.ranks.mean(self.loss), grads

    def refuse_hooks(self) -> None:
        """Refuse hooks that changed the gradient of this pass."""
        self._hooks.refuse()

    def refuse_later_graphs(self) -> None:
        """Refuse what makes a graph of this pass and later ones wrong."""
        self.refuse_hooks()
        if self._state.parameters.written:
            raise MetaplError(
                "the student's forward writes to a frozen parameter, which the graphs that mode 'unrolled' keeps of "
                'earlier steps may have saved; use mode="forward", which is as exact, or look one step ahead.'
            )

    def gradient_again(self, params: Tree, loss: Loss) -> Tree:
        """The gradient of this pass's loss at its θ once more; ``params`` is that θ, which was forgotten."""
        self._refuse_ranks()
        self.params = params
        with self._replay(self.inputs) as (at, outputs):
            return self.student.gradient(loss(outputs, at), at)

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
        at = as_leaves(self.params)
        with self.student.eagerly(), self._again(self.student.held_at(at)):
            outputs = self.student.forward(inputs)
            check_outputs(outputs.detach(), self.outputs, BY_FORWARD_MODE[self.rounded_to].outputs)
            yield at, outputs

    def tangent(self, w: Tree) -> Tensor:
        """ż = d/dε S(x; θ + εw) by forward-mode AD: exact, one pass of about three plain ones, no graph."""
        with self.student.eagerly(), forward_mode():
            duals = {name: forward_ad.make_dual(p.clone(), w[name]) for name, p in self.params.items() if name in w}
            with self._again(self.student.held_at(duals)):
                outputs, tangent = forward_ad.unpack_dual(self.student.forward(self.inputs))
            check_outputs(outputs, self.outputs, BY_FORWARD_MODE[self.rounded_to].outputs, self.student.ranks)
            return torch.zeros_like(self.outputs) if tangent is None else tangent.clone()

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
        half = self.narrowed & {torch.float16, torch.bfloat16}
        if half and not (torch.is_autocast_enabled(student.device.type) or half & set(student.formats())):
            raise MetaplError(
                f"the student casts to {min(map(str, half))} in its forward, and a difference of such outputs would be "
                'noise; use mode="forward", or give precision="bfloat16" in place of the casts.'
            )
        moved = {n: wide(p) + step * wide(direction[n]) if n in direction else wide(p) for n, p in self.params.items()}
        frozen = {id(t): wide(t) for _, _, t in student.slots.parameters if not t.requires_grad}
        held = [*student.held_at(moved), *stand_ins(student.slots.parameters, frozen)]
        with (
            torch.autocast(student.device.type, enabled=False),
            full_float32(student.device),
            no_fast_path(),
            explained(),
            self._again(held, upcast=True),
        ):
            yield moved

    def check_shifted(self, outputs: Tensor) -> None:
        """Refuse outputs of shifted passes, S(x; θ) to the second order of the shift, that are not this pass's."""
        check_outputs(outputs, self.outputs, BY_DIFFERENCE[self.rounded_to].outputs, self.student.ranks)

    @contextmanager
    def hessian(self, loss: Loss) -> Iterator[Callable[[Tree], Tree]]:
        """Products with H = ∂²ℓ/∂θ² of a loss of this pass, by double backward; the graph stays for the block.

        Cost: a forward pass and a backward pass with a graph once, and one through both for every product.
        """
        with self._differentiable_gradient(loss, self.inputs) as (at, g):

            def product(w: Tree) -> Tree:
                if not g:
                    return {name: torch.zeros_like(p) for name, p in at.items()}
                found = torch.autograd.grad(
                    list(g.values()),
                    list(at.values()),
                    [w[name] for name in g],
                    retain_graph=True,
                    materialize_grads=True,
                )
                return dict(zip(at, found, strict=True))

            yield product

    def second_derivatives(
        self, w: Tree, loss: Loss, leaves: Sequence[Tensor], inputs: Any
    ) -> tuple[Tree, list[Tensor | None]]:
        """The derivatives of ⟨g, w⟩, g being the gradient of a loss of this pass: (∂²ℓ/∂θ²) w, and that in leaves.

        By double backward: a forward pass, a backward pass with a graph, and one through both. None for a leaf that
        neither the loss nor the ``inputs``, this pass's own, depend on.
        """
        with self._differentiable_gradient(loss, inputs) as (at, g):
            names = [name for name in g if name in w]
            if not names:
                return {name: torch.zeros_like(p) for name, p in at.items()}, [None for _ in leaves]
            found = torch.autograd.grad(
                [g[name] for name in names], [*at.values(), *leaves], [w[name] for name in names], allow_unused=True
            )
        curved = {
            name: torch.zeros_like(p) if t is None else t for (name, p), t in zip(at.items(), found, strict=False)
        }
        return curved, list(found[len(at) :])

    @contextmanager
    def _differentiable_gradient(self, loss: Loss, inputs: Any) -> Iterator[tuple[Tree, Tree]]:
        """θ as leaves, and the gradient of a loss of this pass in them, with its graph; entries that do not depend on
        θ or on leaves of the loss and of the inputs are left out."""
        self._refuse_ranks()
        with only_math_attention(), explained(), self._replay(inputs) as (at, outputs):
            again = loss(self.outputs, self.params).detach()  # at these outputs it is the same to the last digits
            check_loss(again, self.loss, again)
            g = torch.autograd.grad(loss(outputs, at), list(at.values()), create_graph=True, materialize_grads=True)
            refuse_once_differentiable(g)
            yield at, {name: t for name, t in zip(at, g, strict=True) if t.requires_grad}

    def _refuse_ranks(self) -> None:
        if not self.student.ranks.alone:
            raise MetaplError(
                "second derivatives of the inner loss, and steps that are computed again, are not built for students "
                'in several processes; use an estimator that needs neither, such as mode="forward" with one step.'
            )

    def ran_in_full_precision(self) -> bool:
        """Whether it computed in float32 or wider throughout, as far as weights and settings tell."""
        half = any(p.dtype in (torch.float16, torch.bfloat16) for p in self.params.values())
        rounded = any(p.dtype == torch.float32 for p in self.params.values()) and reduced_float32(self.student.device)
        return not (half or rounded or torch.is_autocast_enabled(self.student.device.type))

    @contextmanager
    def _again(self, held: Sequence[Any], *, upcast: bool = False) -> Iterator[None]:
        """These tensors held, on the draws of this pass, with copies of the state that it began with."""
        self.refuse_hooks()
        slots = self.student.slots
        with self._same_draws(), swapped(held), self._state.again(slots, upcast=upcast):
            yield

    def _same_draws(self) -> Any:
        return replayed(self._before)


LocalStudent.pass_type = Pass


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
    with only_math_attention(), state.again(student.slots, once=True), student.backward_watched():
        found = torch.autograd.grad(
            list(moved.values()), leaves, [cotangents[name] for name in moved], allow_unused=True
        )
    return list(found)


def as_leaves(params: Tree) -> Tree:
    """The same weights, as tensors that a graph begins at."""
    return {name: p.detach().requires_grad_() for name, p in params.items()}


def mean_of(values: Sequence[Tensor]) -> Tensor:
    """The mean of scalars."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).mean(0)
