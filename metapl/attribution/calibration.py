"""The coefficients of :func:`metapl.reliability`.

This file is written by ``python benchmarks/reliability.py --calibrate``, from the rows of
``benchmarks/results/reliability.jsonl`` and ``benchmarks/results/ordinary.jsonl``.
"""

from __future__ import annotations

from typing import NamedTuple


class Calibration(NamedTuple):
    """A linear function from two numbers to Fisher's z of a rank correlation, and its interval.

    Attributes:
        intercept: of z.
        slope: of z over the logarithm, to the base 10, of the bend.
        slope_of_steps: of z over the logarithm, to the base 10, of the number of steps.
        least, most: the smallest and the largest bend among the trainings that it was fitted to.
        least_steps, most_steps: the smallest and the largest number of steps among them.
        half_width: of the 90 % interval of z.
        highest: correlations above it counted as it, since few removals do not tell them apart.
        trainings: how many trainings it was fitted to.
    """

    intercept: float
    slope: float
    slope_of_steps: float
    least: float
    most: float
    least_steps: int
    most_steps: int
    half_width: float
    highest: float
    trainings: int


CALIBRATION = Calibration(
    intercept=2.3165,
    slope=-0.8269,
    slope_of_steps=-0.6359,
    least=0.005992,
    most=3.16,
    least_steps=5,
    most_steps=2000,
    half_width=0.8085,
    highest=0.98,
    trainings=67,
)
