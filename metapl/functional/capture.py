"""Functions of nested tensors as graphs of operations, compiled, and what a graph holds for.

``make_fx`` runs a function once, on tensors without values, and writes down its operations, those
of the backward passes that it asks for included. Inductor compiles what comes out. So the compiler
reads no Python, of metapl's or of anybody's.

What the function asked Python for is a constant of its graph. So each call compares what it is
given, attributes and global variables that the function reads, and switches of PyTorch with what
they were (:class:`Captured`), and captures the function anew where one of them differs.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import types
import warnings
from collections import deque
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass, is_dataclass
from functools import cached_property, partial
from itertools import chain, count
from operator import is_
from typing import Any, Generic, NamedTuple, TypeVar

import numpy
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.checks import described, has_values, no_values, unexpected
from metapl.execution.compare import TRIES
from metapl.execution.numerics import explain, float32_switches
from metapl.execution.state import RandomState, replayed

LOG = logging.getLogger("metapl")

# The most graphs of one function that are kept.
MOST_KEPT = 8

# The types of attributes and of parts of a batch that are constants of a graph.
PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)

SEQUENCES = (tuple, list)

# Operations of a graph from which on a compiler is advised against. It takes some 8 s and 37 ms an
# operation (345 operations 19 s, 1,276 45 s, 2,718 53 s of processor time).
MANY_OPERATIONS = 5_000

# What stands in a graph for tensors that were no arguments.
CONSTANTS = ("_tensor_constant", "_param_constant")

# Fused operations on lists of tensors, with those on a tensor.
UNFUSED: dict[Any, Any] = {
    torch.ops.aten._foreach_norm.Scalar: torch.ops.aten.linalg_vector_norm.default,
    torch.ops.aten._foreach_mul.List: torch.ops.aten.mul.Tensor,
}

# What PyTorch says where a function asks for a value while it is recorded.
_ASKS_FOR_VALUE = (
    "DataDependent",
    "data-dependent",
    "tracing tensor",
    "fake",
    "Fake",
    "item()",
    "nonzero",
    ".numpy()",
)

# What autograd says of an operation without a derivative.
_NO_DERIVATIVE = re.compile(r"derivative for (aten::\w+) is not implemented")

Result = TypeVar("Result")


# ------------------------------------------------------------------------------------------- graphs


def graph_of(
    function: Callable[..., list[Tensor]],
    examples: Sequence[Tensor],
    *,
    has_derivatives: bool = False,
) -> GraphModule:
    """Return a function of tensors, which returns a list of tensors, as one graph.

    Nothing of the values of tensors is in it, and no generator moves.

    Args:
        examples: tensors of the kinds that the graph is given.
        has_derivatives: write fused operations, which PyTorch differentiates once or twice, as
            simpler ones, which it differentiates to any order.
    """
    formulas = differentiable_formulas() if has_derivatives else None
    device = examples[0].device
    torch.clear_autocast_cache()
    with (
        no_transform(),
        replayed(RandomState.now(device)),
        no_values(),
        _no_mkldnn(),
        without_cache_of_casts(),
    ):
        # It writes an account of each operation that fails, which the error says too.
        logger = logging.getLogger("torch._subclasses.fake_tensor")
        was_disabled = logger.disabled
        logger.disabled = True
        try:
            # Without values, in which nothing of this call's numbers can be.
            graph = make_fx(
                function,
                decomposition_table=formulas,
                tracing_mode="fake",
                _allow_non_fake_inputs=True,
            )(*map(_example, examples))
        finally:
            logger.disabled = was_disabled
    for node in [*graph.graph.nodes]:
        if node.target is torch.ops.aten.view.default:
            # Strides of a mapped tensor may not allow to view.
            node.target = torch.ops.aten.reshape.default
        elif node.target in (torch.ops.aten.detach.default, torch.ops.aten.alias.default):
            # A replay has no graph that they could leave.
            node.replace_all_uses_with(node.args[0])
            graph.graph.erase_node(node)
        elif node.target in UNFUSED:
            _unfuse(graph, node)
        elif node.kwargs.keys() == {"out"}:
            _write_afterwards(graph, node)
    graph.recompile()
    return graph


def differentiable_formulas() -> dict[Any, Callable[..., Any]]:
    """Return PyTorch's formulas for operations of backward passes, and for norms of layers."""
    from torch._decomp import decomposition_table

    names = ("backward", "batch_norm", "group_norm", "layer_norm", "rms_norm")
    return {
        operation: formula
        for operation, formula in decomposition_table.items()
        if any(name in str(operation) for name in names)
    }


def _unfuse(graph: GraphModule, node: torch.fx.Node) -> None:
    """Take a fused operation on lists of tensors tensor by tensor, as vmap has rules for."""
    for user in [*node.users]:
        index: Any = user.args[1]
        with graph.graph.inserting_before(user):
            arguments = [part[index] if isinstance(part, list) else part for part in node.args]
            one = graph.graph.call_function(UNFUSED[node.target], tuple(arguments))
        user.replace_all_uses_with(one)
        graph.graph.erase_node(user)
    graph.graph.erase_node(node)


def _write_afterwards(graph: GraphModule, node: torch.fx.Node) -> None:
    """Take an operation that writes to ``out=``, and then write, as vmap has rules for."""
    operation: Any = node.target
    with graph.graph.inserting_before(node):
        result = graph.graph.call_function(operation.overloadpacket, node.args)
        written = graph.graph.call_function(
            torch.ops.aten.copy_.default, (node.kwargs["out"], result)
        )
    node.replace_all_uses_with(written)
    graph.graph.erase_node(node)


