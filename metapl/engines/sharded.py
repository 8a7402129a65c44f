"""A sharded network, whose blocks gather their weights while they run.

``fully_shard`` shards them over one mesh, or over replicas of one. The trees of weights hold this
rank's parts, plain tensors; what a pass returns is of this rank's rows. Five things would be
silently wrong here and are kept in this file:

- ``torch.func.functional_call`` has no effect on gathered weights, so other weights are written
  into the parts in place, and put back from copies bit for bit;
- a root keeps its gathered weights after a pass without a backward pass, so every block gives them
  up before and after the parts are written; autocast keeps its casts of them, so these are dropped
  too;
- ``torch.autograd.grad`` returns gradients of this rank's rows, so the backward pass is
  ``.backward()``, whose hooks average over the ranks, and the gradient is taken out of ``.grad``;
- forward mode has no rules for collectives, so a pass along a direction w in the space of the
  weights is taken block by block: where a block has gathered its weights, w is gathered too, and
  the weights are replaced by dual numbers until the block has run;
- a block gives up its weights after each backward pass, and a second one through it would read what
  is left of them. So second derivatives are taken without the hooks, of blocks that gather their
  weights as operations of autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from metapl.core.lesson import GraphLook, plain_leaves
from metapl.engines.eager import EagerDescent, EagerEngine
from metapl.errors import MetaplError
from metapl.execution.batch import Inputs, flatten
from metapl.execution.layout import Layout
from metapl.execution.numerics import HALF, Tree
from metapl.execution.ranks import NOTHING
from metapl.execution.shards import (
    as_sharded,
    is_sharded,
    local,
    mean_by_backward,
    number_of_shard,
    whole,
    whole_together,
)
from metapl.execution.state import (
    RandomState,
    Slot,
    Slots,
    State,
    Table,
    named_parts,
    put_contents,
    replay,
    stand_in,
    swapped,
)

if TYPE_CHECKING:
    from metapl.core.engine import MicroBatches, OuterLossOf

# A module's forward, or what takes its place.
ForwardMethod = Callable[..., Any]


class ShardedEngine(EagerEngine):
    """A student that is sharded.

    For its arguments see :class:`metapl.engines.eager.EagerEngine`.
    """

    has_whole_weights = False

    def __init__(
        self,
        layout: Layout,
        slots: Slots | None = None,
        *,
        double_backward: bool = False,
        parts: int = 1,
    ) -> None:
        layout.reshard()
        super().__init__(layout, slots, parts=parts)
        self.layout = layout
        for block in layout.blocks:
            compute_dtype = block._get_fsdp_state()._mp_policy.param_dtype
            if compute_dtype is not None:
                self.dtypes.add(compute_dtype)

        self.shard = number_of_shard(self.parameters.values())

    def begin(self) -> None:
        super().begin()
        self.params = {name: local(p).detach() for name, p in self.parameters.items()}

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
        with torch.set_grad_enabled(gradient):
            return super().loss(
                params,
                batches,
                judge=judge,
                start=start,
                gradient=gradient,
                look=look,
            )

    def gradient(
        self, value: Tensor, leaves: Tree, *, create_graph: bool = False
    ) -> tuple[Tree, Tree]:
        # A graph of it is neither asked for nor possible: the hooks average its values.
        mean = {name: local(g) for name, g in mean_by_backward(value, self.parameters).items()}
        return mean, mean

    def over_ranks(self, tree: Tree) -> Tree:
        # Second derivatives are sums over the ranks already.
        return {name: t / self.ranks.size for name, t in tree.items()}

    # ------------------------------------------------------------------ the module at other weights

    def as_leaves(self, params: Tree) -> Tree:
        return params

    def slots_of(self, params: Tree) -> list[Slot]:
        """Return no places: other weights are written into the parameters."""
        return []

    @contextmanager
    def at_weights(
        self, params: Tree, random: RandomState, state: State | Slots, *, upcast: bool = False
    ) -> Iterator[None]:
        if upcast:
            narrow = [dtype for dtype in self.dtypes if dtype in HALF]
            if narrow:
                raise MetaplError(
                    f"the student has weights or a policy of {narrow[0]}; expected mode='forward', "
                    "or precision='bfloat16' without param_dtype."
                )
        formulas = self.slots.in_formulas()
        with replay(random, state, slots=formulas, upcast=upcast), self.moved_to(params):
            yield

    @contextmanager
    def moved_to(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """Have the weights at these values in this block, and bit for bit as before afterwards."""
        copies: Tree = {}
        if params is not self.params:
            copies = {name: t.clone() for name, t in self.params.items()}
        try:
            if copies:
                self._write(params)
            yield
        finally:
            self._write(copies)

    with_weights = moved_to

    def _write(self, params: Mapping[str, Tensor]) -> None:
        """Write values into this rank's parts, when the blocks have given up what they gathered."""
        self.layout.reshard()
        torch.clear_autocast_cache()
        with torch.no_grad():
            for name, t in params.items():
                self.params[name].copy_(t)

    # ------------------------------------------------------------------------ passes block by block

    @contextmanager
    def along(self, params: Tree, w: Tree, random: RandomState, state: State) -> Iterator[None]:
        """Run the student with dual numbers for the weights of each submodule while it runs.

        Their tangent is the submodule's part of w.
        """
        names = {id(p): name for name, p in self.parameters.items()}
        self.layout.reshard()
        places_of_block: dict[nn.Module, list[_WeightPlace]] = {}
        # The submodule that gathers a part's weights is the innermost block around the part. The
        # walk is as a pass would come to the parts.
        block_around: dict[nn.Module, nn.Module] = {}
        for _, part in named_parts(self.module):
            block = part if part in self.layout.blocks else block_around.get(part, self.module)
            for child in part.children():
                block_around[child] = block
            for attribute, p in part._parameters.items():
                if id(p) in names:
                    place = _WeightPlace(part._parameters, attribute, name=names[id(p)])
                    places_of_block.setdefault(block, []).append(place)
        forwards = {
            block: _with_duals(block.forward, places, w=w)
            for block, places in places_of_block.items()
        }
        with self.at_weights(params, random, state=state), _running_as(forwards):
            try:
                yield
            finally:
                self.layout.reshard()

    @contextmanager
    def in_blocks(self, params: Tree) -> Iterator[None]:
        """Have these parts of the weights in this block of code, in a graph.

        A block of the network gathers its own in each of its passes; the root's stay gathered.
        """
        self.layout.reshard()
        gathering = self._gathering_blocks()
        forwards: dict[Any, ForwardMethod] = {}
        for block, weights in gathering.items():
            if block is not None:
                forwards[block] = RecomputedForward(block, self.device, weights, params=params)
        root_weights: AbstractContextManager[None] = NOTHING
        hooks = _without_hooks_of_torch(self.module)
        try:
            if None in gathering:
                root = gathering[None]
                root_weights = root.gathered(root.learned_parts(params))
            with _running_as(forwards), root_weights:
                yield
        finally:
            put_contents(hooks)

    def _gathering_blocks(self) -> dict[Any, _GatheredWeights]:
        """Return the weights that each outermost block gathers; None stands for the root."""
        block_of_table: dict[int, Any] = {}
        # As a pass would come to them: an outer block comes before those inside it.
        for block in self.layout.blocks:
            if block is self.module:
                continue
            for part in block.modules():
                block_of_table.setdefault(id(part._parameters), block)
        names = {id(p): name for name, p in self.parameters.items()}
        gathering: dict[Any, _GatheredWeights] = {}
        for table, name, p in self.slots.parameters:
            if is_sharded(p):
                block = block_of_table.get(id(table))
                weights = gathering.setdefault(block, _GatheredWeights(names))
                weights.slots.append((table, name, p))
        return gathering


