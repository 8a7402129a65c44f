r"""Whether scores will predict retraining, estimated before the attribution is computed.

A score is a derivative through a training of K steps, and a removal is not a small change. Whether
the two agree is known only after trainings without the examples. :func:`reliability` estimates the
rank correlation that these would show from three plain trainings of the first half of the steps,
and from the number of steps. From top to bottom: what is measured; the result; and the call, with
the line that turns what is measured into a correlation.

The coefficients are in :mod:`metapl.attribution.calibration`, which ``benchmarks/reliability.py``
writes. Other measurements are tried there too, and none of them adds much to this one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from metapl.attribution.attribute import agreement_of_signs
from metapl.attribution.calibration import CALIBRATION, Calibration
from metapl.attribution.weighted import WeightedTraining
from metapl.errors import MetaplError
from metapl.execution.numerics import HALF
from metapl.problems.base import BilevelProblem
from metapl.runs.fields import AboveZero, AtLeastOne, check_arguments
from metapl.updates import Settings

PERTURBATION = 0.1
"""How far the examples' weights move along a standard normal direction, as in metasmoothness.

The weights of N examples move by 0.1 √N in all, which is as far as a removal of 1 % moves them.
"""


def bend_of(theta_0: Tensor, theta_h: Tensor, theta_2h: Tensor) -> float:
    r"""Return how much trained weights bend as the weights of the examples move on a line.

    Of three trainings with the weights 1, 1 + h v and 1 + 2 h v of the examples it is

    .. math:: \frac{\|\theta_{2h} - 2 \theta_h + \theta_0\|}{\|\theta_{2h} - \theta_0\|}

    the part of the change that no derivative sees: 0 of a training that is linear in the weights of
    its examples, of the order of h of a smooth one, and 1 or more where θ_h and θ_2h have nothing
    to do with one another. NaN where the trained weights do not move.
    """
    first = theta_0.double()
    second = theta_h.double()
    third = theta_2h.double()
    moved = float((third - first).norm())
    bent = float((third - 2 * second + first).norm())
    return bent / moved if moved else math.nan


@dataclass(frozen=True)
class Reliability:
    """The result of :func:`reliability`; printed, it is one line.

    Attributes:
        correlation: the rank correlation that is expected between predicted changes of the outer
            loss and those of trainings without 1 % of the examples, 25 times.
        low, high: the interval of such correlations, nominally of 90 %.
        bend: of the first half of the training, as :func:`bend_of` defines it.
        agreement: the metasmoothness Ŝ of the first half.
        steps: of the training, K.
        is_bend_outside: whether ``bend`` lies outside of what was calibrated; it was then moved to
            the nearest end.
        are_steps_outside: whether ``steps`` does; they were then moved in the same way.
    """

    correlation: float
    low: float
    high: float
    bend: float
    agreement: float
    steps: int
    is_bend_outside: bool
    are_steps_outside: bool

    def __str__(self) -> str:
        line = (
            f"expect a rank correlation of about {in_words(self.correlation)} "
            f"({in_words(self.low)} to {in_words(self.high)}) with retraining"
        )
        outside: list[str] = []
        if self.is_bend_outside:
            outside.append(f"the bend, {self.bend:.2g},")
        if self.are_steps_outside:
            outside.append(f"the number of steps, {self.steps:,},")
        if outside:
            verb = "is" if len(outside) == 1 else "are"
            line += f"; {' and '.join(outside)} {verb} outside of what was calibrated"
        return line


def in_words(correlation: float) -> str:
    """Return a correlation to two digits.

    >>> in_words(0.4), in_words(-0.001)
    ('0.40', '0.00')
    """
    return f"{round(correlation, 2) + 0.0:.2f}"


def reliability(
    student: nn.Module,
    train: Any,
    outer: Any,
    *,
    optimizer: torch.optim.Optimizer | Sequence[torch.optim.Optimizer],
    steps: AtLeastOne,
    batch_size: AtLeastOne,
    settings: Settings | None = None,
    generator: torch.Generator | None = None,
    problem: BilevelProblem | None = None,
    clip_norm: AboveZero | None = None,
    progress: bool = True,
) -> Reliability:
    r"""Return how well scores may be expected to predict retraining, before they are computed.

    The first half of the training is taken three times, with the weights 1, 1 + h v and 1 + 2 h v
    of the examples, h = 0.1 and v as in :func:`metapl.metasmoothness`. The bend of the trained
    weights, :func:`metapl.attribution.reliability.bend_of`, gives the expected rank correlation,
    together with the number of steps, K:

    .. math:: \hat\rho = \tanh(a + b \log_{10} \mathrm{bend} + c \log_{10} K)

    The coefficients were fitted to 67 trainings of small networks whose correlations had been
    measured. The interval holds nine of ten of them, each predicted by coefficients that were
    fitted without it; these predictions have an error of 0.47 in Fisher's z (root of the mean
    square). Of twelve trainings that were named before they were run it held 11; the middle of the
    interval had no smaller error there than a constant.

    Args:
        student, train, outer, optimizer, steps, batch_size: as for :func:`metapl.attribute`.
        settings, generator, problem, clip_norm, progress: as for :func:`metapl.attribute`; the
            generator stays where it is, so that the same one gives attribute the same order.

    Returns: a :class:`metapl.attribution.reliability.Reliability`, which is printed as one line.
    Cost: one and a half plain trainings, and three more copies of the weights. No derivative is
    taken. Bias: the 67 are perceptrons, small convolutional networks, small transformers and a
    recurrent network, of 5 to 2,000 steps, on digits, tables and docstrings, with removals of 1 %
    (docs/whole-trainings.md); for other trainings it is a guess. It is of exact scores: by Adam at
    its usual eps they may be noise where it promises 0.73.
    Raises: :class:`metapl.MetaplError` for other data, for a sharded student, for weights in half
    precision, and where no weight moves along v, or one becomes NaN.

    >>> x, y = torch.randn(12, 4), torch.arange(12) % 3
    >>> student = nn.Linear(4, 3)
    >>> optimizer = torch.optim.SGD(student.parameters(), 0.1)
    >>> estimate = reliability(student, (x, y), (x, y), optimizer=optimizer, steps=6, batch_size=6)
    >>> estimate.low < estimate.correlation < estimate.high
    True

    Source: the calibration is the project's own (``benchmarks/reliability.py``). That an error of
    first order can be estimated without retraining is the idea of Deng et al. (2026),
    arXiv 2605.18814; the estimate here is another one.
    """
    check_arguments(reliability, locals())
    refuse_half_precision(student)
    # It stays where it is, so that the same one gives attribute the same order.
    if isinstance(generator, torch.Generator):
        generator = generator.clone_state()
    training = WeightedTraining(
        student,
        train,
        outer,
        optimizer=optimizer,
        steps=steps,
        batch_size=batch_size,
        settings=settings,
        generator=generator,
        problem=problem,
        clip_norm=clip_norm,
    )
    first_steps = max(1, steps // 2)
    thetas, _ = training.trained_along(PERTURBATION, None, first_steps, progress=progress)
    return estimate_by(thetas, first_steps, steps)


def estimate_by(thetas: tuple[Tensor, Tensor, Tensor], first_steps: int, steps: int) -> Reliability:
    """Return what is expected of a training, by the weights after some of its steps.

    Args:
        thetas: of three trainings, with weights of the examples along a line.
        first_steps: how many steps they took.
        steps: of the whole training, K.
    """
    bend = bend_of(*thetas)
    if not math.isfinite(bend):
        raise MetaplError(
            f"the weights after {first_steps:,} of {steps:,} steps bend by {bend:g}; expected a "
            "finite number, as of a lower learning rate, and an optimizer that moves the student."
        )
    agreement, _ = agreement_of_signs(*thetas)
    return predicted(bend, agreement, steps, CALIBRATION)


def predicted(bend: float, agreement: float, steps: int, calibration: Calibration) -> Reliability:
    """Return the correlation that a calibration expects of a bend and K steps, with its interval.

    Either number is moved to the nearest end of what was calibrated, where it lies outside.
    """
    nearest_bend = min(max(bend, calibration.least), calibration.most)
    nearest_steps = min(max(steps, calibration.least_steps), calibration.most_steps)
    z = (
        calibration.intercept
        + calibration.slope * math.log10(nearest_bend)
        + calibration.slope_of_steps * math.log10(nearest_steps)
    )
    return Reliability(
        correlation=math.tanh(z),
        low=math.tanh(z - calibration.half_width),
        high=upper_end(z + calibration.half_width, calibration.highest),
        bend=bend,
        agreement=agreement,
        steps=steps,
        is_bend_outside=nearest_bend != bend,
        are_steps_outside=nearest_steps != steps,
    )


def upper_end(z: float, highest: float) -> float:
    """Return the correlation at the upper end of an interval of Fisher's z.

    It is 1 from ``highest`` on: the line was fitted to correlations that counted as that where they
    were above it, so that it cannot tell them apart.
    """
    end = math.tanh(z)
    return 1.0 if end >= highest else end


def refuse_half_precision(student: nn.Module) -> None:
    """Refuse weights in half precision, whose rounding bends far more than the training does.

    Of the perceptron in bfloat16 the bend is 0.62, where the same one in float32 has 0.03. Its
    scores predict retraining as well, with 0.93.
    """
    for name, parameter in student.named_parameters():
        if parameter.dtype in HALF:
            kind = str(parameter.dtype).removeprefix("torch.")
            expected = "float32, as of copy.deepcopy(student).float() and an optimizer over it"
            raise MetaplError(f"the student's {name} is in {kind}; expected {expected}.")
