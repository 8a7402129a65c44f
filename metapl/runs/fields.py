"""Ranges and choices as types: values of users and of files, held against annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Iterable, Mapping
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
        above, below: all are above, below it.
        of: what the number is, for the error, such as "a number of processes".

    >>> Range(0, 1).words(float), Range(above=0).words(float), Range(1, of="a number of processes").words(int)
    ('a number in [0, 1)', 'a number above 0', 'a number of processes, 1 or more')
    >>> Range(1, most=2048).words(int)
    'a whole number from 1 to 2,048'
    """

    least: float | None = None
    below: float | None = None
    above: float | None = None
    most: float | None = None
    of: str = ""

    def holds(self, value: Any) -> bool:
        low = (self.least is None or value >= self.least) and (self.above is None or value > self.above)
        return low and (self.below is None or value < self.below) and (self.most is None or value <= self.most)

    def words(self, kind: Any) -> str:
        name = self.of or ("a whole number" if kind is int else "a number")
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if kind is int and self.least is not None and self.most is not None:
            return f"{name} from {self.least:,} to {self.most:,}"
        if low is not None and high is not None:
            return f"{name} in {'[' if self.above is None else '('}{low}, {high}{']' if self.below is None else ')'}"
        if high is not None:
            return f"{name} {'of at most' if self.below is None else 'below'} {high}"
        if low is None:
            return name
        return f"{name} above {low}" if self.least is None else f"{name}{',' if self.of else ' of'} {low} or more"


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
    ...     kind: Literal["soft", "hard"] | None = None
    ...     def __post_init__(self) -> None:
    ...         check_fields(self)
    >>> Smoothed(amount=1.5)
    Traceback (most recent call last):
    metapl.errors.FieldError: Smoothed(amount=1.5): expected a number in [0, 1).
    >>> Smoothed(kind="firm")
    Traceback (most recent call last):
    metapl.errors.FieldError: Smoothed(kind='firm'): expected 'soft', 'hard' or None.
    """
    kind: Any = type(value)
    hints = _of_fields(kind)
    _refuse({name: getattr(value, name) for name in hints}, hints, f"{kind.__name__}({{}})")


def check_arguments(function: Callable[..., Any], given: Mapping[str, Any]) -> None:
    """Refuse arguments that are not as annotated, among those that :func:`check_fields` looks at.

    >>> def fit(*, steps: AtLeastOne, clip_norm: AboveZero | None = None) -> None:
    ...     check_arguments(fit, locals())
    >>> fit(steps=3, clip_norm=-1.0)
    Traceback (most recent call last):
    metapl.errors.FieldError: clip_norm=-1.0: expected a number above 0 or None.
    """
    _refuse(given, _of_arguments(function), "{}")


def _refuse(given: Mapping[str, Any], hints: Mapping[str, Any], shown: str) -> None:
    for name, hint in hints.items():
        if misfit(value := given[name], hint) is not None:
            expected = _words(hint)
            if isinstance(value, float) and not math.isfinite(value):
                expected = expected.replace("a number", "a finite number")
            raise FieldError(f"{shown.format(f'{name}={value!r}')}: expected {expected}.", name, value, expected)


@cache
def _of_arguments(function: Any) -> dict[str, Any]:
    hints = typing.get_type_hints(function, include_extras=True)
    return {name: hint for name, hint in hints.items() if name != "return" and _is_limited(hint)}


@cache
def _of_fields(kind: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for above in filter(dataclasses.is_dataclass, reversed(kind.__mro__)):
        hints = typing.get_type_hints(above, include_extras=True)
        found |= {name: hint for name, hint in hints.items() if hint not in (int, float) or name not in found}
    return {field.name: found[field.name] for field in dataclasses.fields(kind) if _is_limited(found[field.name])}


def _is_limited(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        kind, ranges = _ranged(hint)
        return bool(ranges) or _is_limited(kind)
    return hint in (bool, int, float) or get_origin(hint) is Literal or any(map(_is_limited, get_args(hint)))


def _ranged(hint: Any) -> tuple[Any, list[Range]]:
    """A type and its ranges; those of a union are its numbers' own."""
    if get_origin(hint) is not Annotated:
        return hint, []
    kind, *said = get_args(hint)  # such as to the command line
    ranges = [one for one in said if isinstance(one, Range)]
    if ranges and get_origin(kind) in (Union, types.UnionType):
        parts = [Annotated[(part, *ranges)] if _ranged(part)[0] in (int, float) else part for part in get_args(kind)]
        return Union[tuple(parts)], []  # noqa: UP007 - of parts that are known at run time
    if ranges and kind not in (int, float):
        raise TypeError(f"{hint} has a range, and is neither a number nor a union with one")
    return kind, ranges