@dataclass
class _WeightPlace:
    """A place of a weight, in a table of a module, and its name in the trees."""

    table: Table
    attribute: str
    name: str


@dataclass
class _GatheredWeights:
    """The sharded weights that one block gathers.

    Attributes:
        names: of the weights that are learned, by identity.
        slots: the places of all of them, also of those that are not learned.
    """

    names: Mapping[int, str]
    slots: list[Slot] = field(default_factory=list)

    def unique(self) -> dict[int, Any]:
        """Return the weights by identity, tied ones once."""
        return {id(p): p for _, _, p in self.slots}

    def learned_parts(self, params: Tree) -> list[Tensor]:
        """Return this rank's parts of the learned weights, of those in ``params``."""
        return [params[self.names[key]] for key in self.unique() if key in self.names]

    def gathered(self, learned_parts: Sequence[Tensor]) -> AbstractContextManager[None]:
        """Hold whole weights in their places in a block.

        Args:
            learned_parts: this rank's parts of those that are learned, in the order of
                :meth:`learned_parts`.
        """
        weights = self.unique()
        next_learned = iter(learned_parts)
        parts: list[Tensor] = []
        for key, p in weights.items():
            parts.append(next(next_learned) if key in self.names else local(p))
        gathered = whole_together(parts, [*weights.values()])
        whole_weights = dict(zip(weights, gathered, strict=True))
        return swapped([(table, name, whole_weights[id(p)]) for table, name, p in self.slots])


