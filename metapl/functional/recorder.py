"""A function of tensors, with the gradients that it takes inside, as one graph of operations.

``make_fx`` runs the function once, on tensors without values, and writes down its operations, those
of the backward passes that it asks for included. What comes out needs no autograd: it is replayed
without a graph, Inductor compiles it, and ``torch.func.vmap`` maps it.

A recording holds what the function asked Python for: shapes, modes, numbers. So each call asks
whether that is as it was (:class:`_Key`, and the attributes and variables that the function reads),
and where it is not, the function is recorded anew. The first call of each recording is compared
with the function itself: values were not there when it was recorded, so that nothing of them can be
in the graph. What changes later and no key sees is not found. Under ``vmap`` alone nothing is
compared.
"""

from __future__ import annotations

import functools
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.batch import named_leaves_of
from metapl.execution.checks import described
from metapl.execution.state import RandomState, replayed
from metapl.functional.capture import (
    MOST_KEPT,
    Attributes,
    Kind,
    WithoutDerivative,
    asks_for_value,
    compiled_graph,
    constants_in,
    graph_of,
    is_equal,
    is_transformed,
    rows_repeated,
)

_TEXT_OF_DERIVATIVE = (
    "the derivative of a recorded function was asked for, and a recording has none; expected the "
    "function itself, which torch.autograd differentiates to any order, or a function that takes "
    "this derivative inside, recorded as a whole."
)


def recorded(function: Callable[..., Any], *, compile: bool = False) -> Recorded:
    """Return a function of tensors as one graph, with the gradients that it takes inside.

    It is recorded at its first call, and anew for other shapes, types, layouts, numbers among the
    arguments, modes of modules that it reaches, attributes and variables that it reads, and
    settings of PyTorch; the second time a warning says why. Each recording is compared once with
    the function, where it is called outside of ``vmap``.

    Args:
        function: takes and returns tensors, in any nesting of tuples, lists and dicts; numbers and
            other values among the arguments are constants of a recording. It may call
            ``torch.autograd.grad``. Weights are arguments too
            (``torch.func.functional_call(net, params, (x,))``). Draws from torch's default
            generators are drawn anew in each call.
        compile: give the graph to Inductor, which takes some 8 s and 37 ms an operation of it.

    Returns: a :class:`Recorded`, which is called as the function is. A derivative through its
    results raises. ``torch.func.vmap`` maps it where it is not compiled.

    Cost: to record, a pass without values, some ms an operation; a call then saves the Python and
    the autograd of the function, about half of the time of small ones.

    Raises: :class:`metapl.MetaplError` where the function reads a value on the host, writes to an
    argument, depends on a tensor that is no argument, or comes out otherwise when it is replayed.

    >>> import torch
    >>> net = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
    >>> def penalty(params, x):
    ...     x = x.detach().requires_grad_()
    ...     out = torch.func.functional_call(net, params, (x,)).sum()
    ...     (slope,) = torch.autograd.grad(out, x, create_graph=True)
    ...     loss = (slope.norm(dim=1) - 1).square().mean()
    ...     return loss, torch.autograd.grad(loss, list(params.values()), allow_unused=True)
    >>> step = recorded(penalty)
    >>> loss, gradients = step(dict(net.named_parameters()), torch.randn(16, 4))
    >>> loss.shape, [None if g is None else tuple(g.shape) for g in gradients]
    (torch.Size([]), [(8, 4), (8,), (1, 8), None])
    """
    return Recorded(function, compile=compile)


class _Key(NamedTuple):
    """What a recording holds of Python's state: it serves calls with an equal one.

    Attributes:
        structure: of the arguments.
        arguments: shape, strides, type, device and ``requires_grad`` of each tensor among them; of
            anything else the value itself.
        modes: ``training`` and the number of hooks of the modules that the function reaches, and
            which of their parameters require a gradient.
        settings: of PyTorch.
    """

    structure: Any
    arguments: tuple[Any, ...]
    modes: tuple[Any, ...]
    settings: tuple[Any, ...]

    def difference(self, other: _Key) -> str:
        """Return what is other in another key, in words."""
        if self.structure != other.structure or len(self.arguments) != len(other.arguments):
            return "the arguments are nested otherwise"
        for one, two in zip(self.arguments, other.arguments, strict=True):
            if one != two:
                return f"an argument was {_words(one)} and is {_words(two)}"
        if self.modes != other.modes:
            return "a module's mode, hooks or frozen parameters have changed"
        return "a setting of PyTorch has changed: autocast, default type, determinism or kernels"


