"""Functions of tensors as graphs of operations, and such graphs compiled.

``make_fx`` runs a function once, on tensors without values, and writes down its operations, those
of the backward passes that it asks for included. Inductor compiles what comes out. So the compiler
reads no Python, of metapl's or of anybody's.
"""

from __future__ import annotations

import copy
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from metapl.errors import MetaplError, reason_of, warn
from metapl.execution.checks import no_values
from metapl.execution.numerics import HALF
from metapl.execution.state import RandomState, replayed
from metapl.functional.transforms import no_transform

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
    "DynamicOutputShape",
    "fake",
    "Fake",
    "item()",
    "nonzero",
    ".numpy()",
)

# What autograd says of an operation without a derivative.
_NO_DERIVATIVE = re.compile(r"derivative for (aten::\w+) is not implemented")


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
                reading_no_values(function),
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


class ReadsValue(RuntimeError):
    """A function reads a value on the host: item()."""


class ReadNoValues(TorchFunctionMode):
    """Refuse to read on the host what a tensor holds that was no argument, and so has values.

    Attributes:
        error_at_read: the error where a value was asked for, which a function may have caught.
    """

    error_at_read: Exception | None = None

    READERS = frozenset(
        [Tensor.item, Tensor.tolist, Tensor.numpy, Tensor.__float__, Tensor.__int__]
        + [Tensor.__bool__, Tensor.__index__, Tensor.__complex__]
    )

    def __torch_function__(
        self, function: Any, types: Any, arguments: Any = (), options: Any = None
    ) -> Any:
        try:
            if function in self.READERS and type(arguments[0]) in (Tensor, torch.nn.Parameter):
                raise ReadsValue("item() of a tensor that is no argument")
            return function(*arguments, **(options or {}))
        except Exception as error:
            if asks_for_value(error):
                self.error_at_read = error
            raise


def reading_no_values(function: Callable[..., list[Tensor]]) -> Callable[..., list[Tensor]]:
    """Return a function that refuses to read values of tensors on the host."""

    def on_tensors(*tensors: Tensor) -> list[Tensor]:
        with ReadNoValues() as mode:
            returned = function(*tensors)
        if mode.error_at_read is not None:
            raise mode.error_at_read
        return returned

    return on_tensors


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


def with_sums_apart(graph: GraphModule) -> GraphModule:
    """Return a copy of a graph whose products of matrices Inductor joins with no sum.

    Joined, a product is ``addmm``, which on a CPU first copies the summand into its result. Apart,
    the sum becomes a part of the kernel that reads it. In half precision an ``addmm`` that the
    network takes stays one, since it rounds once.
    """
    graph = copy.deepcopy(graph)
    aten = torch.ops.aten
    for node in [*graph.graph.nodes]:
        is_plain = node.target is aten.addmm.default and not node.kwargs
        if is_plain and node.meta["val"].dtype not in HALF:
            summand, *factors = node.args
            with graph.graph.inserting_before(node):
                product = graph.graph.call_function(aten.mm.default, tuple(factors))
                total = graph.graph.call_function(aten.add.Tensor, (product, summand))
            node.replace_all_uses_with(total)
            graph.graph.erase_node(node)
    for node in [*graph.graph.nodes]:
        if node.target is aten.mm.default:
            # A change of shape, and back, which is no operation where it is compiled.
            with graph.graph.inserting_after(node):
                longer = graph.graph.call_function(aten.unsqueeze.default, (node, 0))
            with graph.graph.inserting_after(longer):
                same = graph.graph.call_function(aten.squeeze.dim, (longer, 0))
            node.replace_all_uses_with(same)
            longer.args = (node, 0)
    graph.recompile()
    return graph


def backend_of(device: torch.device) -> dict[str, Any]:
    """Return the options of Inductor for steps of a fraction of a millisecond.

    Half of such a step would go into Python around the kernels. Inductor's own kernels would draw
    other dropout masks than PyTorch's. They would also leave out a cast to half precision that is
    cast back, by which Muon rounds its steps. On a GPU they do: there the option that keeps such
    casts also forbids to fuse products and sums of float32.
    """
    is_cpu = device.type == "cpu"
    return {
        "fallback_random": True,
        "emulate_precision_casts": is_cpu,
        "cpp_wrapper": is_cpu,
        "size_asserts": False,
        "alignment_asserts": False,
    }


def compiled_graph(graph: GraphModule, examples: Sequence[Tensor]) -> Callable[..., Sequence[Any]]:
    """Return a graph as Inductor compiles it, for tensors of the kinds of these."""
    device = examples[0].device
    if device.type == "cpu":
        graph = with_sums_apart(graph)
    with warnings.catch_warnings(), torch.no_grad():
        # Inductor warns while it is imported.
        warnings.simplefilter("ignore", DeprecationWarning)
        from torch import _inductor

        try:
            compiled: Callable[..., Sequence[Any]] = _inductor.standalone_compile(
                graph,
                [t.detach() for t in examples],
                dynamic_shapes="from_example_inputs",
                options={"config_patches": backend_of(device)},
            )
        except ImportError as error:
            raise MetaplError(
                f"Inductor's cache has a file that cannot be loaded ({reason_of(error)}); "
                "expected it whole, or removed: it is then compiled anew."
            ) from error
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
        # What torch says of it names its own numbers.
        is_of_torch = "data-dependent" in str(error)
        where = "" if is_of_torch else f" ({reason_of(error)})"
        return f"a network, a loss or the mode reads the value of a tensor on the host{where}"
    return ""


def say(text: str) -> None:
    """Say something beside an answer: in a terminal, else to those who listen to this logger."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
    else:
        logging.getLogger("metapl").info(text)


def say_how_long(operations: int, device: torch.device) -> None:
    """Say how long the compiler takes, and warn where most trainings gain less."""
    minutes = (8 + 0.037 * operations) / 60
    words = f"{60 * minutes:.0f} seconds" if minutes < 2 else f"{minutes:.0f} minutes"
    what = f"compile=True compiles a step of {operations:,} operations, some {words} on one core"
    if operations <= MANY_OPERATIONS:
        pays = "it pays in a training whose eager steps take more than twice as long together"
        say(f"{what}; {pays}")
        return
    instead = "leave compile out"
    if device.type == "cuda":
        instead = 'compile="cudagraphs", which records the step in the time of three steps'
    warn(
        f"{what}, and the step of so large a network gains little by it on a CPU; expected less "
        f"than {MANY_OPERATIONS:,}, or {instead}",
    )
