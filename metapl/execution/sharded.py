"""A sharded network: ``fully_shard`` gathers the weights of a block while it runs, over one mesh or replicas of one.

The trees of weights hold this rank's parts, plain tensors; what a pass returns is of this rank's
rows. Five things would be silently wrong here and are kept in this file:

- ``torch.func.functional_call`` has no effect on gathered weights, so other weights are written
  into the parts in place, and put back from copies bit for bit;
- a root keeps its gathered weights after a pass without a backward pass, so every block gives them
  up before and after the parts are written; autocast keeps its casts of them, so these are dropped
  too;
- ``torch.autograd.grad`` returns gradients of this rank's rows, so the backward pass is
  ``.backward()``, whose hooks average over the ranks, and the gradient is taken out of ``.grad``;
- forward mode has no rules for collectives, so a pass along w is taken block by block: where a
  block has gathered its weights, w is gathered too, and the weights are replaced by dual numbers
  until the block has run;
- a block gives up its weights after each backward pass, and a second one through it would read what
  is left of them. So second derivatives are taken without the hooks, of blocks that gather their
  weights as operations of autograd.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError
from metapl.execution.batch import flatten
from metapl.execution.layout import Layout
from metapl.execution.local import NOTHING, LocalStudent, Pass, as_leaves
from metapl.execution.numerics import HALF, Tree
from metapl.execution.shards import as_sharded, is_sharded, local, whole, whole_together
from metapl.execution.state import (
    RandomState,
    Slot,
    Slots,
    State,
    named_parts,
    replay,
    stand_in,
    swapped,
)


class ShardedStudent(LocalStudent):
    """A student that is sharded.

    For its arguments see :class:`metapl.execution.local.LocalStudent`.
    """

    has_whole_weights = False

    def __init__(
        self, layout: Layout, slots: Slots | None = None, *, double_backward: bool = False
    ) -> None:
        layout.reshard()
        super().__init__(layout, slots)
        self.layout = layout
        self.params: Tree = {name: local(p).detach() for name, p in self.parameters.items()}
        policies = [block._get_fsdp_state()._mp_policy.param_dtype for block in layout.blocks]
        self.dtypes |= {dtype for dtype in policies if dtype is not None}

    def loss(self, *given: Any, gradient: bool = False, **options: Any) -> tuple[Tensor, Tree]:
        with torch.set_grad_enabled(gradient):
            return super().loss(*given, gradient=gradient, **options)

    def gradient(self, value: Tensor, at: Tree, **how: Any) -> tuple[Tree, Tree]:
        mean = {name: local(g) for name, g in by_backward(value, self.parameters).items()}
        return mean, mean

    def as_leaves(self, params: Tree) -> Tree:
        return params

    @contextmanager
    def at_weights(
        self, params: Tree, random: RandomState, state: State | Slots, *, upcast: bool = False
    ) -> Iterator[None]:
        if narrow := [t for t in self.dtypes if t in HALF and upcast]:
            given = (
                f"the student has weights or a policy of {narrow[0]}, in which a difference of "
                "outputs is noise"
            )
            raise MetaplError(
                f"{given}; expected mode='forward', or precision='bfloat16' without param_dtype."
            )
        with replay(random, state, self.slots.in_formulas(), upcast=upcast), self.moved_to(params):
            yield

    @contextmanager
    def moved_to(self, params: Mapping[str, Tensor]) -> Iterator[None]:
        """The weights at these values in this block, and bit for bit as they were afterwards."""
        kept = {} if params is self.params else {name: t.clone() for name, t in self.params.items()}
        try:
            if kept:
                self._write(params)
            yield
        finally:
            self._write(kept)

    with_weights = moved_to

    def held_at(self, params: Tree) -> list[Slot]:
        """No slot: other weights are written into the parameters."""
        return []

    def over_ranks(self, tree: Tree) -> Tree:
        return {name: t / self.ranks.size for name, t in tree.items()}  # sums over the ranks

    @contextmanager
    def in_blocks(self, params: Tree) -> Iterator[None]:
        """In this block of code, the network has these parts of its weights, in a graph: a block
        gathers its own in each of its passes; the root's stay gathered."""
        self.layout.reshard()
        names = {id(p): name for name, p in self.parameters.items()}
        around: dict[int, Any] = {}  # the outermost block that holds a table of parameters
        for block in self.layout.blocks:  # as a pass would come to them
            for part in block.modules() if block is not self.module else ():
                around.setdefault(id(part._parameters), block)
        slots: dict[Any, list[Slot]] = {}
        for slot in self.slots.parameters:
            if is_sharded(slot[2]):
                slots.setdefault(around.get(id(slot[0])), []).append(slot)
        hooks = [
            (t, dict(t))
            for _, part in named_parts(self.module)
            for t in (part._forward_pre_hooks, part._forward_hooks)
        ]

        def holding(own: list[Slot], learned: Sequence[Tensor]) -> AbstractContextManager[None]:
            """These places with the weights of which the learned ones have such parts."""
            likes, rest = {id(p): p for _, _, p in own}, iter(learned)  # tied weights once
            parts = [next(rest) if key in names else local(p) for key, p in likes.items()]
            found = dict(zip(likes, whole_together(parts, [*likes.values()]), strict=True))
            return swapped([(table, name, found[id(p)]) for table, name, p in own])

        def parts_of(own: list[Slot]) -> list[Tensor]:
            return [
                params[names[key]]
                for key in dict.fromkeys(id(p) for _, _, p in own)
                if key in names
            ]

        for table, before in hooks:
            for number, hook in before.items():
                # Of fully_shard, or of checkpoint for it, whose passes are run again once alone.
                if str(getattr(hook, "__module__", "")).startswith("torch.distributed."):
                    del table[number]
        replaced = {
            block: recomputed(
                block, block.forward, self.device, parts_of(own), partial(holding, own)
            )
            for block, own in slots.items()
            if block is not None
        }
        root = slots.get(None, [])
        try:
            with _running_as(replaced), holding(root, parts_of(root)) if root else NOTHING:
                yield
        finally:
            for table, before in hooks:
                table.clear()
                table.update(before)

    def _write(self, params: Mapping[str, Tensor]) -> None:
        self.layout.reshard()
        torch.clear_autocast_cache()
        with torch.no_grad():
            for name, t in params.items():
                self.params[name].copy_(t)

    @contextmanager
    def along(self, params: Tree, w: Tree, random: RandomState, state: State) -> Iterator[None]:
        """The weights of each submodule are dual numbers with their part of w while it runs."""
        names = {id(p): name for name, p in self.parameters.items()}
        self.layout.reshard()
        held: dict[
            Any, list[Slot]
        ] = {}  # by the submodule that gathers them: the innermost block around
        around: dict[nn.Module, Any] = {}
        for _, part in named_parts(self.module):  # as a pass would come to them
            block = part if part in self.layout.blocks else around.get(part, self.module)
            around |= dict.fromkeys(part.children(), block)
            for attribute, p in part._parameters.items():
                if id(p) in names:
                    held.setdefault(block, []).append((part._parameters, attribute, names[id(p)]))
        duals = {block: _with_duals(block.forward, slots, w) for block, slots in held.items()}
        with self.at_weights(params, random, state), _running_as(duals):
            try:
                yield
            finally:
                self.layout.reshard()