def take_each_result_once(graph: GraphModule) -> list[int]:
    """Let a graph return no tensor twice, and none that it is given.

    Returns: of each result that it had, its place in what is given followed by what is returned.
    """
    inputs = [node for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = (node for node in graph.graph.nodes if node.op == "output")
    results = [*map(_written_to, output.args[0])]
    returned = [node for node in dict.fromkeys(results) if node not in inputs]
    places = {node: place for place, node in enumerate([*inputs, *returned])}
    output.args = (returned,)
    graph.recompile()
    return [places[node] for node in results]


def _written_to(node: Any) -> Any:
    """Return the tensor that a node is: of a write, what was written to."""
    while node.target is torch.ops.aten.copy_.default:
        node = node.args[0]
    return node


def constants_in(graph: GraphModule) -> dict[str, Tensor]:
    """Return the tensors that a graph holds and that were no arguments, but for literals."""
    constants = {}
    for node in graph.graph.nodes:
        if node.op == "get_attr" and str(node.target).startswith(CONSTANTS):
            is_literal = all("lift_fresh" in str(user.target) for user in node.users)
            if not is_literal:
                constants[str(node.target)] = getattr(graph, str(node.target))
    return constants


def take_constants_as_inputs(graph: GraphModule) -> list[Tensor]:
    """Let a graph take the tensors that it holds as its last arguments, and return them."""
    constants = constants_in(graph)
    placeholders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    inputs = {}
    with graph.graph.inserting_after(placeholders[-1]):
        for name in reversed(constants):
            inputs[name] = graph.graph.placeholder(f"held{name}")
            # Inductor reads shapes and types there.
            fake_mode = placeholders[0].meta["val"].fake_mode
            inputs[name].meta["val"] = fake_mode.from_tensor(constants[name])
    for node in list(graph.graph.nodes):
        if node.op == "get_attr" and str(node.target) in constants:
            node.replace_all_uses_with(inputs[str(node.target)])
            graph.graph.erase_node(node)
    graph.recompile()
    return [*constants.values()]


def backend_of(device: torch.device) -> dict[str, Any]:
    """Return the options of Inductor for steps of a fraction of a millisecond.

    Half of such a step would go into Python around the kernels. Inductor's own kernels would draw
    other dropout masks than PyTorch's.
    """
    return {
        "fallback_random": True,
        "cpp_wrapper": device.type == "cpu",
        "size_asserts": False,
        "alignment_asserts": False,
    }


def compiled_graph(graph: GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """Return a graph as Inductor compiles it, for tensors of the kinds of these."""
    with warnings.catch_warnings(), torch.no_grad():
        # Inductor warns while it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch import _inductor

        compiled: Callable[..., Sequence[Any]] = _inductor.standalone_compile(
            graph,
            [t.detach() for t in examples],
            dynamic_shapes="from_example_inputs",
            options={"config_patches": backend_of(examples[0].device)},
        )
    return compiled


@contextmanager
def _no_mkldnn() -> Iterator[None]:
    """Record without mkldnn, whose kernels of recurrent networks record and do not run."""
    # Without the switch of torch.backends, which warns of a setting of another device.
    was_enabled = torch._C._get_mkldnn_enabled()
    is_enabled = False
    torch._C._set_mkldnn_enabled(is_enabled)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(was_enabled)


@contextmanager
def without_cache_of_casts() -> Iterator[None]:
    """Let a region of autocast, which may be the caller's, keep no casts of weights."""
    keeps_casts = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(keeps_casts)


def _example(t: Tensor) -> Tensor:
    """Return a tensor of the same kind, in no transform."""
    like = torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device)
    return like.requires_grad_(t.requires_grad)


class NotRecorded(RuntimeError):
    """A function raises where it is recorded, as it may where tensors have no values."""


def asks_for_value(error: BaseException) -> bool:
    """Return whether an error says that a function reads a value while it is recorded."""
    return any(word in f"{type(error).__name__} {error}" for word in _ASKS_FOR_VALUE)


def why_not_captured(error: BaseException) -> str:
    """Return what an error says about a step that cannot be captured; "" for any other error."""
    if isinstance(error, NotRecorded) and error.__cause__ is not None:
        return why_not_captured(error.__cause__) or reason_of(error.__cause__)
    if isinstance(error, MetaplError):
        return ""
    if lacking := _NO_DERIVATIVE.search(str(error)):
        return f"{lacking[1]} lacks the derivative that a compiled step takes of a backward pass"
    if "saved tensor hooks" in str(error):
        return "a network keeps tensors by hooks, as a checkpoint does"
    if type(error).__module__.startswith("torch._inductor"):
        return reason_of(error)
    if asks_for_value(error):
        return f"a network or a loss reads the value of a tensor ({reason_of(error)})"
    return ""


# ------------------------------------------------------------------------------------- transforms


def is_transformed() -> bool:
    """Return whether this runs inside a transform of ``torch.func``."""
    return torch._C._functorch.peek_interpreter_stack() is not None


def no_transform() -> AbstractContextManager[Any]:
    """Leave all transforms of ``torch.func`` in a block."""
    from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

    return temporarily_clear_interpreter_stack()


def is_differentiated(values: Any) -> bool:
    """Return whether a function of nested tensors is differentiated, by whatever way.

    It runs inside a transform other than ``torch.func.vmap``, or a tensor has a graph or a tangent.
    """
    from torch._functorch.pyfunctorch import retrieve_all_functorch_interpreters

    if is_transformed():
        mapping = torch._C._functorch.TransformType.Vmap
        if any(one.key() != mapping for one in retrieve_all_functorch_interpreters()):
            return True
    tensors = [leaf for leaf in pytree.tree_leaves(values) if isinstance(leaf, Tensor)]
    if torch.is_grad_enabled() and any(map(requires_grad, tensors)):
        return True
    if forward_ad._current_level < 0:
        return False
    return any(forward_ad.unpack_dual(t).tangent is not None for t in tensors)


def requires_grad(t: Tensor) -> bool:
    """Return whether a tensor, or what a mapped one stands for, requires a gradient."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        t = functorch.get_unwrapped(t)
    return t.requires_grad


class WithoutDerivative(torch.autograd.Function):
    """A function of tensors as an operation whose derivative raises, in these words."""

    generate_vmap_rule = True

    @staticmethod
    def forward(run: Callable[..., Any], text: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(run(*tensors))

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, ctx.text, *_ = inputs

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor) -> Any:
        raise MetaplError(ctx.text)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Any:
        raise MetaplError(ctx.text)


def without_derivative(results: Any, *, of: Any, text: str) -> Any:
    """Return nested results of a function, whose derivative in what it was given raises a text.

    It would be 0 in silence where a loss reads what was given besides.
    """
    given = [t for t in pytree.tree_leaves(of) if isinstance(t, Tensor) and requires_grad(t)]
    if not given or not torch.is_grad_enabled():
        return results
    leaves, structure = pytree.tree_flatten(results)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    run = partial(without_first, len(given))
    without = iter(WithoutDerivative.apply(run, text, *given, *tensors))
    filled = [next(without) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(filled, structure)


def without_first(count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Return tensors without the first ones."""
    return tensors[count:]


def first_of_mapped(t: Tensor) -> Tensor:
    """Return the first of the tensors that a mapped one stands for; any other as it is."""
    functorch = torch._C._functorch
    while functorch.is_functorch_wrapped_tensor(t):
        dimension = functorch.maybe_get_bdim(t)
        t = functorch.get_unwrapped(t)
        if dimension >= 0:
            t = t.select(dimension, 0)
    return t


def copy_with_strides(t: Tensor) -> Tensor:
    """Return a copy of a tensor with the same strides, for which a compiled graph was made.

    ``clone()`` closes the gaps of columns of a larger tensor, and a graph would read beyond it.
    """
    t = t.detach()
    if t.layout != torch.strided or not t.numel():
        return t.clone()
    steps = zip(t.shape, t.stride(), strict=True)
    span = 1 + sum((size - 1) * stride for size, stride in steps)
    return t.as_strided((span,), (1,)).clone().as_strided(t.shape, t.stride())


def rows_repeated(values: Any) -> Any:
    """Return nested tensors whose second rows are their first again: others, of the same kind."""

    def repeated(t: Tensor) -> Tensor:
        half = len(t) // 2 if t.ndim else 0
        # Rows of an expanded tensor are the same already.
        if not half or 0 in t.stride():
            return t
        other = copy_with_strides(t)
        other[half : 2 * half] = other[:half].clone()
        return other.requires_grad_(t.requires_grad)

    return pytree.tree_map_only(Tensor, repeated, values)


# Two results that differ by less than this many roundings, relative to their size, are equal: a
# replay has the function's own bits, but for kernels that do not repeat theirs.
ROUNDINGS = 1e3
ROUNDINGS_OF_SCALE = 10

# A graph adds in another order, in many operations; another last digit of each number is one
# rounding. So many times as far a graph's results may be from the function's.
NUDGES = 10.0

DROWNED = "At numbers that differ in their last digit it comes out as far off without a graph."


def is_equal(found: Any, wanted: Any, *, factor: float = 1.0, scale: float = 0.0) -> bool:
    """Return whether two results are equal, to the rounding of a sum where they are tensors.

    Args:
        factor: how many times as much rounding is allowed.
        scale: of the numbers that a result may be a difference of, a few roundings are allowed.
    """
    if not isinstance(found, Tensor) or not isinstance(wanted, Tensor):
        return bool(found == wanted)
    wanted = wanted.detach()
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    if torch.equal(found, wanted):
        return True
    if not wanted.is_floating_point():
        return False
    eps = torch.finfo(wanted.dtype).eps
    limit = ROUNDINGS * eps * factor
    floor = limit * size_of(wanted) + ROUNDINGS_OF_SCALE * eps * scale
    return torch.allclose(found, wanted, rtol=limit, atol=floor, equal_nan=True)


def with_other_digits(t: Tensor) -> Tensor:
    """Return a tensor whose numbers differ in their last digit, up or down by a fixed draw."""
    if not t.is_floating_point():
        return t.clone()
    generator = torch.Generator().manual_seed(0)
    signs = 2.0 * torch.randint(0, 2, t.shape, generator=generator) - 1.0
    return t * (1.0 + torch.finfo(t.dtype).eps * signs.to(t))


def is_as_near(found: Any, wanted: Any, wanted_there: Any) -> bool:
    """Return whether rounding explains how far a graph's result is from the function's.

    Args:
        wanted_there: the function's result at numbers that differ in their last digit.
    """
    results = (found, wanted, wanted_there)
    if not all(isinstance(t, Tensor) and t.is_floating_point() for t in results):
        return False
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        return False
    gap, gap_there = ((t.detach() - wanted.detach()).norm() for t in (found, wanted_there))
    return bool(gap <= NUDGES * gap_there)


def size_of(t: Tensor) -> float:
    """Return the largest size among the finite entries of a tensor."""
    size = float(t.detach().abs().nan_to_num().max()) if t.numel() else 0.0
    return size if size < float("inf") else 1.0


# ------------------------------------------------------------------------ what a graph is made for


class Held:
    """Nested tensors that many calls are given, taken apart once.

    Args:
        tensors, kind: as :func:`take_apart` leaves them.
        together: returns the nested value from its tensors.
    """

    def __init__(
        self, tensors: list[Tensor], kind: tuple[Any, ...], together: Callable[[list[Tensor]], Any]
    ) -> None:
        self.tensors = tensors
        self.kind = kind
        self._together = together

    @classmethod
    def of(cls, value: Any) -> Held:
        """Take a nested value apart."""
        tensors: list[Tensor] = []
        kind: list[Any] = []
        take_apart(value, tensors, kind)
        return cls(tensors, tuple(kind), lambda _: value)

    @cached_property
    def value(self) -> Any:
        """The nested tensors."""
        return self._together(self.tensors)

    def __getitem__(self, key: Any) -> Any:
        return self.value[key]


class HeldAt:
    """The places of a value among the results of a graph, which is held for the next call.

    Args:
        value: nested as the function returns it, with an :class:`At` for each tensor.
    """

    def __init__(self, value: Any) -> None:
        numbers = count()
        self._places = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, At)]
        self._nest = pytree.tree_map_only(At, lambda _: At(next(numbers)), value)
        # A graph returns tensors of the same kinds each time: those of the first time.
        self._kind: tuple[Any, ...] | None = None

    def held(self, results: Sequence[Any]) -> Held:
        """Return the value among these results."""
        tensors = [results[place] for place in self._places]
        together = partial(at_places, self._nest)
        if self._kind is None:
            self._kind = Held.of(together(tensors)).kind
        return Held(tensors, self._kind, together)


