"""What a graph is made for: nested arguments, taken apart, and the switches of PyTorch."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import count
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from metapl.errors import few
from metapl.execution.checks import unexpected
from metapl.execution.numerics import float32_switches
from metapl.execution.state import HOOKS_EVERYWHERE
from metapl.functional.attributes import PLAIN, constant, constants_of

SEQUENCES = (tuple, list)


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

    Attributes:
        places: of its tensors.
        nest: the value, with the places of its tensors among these alone.
    """

    def __init__(self, value: Any) -> None:
        numbers = count()
        self.places = [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, At)]
        self.nest = pytree.tree_map_only(At, lambda _: At(next(numbers)), value)
        # A graph returns tensors of the same kinds each time: those of the first time.
        self._kind: tuple[Any, ...] | None = None

    def held(self, results: Sequence[Any]) -> Held:
        """Return the value among these results."""
        tensors = [results[place] for place in self.places]
        together = partial(at_places, self.nest)
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
        kind.append(constant(value))
    elif isinstance(value, Constants):
        kind += value.kind
    else:
        expected = "tensors and numbers in tuples, lists and dicts"
        raise unexpected("a batch of a graph has a part", value, expected)


def put_together(value: Any, tensors: Iterator[Tensor]) -> Any:
    """Return a nested value with other tensors, in the order of :func:`take_apart`."""
    return with_each(value, lambda _: next(tensors))


def with_each(value: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """Return a nested value with ``function`` of its tensors, in the order of :func:`take_apart`.

    PyTorch's pytrees would take longer.
    """
    if isinstance(value, Tensor):
        return function(value)
    if isinstance(value, dict):
        return {name: with_each(part, function) for name, part in value.items()}
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*[with_each(part, function) for part in value])
    if isinstance(value, tuple | list):
        return type(value)([with_each(part, function) for part in value])
    if isinstance(value, Held):
        return with_each(value.value, function)
    return value


def switches(device: torch.device) -> list[Any]:
    """Return the settings of PyTorch that a step depends on."""
    return [
        torch.is_autocast_enabled(device.type),
        torch.get_autocast_dtype(device.type),
        torch.are_deterministic_algorithms_enabled(),
        torch.get_default_dtype(),
        float32_switches(device),
        [hook for table in HOOKS_EVERYWHERE for hook in table.values()],
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
    if isinstance(value, (*PLAIN, torch.Size)):
        return value
    if type(value) is HeldAt:
        return value.held(tensors)
    return pytree.tree_map_only(At, tensors.__getitem__, value)


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
    if isinstance(entry, Named):
        return entry.name.rstrip(",")
    if isinstance(entry, tuple) and len(entry) == 2:
        kind, value = entry
        if kind is dict:
            return f"a dict of {few([*map(str, value)], 3)}"
        if kind in (float, complex):
            return str(value)
        if kind in PLAIN:
            return repr(value)
        return f"a {kind.__name__} of {value}"
    return repr(entry)
