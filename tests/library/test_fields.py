"""Ranges and choices in annotations, and what fits them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import pytest

from metapl.errors import FieldError
from metapl.runs.fields import Range, check_fields

Share = Annotated[float, Range(0, most=1)]


@dataclass(frozen=True)
class Plain:
    count: Annotated[int, Range(1, of="a number of steps")] = 1
    rate: Annotated[float, Range(above=0)] | None = None
    kind: Literal["soft", "hard"] | None = None
    shares: tuple[Share, ...] = ()
    fill: Share | Literal["border"] = "border"
    anything: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


@pytest.mark.parametrize(
    "given",
    [
        {"count": 3, "rate": 1, "kind": "hard", "shares": (0, 1.0), "fill": 0.5},
        {"rate": 1e-300},
        {"rate": None, "fill": "border", "anything": 5},
    ],
)
def test_what_fits_is_taken(given: dict[str, Any]) -> None:
    Plain(**given)


@pytest.mark.parametrize(
    ("field", "wrong", "expected"),
    [
        ("count", 0, "a number of steps, 1 or more"),
        ("count", True, "a number of steps, 1 or more"),
        ("count", 1.0, "a number of steps, 1 or more"),
        ("rate", 0.0, "a number above 0 or None"),
        ("rate", math.inf, "a finite number above 0 or None"),
        ("rate", math.nan, "a finite number above 0 or None"),
        ("rate", "1", "a number above 0 or None"),
        ("kind", "firm", "'soft', 'hard' or None"),
        ("kind", ["soft"], "'soft', 'hard' or None"),
        ("shares", (0.5, 1.5), "several, each a number in [0, 1]"),
        ("shares", 0.5, "several, each a number in [0, 1]"),
        ("fill", "edge", "a number in [0, 1] or 'border'"),
        ("fill", -1, "a number in [0, 1] or 'border'"),
    ],
)
def test_what_does_not_fit_is_refused_by_its_field(field: str, wrong: object, expected: str) -> None:
    with pytest.raises(FieldError) as told:
        Plain(**{field: wrong})
    assert str(told.value) == f"Plain({field}={wrong!r}): expected {expected}."
    assert (told.value.field, told.value.expected) == (field, expected)
