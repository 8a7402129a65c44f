"""The interval of an accuracy against the formula, and the words around it."""

from __future__ import annotations

import math

import pytest

from metapl.errors import MetaplError
from metapl.metrics import interval, spoken


@pytest.mark.parametrize(("correct", "n"), [(0, 1), (1, 1), (0, 20), (20, 20), (7, 20), (870, 1000)])
def test_it_is_wilsons(correct: int, n: int) -> None:
    z, p = 1.959963984540054, correct / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    ends = [(p + z * z / (2 * n) + sign * half) / (1 + z * z / n) for sign in (-1, 1)]
    assert interval(correct, n) == pytest.approx(ends, abs=1e-12)
    low, high = interval(correct, n)
    assert 0 <= low <= p <= high <= 1


def test_all_right_of_few_is_not_certain() -> None:
    low, high = interval(4, 4)
    assert low == pytest.approx(0.51, abs=0.001)
    assert high == 1


def test_words() -> None:
    assert spoken(0.25, 12_000, 1 / 4) == "25.0 % (n = 12,000, 95 % interval 24.2-25.8, chance 25.0 %)"
    assert spoken(1.0, 4, 1 / 3) == "100.0 % (n = 4, 95 % interval 51.0-100.0, chance 33.3 %)"
    assert spoken(0.25, 12_000, None) == "25.0 % (n = 12,000, 95 % interval 24.2-25.8)"


@pytest.mark.parametrize(("correct", "n"), [(0, 0), (3, 2), (-1, 2)])
def test_impossible_counts(correct: int, n: int) -> None:
    with pytest.raises(MetaplError, match=r"expected 0 to n right"):
        interval(correct, n)


@pytest.mark.parametrize(("accuracy", "n", "chance"), [(1.5, 3, 0.5), (math.nan, 3, 0.5), (0.5, 4, 2.0), (0.5, 0, 0.5)])
def test_impossible_accuracies(accuracy: float, n: int, chance: float) -> None:
    with pytest.raises(MetaplError):
        spoken(accuracy, n, chance)