# What a graph reads of them is their value: torch's trees go into it.
pytree.register_pytree_node(
    Held, lambda held: ([held.value], None), lambda parts, _: Held.of(*parts)
)


class Named(NamedTuple):
    """A part of a kind that has a name of its own."""

    name: str
    value: Any


@dataclass(frozen=True)
class Constants:
    """What of the arguments of a function is no tensor, as its kind and as it is."""

    kind: list[Any]
    value: Any


def take_apart(value: Any, tensors: list[Tensor], kind: list[Any]) -> None:
    """Append the tensors of a nested value, and what of it is a constant of a graph.

    PyTorch's pytrees would take ten times as long.
    """
    if isinstance(value, Tensor):
        tensors.append(value)
        kind.append((value.shape, value.stride(), value.dtype, value.device))
    elif isinstance(value, Held):
        tensors += value.tensors
        kind.append(value.kind)
    elif isinstance(value, SEQUENCES):
        kind.append((type(value), len(value)))
        for part in value:
            take_apart(part, tensors, kind)
    elif isinstance(value, dict):
        kind.append((type(value), tuple(value)))
        for part in value.values():
            take_apart(part, tensors, kind)
    elif isinstance(value, PLAIN):
        kind.append((type(value), value))
    elif isinstance(value, Constants):
        kind += value.kind
    else:
        expected = "tensors and numbers in tuples, lists and dicts"
        raise unexpected("a batch of a graph has a part", value, expected)


