"""How sure an accuracy on n examples is."""

from __future__ import annotations

from metapl.errors import MetaplError


def interval(correct: int, n: int) -> tuple[float, float]:
    """The 95 % confidence interval of an accuracy, by Wilson's score.

        (p̂ + z²/2n ± z √(p̂(1 − p̂)/n + z²/4n²)) / (1 + z²/n),   p̂ = correct / n,   z = 1.96

    Args:
        correct: number of examples that are right, from 0 to n.
        n: number of examples, at least 1; independent draws of what the accuracy is about.

    Returns:
        both ends as fractions between 0 and 1. It holds for few examples and for accuracies near 0 and 1 too.

    Raises:
        MetaplError: the numbers are not as above.

    >>> [round(end, 3) for end in interval(131, 150)]
    [0.811, 0.917]

    Wilson 1927, "Probable Inference, the Law of Succession, and Statistical Inference".
    """
    if n < 1 or not 0 <= correct <= n:
        raise MetaplError(f"{correct} right of {n} examples were given; expected 0 to n right, of at least one example")
    import scipy.stats

    ends = scipy.stats.binomtest(correct, n).proportion_ci(0.95, method="wilson")
    return float(ends.low), float(ends.high)


def spoken(accuracy: float, n: int, chance: float | None) -> str:
    """An accuracy in words, with what it takes to judge it: n, its 95 % interval, and what guessing gives.

    Args:
        accuracy: a fraction between 0 and 1.
        n: number of examples, at least 1.
        chance: what guessing reaches, a fraction; see :func:`chance_level`. None: not known, and left out.

    Returns:
        one line of text, in percent.

    Raises:
        MetaplError: the numbers are not as above.

    >>> spoken(131 / 150, 150, 0.1)
    '87.3 % (n = 150, 95 % interval 81.1-91.7, chance 10.0 %)'
    """
    if not 0 <= accuracy <= 1 or not 0 <= (chance or 0) <= 1:
        raise MetaplError(f"accuracy {accuracy} beside chance {chance} was given; expected fractions, 0 to 1")
    low, high = (f"{100 * end:.1f}" for end in interval(round(accuracy * n), n))
    guessed = "" if chance is None else f", chance {100 * chance:.1f} %"
    return f"{accuracy * 100:.1f} % (n = {n:,}, 95 % interval {low}-{high}{guessed})"
