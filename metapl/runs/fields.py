"""Ranges and choices as types: the fields of a frozen value, held against their annotations."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from metapl.errors import FieldError


@dataclass(frozen=True)
class Range:
    """The numbers that a field may be, for ``Annotated[float, Range(above=0)]``; never NaN or infinite ones.

    Args:
        least: the smallest.
        below: all are below it.
        above: all are above it.
        most: the greatest.
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
        """Whether a number is within it."""
        return (
            (self.least is None or value >= self.least)
            and (self.below is None or value < self.below)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
        )

    def words(self, kind: Any) -> str:
        """What is expected, in words."""
        name = self.of or ("a whole number" if kind is int else "a number")
        low = self.least if self.above is None else self.above
        high = self.most if self.below is None else self.below
        if low is not None and high is not None:
            ends = "[("[self.above is not None], "])"[self.below is not None]
            return f"{name} in {ends[0]}{low}, {high}{ends[1]}"
        if high is not None:
            return f"{name} {'of at most' if self.below is None else 'below'} {high}"
        if low is None:
            return name
        return f"{name} above {low}" if self.least is None else f"{name}{',' if self.of else ' of'} {low} or more"


def check_fields(value: Any) -> None:
    """Refuse a dataclass one of whose fields is not as annotated; called by its ``__post_init__``.

    Looked at are fields whose annotation has a :class:`Range` or a ``Literal``, alone, in a union or in a tuple.

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
    for name, hint in _limited(kind).items():
        given = getattr(value, name)
        if not _fits(given, hint):
            expected = _words(hint)
            raise FieldError(f"{type(value).__name__}({name}={given!r}): expected {expected}.", name, given, expected)


@cache
def _limited(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass's fields that say more than a type."""
    hints = typing.get_type_hints(kind, include_extras=True)
    return {each.name: hints[each.name] for each in dataclasses.fields(kind) if _says_more(hints[each.name])}


def _says_more(hint: Any) -> bool:
    if get_origin(hint) is Annotated:
        return any(isinstance(note, Range) for note in hint.__metadata__) or _says_more(hint.__origin__)
    return get_origin(hint) is Literal or any(map(_says_more, get_args(hint)))


def _fits(value: Any, hint: Any) -> bool:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [note for note in hint.__metadata__ if isinstance(note, Range)]
        return _fits(value, parts[0]) and all(each.holds(value) for each in ranges)
    if origin in (Union, types.UnionType):
        return any(_fits(value, part) for part in parts)
    if origin is Literal:
        return any(type(value) is type(part) and value == part for part in parts)
    if origin is tuple and isinstance(value, tuple | list):
        hints = parts[:1] * len(value) if parts[1:] == (...,) else parts
        return len(hints) == len(value) and all(map(_fits, value, hints))
    if hint in (int, float):
        whole = isinstance(value, Integral if hint is int else Real) and not isinstance(value, bool)
        return whole and _is_finite(value)
    plain = origin or hint
    return not isinstance(plain, type) or isinstance(value, plain)


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False


def _words(hint: Any) -> str:
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        ranges = [note.words(parts[0]) for note in hint.__metadata__ if isinstance(note, Range)]
        return " and ".join(ranges) or _words(parts[0])
    if origin in (Union, types.UnionType):
        *first, last = [one for part in parts for one in _choices(part)]
        return f"{', '.join(first)} or {last}"
    if origin is Literal:
        return f"one of {', '.join(_choices(hint))}" if len(parts) > 1 else repr(parts[0])
    if origin is tuple:
        return f"several, each {_words(parts[0])}" if parts[1:] == (...,) else f"({', '.join(map(_words, parts))})"
    if hint is type(None):
        return "None"
    return _NAMES.get(hint, str(hint))


def _choices(hint: Any) -> list[str]:
    return [repr(part) for part in get_args(hint)] if get_origin(hint) is Literal else [_words(hint)]


_NAMES: dict[Any, str] = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
