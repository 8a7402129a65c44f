"""Ranges that several recipes share, as a part of their fields' types: ``steps: Steps``."""

from __future__ import annotations

import operator
from typing import Annotated

from metapl.errors import FieldError
from metapl.runs.fields import AboveZero, Range

MOST_STEPS = 10**9

MOST_IN_A_BATCH = 2**20
"""Greatest values of options beyond which a machine would be asked for more than any has."""


Steps = Annotated[int, Range(1, most=MOST_STEPS)]
SomeSteps = Annotated[int, Range(0, most=MOST_STEPS)]
Batch = Annotated[int, Range(1, most=MOST_IN_A_BATCH)]
Share = Annotated[float, Range(0, 1)]
Weight = Annotated[float, Range(0)]
Rate = AboveZero


def require(value: object, condition: bool, field: str, expected: str) -> None:
    """Refuse a dataclass whose ``field``, which may be one of a field, is not as ``expected``."""
    if not condition:
        given = operator.attrgetter(field)(value)
        text = f"{type(value).__name__}({field}={given!r}): expected {expected}."
        raise FieldError(text, field, given, expected)
