"""What is wrong with values that files hold, in words."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from metapl.errors import MetaplError
from metapl.runs.fields import unmet

R = TypeVar("R")


def misfit(value: Any, hint: Any, where: str = "it") -> str | None:
    """What is wrong with a value that a user or a file gave, in words; None where it fits.

    Args:
        value: of dicts, lists, numbers, texts, switches and None.
        hint: a type as in an annotation, ``Annotated`` with a :class:`Range` where not all numbers will do. A list fits
            a tuple, a dict fits a dataclass whose fields its entries fit, a whole number fits a float; NaN and infinite
            numbers fit nothing.
        where: what messages call the value.

    >>> from metapl.runs.fields import AtLeastOne
    >>> misfit(3, int), misfit("3", int | None, "steps"), misfit(0, AtLeastOne, "steps")
    (None, "steps is '3'; expected a whole number or None", 'steps is 0; expected a whole number of 1 or more')
    >>> misfit({"a": [1, "x"]}, dict[str, tuple[int, ...]], "counts")
    "counts.a.1 is 'x'; expected a whole number"
    """
    if not unmet(value, hint):
        return None
    kind, *said = get_args(hint) if get_origin(hint) is Annotated else (hint,)
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        # Ranges around a union are those of its numbers.
        faults = [misfit(value, Annotated[(part, *said)] if said else part, where) for part in parts]
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


@cache  # many runs may be read by one command
def hints_of(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind)


@cache
def _hints(kind: Any) -> dict[str, Any]:
    return typing.get_type_hints(kind, include_extras=True)


def misfit_entries(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "it") -> str | None:
    """The same of the entries of a dict that have a hint, by name; ``where=""`` leaves them their bare names."""
    above = f"{where}." if where else ""
    return _first(misfit(value, hints[name], f"{above}{name}") for name, value in values.items() if name in hints)


def _first(faults: Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _unexpected(value: Any, hint: Any, where: str) -> str:
    shown = repr(value)
    expected = "an object" if dataclasses.is_dataclass(hint) else unmet(value, hint)
    return f"{where} is {shown if len(shown) <= 60 else f'{shown[:57]}...'}; expected {expected}"


def from_dict(kind: type[R], values: Mapping[str, Any], kinds: Mapping[str, type] | None = None, **made: Any) -> R:
    """A dataclass from the dictionary that :func:`dataclasses.asdict` made of it, by way of JSON.

    ``kinds`` of fields count where these are not as the type says; further fields are ``made`` already.

    >>> from metapl.runs.fields import Range
    >>> from_dict(Range, {"least": 0, "most": 1}).most
    1
    """
    if not isinstance(values, Mapping):
        raise MetaplError(f"{kind.__name__} is stored as {values!r:.60}; expected an object.")
    hints = hints_of(kind) | dict(kinds or {})  # type: ignore[arg-type]  # a type can be hashed
    names = {each.name for each in dataclasses.fields(kind)}  # type: ignore[arg-type]  # a dataclass
    if unknown := values.keys() - names:
        raise MetaplError(f"{kind.__name__} has no {', '.join(sorted(unknown))}; the run is of another version.")
    if fault := misfit_entries(values, hints, kind.__name__):
        raise MetaplError(f"{fault}.")

    def rebuilt(hint: Any, value: Any) -> Any:
        for part in (hint, *typing.get_args(hint)):  # a dataclass, or one that may be left out
            if dataclasses.is_dataclass(part) and isinstance(part, type) and value is not None:
                return from_dict(part, value)
        return tuple(value) if isinstance(value, list) else value

    return kind(**{name: rebuilt(hints[name], value) for name, value in values.items()}, **made)
