"""The coefficients of :func:`metapl.reliability`.

This file is written by ``python benchmarks/reliability.py --calibrate``, from the rows of
``benchmarks/results/reliability.jsonl``.
"""

from __future__ import annotations

from typing import NamedTuple


class Calibration(NamedTuple):
    """A line from a measurement to Fisher's z of a rank correlation, and its interval.

    Attributes:
        intercept, slope: of z over the logarithm, to the base 10, of the bend.
        least, most: the smallest and the largest bend among the trainings that it was fitted to.
        half_width: of the 80 % interval of z.
        highest: correlations above it counted as it, since few removals do not tell them apart.
        trainings: how many trainings it was fitted to.
    """

    intercept: float
    slope: float
    least: float
    most: float
    half_width: float
    highest: float
    trainings: int


CALIBRATION = Calibration(
    intercept=0.3963,
    slope=-1.0245,
    least=0.005992,
    most=1.733,
    half_width=0.6084,
    highest=0.98,
    trainings=37,
)
