"""A function of tensors, with the gradients that it takes inside, as one graph of operations.

``make_fx`` runs the function once, on tensors without values, and writes down its operations, those
of the backward passes that it asks for included. What comes out needs no autograd: it is replayed
without a graph, Inductor compiles it, and ``torch.func.vmap`` maps it.

A recording holds what the function asked Python for: shapes, modes, numbers. So each call asks
whether that is as it was (:class:`metapl.functional.capture.Captured`), and where it is not, the
function is recorded anew. Each recording is compared with the function itself: values were not
there when it was recorded, so that nothing of them can be in the graph. What changes later and no
key sees is not found.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable, Hashable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

from metapl.errors import MetaplError, few, reason_of
from metapl.execution.batch import named_leaves_of
from metapl.execution.checks import described, unexpected
from metapl.functional.attributes import (
    PLAIN,
    Attributes,
    cause_in_checkpoints,
    constant,
    constants_of,
    modes_of,
)
from metapl.functional.capture import Captured
from metapl.functional.kinds import Constants, Named
from metapl.functional.operations import NotRecorded, asks_for_value, constants_in
from metapl.functional.transforms import without_derivative

MAKES_SPARSE = (
    "makes a sparse tensor, which no graph can; expected dense ones, such as "
    "torch.nn.Embedding(sparse=False), or the function as it is."
)


def recorded(function: Callable[..., Any], *, compile: bool = False) -> Recorded:
    """Return a function of tensors as one graph, with the gradients that it takes inside.

    It is recorded at its first call, and anew for other shapes, types, layouts, numbers among the
    arguments, modes of modules that it reaches, attributes and variables that it reads, and
    settings of PyTorch; the third time a warning says why. Each recording is compared twice with
    the function, once on other rows, where it is called outside of ``vmap``. A number of
    ``os.environ``, ``globals()``, a ``ContextVar``, an iterator, a cache, a collection of more than
    1,000 entries, an attribute of a tensor, or four attributes deep stays that of the recording,
    and so does whether gradients are enabled: they are. A replay writes to nothing but its results:
    an entry that the function would append to a list is not there.

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


