"""Ranges and choices as types: what a caller gave, held against annotations."""

from __future__ import annotations

import dataclasses
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from metapl.errors import FieldError


@dataclass(frozen=True)
class Range:
    """The numbers that a field may be, for ``Annotated[float, Range(above=0)]``; never NaN or infinite ones.

    Args:
        least, most: the smallest, the greatest.
        above, below: all are above, below it; each range has ``least`` or ``above``.
        of: what the number is, for the error, such as "a number of processes".

    >>> Range(0, 1).words(float), Range(above=0).words(float), Range(1, of="a number of processes").words(int)
    ('a number in [0, 1)', 'a number above 0', 'a number of processes, 1 or more')
    """

    least: float | None = None
    below: float | None = None
    above: float | None = None
    most: float | None = None
    of: str = ""

    def holds(self, value: Any) -> bool:
        low = value >= self.least if self.above is None else value > self.above
        return low and (self.below is None or value < self.below) and (self.most is None or value <= self.most)

    def words(self, kind: Any) -> str:
        name = self.of or ("a whole number" if kind is int else "a number")
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if high is None:
            return f"{name} above {low}" if self.least is None else f"{name}{',' if self.of else ' of'} {low} or more"
        if kind is int and self.above is None and self.below is None:
            return f"{name} from {low:,} to {high:,}"
        return f"{name} in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"


AtLeastOne = Annotated[int, Range(1)]
AtLeastZero = Annotated[int, Range(0)]
AboveZero = Annotated[float, Range(above=0)]
MicroBatches = Annotated[int, Range(1, of="a number of micro-batches")]


def check_fields(value: Any) -> None:
    """Refuse a dataclass one of whose fields is not as annotated; called by its ``__post_init__``.

    Looked at are switches, numbers and fields whose annotation has a ``Literal`` or a :class:`Range`, alone, in a union
    or in a tuple. A field that has only another default than in a class above keeps its range.

    >>> @dataclass(frozen=True)
    ... class Smoothed:
    ...     amount: Annotated[float, Range(0, 1)] = 0.0
    ...     def __post_init__(self) -> None:
    ...         check_fields(self)
    >>> Smoothed(amount=1.5)
    Traceback (most recent call last):
    metapl.errors.FieldError: Smoothed(amount=1.5): expected a number in [0, 1).
    """
    kind: Any = type(value)
    given = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
    _refuse(given, _hints(kind), f"{kind.__name__}({{}})")


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that are not as annotated, among those that :func:`check_fields` looks at.

    >>> def fit(*, steps: AtLeastOne, clip_norm: AboveZero | None = None) -> None:
    ...     check_arguments(fit, locals())
    >>> fit(steps=3, clip_norm=-1.0)
    Traceback (most recent call last):
    metapl.errors.FieldError: clip_norm=-1.0: expected a number above 0 or None.
    """
    _refuse(given, _hints(function), "{}")


def _refuse(given: Mapping[str, Any], hints: Mapping[str, Any], shown: str) -> None:
    for name, hint in hints.items():
        if name in given and not fits(value := given[name], hint):
            expected = words(hint)
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number")
            raise FieldError(f"{shown.format(f'{name}={value!r}')}: expected {expected}.", name, value, expected)


@cache
def _hints(of: Any) -> dict[str, Any]:
    """The annotations of a function or a class that limit a value."""
    found: dict[str, Any] = {}
    for one in reversed(getattr(of, "__mro__", [of])):
        hints = typing.get_type_hints(one, include_extras=True)
        found |= {name: hint for name, hint in hints.items() if hint not in (int, float) or name not in found}
    return {name: hint for name, hint in found.items() if name != "return" and _is_limited(hint)}


def _is_limited(hint: Any) -> bool:
    kind, ranges = ranged(hint)
    choices = kind in (bool, int, float) or get_origin(kind) is Literal
    return bool(ranges) or choices or any(map(_is_limited, get_args(kind)))


def ranged(hint: Any) -> tuple[Any, list[Range]]:
    """A type and its ranges; those of a union are its numbers' own."""
    if get_origin(hint) is not Annotated:
        return hint, []
    kind, *said = get_args(hint)  # such as to the command line
    ranges = [one for one in said if isinstance(one, Range)]
    if ranges and get_origin(kind) in (Union, types.UnionType):
        parts = [Annotated[(part, *ranges)] if ranged(part)[0] in (int, float) else part for part in get_args(kind)]
        return Union[tuple(parts)], []  # noqa: UP007 - of parts that are known at run time
    return kind, ranges


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is as annotated; a whole number is a float too, and a list a tuple.

    >>> fits(3, AtLeastOne), fits(0, AtLeastOne | None), fits("soft", Literal["soft", "hard"]), fits(True, int)
    (True, False, True, False)
    """
    kind, ranges = ranged(hint)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        return any(fits(value, part) for part in parts)
    if origin in (tuple, list):
        if not isinstance(value, list | tuple):
            return False
        each = [parts[0]] * len(value) if origin is list or parts[1:] == (...,) else list(parts)
        return len(each) == len(value) and all(map(fits, value, each))
    if origin is Literal:
        return any(type(value) is type(one) and value == one for one in parts)
    if kind in (int, float):
        number: Any = value
        if isinstance(value, bool) or not isinstance(value, Integral if kind is int else Real):
            return False
        return (kind is int or abs(number) <= sys.float_info.max) and all(one.holds(number) for one in ranges)
    if kind in (str, bool):
        return type(value) is kind
    if kind in (None, type(None), Any):
        return kind is Any or value is None
    plain = origin or kind
    return isinstance(plain, type) and plain is not dict and isinstance(value, plain)


def words(hint: Any) -> str:
    """What is expected by an annotation, in words."""
    kind, ranges = ranged(hint)
    if ranges:
        return " and ".join(one.words(kind) for one in ranges)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        of_each = [map(repr, get_args(part)) if get_origin(part) is Literal else [words(part)] for part in parts]
        *first, last = [text for choices in of_each for text in choices]
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin is tuple:
        return f"several, each {words(parts[0])}" if parts[1:] == (...,) else f"({', '.join(map(words, parts))})"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
