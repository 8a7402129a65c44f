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
    """

    least: float | None = None
    below: float | None = None
    above: float | None = None
    most: float | None = None
    of: str = ""

    def holds(self, value: Any) -> bool:
        low = value >= self.least if self.above is None else value > self.above
        return (
            low
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __repr__(self) -> str:  # as the errors of tyro show it too
        limits = {">=": self.least, ">": self.above, "<": self.below, "<=": self.most}
        return " and ".join(
            f"{sign} {limit:,}" for sign, limit in limits.items() if limit is not None
        )

    def words(self, kind: Any) -> str:
        return f"{self.of or _NAMES[kind]} {self!r}"


AtLeastOne = Annotated[int, Range(1)]
AtLeastZero = Annotated[int, Range(0)]
AboveZero = Annotated[float, Range(above=0)]
MicroBatches = Annotated[int, Range(1, of="a number of micro-batches")]


def check_fields(value: Any) -> None:
    """Refuse a dataclass one of whose fields is not as annotated; called by its ``__post_init__``.

    Looked at are switches, numbers, and annotations with a ``Literal`` or a :class:`Range`, also in
    unions and tuples. A field that has only another default than in a class above keeps its range.
    """
    kind: Any = type(value)
    given = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
    _refuse(given, _hints(kind), f"{kind.__name__}({{}})")


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that are not as annotated, among those that :func:`check_fields` looks at."""
    _refuse(given, _hints(function), "{}")


def _refuse(given: Mapping[str, Any], hints: Mapping[str, Any], shown: str) -> None:
    for name, hint in hints.items():
        if name in given and (expected := unmet(value := given[name], hint)):
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number")
            raise FieldError(
                f"{shown.format(f'{name}={value!r}')}: expected {expected}.", name, value, expected
            )


@cache
def _hints(of: Any) -> dict[str, Any]:
    """The annotations of a function or a class that limit a value."""

    def limits(hint: Any) -> bool:
        parts = get_args(hint)
        plain = hint in (bool, int, float) or get_origin(hint) is Literal
        return plain or any(isinstance(part, Range) or limits(part) for part in parts)

    found: dict[str, Any] = {}
    for one in reversed(getattr(of, "__mro__", [of])):
        hints = typing.get_type_hints(one, include_extras=True)
        found |= {
            name: hint
            for name, hint in hints.items()
            if hint not in (int, float) or name not in found
        }
    return {name: hint for name, hint in found.items() if name != "return" and limits(hint)}


def unmet(value: Any, hint: Any) -> str:
    """What an annotation expects, in words, where a value is not so.

    A whole number is a float too, a list a tuple.
    """
    *first, last = _unmet(value, hint, []) or [""]
    return f"{', '.join(first)} or {last}" if first else last


_NOTHING = object()
_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
}


def _unmet(value: Any, hint: Any, ranges: list[Range]) -> list[str]:
    """The alternatives of which none is met.

    ``ranges`` are those around a union, and hold for its numbers.
    """
    kind, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    ranges = ranges + [one for one in said if isinstance(one, Range)]
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        each = [_unmet(value, part, ranges) for part in parts]
        return [text for texts in each for text in texts] if all(each) else []
    if origin is Literal:
        return (
            []
            if any(type(value) is type(one) and value == one for one in parts)
            else [repr(one) for one in parts]
        )
    if origin in (tuple, list):
        several, alike = isinstance(value, list | tuple), origin is list or parts[1:] == (...,)
        hints = parts[:1] * len(value) if several and alike else parts
        if several and len(value) == len(hints) and not any(map(unmet, value, hints)):
            return []
        names = [unmet(_NOTHING, part) or "anything" for part in parts if part is not ...]
        return [f"several, each {names[0]}" if alike else f"({', '.join(names)})"]
    if kind in (int, float):
        number = isinstance(value, Integral if kind is int else Real) and not isinstance(
            value, bool
        )
        finite = number and (kind is int or abs(value) <= sys.float_info.max)  # which NaN is not
        met = finite and all(one.holds(value) for one in ranges)
        return [] if met else [" and ".join(one.words(kind) for one in ranges) or _NAMES[kind]]
    plain = type(None) if kind is None else origin or kind
    if plain in (str, bool):
        met = type(value) is plain
    else:  # of a dict, a file's reader looks at the entries
        met = plain is Any or (
            isinstance(plain, type) and plain is not dict and isinstance(value, plain)
        )
    return [] if met else [_NAMES.get(plain, getattr(kind, "__name__", str(kind)))]
