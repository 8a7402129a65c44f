"""``--method mpl``: Meta Pseudo Labels, and ``none``, its control."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import ClassVar, Self

import tyro

from metapl.apps.methods.base import Method, Trained, Training
from metapl.apps.methods.feedback import Feedback
from metapl.apps.methods.uda import Consistency
from metapl.apps.settings import SomeSteps
from metapl.errors import MetaplError
from metapl.training.trainer import BilevelTrainer

# The share of the steps before the student of a teacher begins.
WAIT = 0.75


@dataclass(frozen=True, kw_only=True)
class Mpl(Method):
    """Train a student on a teacher's labels, and the teacher on how that helps (MPL).

    Args:
        wait: number of steps in which the teacher learns alone, before the student begins. By
            default it is 75 % of the steps, and 0 for digits.
        warm_start: whether the student begins with the teacher's weights after --wait steps.
    """

    feedback: Feedback = field(default_factory=Feedback)
    uda: Consistency = field(default_factory=Consistency)
    wait: SomeSteps | None = None
    warm_start: tyro.conf.FlagConversionOff[bool] = True

    advice: ClassVar[str] = (
        "whether the teacher's feedback helped, only a comparison tells: --compare --seeds 0-4"
    )

    @property
    def name(self) -> str:
        """Return mpl, and none without feedback."""
        return "mpl" if self.feedback.learns_from_student else "none"

    @property
    def title(self) -> str:
        """Return what is fed back, in words."""
        if self.feedback.learns_from_student:
            return "Meta Pseudo Labels"
        return "same loop, no feedback"

    def scheduled(self, steps: int) -> Self:
        """Return the method with a number of steps before the student begins."""
        wait = self.wait
        if wait is None:
            wait = min(round(WAIT * steps), steps - 1)
        if wait >= steps:
            raise MetaplError(
                f"--wait {wait:,}: expected fewer steps than the {steps:,} of the training."
            )
        return dataclasses.replace(self, wait=wait, uda=self.uda.scheduled(steps))

    def trainer(self, t: Training) -> BilevelTrainer:
        """Build the trainer of both networks."""
        return t.bilevel(
            t.teacher,
            self.feedback.estimator(),
            self.feedback.problem(),
            teacher_losses=self.uda.losses(),
            student_lr=self.feedback.student_lr,
            **self.feedback.size(),
        )

    def train(self, t: Training) -> Trained:
        """Train both networks in one phase."""
        trainer = self.trainer(t)
        wait = self.wait or 0
        steps = t.config.fitting.chosen_steps
        # A student that waits has fewer steps, and warms up over the same share of them.
        warmup = round((steps - wait) / steps * (t.config.fitting.warmup or 0))
        result = t.fit(
            trainer,
            t.data.labeled,
            t.data.unlabeled,
            wait=wait,
            warm_start=self.warm_start and wait > 0,
            warmup=warmup,
        )
        return Trained(trainer, result, (t.teacher, result.teacher_weights or {}))
