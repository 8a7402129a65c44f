"""What a classifier that has learned nothing reaches, and accuracies in words beside it."""

from __future__ import annotations

from collections.abc import Sequence


def chance_level(counts: Sequence[int]) -> float:
    """The accuracy of guessing: 1 in C, or that of always naming the largest class where that is more.

    Args:
        counts: C numbers of examples, of each class.

    >>> chance_level([50, 50, 50, 50]), chance_level([90, 10])
    (0.25, 0.9)
    """
    return max(1 / len(counts), max(counts) / max(1, sum(counts)))


def with_chance(accuracy: float, n: int, chance: float) -> str:
    """An accuracy with the number of examples and the chance level.

    >>> with_chance(0.7125, 400, 0.1)
    '71.2% of 400 (chance 10.0%)'
    """
    return f"{accuracy:.1%} of {n:,} (chance {chance:.1%})"
