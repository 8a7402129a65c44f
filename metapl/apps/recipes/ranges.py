"""Ranges of fields, as a part of their types: ``steps: Annotated[int, Within(1, 10**9)]``."""

from __future__ import annotations

import dataclasses
import math
import operator
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Annotated, Any

from metapl.errors import FieldError

MOST_STEPS = 10**9

MOST_IN_A_BATCH = 2**20
"""Greatest values of options beyond which a machine would be asked for more than any has."""


@dataclass(frozen=True)
class Within:
    """The range of a number; None, where a field may be that, is in every range.

    Args:
        least, most: the ends.
        above, below: leave out the least, the greatest number.

    >>> Within(1).text, Within(0, 1, below=True).text, Within(0, above=True).text, Within(1, 2048).text
    ('1 or more', 'a number in [0, 1)', 'a number above 0', '1 to 2,048')
    """

    least: float = -math.inf
    most: float = math.inf
    above: bool = False
    below: bool = False

    def has(self, value: float) -> bool:
        """Whether a number is in it."""
        ends = (self.above and value == self.least) or (self.below and value == self.most)
        return self.least <= value <= self.most and not ends

    @property
    def text(self) -> str:
        """The range in words."""
        if self.most == math.inf:
            return f"a number above {self.least:g}" if self.above else f"{self.least:g} or more"
        if isinstance(self.most, int) and not (self.above or self.below) and self.most > 1:
            return f"{self.least:,} to {self.most:,}"
        return f"a number in {'(' if self.above else '['}{self.least:g}, {self.most:g}{')' if self.below else ']'}"


Steps = Annotated[int, Within(1, MOST_STEPS)]
SomeSteps = Annotated[int, Within(0, MOST_STEPS)]
Batch = Annotated[int, Within(1, MOST_IN_A_BATCH)]
Share = Annotated[float, Within(0, 1, below=True)]
Weight = Annotated[float, Within(0)]
Rate = Annotated[float, Within(0, above=True)]


def require(value: object, condition: bool, field: str, expected: str) -> None:
    """Refuse a dataclass whose ``field``, which may be one of a field, is not as ``expected``."""
    if not condition:
        given = operator.attrgetter(field)(value)
        text = f"{type(value).__name__}({field}={given!r}): expected {expected}."
        raise FieldError(text, field, given, expected)


def require_within(value: object, field: str, least: int, most: int) -> None:
    """Refuse a dataclass whose ``field`` is less or more than that; None is neither."""
    given, within = getattr(value, field), Within(least, most)
    require(value, given is None or within.has(given), field, within.text)


def check_ranges(value: object) -> None:
    """Refuse a dataclass with a number that is infinite, none, or outside the range of its field's type."""
    kind: Any = type(value)
    for name, within in _ranges(kind):
        given = getattr(value, name)
        for number in given if isinstance(given, tuple) else (given,):
            if isinstance(number, int | float) and not isinstance(number, bool):
                require(value, math.isfinite(number), name, "a finite number")
                require(value, within is None or within.has(number), name, within.text if within else "")


@cache
def _ranges(kind: Any) -> tuple[tuple[str, Within | None], ...]:
    """Of a class's fields; one that has only another default than in a class above keeps its range."""
    found: dict[str, Within | None] = dict.fromkeys(each.name for each in dataclasses.fields(kind))
    for above in reversed(kind.__mro__):
        hints = typing.get_type_hints(above, include_extras=True) if dataclasses.is_dataclass(above) else {}
        found |= {name: within for name in found.keys() & hints.keys() for within in _within(hints[name])}
    return tuple(found.items())


def _within(hint: Any) -> Iterator[Within]:
    """The ranges in a type, however deep: of one that may be left out, or of each number of several."""
    yield from (part for part in getattr(hint, "__metadata__", ()) if isinstance(part, Within))
    inner: Callable[[Any], Any] = typing.get_args
    for part in inner(hint):
        yield from _within(part)