class Recorded(Captured[Any]):
    """A recorded function (:func:`recorded`).

    Attributes:
        recordings: how often it was recorded.
    """

    def __init__(self, function: Callable[..., Any], *, compile: bool = False) -> None:
        functools.update_wrapper(self, function, updated=())
        self._wrapped = function
        self.what = getattr(function, "__name__", type(function).__name__)
        super().__init__(
            self._on_tensors,
            torch.device("cpu"),
            [function],
            is_compiled=compile,
            looks_at_modes=True,
        )

    @property
    def recordings(self) -> int:
        """How often the function was recorded."""
        return self.captures

    def __call__(self, *args: Any, **options: Any) -> Any:
        leaves, structure = pytree.tree_flatten((args, options))
        # A recording has no views of conjugates.
        leaves = [leaf.resolve_conj() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        if not tensors:
            raise MetaplError(f"{self.what} was given no tensor; expected one at least.")
        if any(t.layout != torch.strided for t in tensors):
            raise MetaplError(f"{self.what} was given a sparse tensor; expected dense ones.")
        self.device = tensors[0].device
        constants = self._constants(leaves, structure)
        results = self.compared(constants, tensors)
        return without_derivative(results, of=tensors, text=self.text_of_derivative())

    def __get__(self, owner: Any, _: type | None = None) -> Any:
        """Return the function of a class as a method of an object."""
        return self if owner is None else partial(self, owner)

    def graph(self) -> GraphModule:
        """Return the newest graph, to be read: ``print(step.graph().code)``."""
        operations = self.kept[-1].operations if self.kept else None
        if operations is None:
            raise MetaplError("nothing was recorded yet; expected a call first.")
        return operations

    def _on_tensors(self, constants: Constants, tensors: list[Tensor]) -> Any:
        """Return what the function returns for these tensors among its arguments."""
        # One that is given at two places is one tensor in the function too.
        arguments = [leaf for leaf in constants.value[0] if isinstance(leaf, Tensor)]
        tensors = [tensors[place] for place in _first_places(arguments)]
        for t, argument in zip(tensors, arguments, strict=True):
            if isinstance(argument, nn.Parameter):
                # By which PyTorch knows a parameter of any class of tensors.
                t._is_param = True
        args, options = _arguments(constants, tensors)
        with torch.enable_grad():
            results = self._wrapped(*args, **options)
        for leaf in pytree.tree_leaves(results):
            if not isinstance(leaf, (Tensor, *PLAIN)):
                expected = "tensors, numbers and words, in tuples, lists and dicts"
                raise unexpected(f"{self.what} returns", leaf, expected)
            if isinstance(leaf, Tensor) and leaf.layout != torch.strided:
                # Not every version of torch refuses to record it.
                raise MetaplError(f"{self.what} {MAKES_SPARSE}")
        return results

    def _constants(self, leaves: list[Any], structure: Any) -> Constants:
        """Return what of the arguments and of PyTorch's settings is a constant of a recording."""
        kind: list[Any] = [Named("the nesting of the arguments", structure)]
        kind += [_constant(leaf) for leaf in leaves if not isinstance(leaf, Tensor)]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        asked = [(t.requires_grad, isinstance(t, nn.Parameter)) for t in tensors]
        kind.append(Named("which of the arguments require a gradient, or are parameters,", asked))
        kind.append(Named("which of the arguments are one tensor", _first_places(tensors)))
        frozen = [
            p is not None and p.requires_grad
            for part in self.attributes.modules()
            for p in part._parameters.values()
        ]
        kind.append(Named("which parameters of a module are frozen", frozen))
        kind.append(Named("autocast, or a switch of kernels,", _settings()))
        return Constants(kind, (leaves, structure))

    def inputs_of_constants(self, graph: GraphModule) -> list[Tensor]:
        """Refuse a graph that holds tensors that were no arguments, but for literals."""
        names = {id(t): name for name, t in _tensors_of(self._wrapped)}
        found = [names.get(id(t), described(t)) for t in constants_in(graph).values()]
        if found:
            raise MetaplError(
                f"{self.what} reads {few(found, 3)}, which a recording would keep as it is; "
                "expected it among the arguments (torch.func.functional_call(net, params, (x,)))."
            )
        return []

    def not_recorded(self, error: NotRecorded) -> BaseException:
        """Return the error that says why the function cannot be recorded."""
        cause = error.__cause__ or error
        if "SparseTensorImpl" in str(cause):
            return MetaplError(f"{self.what} {MAKES_SPARSE}")
        if "torch._C.Generator" in str(cause):
            return MetaplError(
                f"{self.what} draws from a generator, which graphs of this version of torch cannot "
                "hold; expected the default ones, without NumPy's or a torch.Generator of its own."
            )
        if not asks_for_value(cause):
            return cause
        return MetaplError(
            f"{self.what} reads a value of a tensor on the host ({reason_of(cause)}), which no "
            "graph can; expected torch.where and the like, validate_args=False of a distribution, "
            "or the function as it is."
        )

    def text_of_derivative(self) -> str:
        """Return what to say where the function's results are differentiated."""
        return (
            "the derivative of a recorded function was asked for, and a recording has none; "
            "expected the function itself, which torch.autograd differentiates to any order, or a "
            "function that takes this derivative inside, recorded as a whole."
        )

    def text_of_write(self, arguments: Any, t: Tensor) -> str:
        """Return what to say of a function that writes to one of its arguments."""
        args, options = _arguments(*arguments)
        named = named_leaves_of((*args, *options.values()))
        name = next(name for name, leaf in named if leaf is t)
        return f"{self.what} writes to its argument{name} in place; expected a new tensor."

    def text_of_difference(self, found: Any, wanted: Any) -> str:
        """Return what to say where a recording returns something else than the function."""
        cause = cause_in_checkpoints(self.attributes.modules())
        return (
            f"{self.what} returns {_beside(wanted, found)} by itself and recorded, on the same "
            f"draws{cause}; expected a function of its arguments and of torch's default "
            "generators, without NumPy's or a torch.Generator of its own, and without numbers that "
            "it keeps."
        )


def _arguments(constants: Constants, tensors: list[Tensor]) -> Any:
    """Return the arguments of a function, by position and by name, with these tensors in them."""
    leaves, structure = constants.value
    given = iter(tensors)
    filled = [next(given) if isinstance(leaf, Tensor) else leaf for leaf in leaves]
    return pytree.tree_unflatten(filled, structure)


class Reads:
    """An argument that is an object, a module or a function, and what is read of it.

    It is held, so that no other object has its address.
    """

    def __init__(self, value: Hashable) -> None:
        attributes = Attributes([value])
        self.values = [value, *attributes.values()]
        self.modes = [*map(modes_of, attributes.modules())]
        weights = [p for part in attributes.modules() for p in part._parameters.values()]
        self.modes.append([p is not None and p.requires_grad for p in weights])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Reads) or self.modes != other.modes:
            return False
        return constants_of(self.values) == constants_of(other.values)


def _constant(value: Any) -> Any:
    """Return an argument that is no tensor for a key.

    A value without a hash, such as an array or a set, may change in place, which no key would see.
    """
    if isinstance(value, PLAIN):
        return constant(value)
    try:
        hash(value)
    except TypeError as error:
        expected = "tensors, and other values that do not change, such as numbers and words"
        raise unexpected("an argument is", value, expected) from error
    return Named("what an argument that is no tensor reads", Reads(value))


def _first_places(tensors: list[Tensor]) -> list[int]:
    """Return the first place of each of these tensors among them."""
    places: dict[int, int] = {}
    return [places.setdefault(id(t), place) for place, t in enumerate(tensors)]


def _settings() -> tuple[Any, ...]:
    """Return the settings of PyTorch that a function's operations depend on.

    Those that are no device's, and no kernel's of attention, are among the ``switches`` of a kind.
    """
    cuda: Any = torch.backends.cuda
    return (
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_enabled("cuda"),
        torch.get_autocast_dtype("cuda"),
        cuda.math_sdp_enabled(),
        cuda.flash_sdp_enabled(),
        cuda.mem_efficient_sdp_enabled(),
    )


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
        gap = float((wanted - found).detach().abs().max()) if wanted.numel() else 0.0
        return f"tensors of shape {tuple(wanted.shape)} that are up to {gap:.3g} apart"
    return f"{described(wanted)} and {described(found)}"
