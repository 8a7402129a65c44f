"""The settings of the methods whose teacher learns from what its labels do to the student."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import tyro

from metapl import feedback, problems
from metapl.apps.settings import Weight
from metapl.errors import MetaplError
from metapl.runs.fields import AboveZero, check_fields

# The modes in which a teacher can learn, which the type checker cannot read from a tuple.
if TYPE_CHECKING:
    Mode = str
else:
    Mode = Literal[tuple(m for m in feedback.MODES if feedback.estimator(m).is_through_step)]


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """How a teacher labels, and what it learns from the student.

    Args:
        mode: how the feedback is computed: forward and unrolled are exact, and difference,
            reinforce, reinforce_per_example and loss_difference are estimates. metapl ablate
            compares them.
        pseudo_labels: labels that the student learns: soft are the teacher's probabilities, hard is
            one class for each example. By default the mode decides.
        temperature: temperature of the softmax that makes the pseudo-labels. Below 1 it sharpens
            them.
        student_lr: learning rate of the student. By default it fits the network.
        feedback_weight: weight of the feedback in the teacher's loss, the same in every step.
        feedback_ratio: size of the feedback's gradient, as a multiple of the gradient of the
            teacher's other losses.
        feedback_bound: largest size of the feedback's gradient, as a multiple of the gradient of
            the teacher's other losses. By default it is 0.1.
        baseline: decay of the running average that is subtracted from the feedback, in a mode that
            draws labels.
        reduction: whether the teacher's loss is the mean or the sum over the batch, in a mode that
            draws labels.
        learns_from_student: whether the teacher learns from what its labels do to the student. A
            control has the same loop without that.
    """

    mode: Mode = "forward"
    pseudo_labels: Literal["soft", "hard"] | None = None
    temperature: float = 1.0
    student_lr: AboveZero | None = None
    feedback_weight: float | None = None
    feedback_ratio: Weight | None = None
    feedback_bound: Weight | None = None
    baseline: float | None = None
    reduction: Literal["mean", "sum"] | None = None
    learns_from_student: tyro.conf.Suppress[bool] = True

    def __post_init__(self) -> None:
        check_fields(self)
        self.estimator()
        kinds = feedback.estimator(self.mode).labels
        if self.pseudo_labels is not None and self.pseudo_labels not in kinds:
            modes = []
            for name in feedback.modes_for(self.pseudo_labels):
                if feedback.estimator(name).is_through_step:
                    modes.append(name)
            raise MetaplError(
                f"--pseudo-labels {self.pseudo_labels} was given, and --mode {self.mode} takes "
                f"{' or '.join(kinds)} labels; leave it out, or take --mode {' or '.join(modes)}."
            )
        if self.feedback_ratio is not None and (
            self.feedback_weight is not None or self.feedback_bound is not None
        ):
            beside = "--feedback-bound" if self.feedback_weight is None else "--feedback-weight"
            raise MetaplError(f"--feedback-ratio and {beside} were given; expected one of them.")
        self.problem()

    def estimator(self) -> Any:
        """Return the estimator of the mode; "none" without feedback."""
        estimator: Any = feedback.estimator(self.mode)
        for name in ("baseline", "reduction"):
            value = getattr(self, name)
            if value is None:
                continue
            if name not in options_of(estimator):
                modes = []
                for mode in feedback.MODES:
                    if name in options_of(feedback.estimator(mode)):
                        modes.append(mode)
                raise MetaplError(
                    f"--{name} {value} was given, and mode '{self.mode}' has none; leave it out, "
                    f"or take --mode {' or '.join(modes)}."
                )
            estimator = dataclasses.replace(estimator, **{name: value})
        if not self.learns_from_student:
            return "none"
        return estimator

    def problem(self) -> problems.PseudoLabels:
        """Return the labels that the student learns: without feedback too, those of the mode."""
        labels = problems.PseudoLabels(kind=self.pseudo_labels, temperature=self.temperature)
        if not self.learns_from_student:
            return labels.for_modes(feedback.estimator(self.mode).labels, self.mode)
        return labels

    def size(self) -> dict[str, Any]:
        """Return the rule of the feedback's size, as :class:`metapl.BilevelTrainer` takes it."""
        if not self.learns_from_student:
            return {}
        return {
            name: getattr(self, name)
            for name in ("feedback_weight", "feedback_ratio", "feedback_bound")
        }


def options_of(estimator: Any) -> set[str]:
    """Return the names of what an estimator can be made with."""
    return {option.name for option in dataclasses.fields(estimator)}
