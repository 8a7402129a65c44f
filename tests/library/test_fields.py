"""Ranges and choices in annotations, and what fits them."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import pytest

import metapl
from metapl.errors import MetaplError
from metapl.feedback import Forward
from metapl.runs.fields import Range, check_fields

if TYPE_CHECKING:
    from pathlib import Path

Share = Annotated[float, Range(0, most=1)]


@dataclass(frozen=True)
class Plain:
    count: Annotated[int, Range(1, of="a number of steps")] = 1
    rate: Annotated[float, Range(above=0)] | None = None
    decay: Annotated[float, Range(0, 1)] = 0.0
    kind: Literal["soft", "hard"] | None = None
    shares: tuple[Share, ...] = ()
    fill: Share | Literal["border"] = "border"
    anything: str = ""

    def __post_init__(self) -> None:
        check_fields(self)


FITS = [
    {"count": 3, "rate": 1, "kind": "hard", "shares": (0, 1.0), "fill": 0.5},
    {"rate": None, "fill": "border", "anything": 5},
    {"rate": 1e-300},
]
MISFITS: dict[str, list[Any]] = {
    "count": [0, True, 1.0],
    "rate": [0.0, math.inf, math.nan, "1"],
    "decay": [1.0, -0.1],
    "kind": ["firm", ["soft"]],
    "shares": [(0.5, 1.5), 0.5],
    "fill": ["edge", -1],
}


@pytest.mark.parametrize("values", FITS)
def test_what_fits_is_taken(values: dict[str, Any]) -> None:
    Plain(**values)


@pytest.mark.parametrize(
    ("field", "wrong"),
    [(field, value) for field, values in MISFITS.items() for value in values],
)
def test_what_does_not_fit_is_refused_by_its_field(field: str, wrong: Any) -> None:
    with pytest.raises(MetaplError, match=field):
        Plain(**{field: wrong})


@dataclass(frozen=True)
class PartlyReadable(Plain):
    """Two annotations have a name that is not there when the program runs."""

    folder: Path | None = None
    count: Path | int = 1  # type: ignore[assignment]
    share: Share = 0.5


@dataclass(frozen=True)
class OwnEstimator(Forward):
    folder: Path | None = None
    share: Share = 0.5


@dataclass(frozen=True)
class OwnProblem(metapl.PseudoLabels):
    folder: Path | None = None


@pytest.mark.parametrize(
    ("kind", "field", "wrong"),
    [
        (PartlyReadable, "share", 1.5),
        (PartlyReadable, "rate", 0.0),
        (OwnEstimator, "share", 1.5),
        (OwnEstimator, "normalization", "none"),
        (OwnProblem, "temperature", 0.0),
    ],
)
def test_an_annotation_under_type_checking_leaves_the_other_fields_checked(
    kind: Any, field: str, wrong: Any
) -> None:
    kind()
    with pytest.raises(MetaplError, match=field):
        kind(**{field: wrong})


def test_a_field_whose_annotation_cannot_be_read_is_not_checked() -> None:
    assert PartlyReadable(folder=3).folder == 3  # type: ignore[arg-type]
    # Its annotation stands in the place of the range that the class above gives this field.
    assert PartlyReadable(count=0).count == 0


def test_the_default_of_a_subclass_is_looked_at_too() -> None:
    @dataclass(frozen=True)
    class Surer(metapl.UDA):
        threshold: float = 1.5

    with pytest.raises(MetaplError, match=r"^Surer\(threshold=1.5\): expected a number >= 0"):
        Surer()