def put_together(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a nested value with other tensors, in the order of :func:`take_apart`."""
    if isinstance(value, Tensor):
        return next(tensors)
    if isinstance(value, dict):
        return {name: put_together(part, tensors) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(put_together(part, tensors) for part in value))
    if isinstance(value, tuple | list):
        return type(value)(put_together(part, tensors) for part in value)
    if isinstance(value, Held):
        return put_together(value.value, tensors)
    return value


class Attributes:
    """What a function reads of objects and of variables, besides its arguments.

    Of objects that these hold, and that are no modules, the attributes count too, to some depth,
    and so do those of their classes, the entries of dicts, lists and other collections, arrays, and
    the variables that methods and functions outside of PyTorch read around them: globals and
    closures. Of modules, what every module has is left out: tables of tensors, parts and hooks, and
    the mode. :func:`modes_of` has these for stacks, and ``Slots.mark`` for a trainer's steps.

    Args:
        sources: the objects: networks, losses, a problem.
    """

    def __init__(self, sources: Sequence[Any]) -> None:
        self._sources = sources
        self.read_again()

    def read_again(self) -> None:
        """Look into all objects anew: others may be in their places."""
        self._tables: list[Mapping[Any, Any]] = []
        self._globals: list[tuple[Mapping[Any, Any], Any]] = []
        self._cells: list[types.CellType] = []
        self._collections: list[Collection[Any]] = []
        self._arrays: list[numpy.ndarray[Any, Any]] = []
        self._slots: list[tuple[Any, str]] = []
        self._modules: list[nn.Module] = []
        self._met: set[int] = set()
        self._met_globals: set[tuple[int, str]] = set()
        for source in self._sources:
            self._look_into(source, depth=0)
        self._sizes: list[int] | None = None
        self._places: list[tuple[Mapping[Any, Any], Any]] = []

    def values(self) -> list[Any]:
        """Return the values of all attributes and variables, as they are now."""
        sizes = [*map(len, self._tables)]
        if sizes != self._sizes:
            self._sizes = sizes
            self._places = [
                (table, name)
                for table in self._tables
                for name in table
                if name not in ATTRIBUTES_OF_ALL_MODULES
            ]
            self._places += self._globals
        try:
            values = [table[name] for table, name in self._places]
        except KeyError:
            # As many attributes, of other names; or a variable that was deleted.
            self.read_again()
            return self.values()
        values += chain.from_iterable(self._collections)
        if self._cells or self._slots or self._arrays:
            values += [cell.cell_contents for cell in self._cells]
            values += [getattr(owner, name, None) for owner, name in self._slots]
            values += [array.tobytes() for array in self._arrays]
        return values

    def modules(self) -> list[nn.Module]:
        """Return the modules among the objects, and those that these hold or read."""
        return self._modules

    def named_values(self) -> list[tuple[str, Any]]:
        """Return the values of attributes and entries of dicts and lists, as they are now."""
        values = self.values()
        names = [str(name) for _, name in self._places]
        return [*zip(names + ["an entry"] * (len(values) - len(names)), values, strict=True)]

    def difference_from(self, values: list[Any]) -> str:
        """Return which value is another one than among these, in words."""
        names = [name for _, name in self._places]
        for name, one, two in zip(names, values, self.values(), strict=False):
            if constants_of([one]) != constants_of([two]):
                return f"{name} was {one!r:.40} and is {two!r:.40}"
        return "an attribute or a variable that it reads has changed"

    @contextmanager
    def restored(self) -> Iterator[None]:
        """Put back what passes in this block leave in attributes and in dicts.

        Where a function is recorded, they leave tensors without values.
        """
        tables = [table for table in self._tables if isinstance(table, dict)]
        tables_before = [dict(table) for table in tables]
        try:
            yield
        finally:
            for table, before in zip(tables, tables_before, strict=True):
                if len(table) != len(before) or not all(map(is_, table.values(), before.values())):
                    table.clear()
                    table.update(before)

    def _look_into(self, value: Any, *, depth: int) -> None:
        if id(value) in self._met or isinstance(value, PLAIN):
            return
        if isinstance(value, type):
            self._look_at_class(value, value, depth=depth)
            return
        self._met.add(id(value))
        if isinstance(value, nn.Module):
            for part in value.modules():
                if part is value or id(part) not in self._met:
                    self._met.add(id(part))
                    self._modules.append(part)
                    self._look_at_class(type(part), part, depth=depth)
                    self._look_through(vars(part), depth=depth)
        elif isinstance(value, partial):
            self._look_into((value.func, value.args, value.keywords), depth=depth)
        elif isinstance(value, types.MethodType):
            self._look_into(value.__self__, depth=depth)
            self._look_into(value.__func__, depth=depth)
        elif isinstance(value, types.FunctionType):
            self._look_around(value, depth=depth)
        elif isinstance(value, numpy.ndarray):
            self._arrays += [value] if value.size <= MOST_ENTRIES else []
        elif isinstance(value, Mapping):
            if len(value) <= MOST_ENTRIES:
                self._look_through(value, depth=depth)
        elif isinstance(value, list | tuple | deque | set | frozenset | bytearray):
            if len(value) <= MOST_ENTRIES:
                self._collections.append(value)
                for entry in value:
                    self._look_into(entry, depth=depth + 1)
        elif depth == 0 or (depth <= DEPTH and is_read_deeper(value)):
            self._look_at_class(type(value), value, depth=depth)
            if hasattr(value, "__dict__"):
                self._look_through(vars(value), depth=depth)

    def _look_at_class(self, kind: type, value: Any, *, depth: int) -> None:
        """Note what an object has of its classes, but for those of PyTorch and metapl."""
        for base in kind.__mro__:
            if not is_of_user(base):
                continue
            if id(base) not in self._met:
                self._met.add(id(base))
                self._tables.append(vars(base))
                for name, part in vars(base).items():
                    for function in functions_of(part) or [part]:
                        if not name.startswith("__") or isinstance(function, types.FunctionType):
                            self._look_into(function, depth=depth + 1)
            slots = vars(base).get("__slots__", ())
            for name in [slots] if isinstance(slots, str) else slots:
                self._slots.append((value, name))
                self._look_into(getattr(value, name, None), depth=depth + 1)

    def _look_through(self, table: Mapping[Any, Any], *, depth: int) -> None:
        """Note the entries of a table, and look into them."""
        self._tables.append(table)
        if depth < DEPTH:
            for name, part in table.items():
                if name not in ATTRIBUTES_OF_ALL_MODULES:
                    self._look_into(part, depth=depth + 1)

    def _look_around(self, function: types.FunctionType, *, depth: int) -> None:
        """Note the variables that a function reads of its file and of functions around it."""
        if not is_of_user(function):
            return
        # What it says after a dot, or in brackets: parts of variables by their names.
        names: list[str] = []
        codes = [function.__code__]
        for code in codes:
            names += [*code.co_names, *(part for part in code.co_consts if isinstance(part, str))]
            codes += [part for part in code.co_consts if isinstance(part, types.CodeType)]
        names = [*dict.fromkeys(names)]
        for cell in function.__closure__ or ():
            # A cell is empty until its name is bound.
            with suppress(ValueError):
                self._look_into(cell.cell_contents, depth=1)
                self._look_at_parts(cell.cell_contents, names, met=set())
                self._cells.append(cell)
        defaults = (function.__defaults__, function.__kwdefaults__)
        # Notebooks put the code of an edited file into the function that there is.
        self._slots += [(function, "__defaults__"), (function, "__code__")]
        self._look_into(defaults, depth=0)
        self._look_at_parts(function, names, met=set())
        for name in dict.fromkeys(name for code in codes for name in code.co_names):
            if name in function.__globals__:
                self._look_at_variable(function.__globals__, name, names, met=set())
            elif name in sys.modules and is_of_user(sys.modules[name]):
                # It is imported inside of the function.
                self._look_at_parts(sys.modules[name], names, met=set())

    def _look_at_variable(
        self, table: Mapping[str, Any], name: str, names: list[str], *, met: set[int]
    ) -> None:
        """Note a variable that a function reads, and what the function may read of it.

        Args:
            table: the variables of a file, or the attributes of an object or a class.
            names: those of parts that the function reads of its variables.
            met: the objects whose parts were looked at for this function.
        """
        value = table[name]
        if isinstance(value, types.ModuleType):
            if is_of_user(value):
                self._look_at_parts(value, names, met=met)
        elif not isinstance(value, types.BuiltinFunctionType):
            if (id(table), name) not in self._met_globals:
                self._met_globals.add((id(table), name))
                self._globals.append((table, name))
            self._look_into(value, depth=1)
            self._look_at_parts(value, names, met=met)

    def _look_at_parts(self, value: Any, names: list[str], *, met: set[int]) -> None:
        """Note what of a file, a class, an object or a dict has one of these names."""
        if isinstance(value, (*PLAIN, Tensor)) or id(value) in met:
            return
        met.add(id(value))
        tables = [value if isinstance(value, Mapping) else getattr(value, "__dict__", {})]
        tables += [vars(base) for base in type(value).__mro__ if is_of_user(base)]
        for name in names:
            for table in tables:
                if name in table and name not in ATTRIBUTES_OF_ALL_MODULES:
                    self._look_at_variable(table, name, names, met=met)


def functions_of(method: Any) -> list[Any]:
    """Return the functions of what a class holds: a method, a property, a static method."""
    if isinstance(method, property):
        return [method.fget] if method.fget else []
    if isinstance(method, staticmethod | classmethod):
        return [method.__func__]
    if isinstance(method, cached_property):
        return [method.func]
    return [method] if isinstance(method, types.FunctionType) else []


def modes_of(module: nn.Module) -> list[Any]:
    """Return what a forward may branch on, of a part of a network: mode, hooks, parts."""
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    hooks += [*module._backward_hooks.values(), *module._backward_pre_hooks.values()]
    return [module.training, [*map(id, hooks)], [*map(id, module._modules.values())]]


def is_read_deeper(value: Any) -> bool:
    """Return whether the attributes of an object that another one holds are read too."""
    if isinstance(value, Tensor):
        return False
    is_namespace = isinstance(value, types.SimpleNamespace | argparse.Namespace)
    return is_namespace or is_dataclass(value) or is_of_user(type(value))


# How deep attributes of attributes are looked at, and how long dicts and lists of them are.
DEPTH = 3
MOST_ENTRIES = 1_000

ATTRIBUTES_OF_ALL_MODULES = frozenset(vars(nn.Module()))


def is_of_user(value: Any) -> bool:
    """Return whether a class, function or file was written outside of Python, metapl and packages.

    What an installed package reads of itself is not looked at.
    """
    is_file = isinstance(value, types.ModuleType)
    name = value.__name__ if is_file else getattr(value, "__module__", None) or "builtins"
    module = value if is_file else sys.modules.get(name)
    package = name.split(".")[0]
    if package in sys.stdlib_module_names or package in ("torch", "metapl"):
        return False
    file = getattr(module, "__file__", None) or ""
    return "site-packages" not in file and "dist-packages" not in file


def constants_of(attributes: Sequence[Any]) -> list[Any]:
    """Return what of the values of attributes is a constant of a graph.

    That is numbers and texts, also in tuples, and which objects the others are.
    """
    constants: list[Any] = []
    for value in attributes:
        if isinstance(value, PLAIN):
            constants.append((type(value), value))
        elif isinstance(value, tuple):
            constants.append(constants_of(value))
        else:
            constants.append(id(value))
    return constants


def switches(device: torch.device) -> list[Any]:
    """Return the settings of PyTorch that a step depends on."""
    return [
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        float32_switches(device),
    ]


@dataclass
class Kind:
    """What a graph was made for, but for the tensors.

    Both are those that were read last and are the same to the graph as those that it was made with,
    so that the next ones are often the same objects.

    Attributes:
        arguments: their structure, shapes and numbers, and PyTorch's switches.
        attributes: the values of attributes, which are held here.
    """

    arguments: list[Any]
    attributes: list[Any]

    def is_of(self, arguments: list[Any], attributes: list[Any], *, exactly: bool = False) -> bool:
        """Return whether a graph of this kind serves these.

        Args:
            exactly: only where the attributes are the same objects.
        """
        if arguments != self.arguments:
            return False
        self.arguments = arguments
        if len(attributes) == len(self.attributes) and all(map(is_, attributes, self.attributes)):
            return True
        if exactly or constants_of(attributes) != constants_of(self.attributes):
            return False
        self.attributes = attributes
        return True


# --------------------------------------------------------------------------------------- functions


class Capture(NamedTuple):
    """A function as a compiled graph.

    Attributes:
        graph: takes the tensors of the arguments and those of ``held``, and returns others.
        held: tensors that were no arguments.
        given: how many tensors the graph takes.
        places: of the results' tensors, among those that the graph takes and returns.
        results: nested as the function returns them, with an :class:`At` for each tensor.
        operations: the graph as it was recorded.
    """

    kind: Kind
    graph: Callable[..., Sequence[Any]]
    held: list[Tensor]
    given: int
    places: list[int]
    results: Any
    operations: GraphModule | None = None

    def run(self, tensors: list[Tensor]) -> list[Tensor]:
        """Return the results' tensors, from those of the arguments."""
        given = tensors + self.held
        taken_and_returned = [*given, *self.graph(*given)]
        return [*map(taken_and_returned.__getitem__, self.places)]


class At(int):
    """The place of a tensor among those of a graph's results."""


def at_places(value: Any, tensors: Sequence[Any]) -> Any:
    """Return nested results with the tensors that are at their places.

    PyTorch's pytrees would take three times as long.
    """
    if type(value) is At:
        return tensors[value]
    if type(value) is dict:
        return {name: at_places(part, tensors) for name, part in value.items()}
    if type(value) in (list, tuple):
        return type(value)([at_places(part, tensors) for part in value])
    if hasattr(value, "_fields"):
        return type(value)(*[at_places(part, tensors) for part in value])
    if isinstance(value, PLAIN):
        return value
    if type(value) is HeldAt:
        return value.held(tensors)
    return pytree.tree_map_only(At, tensors.__getitem__, value)


class Captured(Generic[Result]):
    """A function of nested tensors as one graph for each kind of arguments that it is called with.

    A kind is what a graph was made for: nesting, shapes and numbers of the arguments, the
    attributes and variables that the function reads, and switches of PyTorch. It is called without
    a graph of autograd.

    Args:
        sources: objects whose attributes the function reads.
        is_compiled: whether Inductor compiles the graphs.
        looks_at_modes: whether each call looks at modes, hooks and parts of the sources. A trainer
            has looked at them before a compiled step.
        has_derivative: whether :meth:`compared` returns results with their graph. Their derivative
            is that of the numbers that the function computes: a graph of operations has those of
            the backward passes too, and no ``detach()``.
    """

    what = "a step"
    """What is recorded, for warnings."""
    mapped_over = "states"
    """What ``torch.func.vmap`` maps the function over, for errors."""

    def __init__(
        self,
        function: Callable[..., Result],
        device: torch.device,
        sources: Sequence[Any] = (),
        *,
        is_compiled: bool = True,
        looks_at_modes: bool = False,
        has_derivative: bool = False,
        holds_first: bool = False,
    ) -> None:
        self.function = function
        self.device = device
        self.is_compiled = is_compiled
        self.looks_at_modes = looks_at_modes
        self.has_derivative = has_derivative
        self.holds_first = holds_first
        self.attributes = Attributes(sources)
        # The latest last.
        self.kept: list[Capture] = []
        self.captures = 0
        # Whether the next graph is compared with the function, also where it is not new.
        self.is_doubted = False
        # How many further calls are compared where rounding drowns the difference.
        self.tries_left = TRIES

    def __call__(self, *arguments: Any) -> Result:
        capture, tensors = self.run(*arguments)
        result: Result = at_places(capture.results, tensors)
        return result

    def compared(self, *arguments: Any) -> Result:
        """Return the results of a graph that was compared with the function, also under vmap.

        A graph that is new is compared on these arguments, or on the first of what is mapped, and
        once more on other rows, where a function with a memory of its own has that of before.

        Raises: :class:`metapl.MetaplError` where the function cannot be recorded or comes out
            otherwise, and under a transform that differentiates results without a derivative.
        """
        if is_transformed() and not self.has_derivative and is_differentiated(()):
            raise MetaplError(self.text_of_derivative())
        captures = self.captures
        try:
            capture, tensors = self.find(*arguments)
        except NotRecorded as error:
            raise self.not_recorded(error) from error
        if (self.captures > captures or self.is_doubted) and has_values.get():
            self.is_doubted = False
            try:
                # In no mode either, such as that of a user's own recording.
                with no_transform(), _disable_current_modes(), self.attributes.restored():
                    first = pytree.tree_map_only(Tensor, first_of_mapped, arguments)
                    # All of these are compared, also behind one of which nothing can be told.
                    decided = [
                        self._compare(capture, values) for values in (first, rows_repeated(first))
                    ]
                if not all(decided):
                    self._compare_again()
            except BaseException:
                self.kept = [kept for kept in self.kept if kept is not capture]
                raise
        with torch.set_grad_enabled(self.has_derivative and torch.is_grad_enabled()):
            result: Result = at_places(capture.results, self.replay(capture, tensors))
        return result

    def _compare_again(self) -> None:
        """Let the next call compare its results too, for some calls; then warn."""
        self.is_doubted = self.tries_left > 0
        self.tries_left -= 1
        if not self.is_doubted:
            warnings.warn(
                f"cannot tell whether {self.what} comes out the same recorded, for rounding "
                f"drowns the difference. {DROWNED} Expected float64, or no graph",
                stacklevel=2,
            )

    def _compare(self, capture: Capture, arguments: Any) -> bool:
        """Refuse a graph that returns something else than the function, or a function that writes.

        A function may come out otherwise by rounding alone, such as a first step of Adam where a
        gradient is about as small as its ε. It does so without a graph too, at arguments that
        differ in their last digit, and repeats its bits at the same ones.

        No generator moves.

        Returns: False where rounding drowns the difference, so that nothing can be told.
        """
        tensors: list[Tensor] = []
        take_apart(arguments, tensors, [])
        copies = [t.detach().clone().requires_grad_(t.requires_grad) for t in tensors]
        versions = [t._version for t in copies]
        given = put_together(arguments, iter(copies))
        with replayed(RandomState.now(self.device)):
            wanted, structure = pytree.tree_flatten(self.function(*given))
        for t, version in zip(copies, versions, strict=True):
            if t._version != version:
                raise MetaplError(self.text_of_write(given, t))
        with replayed(RandomState.now(self.device)), torch.no_grad():
            results = at_places(capture.results, capture.run(tensors))
        found, structure_found = pytree.tree_flatten(results)
        if structure_found != structure:
            raise MetaplError(self.text_of_difference(structure_found, structure))
        factor = 100 if self.is_compiled else 1
        # The gradient of a bias before batch norm is 0, and comes out as rounding.
        sizes = [size_of(t) for t in wanted if isinstance(t, Tensor) and t.is_floating_point()]
        scale = max(sizes, default=0.0)
        others = [
            place
            for place, (one, two) in enumerate(zip(found, wanted, strict=True))
            if not is_equal(one, two, factor=factor, scale=scale)
        ]
        if not others:
            return True
        again = self._results(arguments, tensors, change=torch.clone)
        wanted_there = self._results(arguments, tensors, change=with_other_digits)
        repeats = all(map(is_equal, again, wanted))
        for place in others:
            one, two = found[place], wanted[place]
            if not repeats or not is_as_near(one, two, wanted_there[place]):
                raise MetaplError(self.text_of_difference(one, two))
        return False

    def _results(
        self, arguments: Any, tensors: Sequence[Tensor], *, change: Callable[[Tensor], Tensor]
    ) -> list[Any]:
        """Return what the function returns, in a list; no generator moves.

        Args:
            arguments: of the function, whose tensors are changed.
        """
        changed = [change(t.detach()).requires_grad_(t.requires_grad) for t in tensors]
        with replayed(RandomState.now(self.device)):
            return pytree.tree_leaves(self.function(*put_together(arguments, iter(changed))))

    def not_recorded(self, error: NotRecorded) -> BaseException:
        """Return the error that says why the function cannot be recorded."""
        reason = why_not_captured(error) or reason_of(error)
        if not is_transformed():
            return MetaplError(
                f"torch.autograd cannot differentiate through this step: {reason}; expected a "
                "network and losses that can be recorded, or detach() of what the step is given."
            )
        return MetaplError(
            f"torch.func.vmap cannot map this step: {reason}; expected a loop over the "
            f"{self.mapped_over}."
        )

    def text_of_derivative(self) -> str:
        """Return what to say where a transform differentiates the function."""
        return (
            "torch.func differentiates a step that has no derivative here; expected the step of "
            "functional(), which has, or metapl.hypergradient."
        )

    def text_of_write(self, arguments: Any, t: Tensor) -> str:
        """Return what to say of a function that writes to one of its arguments."""
        return f"the step writes to {described(t)} that it is given; expected a new tensor."

    def text_of_difference(self, found: Any, wanted: Any) -> str:
        """Return what to say where a graph returns something else than the function."""
        return (
            "the step comes out otherwise when it is recorded, as torch.func.vmap and derivatives "
            "through it need it; expected a function of its arguments and of torch's default "
            "generators, without NumPy's, and without numbers that it keeps; or a loop over the "
            f"{self.mapped_over}."
        )

    def inputs_of_constants(self, graph: GraphModule) -> list[Tensor]:
        """Return the tensors that a graph holds, which are its last arguments from now on."""
        return take_constants_as_inputs(graph)

    def run(self, *arguments: Any) -> tuple[Capture, Sequence[Any]]:
        """Return the tensors of the results, and the graph that they are of."""
        capture, tensors = self.find(*arguments)
        return capture, self.replay(capture, tensors)

    def before_capture(self, *arguments: Any) -> None:
        """Do what has to be done before a graph is made for these arguments: nothing."""

    def find(self, *arguments: Any) -> tuple[Capture, list[Tensor]]:
        """Return the graph for these arguments, and their tensors."""
        capture, kind, tensors = self._find(arguments)
        if capture is None:
            self.before_capture(*arguments)
            capture = self._capture(arguments, tensors, kind)
        return capture, tensors

    def replay(self, capture: Capture, tensors: list[Tensor]) -> Sequence[Any]:
        """Return the tensors of the results of a graph."""
        if torch.is_autocast_enabled(self.device.type):
            # The casts are operations of the graph.
            with torch.autocast(self.device.type, enabled=False):
                return capture.run(tensors)
        return capture.run(tensors)

    def _find(self, arguments: Any) -> tuple[Capture | None, list[Any], list[Tensor]]:
        """Return the graph for these arguments, what it is made for, and their tensors."""
        tensors: list[Tensor] = []
        kind = switches(self.device)
        take_apart(arguments, tensors, kind)
        if self.looks_at_modes:
            kind += chain.from_iterable(map(modes_of, self.attributes.modules()))
        values = self.attributes.values()
        if self.kept and self.kept[-1].kind.is_of(kind, values, exactly=True):
            return self.kept[-1], kind, tensors
        # Another object may be in the place of one that was looked into.
        self.attributes.read_again()
        values = self.attributes.values()
        for index in reversed(range(len(self.kept))):
            if self.kept[index].kind.is_of(kind, values):
                self.kept.append(self.kept.pop(index))
                return self.kept[-1], kind, tensors
        return None, kind, tensors

    def _capture(self, arguments: Any, tensors: list[Tensor], kind: list[Any]) -> Capture:
        """Capture the function for these arguments; nothing moves."""
        nested: list[Any] = []

        def on_tensors(*recorded: Tensor) -> list[Tensor]:
            returned = self.function(*put_together(arguments, iter(recorded)))
            numbers = count()
            nested.append(pytree.tree_map_only(Tensor, lambda _: At(next(numbers)), returned))
            leaves = pytree.tree_leaves(returned)
            return [leaf.detach() for leaf in leaves if isinstance(leaf, Tensor)]

        self._say_why(kind)
        try:
            with self.attributes.restored():
                graph = graph_of(on_tensors, tensors, has_derivatives=self.has_derivative)
        except (MetaplError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise NotRecorded(str(error)) from error
        held = self.inputs_of_constants(graph)
        if self.is_compiled:
            say_how_long(len(graph.graph.nodes), self.device)
        places = take_each_result_once(graph)
        compiled: Callable[..., Sequence[Any]] = graph
        if self.is_compiled:
            compiled = compiled_graph(graph, [*tensors, *held])
        # Other objects may be in the places of those that were looked into.
        self.attributes.read_again()
        whole_kind = Kind(kind, self.attributes.values())
        given = len(tensors) + len(held)
        results = self.with_held(nested[0])
        capture = Capture(whole_kind, compiled, held, given, places, results, operations=graph)
        self.kept.append(capture)
        del self.kept[:-MOST_KEPT]
        self.captures += 1
        return capture

    def with_held(self, results: Any) -> Any:
        """Return nested places of results; those of one that is held as :class:`HeldAt`."""
        if not self.holds_first:
            return results
        first, *others = results
        parts = (HeldAt(first), *others)
        return type(results)(*parts) if hasattr(results, "_fields") else parts

    def _say_why(self, kind: list[Any]) -> None:
        """Warn, once, of a function that is captured for the third time, and say why."""
        if self.captures != 2 or not self.kept:
            return
        difference = difference_of(self.kept[-1].kind.arguments, kind)
        if not difference:
            difference = self.attributes.difference_from(self.kept[-1].kind.attributes)
        instead = "; or leave compile out" if self.is_compiled else ""
        warnings.warn(
            f"{self.what} is recorded for the third time: {difference}. Each time takes as long as "
            f"the first, and {MOST_KEPT} are kept; expected few shapes (pad to a few lengths, drop "
            "the last short batch by drop_last=True), and few values of numbers that it "
            f"reads{instead}.",
            stacklevel=2,
        )


def difference_of(one: Sequence[Any], two: Sequence[Any]) -> str:
    """Return the first difference between the arguments of two kinds, in words; "" for none."""
    for entry, other in zip(one, two, strict=False):
        if entry == other:
            continue
        if isinstance(entry, Named) and isinstance(other, Named):
            return f"{entry.name} has changed"
        if is_of_held(entry) and is_of_held(other):
            return difference_of(entry, other)
        return f"what was {in_words(entry)} is {in_words(other)}"
    return ""


def is_of_held(entry: Any) -> bool:
    """Return whether an entry of a kind has those of :class:`Held` values in it."""
    if not isinstance(entry, tuple) or not entry:
        return False
    return isinstance(entry[0], tuple) and not isinstance(entry[0], torch.Size)


def in_words(entry: Any) -> str:
    """Return an entry of a kind in words."""
    if isinstance(entry, tuple) and entry and isinstance(entry[0], torch.Size):
        shape, _, dtype, device = entry
        return f"a tensor {tuple(shape)} of {str(dtype).removeprefix('torch.')} on {device}"
    if isinstance(entry, tuple) and len(entry) == 2:
        kind, value = entry
        if kind is dict:
            return f"a dict of {few([*map(str, value)], 3)}"
        if kind in PLAIN:
            return repr(value)
        return f"a {kind.__name__} of {value}"
    return repr(entry)


def say_how_long(operations: int, device: torch.device) -> None:
    """Say how long the compiler takes, and warn where most trainings gain less."""
    minutes = (8 + 0.037 * operations) / 60
    words = f"{60 * minutes:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes"
    what = f"compile=True compiles a step of {operations:,} operations, some {words} on one core"
    if operations <= MANY_OPERATIONS:
        LOG.info(
            "%s; it pays in a training whose eager steps take more than twice as long together",
            what,
        )
        return
    instead = "leave compile out"
    if device.type == "cuda":
        instead = 'compile="cudagraphs", which records the step in the time of three steps'
    warnings.warn(
        f"{what}, and the step of so large a network gains little by it on a CPU; expected less "
        f"than {MANY_OPERATIONS:,}, or {instead}",
        stacklevel=2,
    )


class Capturing:
    """A block that names what cannot be captured by a graph that is called there.

    Every step enters such a block, so this is a class: a generator would take longer.
    """

    def __enter__(self) -> None:
        pass

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if error is None or not isinstance(error, Exception):
            return
        # They stay disabled where a transform fails.
        torch._C._autograd._saved_tensors_hooks_enable()
        cause = error.__cause__ if isinstance(error, NotRecorded) else error
        if cause is not None and not isinstance(cause, MetaplError):
            explain(cause)
        reason = why_not_captured(error)
        if reason:
            text = f"compile=True cannot take this step: {reason}; leave compile out."
            raise MetaplError(text) from error