def misfit(value: Any, hint: Any, where: str = "it") -> str | None:
    """What is wrong with a value that a user or a file gave, in words; None where it fits.

    Args:
        value: of dicts, lists, numbers, texts, switches and None.
        hint: a type as in an annotation, ``Annotated`` with a :class:`Range` where not all numbers will do. A list fits
            a tuple, a dict fits a dataclass whose fields its entries fit, a whole number fits a float; NaN and infinite
            numbers fit nothing.
        where: what messages call the value.

    >>> misfit(3, int), misfit("3", int | None, "steps"), misfit(0, AtLeastOne, "steps")
    (None, "steps is '3'; expected a whole number or None", 'steps is 0; expected a whole number of 1 or more')
    >>> misfit({"a": [1, "x"]}, dict[str, tuple[int, ...]], "counts")
    "counts.a.1 is 'x'; expected a whole number"
    """
    kind, ranges = _ranged(hint)
    origin, parts = get_origin(kind), get_args(kind)
    if _fits_plainly(value, kind) and all(one.holds(value) for one in ranges):
        return None
    if origin in (Union, types.UnionType):
        faults = [misfit(value, part, where) for part in parts]
        # Of a text that may be left out, say, the fault of the text itself says nothing of None.
        deeper = [fault for fault in faults if fault is not None and not fault.startswith(f"{where} is ")]
        return None if None in faults else deeper[0] if deeper else _unexpected(value, hint, where)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        hints = [parts[0]] * len(value) if origin is list or parts[1:] == (...,) else list(parts)
        if len(hints) != len(value):
            return f"{where} has {len(value)} entries; expected {len(hints)}"
        return _first(misfit(entry, hints[i], f"{where}.{i}") for i, entry in enumerate(value))
    if isinstance(value, Mapping):
        if origin is not None and issubclass(origin, Mapping):
            return _first(misfit(entry, parts[1], f"{where}.{name}") for name, entry in value.items())
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            return misfit_entries(value, _hints(kind), where)
    return _unexpected(value, hint, where)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def misfit_entries(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "it") -> str | None:
    """The same of the entries of a dict that have a hint, by name; ``where=""`` leaves them their bare names."""
    above = f"{where}." if where else ""
    return _first(misfit(value, hints[name], f"{above}{name}") for name, value in values.items() if name in hints)


def _fits_plainly(value: Any, hint: Any) -> bool:
    if hint in (Any, None, type(None)):
        return hint is Any or value is None
    if hint is int:
        return not isinstance(value, bool) and isinstance(value, Integral)
    if hint is float:
        try:
            return not isinstance(value, bool) and isinstance(value, Real) and math.isfinite(value)
        except OverflowError:  # a whole number that no float reaches
            return False
    if hint in (str, bool):
        return type(value) is hint
    if get_origin(hint) is Literal:
        return any(type(value) is type(one) and value == one for one in get_args(hint))
    plain = get_origin(hint) or hint
    return isinstance(plain, type) and plain not in (list, tuple, dict) and isinstance(value, plain)


def _first(faults: Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _unexpected(value: Any, hint: Any, where: str) -> str:
    shown = repr(value)
    expected = "an object" if dataclasses.is_dataclass(hint) else _words(hint)
    return f"{where} is {shown if len(shown) <= 60 else f'{shown[:57]}...'}; expected {expected}"


def _words(hint: Any) -> str:
    kind, ranges = _ranged(hint)
    if ranges:
        return " and ".join(one.words(kind) for one in ranges)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        of_each = [map(repr, get_args(part)) if get_origin(part) is Literal else [_words(part)] for part in parts]
        *first, last = [words for choices in of_each for words in choices]
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(map(repr, parts))}" if len(parts) > 1 else repr(parts[0])
    if origin is tuple:
        return f"several, each {_words(parts[0])}" if parts[1:] == (...,) else f"({', '.join(map(_words, parts))})"
    names = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", type(None): "None"}
    return names.get(kind, getattr(kind, "__name__", str(kind)))