@contextmanager
def _running_as(forwards: Mapping[Any, Callable[..., Any]]) -> Iterator[None]:
    """The modules with these ``forward`` methods in this block, which run when a module has gathered its weights."""
    before = {module: vars(module).get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward


def _with_duals(forward: Callable[..., Any], slots: list[Slot], w: Tree) -> Callable[..., Any]:
    """A ``forward`` for which the gathered weights are dual numbers.

    ``slots`` say where they are, and their names.
    """
    like = {
        name: tensors[attribute] for tensors, attribute, name in slots if name in w
    }  # the sharded parameters

    def run(*args: Any, **kwargs: Any) -> Any:
        duals: dict[str, Tensor] = {}  # of tied weights, one
        for tensors, attribute, name in slots:
            if name in like and name not in duals:
                weight, direction = tensors[attribute], whole(as_sharded(w[name], like[name]))
                duals[name] = stand_in(
                    forward_ad.make_dual(weight.detach(), direction.to(weight.dtype)), weight
                )
        with swapped(
            [
                (tensors, attribute, duals[name])
                for tensors, attribute, name in slots
                if name in duals
            ]
        ):
            return forward(*args, **kwargs)

    return run


class ShardedPass(Pass):
    """One inner pass of a sharded student, and its replays."""

    student: ShardedStudent

    @contextmanager
    def _running(self) -> Iterator[None]:
        torch.clear_autocast_cache()
        try:
            with (
                NOTHING
                if self.params is self.student.params
                else self.student.moved_to(self.params)
            ):
                yield
        except BaseException:
            self.student.layout.reshard()
            raise

    @contextmanager
    def _replay_twice(self, inputs: Any) -> Iterator[tuple[Tree, Tensor]]:
        at = as_leaves(self.params)
        formulas = self.student.slots.in_formulas()
        with replay(self._before, self._state, formulas), self.student.in_blocks(at):
            outputs = self._same_outputs(self.student.forward(inputs))
            with self.drawing_as_loss():
                yield at, outputs


ShardedStudent.pass_type = ShardedPass


def by_backward(
    value: Tensor, parameters: Mapping[str, nn.Parameter], *, retain: bool = False
) -> dict[str, Any]:
    """The gradient of a scalar by ``.backward()``, whose hooks average over the ranks.

    ``.grad`` stays as it is.
    """
    kept = {name: p.grad for name, p in parameters.items()}
    try:
        for p in parameters.values():
            p.grad = None
        value.backward(retain_graph=retain)
        found: dict[str, Any] = {
            name: p.grad for name, p in parameters.items() if p.grad is not None
        }
    finally:
        for name, p in parameters.items():
            p.grad = kept[name]
    for name, g in found.items():
        like: Any = parameters[name]
        if (
            is_sharded(g) and g.placements != like.placements
        ):  # sums that parallelize_module leaves to be taken
            found[name] = g.redistribute(like.device_mesh, like.placements)
    return found


Run = Callable[..., Sequence[Tensor]]  # of tensors, the floating-point outputs


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
        again, count = ctx.again, len(cotangents)

        def pullback(*given: Tensor) -> list[Tensor]:
            graph = torch.is_grad_enabled()  # where the pullback is run again, to be differentiated
            with torch.enable_grad():
                leaves = given if graph else [t.detach().requires_grad_() for t in given]
                inputs = leaves[count:]
                grads: Sequence[Tensor | None] = [None] * len(inputs)
                pairs = [
                    (y, c)
                    for y, c in zip(again(*inputs), leaves[:count], strict=True)
                    if y.requires_grad
                ]
                if pairs:
                    outputs, along = zip(*pairs, strict=True)
                    grads = torch.autograd.grad(
                        outputs, inputs, along, create_graph=graph, allow_unused=True
                    )
            return [
                torch.zeros_like(t) if g is None else g for t, g in zip(inputs, grads, strict=True)
            ]

        return None, None, *Recomputed.apply(pullback, pullback, *cotangents, *ctx.saved_tensors)


def recomputed(
    part: nn.Module,
    forward: Callable[..., Any],
    device: torch.device,
    weights: list[Tensor],
    using: Callable[..., Any],
) -> Callable[..., Any]:
    """The ``forward`` of a part that runs again in each backward pass, on the draws, state and
    precision of its first run. The gradient is also in ``weights``, which the part has in a context
    ``using(weights)``."""

    def run_part(*args: Any, **kwargs: Any) -> Any:
        values, given_as = flatten((args, kwargs))
        entering = [i for i, t in enumerate(values) if isinstance(t, Tensor) and t.requires_grad]
        random, state = RandomState.now(device), State(Slots(part))
        precision = torch.get_autocast_dtype(device.type), torch.is_autocast_enabled(device.type)
        returned: list[Any] = []  # by the first run alone: what later ones return has a graph

        def run(*tensors: Tensor, keep: bool = False) -> list[Tensor]:
            replaced = {**dict(enumerate(values)), **dict(zip(entering, tensors, strict=False))}
            own_args, own_kwargs = pytree.tree_unflatten([*replaced.values()], given_as)
            with using(tensors[len(entering) :]):
                results, returned_as = flatten(forward(*own_args, **own_kwargs))
            places = [
                i for i, t in enumerate(results) if isinstance(t, Tensor) and t.is_floating_point()
            ]
            if keep:
                returned[:] = results, returned_as, places
            return [results[i] for i in places]

        def again(*tensors: Tensor) -> list[Tensor]:
            with replay(random, state), torch.autocast(device.type, *precision):
                return run(*tensors)

        outputs = Recomputed.apply(
            partial(run, keep=True), again, *(values[i] for i in entering), *weights
        )
        results, returned_as, places = returned
        returned.clear()
        for i, t in zip(places, outputs, strict=True):
            results[i] = t
        return pytree.tree_unflatten(results, returned_as)

    return run_part
