"""What an accuracy says beside guessing and chance, and whether one method beats another over paired runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

from metapl.errors import MetaplError

LARGEST_EXACT = 16


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


def interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, by Wilson's score; for few examples and extreme accuracies too.

        (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n),   p̂ = correct / n,   z = 1.96

    Args:
        correct: number of examples that are right, from 0 to n.
        n: number of examples, at least 1; independent draws of what the accuracy is about.

    Returns: both ends as fractions between 0 and 1.
    Raises: :class:`metapl.MetaplError` where the numbers are not as above.

    >>> [round(end, 3) for end in interval(131, 150)]
    [0.811, 0.917]

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if n < 1 or not 0 <= correct <= n:
        raise MetaplError(f"{correct} right of {n} examples were given; expected 0 to n right, of at least one example")
    p, z = correct / n, NormalDist().inv_cdf(0.975)
    middle, half = p + z**2 / (2 * n), z * math.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
    low, high = ((middle + sign * half) / (1 + z**2 / n) for sign in (-1, 1))
    return low if correct else 0.0, high if correct < n else 1.0


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """An accuracy in words, with its number of examples n, its 95 % interval, and what guessing reaches where known.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    if not 0 <= accuracy <= 1 or not 0 <= (chance or 0) <= 1:
        raise MetaplError(f"accuracy {accuracy} beside chance {chance} was given; expected fractions, 0 to 1")
    low, high = (f"{100 * end:.1f}" for end in interval(round(accuracy * n), n))
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {low}-{high}{guessed})"


@dataclass(frozen=True)
class PairedTest:
    """What n paired runs say about the difference a − b; a field is None where it is not defined.

    `std` is that of the differences, with n − 1 below the fraction; `interval` is the 95 % t interval of the mean;
    `p` is the two-sided p-value of the paired t-test, and `p_permutation` that of the exact sign-flip test.
    """

    mean: float
    std: float | None
    n: int
    interval: tuple[float, float] | None
    p: float | None
    p_permutation: float | None

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "interval": None if self.interval is None else list(self.interval)}


def paired_test(a: Sequence[float], b: Sequence[float]) -> PairedTest:
    """Tests whether two methods differ in the mean over paired runs.

        d_i = a_i − b_i,   t = d̄ / (s / √n),   p = P(|T_{n−1}| ≥ |t|),   interval = d̄ ± t_{0.975, n−1} s / √n
        p_permutation = share of the 2ⁿ choices of signs σ with |Σ σ_i d_i| ≥ |Σ d_i|

    Args:
        a, b: n scores each, finite; a_i and b_i belong to the same seed.

    Returns: the test. With n = 1 only the mean is defined. With equal differences the t-test is not, for it divides by
        their spread: `p` and `interval` are None, `p_permutation` still stands. The latter is exact and needs no normal
        distribution, but cannot fall below 2/2ⁿ; it is None for n > 16.
    Cost: at most 2¹⁶ sums of 16 numbers.
    Raises: :class:`metapl.MetaplError` where the lengths differ, are 0, or a score is not finite.

    >>> test = paired_test([0.97, 0.96, 0.98, 0.97], [0.95, 0.95, 0.95, 0.96])
    >>> f"{test.mean:.4f} ± {test.std:.4f}, p = {test.p:.3f}, exact p = {test.p_permutation}"
    '0.0175 ± 0.0096, p = 0.035, exact p = 0.125'
    """
    if len(a) != len(b) or not len(a):
        raise MetaplError(f"{len(a)} and {len(b)} scores were given; expected as many of one as of the other")
    d = [float(left) - float(right) for left, right in zip(a, b, strict=True)]
    if not all(map(math.isfinite, d)):
        raise MetaplError("a score is not finite; leave out that pair of runs, and say so beside the result")
    n, total = len(d), math.fsum(d)
    mean = total / n
    if n == 1:
        return PairedTest(mean, None, 1, None, None, None)
    std = math.sqrt(math.fsum((one - mean) ** 2 for one in d) / (n - 1))
    interval, p, p_permutation = None, None, None
    # 0.3 − 0.2 and 0.2 − 0.1 differ by rounding alone; a spread of that size is none.
    if std > 4e-16 * max(abs(float(score)) for score in (*a, *b)):
        import scipy.stats

        test = scipy.stats.ttest_rel(a, b)
        ends, p = test.confidence_interval(0.95), float(test.pvalue)
        interval = float(ends.low), float(ends.high)
    if n <= LARGEST_EXACT:  # in milliseconds, where scipy's permutation_test takes seconds for 16 pairs
        sums = np.zeros(1)
        for one in map(abs, d):
            sums = np.concatenate([sums + one, sums - one])
        # The same sum in another order may round to less; such a tie counts as reached.
        reached = abs(total) * (1 - 1e-12) - 1e-15 * math.fsum(map(abs, d))
        p_permutation = float((abs(sums) >= reached).mean())
    return PairedTest(mean, std, n, interval, p, p_permutation)
