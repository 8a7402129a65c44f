"""Ranges and choices as types: values are checked against annotations."""

from __future__ import annotations

import dataclasses
import inspect
import math
import sys
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from numbers import Integral, Real
from typing import Annotated, Any, Literal, TypeVar, Union, cast, get_args, get_origin

from metapl.errors import MetaplError
from metapl.words import did_you_mean

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Range:
    """The numbers that a field may be, for ``Annotated[float, Range(above=0)]``.

    NaN and infinite numbers are in no range.

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
        """Return whether a finite number is in the range."""
        if self.above is None:
            is_above_limit = value >= self.least
        else:
            is_above_limit = value > self.above
        return (
            is_above_limit
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __repr__(self) -> str:
        # The errors of tyro show a range so too.
        limits = {">=": self.least, ">": self.above, "<": self.below, "<=": self.most}
        return " and ".join(
            f"{sign} {limit:,}" for sign, limit in limits.items() if limit is not None
        )

    def words(self, kind: Any) -> str:
        """Return the range in words, of numbers that are ``int`` or ``float``."""
        return f"{self.of or _NAMES[kind]} {self!r}"


AtLeastOne = Annotated[int, Range(1)]
AtLeastZero = Annotated[int, Range(0)]
AboveZero = Annotated[float, Range(above=0)]
MicroBatches = Annotated[int, Range(1, of="a number of micro-batches")]


# A value that meets no annotation but Any and object.
_NOTHING = object()


def check_fields(value: Any) -> None:
    """Refuse a dataclass one of whose fields is not as annotated; called by its ``__post_init__``.

    Looked at are switches, numbers, and annotations with a ``Literal`` or a :class:`Range`, also in
    unions and tuples. A field that has only another default than in a class above keeps its range.
    A field is not checked whose annotation has a name that is not there when the program runs, such
    as one imported under ``TYPE_CHECKING``; the other fields of its class are.
    """
    kind: Any = type(value)
    values = {field.name: getattr(value, field.name) for field in dataclasses.fields(kind)}
    _refuse_unmet(values, _limiting_hints(kind), template=f"{kind.__name__}({{}})")


def no_such_option(name: str, names: Sequence[str], owner: str) -> MetaplError:
    """Return the error of an option that is none of the names, with one that may be meant.

    Args:
        owner: whose options they are.

    >>> print(no_such_option("batchsize", ["batch_size", "steps"], "fit"))
    fit has no option 'batchsize'; did you mean batch_size?
    """
    expected = did_you_mean(name, names, likeness=0.5) or f"; expected one of {', '.join(names)}."
    return MetaplError(f"{owner} has no option {name!r}{expected}")


def options_by_name(initialize: Function) -> Function:
    """Return the ``__init__`` of a class, which refuses unknown options as a fit does."""
    names = [*inspect.signature(initialize).parameters][1:]

    @wraps(initialize)
    def begun(self: Any, *args: Any, **options: Any) -> None:
        for name in options:
            if name not in names:
                raise no_such_option(name, names, type(self).__name__)
        initialize(self, *args, **options)

    return cast(Function, begun)


def check_arguments(function: Callable[..., Any], arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that are not as annotated.

    Looked at are those that :func:`check_fields` looks at.
    """
    _refuse_unmet(arguments, _limiting_hints(function), template="{}")


def _refuse_unmet(
    values: Mapping[str, Any], hints: Mapping[str, tuple[Any, Any]], *, template: str
) -> None:
    """Refuse the first value that is not as annotated; the template shows its name and value."""
    for name, (hint, default) in hints.items():
        value = values.get(name, default)
        if value is default:
            continue
        expected = unmet(value, hint)
        if not expected:
            continue
        if isinstance(value, float) and not math.isfinite(value):
            expected = expected.replace("a number", "a finite number")
        shown = template.format(f"{name}={value!r}")
        raise MetaplError(f"{shown}: expected {expected}.")


@cache
def _limiting_hints(function_or_class: Any) -> dict[str, tuple[Any, Any]]:
    """Return the annotations of a function or a class that limit a value, with its default."""
    hints: dict[str, Any] = {}
    # From the class furthest above down, so that the annotation of a subclass wins.
    for owner in reversed(getattr(function_or_class, "__mro__", [function_or_class])):
        for name, hint in _readable_hints(owner).items():
            # A plain number in a subclass keeps the range of a class above.
            if hint not in (int, float) or name not in hints:
                hints[name] = hint
    limiting: dict[str, tuple[Any, Any]] = {}
    for name, hint in hints.items():
        if name != "return" and _limits(hint):
            limiting[name] = (hint, _default_of(function_or_class, name))
    return limiting


def _default_of(function_or_class: Any, name: str) -> Any:
    """Return the default of an argument, which meets its annotation, or no value that is given.

    The default of a field may be that of a subclass of a user's own.
    """
    if isinstance(function_or_class, type):
        return _NOTHING
    default = inspect.signature(function_or_class).parameters[name].default
    return _NOTHING if default is inspect.Parameter.empty else default