def _without_hooks_of_torch(network: nn.Module) -> list[tuple[Table, Table]]:
    """Remove the hooks of ``fully_shard``, and those of ``checkpoint`` for it, from a network.

    The passes of checkpoints are run again once alone.

    Returns:
        All tables of hooks, with what they held.
    """
    tables: list[tuple[Table, Table]] = []
    for _, part in named_parts(network):
        hook_tables: tuple[Any, ...] = (part._forward_pre_hooks, part._forward_hooks)
        for table in hook_tables:
            tables.append((table, dict(table)))
    for table, hooks in tables:
        for number, hook in hooks.items():
            if str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
                del table[number]
    return tables


@contextmanager
def _running_as(forwards: Mapping[Any, ForwardMethod]) -> Iterator[None]:
    """Give the modules these ``forward`` methods in this block.

    They run when a module has gathered its weights.
    """
    own_forwards = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, own_forward in own_forwards.items():
            vars(module).pop("forward", None)
            if own_forward is not None:
                module.forward = own_forward


def _with_duals(forward: ForwardMethod, places: list[_WeightPlace], w: Tree) -> ForwardMethod:
    """Return a ``forward`` for which the gathered weights are dual numbers, whose tangent is w."""
    # Read now: while the block runs, its tables hold gathered weights.
    sharded = {place.name: place.table[place.attribute] for place in places if place.name in w}

    def run(*args: Any, **kwargs: Any) -> Any:
        # Tied weights have one dual number.
        duals: dict[str, Tensor] = {}
        for place in places:
            if place.name not in sharded or place.name in duals:
                continue
            weight = place.table[place.attribute]
            direction = whole(as_sharded(w[place.name], sharded[place.name]))
            dual = forward_ad.make_dual(weight.detach(), direction.to(weight.dtype))
            duals[place.name] = stand_in(dual, weight)
        slots = [
            (place.table, place.attribute, duals[place.name])
            for place in places
            if place.name in duals
        ]
        with swapped(slots):
            return forward(*args, **kwargs)

    return run


class ShardedDescent(EagerDescent):
    """One inner pass of a sharded student, and its replays."""

    student: ShardedEngine

    @contextmanager
    def _running(self) -> Iterator[None]:
        torch.clear_autocast_cache()
        has_own_weights = self.params is self.student.params
        try:
            with NOTHING if has_own_weights else self.student.moved_to(self.params):
                yield
        except BaseException:
            self.student.layout.reshard()
            raise

    @contextmanager
    def _twice_differentiable(self, inputs: Inputs) -> Iterator[tuple[Tree, Tensor]]:
        leaves = plain_leaves(self.params)
        formulas = self.student.slots.in_formulas()
        with (
            replay(self._random_state, self._state, slots=formulas),
            self.student.in_blocks(leaves),
        ):
            outputs = self._checked(self.student.forward(inputs))
            with self.drawing_as_loss():
                yield leaves, outputs


ShardedEngine.descent_type = ShardedDescent


# ----------------------------------------------------------- operations that are run again backward

# A function of tensors; it returns the floating-point outputs.
Run = Callable[..., Sequence[Tensor]]


