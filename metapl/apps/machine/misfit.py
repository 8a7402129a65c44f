"""What is wrong with values that files hold, in words."""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Iterable, Mapping
from functools import cache
from typing import Annotated, Any, Union, get_args, get_origin

from metapl.runs.fields import unmet


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
