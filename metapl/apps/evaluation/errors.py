"""Errors under corruption and flips under perturbation, by themselves and beside AlexNet's."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean

import numpy as np

from metapl.apps.evaluation.corruptions import SEVERITIES
from metapl.errors import MetaplError, few

ALEXNET: Mapping[str, float] = {
    "gaussian_noise": 0.886428,
    "shot_noise": 0.894468,
    "impulse_noise": 0.922640,
    "defocus_blur": 0.819880,
    "glass_blur": 0.826268,
    "motion_blur": 0.785948,
    "zoom_blur": 0.798360,
    "snow": 0.866816,
    "frost": 0.826572,
    "fog": 0.819324,
    "brightness": 0.564592,
    "contrast": 0.853204,
    "elastic_transform": 0.646056,
    "pixelate": 0.717840,
    "jpeg_compression": 0.606500,
}
"""AlexNet's mean top-1 error over the severities of each kind on ImageNet-C, by which mCE divides: the constants that
the benchmark's authors published with it, and that papers since have used. Their mean is 0.789. Checked against the
errors that the authors of "Robustness properties of Facebook's ResNeXt WSL models" publish (eminorhan/resnext-wsl on
GitHub): of ResNeXt-101 32x48d WSL they make an mCE of 45.7, the figure that is printed for it."""

FLIPS_OF_ALEXNET: Mapping[str, float] = {
    "gaussian_noise": 0.2365,
    "shot_noise": 0.3006,
    "motion_blur": 0.0930,
    "zoom_blur": 0.0594,
    "snow": 0.1193,
    "brightness": 0.0489,
    "translate": 0.1101,
    "rotate": 0.1310,
    "tilt": 0.0705,
    "scale": 0.2353,
}
"""AlexNet's flip probability under each perturbation of ImageNet-P, by which mFR divides; the perturbations are the ten
that its test set has. Rounded as papers restate them; the code of the benchmark does not contain them, so they were
checked against flip probabilities that others publish: those of ResNeXt-101 32x48d WSL (eminorhan/resnext-wsl on
GitHub) make an mFR of 27.8, the figure that is printed for it."""

NOISES = ("gaussian_noise", "shot_noise")
"""Perturbations whose frames do not follow each other: each is compared with the first, which is clean."""


def mean_corruption_error(errors: Mapping[str, Sequence[float]]) -> float:
    r"""mCE, the errors under corruption relative to AlexNet's, in %.

    .. math:: \mathrm{CE}_c = \frac{\sum_s E_{s,c}}{\sum_s E^{\mathrm{AlexNet}}_{s,c}}, \qquad
              \mathrm{mCE} = 100 \cdot \tfrac{1}{15} \sum_c \mathrm{CE}_c

    Args:
        errors: top-1 errors in [0, 1] on ImageNet's classes: 5 for each of the 15 kinds, one a severity.

    Raises:
        MetaplError: a kind or a severity is missing, or there are others.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.1.

    >>> round(mean_corruption_error({name: [error] * 5 for name, error in ALEXNET.items()}), 6)
    100.0
    """
    whole = {name: fmean(row) for name, row in errors.items() if len(row) == len(SEVERITIES)}
    return _relative("the mean corruption error takes 15 kinds in 5 severities each", whole, ALEXNET)


def flip_probability(predictions: Sequence[Sequence[int]], perturbation: str) -> float:
    r"""How often the predicted class changes from one frame to the next.

    .. math:: \mathrm{FP}_p = \frac{1}{m} \sum_{i=1}^{m} \frac{1}{n_i - 1} \sum_{j=2}^{n_i}
              [f(x^{(i)}_j) \ne f(x^{(i)}_{j-1})], \qquad x_{j-1} \to x_1 \text{ for noise}

    Args:
        predictions: for each of the m sequences the classes of its n_i frames.
        perturbation: its name; frames of :data:`NOISES` are compared with the first frame.

    Raises:
        MetaplError: no sequence, or one of fewer than two frames.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.2.

    >>> flip_probability([[3, 3, 7, 7, 3]], "tilt"), flip_probability([[3, 3, 7, 7, 3]], "shot_noise")
    (0.5, 0.5)
    >>> flip_probability([[3, 7, 7, 7, 7]], "tilt"), flip_probability([[3, 7, 7, 7, 7]], "shot_noise")
    (0.25, 1.0)
    """
    least = min(map(len, predictions), default=0)
    if least < 2:
        raise MetaplError(
            f"{perturbation}: {len(predictions):,} sequences, the shortest of {least} frames; expected at least one, "
            "and two frames in each."
        )
    sequences = map(np.asarray, predictions)
    return fmean(np.mean(c[1:] != (c[0] if perturbation in NOISES else c[:-1])) for c in sequences)


def mean_flip_rate(probabilities: Mapping[str, float]) -> float:
    r"""mFR, the flip probabilities relative to AlexNet's, in %.

    .. math:: \mathrm{mFR} = 100 \cdot \tfrac{1}{10} \sum_p \mathrm{FP}_p / \mathrm{FP}^{\mathrm{AlexNet}}_p

    Args:
        probabilities: flip probabilities on ImageNet's classes, of each of the 10 perturbations.

    Raises:
        MetaplError: one is missing, or there are others.

    Source: Hendrycks and Dietterich (ICLR 2019), section 4.2.

    >>> round(mean_flip_rate(FLIPS_OF_ALEXNET), 6)
    100.0
    """
    return _relative("the mean flip rate takes the 10 perturbations of ImageNet-P", probabilities, FLIPS_OF_ALEXNET)


def _relative(expected: str, values: Mapping[str, float], alexnet: Mapping[str, float]) -> float:
    if wrong := sorted(alexnet.keys() ^ values.keys()):
        raise MetaplError(f"{expected}; not so: {few(wrong, 15)}.")
    return 100 * fmean(values[name] / divisor for name, divisor in alexnet.items())
