"""``--method pseudo_labels``: a student of the labels of a teacher that was trained before."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from metapl import problems
from metapl.apps.methods.base import Method, Trained, Training
from metapl.apps.settings import Share
from metapl.problems.losses import CrossEntropy
from metapl.runs.fields import AboveZero, check_fields


@dataclass(frozen=True, kw_only=True)
class PseudoLabels(Method):
    """Train a teacher on the labeled examples, and then a student on the teacher's labels.

    Args:
        pseudo_labels: labels that the student learns: soft are the teacher's probabilities, hard is
            the most probable class of each example.
        temperature: temperature of the softmax that makes the pseudo-labels. Below 1 it sharpens
            them.
        student_lr: learning rate of the student. By default it fits the network.
        label_smoothing: label smoothing of the teacher's loss, from 0 to 1. By default it fits the
            network.

    Source: Meta Pseudo Labels, eq. (1).
    """

    pseudo_labels: Literal["soft", "hard"] = "soft"
    temperature: float = 1.0
    student_lr: AboveZero | None = None
    label_smoothing: Share | None = None

    name: ClassVar[str] = "pseudo_labels"
    title: ClassVar[str] = "pseudo labels of a fixed teacher"

    def __post_init__(self) -> None:
        check_fields(self)
        self.problem()

    @property
    def trainings(self) -> int:
        """Return 2: the teacher, and the student of its labels."""
        return 2

    def problem(self) -> problems.PseudoLabels:
        """Return the labels that the student learns."""
        return problems.PseudoLabels(kind=self.pseudo_labels, temperature=self.temperature)

    def train(self, t: Training) -> Trained:
        """Train the teacher, then the student on its labels."""
        taught = t.alone(t.teacher, (CrossEntropy(self.label_smoothing or 0.0),), phase="teacher")
        # Without a loss and without feedback the teacher stays as it is.
        trainer = t.bilevel(
            t.teacher, "none", self.problem(), teacher_losses=(), student_lr=self.student_lr
        )
        result = t.fit(trainer, t.data.labeled, t.data.unlabeled)
        return Trained(trainer, result, fallback=(t.teacher, taught.result.weights))