class _Recording(NamedTuple):
    """A graph, and how its results are nested.

    Attributes:
        graph: as it was recorded.
        run: takes the tensors among the arguments, and returns those among the results.
        places: of the tensors among the leaves of the arguments.
        results: the leaves of the results, with the type in the place of each tensor.
        structure: of the results.
        kind: the attributes and variables that the function read.
    """

    graph: GraphModule
    run: Callable[..., Any]
    places: list[int]
    results: list[Any]
    structure: Any
    kind: Kind

    def with_results(self, tensors: Any) -> Any:
        """Return tensors as the function returns them."""
        leaves = iter(tensors)
        filled = [next(leaves) if kind is Tensor else kind for kind in self.results]
        return pytree.tree_unflatten(filled, self.structure)


class Recorded:
    """A recorded function (:func:`recorded`).

    Attributes:
        recordings: how often it was recorded.
    """

    def __init__(self, function: Callable[..., Any], *, compile: bool = False) -> None:
        functools.update_wrapper(self, function, updated=())
        self.function = function
        self.compile = compile
        self.recordings = 0
        self._modules = [*_modules_of(function)]
        self._kept: dict[_Key, _Recording] = {}
        # Those that were made under vmap, where nothing can be compared.
        self._uncompared: set[_Key] = set()
        parts = [part for module in self._modules for part in module.modules()]
        self._attributes = Attributes([*parts, function])
        self._has_warned = False

    def __call__(self, *args: Any, **options: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, options))
        key = self._key(leaves, structure)
        recording = self._kept.get(key)
        if recording is None or not self._reads_the_same(recording):
            recording = self._record(key, leaves, structure)
        if key in self._uncompared and not is_transformed():
            self._compare_twice(recording, leaves, structure)
            self._uncompared.discard(key)
        tensors = [leaves[place] for place in recording.places]
        if torch.is_grad_enabled() and any(map(_REQUIRES_GRAD, tensors)):
            without = WithoutDerivative.apply(recording.run, _TEXT_OF_DERIVATIVE, *tensors)
            return recording.with_results(without)
        with torch.no_grad():
            return recording.with_results(recording.run(*tensors))

    def graph(self) -> GraphModule:
        """Return the newest graph, to be read: ``print(step.graph().code)``."""
        if not self._kept:
            raise MetaplError("nothing was recorded yet; expected a call first.")
        return [*self._kept.values()][-1].graph

    def _key(self, leaves: list[Any], structure: Any) -> _Key:
        arguments = []
        for leaf in leaves:
            if isinstance(leaf, Tensor):
                arguments.append(_kind_of(leaf))
            else:
                arguments.append(_constant(leaf))
        modes = []
        for module in self._modules:
            modes += [*_modes_of(module)]
        return _Key(structure, tuple(arguments), tuple(modes), _settings())

    def _reads_the_same(self, recording: _Recording) -> bool:
        """Return whether attributes and variables that the function reads are as they were."""
        if recording.kind.is_of([], self._attributes.values(), exactly=True):
            return True
        self._attributes.read_again()
        return recording.kind.is_of([], self._attributes.values())

    def _record(self, key: _Key, leaves: list[Any], structure: Any) -> _Recording:
        """Record the function for this key."""
        self._say_why(key)
        places = [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        if not places:
            raise MetaplError(f"{_name(self.function)} was given no tensor; expected one at least.")
        recording = self._recorded(leaves, structure, places)
        self._kept.pop(key, None)
        while len(self._kept) >= MOST_KEPT:
            del self._kept[next(iter(self._kept))]
        self._uncompared &= {*self._kept}
        if is_transformed():
            self._uncompared.add(key)
        else:
            self._compare_twice(recording, leaves, structure)
        self._kept[key] = recording
        self.recordings += 1
        return recording

    def _say_why(self, key: _Key) -> None:
        """Warn, once, of a function that is recorded for the third time, and say why."""
        if self.recordings < 2 or self._has_warned:
            return
        self._has_warned = True
        newest = [*self._kept][-1]
        warnings.warn(
            f"{_name(self.function)} is recorded for the third time: {newest.difference(key)}. "
            f"Each recording costs as much as the first; {MOST_KEPT} are kept.",
            stacklevel=4,
        )

    def _recorded(self, leaves: list[Any], structure: Any, places: list[int]) -> _Recording:
        """Return the graph of the function for arguments of these kinds."""
        examples = [leaves[place] for place in places]
        results: list[Any] = []
        structures: list[Any] = []

        def on_tensors(*tensors: Tensor) -> list[Tensor]:
            arguments = list(leaves)
            for place, t in zip(places, tensors, strict=True):
                arguments[place] = t
            args, options = pytree.tree_unflatten(arguments, structure)
            returned, structure_of_results = pytree.tree_flatten(self.function(*args, **options))
            structures.append(structure_of_results)
            results.extend(Tensor if isinstance(leaf, Tensor) else leaf for leaf in returned)
            return [leaf.detach() for leaf in returned if isinstance(leaf, Tensor)]

        device = examples[0].device
        try:
            with torch.enable_grad(), self._attributes.restored():
                graph = graph_of(on_tensors, examples)
        except MetaplError:
            raise
        except Exception as error:
            if asks_for_value(error):
                raise MetaplError(
                    f"{_name(self.function)} reads a value of a tensor on the host "
                    f"({reason_of(error)}), which no graph can; expected torch.where and the like, "
                    "or the function as it is."
                ) from error
            raise
        self._refuse_constants(graph)
        run: Callable[..., Any] = graph
        if self.compile:
            run = compiled_graph(graph, examples)
        if torch.is_autocast_enabled(device.type):
            # The casts are operations of the graph.
            run = partial(_without_autocast, run, device.type)
        self._attributes.read_again()
        kind = Kind([], self._attributes.values())
        return _Recording(graph, run, places, results, structures[0], kind)

    def _refuse_constants(self, graph: GraphModule) -> None:
        """Refuse a graph that holds tensors that were no arguments, but for literals."""
        names = {id(t): name for name, t in _tensors_of(self.function)}
        found = [names.get(id(t), described(t)) for t in constants_in(graph).values()]
        if found:
            raise MetaplError(
                f"{_name(self.function)} reads {few(found, 3)}, which no argument holds, so that a "
                "recording would keep it as it is; expected it among the arguments, such as "
                "params of torch.func.functional_call(net, params, (x,))."
            )

    def _compare_twice(self, recording: _Recording, leaves: list[Any], structure: Any) -> None:
        """Refuse a recording that returns something else than the function, or writes.

        The second time, on other rows, a function with a memory of its own has that of the first.
        """
        with self._attributes.restored():
            for values in (leaves, rows_repeated(leaves)):
                self._compare(recording, values, structure)

    def _compare(self, recording: _Recording, leaves: list[Any], structure: Any) -> None:
        """Refuse a recording that returns something else than the function, or writes."""
        copies = [leaf.detach().clone() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for leaf, copied in zip(leaves, copies, strict=True):
            if isinstance(leaf, Tensor):
                copied.requires_grad_(leaf.requires_grad)
        device = leaves[recording.places[0]].device
        versions = [copies[place]._version for place in recording.places]
        args, options = pytree.tree_unflatten(copies, structure)
        with replayed(RandomState.now(device)), torch.enable_grad():
            expected = self.function(*args, **options)
        self._refuse_writes(recording, copies, versions, structure)
        with replayed(RandomState.now(device)), torch.no_grad():
            tensors = recording.run(*(leaves[place] for place in recording.places))
        found, structure_found = pytree.tree_flatten(recording.with_results(tensors))
        wanted, structure_wanted = pytree.tree_flatten(expected)
        if structure_found != structure_wanted:
            raise MetaplError(
                f"{_name(self.function)} returned another nesting when it was recorded "
                f"({structure_found}) than by itself ({structure_wanted}); expected the same."
            )
        for one, two in zip(found, wanted, strict=True):
            if not is_equal(one, two, factor=100 if self.compile else 1):
                raise MetaplError(
                    f"{_name(self.function)} returns {_beside(two, one)} by itself and recorded, "
                    "on the same draws; expected a function of its arguments and of torch's "
                    "default generators, without NumPy's, and without numbers that it keeps."
                )

    def _refuse_writes(
        self, recording: _Recording, copies: list[Any], versions: list[int], structure: Any
    ) -> None:
        """Refuse a function that has written to an argument."""
        args, options = pytree.tree_unflatten(copies, structure)
        names = {id(t): name for name, t in named_leaves_of((*args, *options.values()))}
        for place, version in zip(recording.places, versions, strict=True):
            if copies[place]._version != version:
                raise MetaplError(
                    f"{_name(self.function)} writes to its argument{names[id(copies[place])]} in "
                    "place; expected a new tensor, which it returns."
                )


_REQUIRES_GRAD = attrgetter("requires_grad")


def _without_autocast(run: Callable[..., Any], device_type: str, *tensors: Tensor) -> Any:
    with torch.autocast(device_type, enabled=False):
        return run(*tensors)


def _kind_of(t: Tensor) -> tuple[Any, ...]:
    return (t.shape, t.stride(), t.dtype, t.device, t.requires_grad)


def _words(kind: Any) -> str:
    """Return an argument's part of a key in words."""
    if isinstance(kind, tuple) and len(kind) == 5 and isinstance(kind[0], torch.Size):
        shape, _, dtype, device, _ = kind
        return f"{tuple(shape)} of {str(dtype).removeprefix('torch.')} on {device}"
    _, value = kind
    return repr(value)


def _constant(value: Any) -> tuple[type, Any]:
    """Return an argument that is no tensor for a key, with its type: 2, 2.0 and True are equal.

    A value without a hash, such as an array or a set, may change in place, which no key would see.
    """
    try:
        hash(value)
    except TypeError as error:
        raise MetaplError(
            f"an argument is {described(value)}, which a recording cannot know again; expected "
            "tensors, and other values that do not change, such as numbers and words."
        ) from error
    return type(value), value


def _settings() -> tuple[Any, ...]:
    """Return the settings of PyTorch that a function's operations depend on."""
    cuda: Any = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(),
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
    )


def _modes_of(module: nn.Module) -> Iterator[Any]:
    """Yield what a forward may branch on, of each part of a module."""
    for part in module.modules():
        yield part.training
        yield len(part._forward_hooks) + len(part._forward_pre_hooks)
        yield tuple(p is not None and p.requires_grad for p in part._parameters.values())


def _reached(function: Any) -> Iterator[tuple[str, Any]]:
    """Yield what a function reaches besides its arguments, by name: closures, globals, self."""
    while isinstance(function, partial):
        yield from ((str(number), value) for number, value in enumerate(function.args))
        yield from function.keywords.items()
        function = function.func
    if isinstance(function, types.MethodType):
        yield "self", function.__self__
        function = function.__func__
    if isinstance(function, types.FunctionType):
        names = inspect.getclosurevars(function)
        yield from names.nonlocals.items()
        yield from names.globals.items()
    elif isinstance(function, nn.Module):
        yield "", function
    elif hasattr(function, "__dict__"):
        yield from vars(function).items()


def _modules_of(function: Any) -> Iterator[nn.Module]:
    for _, value in _reached(function):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, nn.Module):
                yield leaf
            elif isinstance(leaf, types.FunctionType | types.MethodType) and leaf is not function:
                yield from (module for _, module in _reached(leaf) if isinstance(module, nn.Module))


def _tensors_of(function: Any) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors that a function reaches besides its arguments, by their names."""
    for name, value in _reached(function):
        for leaf in pytree.tree_leaves(value):
            if isinstance(leaf, Tensor):
                yield f"the tensor {name}", leaf
            elif isinstance(leaf, nn.Module):
                for place, t in leaf.state_dict(keep_vars=True).items():
                    yield f"{name}.{place}".removeprefix("."), t


def _beside(wanted: Any, found: Any) -> str:
    """Return two results in words."""
    if isinstance(wanted, Tensor) and isinstance(found, Tensor) and wanted.shape == found.shape:
        gap = float((wanted.detach() - found).abs().max()) if wanted.numel() else 0.0
        return f"tensors of shape {tuple(wanted.shape)} that are up to {gap:.3g} apart"
    return f"{described(wanted)} and {described(found)}"


def _name(function: Any) -> str:
    return getattr(function, "__name__", type(function).__name__)
