"""Errors under corruption, by themselves and beside AlexNet's."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from metapl.errors import MetaplError, few
from metapl.robustness.corruptions import CORRUPTIONS, SEVERITIES

ALEXNET: Mapping[str, float] = dict(
    zip(
        CORRUPTIONS,
        (
            *(0.886428, 0.894468, 0.922640),
            *(0.819880, 0.826268, 0.785948, 0.798360),
            *(0.866816, 0.826572, 0.819324, 0.564592),
            *(0.853204, 0.646056, 0.717840, 0.606500),
        ),
        strict=True,
    )
)
"""AlexNet's mean top-1 error over the severities of each kind on ImageNet-C, by which mCE divides: the constants that
the benchmark's authors published with it, and that papers since have used. Their mean is 0.789."""


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    r"""mCE, the errors under corruption relative to AlexNet's, in %.

    .. math:: \mathrm{CE}_c = \frac{\sum_s E_{s,c}}{\sum_s E^{\mathrm{AlexNet}}_{s,c}}, \qquad
              \mathrm{mCE} = 100 \cdot \tfrac{1}{15} \sum_c \mathrm{CE}_c

    Args:
        errors: top-1 errors in [0, 1] on ImageNet's classes, for each of the 15 kinds those of the 5 severities.

    Raises:
        MetaplError: a kind or a severity is missing, or there are others.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.1.

    >>> round(mean_corruption_error({name: [error] * 5 for name, error in ALEXNET.items()}), 6)
    100.0
    """
    if set(errors) != set(CORRUPTIONS) or any(len(row) != len(SEVERITIES) for row in errors.values()):
        wrong = sorted(set(CORRUPTIONS) ^ set(errors)) or [name for name, row in errors.items() if len(row) != 5]
        raise MetaplError(f"the mean corruption error takes 15 kinds in 5 severities each; not so: {few(wrong, 15)}.")
    return 100 * statistics.fmean(statistics.fmean(errors[name]) / ALEXNET[name] for name in CORRUPTIONS)