def _readable_hints(function_or_class: Any) -> dict[str, Any]:
    """Return the annotations of a function or a class by name, and Any for an unreadable one.

    In a class an annotation is unreadable where one of its names is neither built in nor in the
    module, as names are that are imported under ``TYPE_CHECKING``.

    Raises: NameError for a function with such an annotation.
    """
    try:
        return typing.get_type_hints(function_or_class, include_extras=True)
    except NameError:
        if not isinstance(function_or_class, type):
            raise
    # One such name has failed the whole class, so the annotations are read one by one.
    hints: dict[str, Any] = {}
    for owner in reversed(function_or_class.__mro__):
        for name, annotation in vars(owner).get("__annotations__", {}).items():
            # Any also in the place of what a class above says of this name.
            hints[name] = Any
            namespace = {"__annotations__": {name: annotation}, "__module__": owner.__module__}
            class_of_one_name = type(owner.__name__, (), namespace)
            with suppress(NameError):
                hints |= typing.get_type_hints(class_of_one_name, include_extras=True)
    return hints


def _limits(hint: Any) -> bool:
    """Return whether an annotation is one that is checked."""
    if hint in (bool, int, float) or get_origin(hint) is Literal:
        return True
    return any(isinstance(part, Range) or _limits(part) for part in get_args(hint))


def unmet(value: Any, hint: Any) -> str:
    """Return what an annotation expects, in words, or nothing where the value is so.

    A whole number is a float too, a list a tuple.
    """
    alternatives = _unmet_alternatives(value, hint, ranges=())
    if len(alternatives) < 2:
        return "".join(alternatives)
    return f"{', '.join(alternatives[:-1])} or {alternatives[-1]}"


_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a text",
    type(None): "None",
}


def _unmet_alternatives(value: Any, hint: Any, *, ranges: Sequence[Range]) -> list[str]:
    """Return the alternatives that a value may be, in words, or none where it is one of them.

    ``ranges`` are those around a union, and hold for its numbers.
    """
    kind = hint
    if get_origin(hint) is Annotated:
        kind, *metadata = get_args(hint)
        ranges = [*ranges, *(entry for entry in metadata if isinstance(entry, Range))]
    origin = get_origin(kind)
    parts = get_args(kind)
    if origin in (Union, types.UnionType):
        # What most options are; the words of all others would be made first.
        if value is None and type(None) in parts:
            return []
        return _unmet_by_union(value, parts, ranges)
    if origin is Literal:
        return _unmet_by_choices(value, parts)
    if origin in (tuple, list):
        return _unmet_by_sequence(value, origin, parts)
    if kind in (int, float):
        return _unmet_by_number(value, kind, ranges)
    return _unmet_by_class(value, kind)


def _unmet_by_union(value: Any, parts: Sequence[Any], ranges: Sequence[Range]) -> list[str]:
    alternatives = []
    for part in parts:
        alternatives_of_part = _unmet_alternatives(value, part, ranges=ranges)
        if not alternatives_of_part:
            return []
        alternatives += alternatives_of_part
    return alternatives


def _unmet_by_choices(value: Any, choices: Sequence[Any]) -> list[str]:
    # Types are compared too, since True == 1.
    if any(type(value) is type(choice) and value == choice for choice in choices):
        return []
    return [repr(choice) for choice in choices]


def _unmet_by_sequence(value: Any, origin: Any, parts: tuple[Any, ...]) -> list[str]:
    # tuple[float, ...] and list[float] are of any length, tuple[float, int] is of two.
    is_of_any_length = origin is list or parts[1:] == (...,)
    if isinstance(value, list | tuple):
        hints = [parts[0]] * len(value) if is_of_any_length else [*parts]
        if len(value) == len(hints) and not any(map(unmet, value, hints)):
            return []
    names = [unmet(_NOTHING, part) or "anything" for part in parts if part is not ...]
    if is_of_any_length:
        return [f"several, each {names[0]}"]
    return [f"({', '.join(names)})"]


def _unmet_by_number(value: Any, kind: Any, ranges: Sequence[Range]) -> list[str]:
    is_number = isinstance(value, Integral if kind is int else Real)
    is_number = is_number and not isinstance(value, bool)
    # NaN is not less than or equal to anything.
    is_finite = is_number and (kind is int or abs(value) <= sys.float_info.max)
    if is_finite and all(limit.holds(value) for limit in ranges):
        return []
    return [" and ".join(limit.words(kind) for limit in ranges) or _NAMES[kind]]


def _unmet_by_class(value: Any, kind: Any) -> list[str]:
    plain = type(None) if kind is None else get_origin(kind) or kind
    if plain is Any:
        return []
    if plain in (str, bool):
        is_met = type(value) is plain
    else:
        # A dict is never met: who reads it from a file looks at its entries.
        is_class = isinstance(plain, type) and plain is not dict
        is_met = is_class and isinstance(value, plain)
    if is_met:
        return []
    return [_NAMES.get(plain, getattr(kind, "__name__", str(kind)))]
