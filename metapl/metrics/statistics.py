"""Accuracy beside guessing and chance, and tests of one method against another in paired runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from metapl.errors import MetaplError

# The exact test costs 2ⁿ sums, and is left out above this n.
LARGEST_EXACT = 16


def chance_level(counts: Sequence[int]) -> float:
    """Return the accuracy of guessing.

    It is 1 in C, or that of always naming the largest class where that is more; ``counts`` are the
    C numbers of examples of each class.

    >>> chance_level([50, 50, 50, 50]), chance_level([90, 10])
    (0.25, 0.9)
    """
    return max(1 / len(counts), max(counts) / max(1, sum(counts)))


def interval(correct: int, n: int) -> tuple[float, float]:
    """Return the 95 % confidence interval of an accuracy, by Wilson's score.

    Its ends are fractions between 0 and 1.

    Args:
        correct: number of examples that are right, from 0 to n.
        n: number of examples, at least 1; independent draws of what the accuracy is about.

    >>> [round(end, 3) for end in interval(131, 150)]
    [0.811, 0.917]

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if n < 1 or not 0 <= correct <= n:
        raise MetaplError(
            f"{correct} right of {n} examples were given; expected 0 to n right, of at least one "
            "example"
        )
    from scipy.stats import binomtest

    bounds = binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(bounds.low), float(bounds.high)


@dataclass(frozen=True)
class PairedTest:
    """What n paired runs say about the difference a − b; a field is None where it is not defined.

    `std` is that of the differences, with n − 1 below the fraction; `interval` is the 95 % t
    interval of the mean; `p` is the two-sided p-value of the paired t-test, and `p_permutation`
    that of the exact sign-flip test.
    """

    mean: float
    std: float | None
    n: int
    interval: tuple[float, float] | None
    p: float | None
    p_permutation: float | None


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairedTest:
    """Test whether two methods differ in the mean over paired runs.

        d_i = a_i − b_i,   t = d̄ / (s / √n),   p = P(|T_{n−1}| ≥ |t|)
        interval = d̄ ± t_{0.975, n−1} s / √n
        p_permutation = share of the 2ⁿ choices of signs σ with |Σ σ_i d_i| ≥ |Σ d_i|

    Args:
        a, b: n scores each, finite; a_i and b_i belong to the same seed.

    Returns: the test. With n = 1 only the mean is defined, with equal differences the t-test is
        not. `p_permutation` cannot fall below 2/2ⁿ; it is None for n > 16, as its cost is 2ⁿ sums.

    >>> test = paired_test([0.97, 0.96, 0.98, 0.97], [0.95, 0.95, 0.95, 0.96])
    >>> f"{test.mean:.4f} ± {test.std:.4f}, p = {test.p:.3f}, exact p = {test.p_permutation}"
    '0.0175 ± 0.0096, p = 0.035, exact p = 0.125'
    """
    if len(a) != len(b) or not len(a) or not np.isfinite([*a, *b]).all():
        raise MetaplError(
            f"{len(a)} and {len(b)} scores were given; expected as many, one or more, all finite"
        )
    from scipy.stats import permutation_test, ttest_rel

    d = np.asarray(a, dtype=float) - np.asarray(b, dtype=float)
    n = len(d)
    mean = math.fsum(d) / n
    if n == 1:
        return PairedTest(mean, std=None, n=1, interval=None, p=None, p_permutation=None)
    std = float(d.std(ddof=1))
    ends: tuple[float, float] | None = None
    p = None
    # 0.3 − 0.2 and 0.2 − 0.1 differ by rounding alone; a spread of that size is none.
    if std > 4e-16 * np.abs([*a, *b]).max():
        test = ttest_rel(a, b)
        bounds = test.confidence_interval(0.95)
        ends = (float(bounds.low), float(bounds.high))
        p = float(test.pvalue)
    p_permutation = None
    if n <= LARGEST_EXACT:
        exact_test = permutation_test(
            (d,), np.mean, permutation_type="samples", n_resamples=np.inf, vectorized=True
        )
        p_permutation = float(exact_test.pvalue)
    return PairedTest(mean, std=std, n=n, interval=ends, p=p, p_permutation=p_permutation)
