"""Values that were read from a file, held against the types that they should have."""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin


def misfit(value: Any, hint: Any, where: str = "it") -> str | None:
    """What is wrong with a value that JSON gave, in words; None where it fits.

    Args:
        value: of dicts, lists, numbers, texts, switches and None.
        hint: a type as in an annotation. A list fits a tuple, a dict fits a dataclass whose fields its entries fit, a
            whole number fits a float; NaN and infinite numbers fit nothing.
        where: what messages call the value.

    >>> misfit(3, int), misfit("3", int | None, "steps")
    (None, "steps is '3'; expected int | None")
    >>> misfit({"a": [1, "x"]}, dict[str, tuple[int, ...]], "counts")
    "counts.a.1 is 'x'; expected int"
    """
    if _fits_plainly(value, hint):
        return None
    origin, parts = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        faults = [misfit(value, part, where) for part in parts]
        # Of a text that may be left out, say, the fault of the text itself says nothing of None.
        deeper = [fault for fault in faults if fault is not None and not fault.startswith(f"{where} is ")]
        return None if None in faults else deeper[0] if deeper else _unexpected(value, hint, where)
    if origin in (tuple, list) and isinstance(value, list | tuple):
        return _first_of_list(value, parts, hint, where)
    if isinstance(value, Mapping):
        if origin is not None and issubclass(origin, Mapping):
            return _first(misfit(entry, parts[1], f"{where}.{name}") for name, entry in value.items())
        if dataclasses.is_dataclass(hint) and isinstance(hint, type):
            return misfit_entries(value, typing.get_type_hints(hint), where)
    return _unexpected(value, hint, where)


def misfit_entries(values: Mapping[str, Any], hints: Mapping[str, Any], where: str = "it") -> str | None:
    """The same of the entries of a dict that have a hint, by name."""
    return _first(misfit(value, hints[name], f"{where}.{name}") for name, value in values.items() if name in hints)


def _fits_plainly(value: Any, hint: Any) -> bool:
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)
    if hint in (int, str, bool):
        return type(value) is hint
    return get_origin(hint) is Literal and any(type(value) is type(one) and value == one for one in get_args(hint))


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # a whole number that no float reaches
        return False


def _first_of_list(values: list[Any] | tuple[Any, ...], parts: tuple[Any, ...], hint: Any, where: str) -> str | None:
    ellipsis = get_origin(hint) is list or (len(parts) == 2 and parts[1] is Ellipsis)
    hints = [parts[0]] * len(values) if ellipsis else list(parts)
    if len(hints) != len(values):
        return f"{where} has {len(values)} entries; expected {len(hints)}"
    return _first(
        misfit(entry, each, f"{where}.{i}") for i, (entry, each) in enumerate(zip(values, hints, strict=True))
    )


def _first(faults: typing.Iterable[str | None]) -> str | None:
    return next((fault for fault in faults if fault is not None), None)


def _unexpected(value: Any, hint: Any, where: str) -> str:
    shown = repr(value)
    shown = shown if len(shown) <= 60 else f"{shown[:57]}..."
    name = hint.__name__ if isinstance(hint, type) and get_origin(hint) is None else str(hint).replace("typing.", "")
    return f"{where} is {shown}; expected {'an object' if dataclasses.is_dataclass(hint) else name}"