class Recomputed(torch.autograd.Function):
    """An operation y = f(t) whose graph keeps no more than t, and can be differentiated twice.

    ``torch.utils.checkpoint`` frees what a part computes until the backward pass, but the graph of
    that backward pass, which a second one goes through, holds it again for all parts at once. Here
    the derivative of f is the pullback p(c, t) = (∂f/∂t)ᵀ c as such an operation, which runs f
    again, and so does the derivative of that.
    """

    @staticmethod
    def forward(ctx: Any, first: Run, again: Run, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.again = again
        ctx.save_for_backward(*tensors)
        return tuple(first(*tensors))

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> tuple[Any, ...]:
        again: Run = ctx.again
        count = len(cotangents)

        def pullback(*cotangents_and_inputs: Tensor) -> list[Tensor]:
            # Gradients are enabled where the pullback itself is run again, to be differentiated.
            has_graph = torch.is_grad_enabled()
            with torch.enable_grad():
                leaves: Sequence[Tensor] = cotangents_and_inputs
                if not has_graph:
                    leaves = [t.detach().requires_grad_() for t in cotangents_and_inputs]
                cotangent_leaves = leaves[:count]
                inputs = leaves[count:]
                grads: Sequence[Tensor | None] = [None] * len(inputs)
                pairs = [
                    (y, c)
                    for y, c in zip(again(*inputs), cotangent_leaves, strict=True)
                    if y.requires_grad
                ]
                if pairs:
                    outputs, output_cotangents = zip(*pairs, strict=True)
                    grads = torch.autograd.grad(
                        outputs,
                        inputs,
                        grad_outputs=output_cotangents,
                        create_graph=has_graph,
                        allow_unused=True,
                    )
            return [
                torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)
            ]

        return None, None, *Recomputed.apply(pullback, pullback, *cotangents, *ctx.saved_tensors)


class RecomputedForward:
    """A ``forward`` of a block that runs again in each backward pass.

    It runs again on the draws, state and precision of its first run. The gradient is also in this
    rank's parts of the block's weights, which the block gathers in each run.
    """

    def __init__(
        self, block: nn.Module, device: torch.device, weights: _GatheredWeights, params: Tree
    ) -> None:
        self.block = block
        self.forward: ForwardMethod = block.forward
        self.device = device
        self.weights = weights
        self.learned_parts = weights.learned_parts(params)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        call = _BlockCall(self, args, kwargs)
        entering = [call.values[i] for i in call.entering]
        outputs = Recomputed.apply(call.first, call.again, *entering, *self.learned_parts)
        return call.take_results(outputs)


class _BlockCall:
    """One call of a :class:`RecomputedForward`.

    Attributes:
        values: the leaves of the arguments.
        entering: the places in ``values`` of tensors that require a gradient.
    """

    def __init__(
        self, forward: RecomputedForward, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        device_type = forward.device.type
        self.forward = forward
        self.values, self._arguments_structure = flatten((args, kwargs))
        self.entering = [
            i for i, t in enumerate(self.values) if isinstance(t, Tensor) and t.requires_grad
        ]
        self._random_state = RandomState.now(forward.device)
        self._state = State(Slots(forward.block))
        self._autocast_dtype = torch.get_autocast_dtype(device_type)
        self._has_autocast = torch.is_autocast_enabled(device_type)
        # Of the first run alone: what later ones return has a graph.
        self._results: list[Any] = []
        self._results_structure: Any = None

    def first(self, *tensors: Tensor) -> list[Tensor]:
        """Run the block, keep all that it returns, and return its floating-point tensors."""
        self._results, self._results_structure = self._run(tensors)
        return [self._results[i] for i in _float_places(self._results)]

    def again(self, *tensors: Tensor) -> list[Tensor]:
        """Run the block as the first time, and return its floating-point tensors."""
        precision = torch.autocast(
            self.forward.device.type, dtype=self._autocast_dtype, enabled=self._has_autocast
        )
        with replay(self._random_state, self._state), precision:
            results, _ = self._run(tensors)
        return [results[i] for i in _float_places(results)]

    def take_results(self, outputs: Sequence[Tensor]) -> Any:
        """Return what the first run returned, with these floating-point tensors, and drop it."""
        results = self._results
        self._results = []
        for i, t in zip(_float_places(results), outputs, strict=True):
            results[i] = t
        return pytree.tree_unflatten(results, self._results_structure)

    def _run(self, tensors: Sequence[Tensor]) -> tuple[list[Any], Any]:
        """Run the block on tensors in the place of those that entered, and of the learned parts."""
        values = [*self.values]
        for i, t in zip(self.entering, tensors, strict=False):
            values[i] = t
        learned_parts = tensors[len(self.entering) :]
        args, kwargs = pytree.tree_unflatten(values, self._arguments_structure)
        with self.forward.weights.gathered(learned_parts):
            return flatten(self.forward.forward(*args, **kwargs))


def _float_places(results: Sequence[Any]) -> list[int]:
    """Return the places of floating-point tensors."""
    return [i for i, t in enumerate(results) if isinstance(t, Tensor) and t.is_floating_point()]
