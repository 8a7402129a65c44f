"""Accuracies of several seeds as the documentation shows them, so that its figures agree with each other.

A difference is that of the two means as they are shown, to a tenth of a point: who subtracts two cells of a table gets
the third. p is that of the pairs as they are.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from metapl.metrics import paired_test


def points(values: Sequence[float]) -> float:
    """The mean in %, as it is shown.

    >>> points([0.8, 0.8125])
    80.6
    """
    return float(f"{100 * statistics.fmean(values):.1f}")


def spread(values: Sequence[float]) -> str:
    """Mean ± standard deviation in %; of a single value, the value.

    >>> spread([0.8, 0.9])
    '85.0 ± 7.1'
    """
    mean = f"{points(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def difference(first: Sequence[float], second: Sequence[float]) -> tuple[str, str]:
    """Of the means, in points, and p of the paired t-test.

    >>> difference([0.7996, 0.9001, 0.8501], [0.7504, 0.8304, 0.8102])
    ('+5.3', '0.027')
    """
    p = paired_test(first, second).p
    return f"{points(first) - points(second):+.1f}", "–" if p is None else f"{p:.2g}"
