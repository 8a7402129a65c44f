"""``--method uda``: consistency of the predictions on two views of unlabeled examples."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Self

import tyro

from metapl.apps.methods.base import Losses, Method, Trained, Training
from metapl.apps.settings import Share, SomeSteps, Weight
from metapl.problems.losses import UDA, CrossEntropy
from metapl.runs.fields import Range, check_fields

# Shares of the steps: before the consistency loss begins, and of its ramp.
START = 0.4
RAMP = 0.1


@dataclass(frozen=True, kw_only=True)
class Consistency:
    """Consistency of the predictions on two views of unlabeled examples.

    Args:
        label_smoothing: label smoothing of the supervised loss, from 0 to 1. By default it fits the
            network.
        uda_weight: weight of the consistency loss, which asks for equal predictions on two views of
            an unlabeled example. 0 leaves it out.
        uda_temperature: temperature of the targets of the consistency loss. 0 makes them hard
            labels.
        uda_threshold: leave an example out of the consistency loss if its most probable class has
            less than this probability.
        uda_align: how far the targets' shares of the classes are moved to those of the labeled
            examples, from 0 (not at all) to 1.
        uda_start: number of steps before the consistency loss begins. By default it is 40 % of the
            steps, and 0 for digits.
        uda_ramp: number of steps in which the consistency loss grows to its weight. By default it
            is 10 % of the steps, and 0 for digits.
        uda_prior: shares of the classes that uda_align moves to; None: equal ones.
    """

    label_smoothing: Share | None = None
    uda_weight: Weight = 1.0
    uda_temperature: Weight = 0.5
    uda_threshold: Share = 0.85
    uda_align: Annotated[float, Range(0, most=1)] = 0.5
    uda_start: SomeSteps | None = None
    uda_ramp: SomeSteps | None = None
    uda_prior: tyro.conf.Suppress[tuple[float, ...] | None] = None

    def __post_init__(self) -> None:
        check_fields(self)
        self.losses()

    def losses(self) -> Losses:
        """Return the supervised loss, and UDA's where it has a weight."""
        plain = CrossEntropy(self.label_smoothing or 0.0)
        uda = UDA(
            weight=self.uda_weight,
            temperature=self.uda_temperature,
            threshold=self.uda_threshold,
            align=self.uda_align,
            start=self.uda_start or 0,
            ramp=self.uda_ramp or 0,
            prior=self.uda_prior,
        )
        if self.uda_weight:
            return (plain, uda)
        return (plain,)

    def scheduled(self, steps: int) -> Self:
        """Return the settings with the usual shares of the steps where none were given."""
        start = self.uda_start
        if start is None:
            start = round(START * steps)
        ramp = self.uda_ramp
        if ramp is None:
            ramp = round(RAMP * steps)
        return dataclasses.replace(self, uda_start=start, uda_ramp=ramp)


@dataclass(frozen=True, kw_only=True)
class Uda(Method):
    """Train one network on labeled examples, and on its own labels of unlabeled ones (UDA)."""

    uda: Consistency = field(default_factory=Consistency)

    name: ClassVar[str] = "uda"
    title: ClassVar[str] = "UDA alone"
    has_teacher: ClassVar[bool] = False

    def scheduled(self, steps: int) -> Self:
        """Return the method with the steps of the consistency loss."""
        return dataclasses.replace(self, uda=self.uda.scheduled(steps))

    def train(self, t: Training) -> Trained:
        """Train one network on labeled and unlabeled examples."""
        return t.alone(t.teacher, self.uda.losses())
