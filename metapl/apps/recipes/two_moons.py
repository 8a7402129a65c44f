"""The two moons of the paper's toy experiment: what it states, and a knob for each thing that it leaves open."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from metapl.apps.recipes.base import MOST_IN_A_BATCH, MOST_STEPS, require, require_within
from metapl.errors import MetaplError

Activation = Literal["sigmoid", "tanh", "relu"]

SUCCESS = 0.95
"""A run succeeds if it classifies more than this share of all points as they were drawn."""

MOST_POINTS, MOST_LABELS, MOST_LAYERS, WIDEST, MOST_AHEAD = 100_000, 1_000, 8, 256, 64


@dataclass(frozen=True, kw_only=True)
class TwoMoons:
    """2,000 points on two moons, 6 of them labeled; networks of two hidden layers of 8 units; SGD at a constant rate.

    Three methods: supervised learning on the labeled points, pseudo-labels of the network that was trained so, and Meta
    Pseudo Labels.

    Args:
        points: number of points, half of them on each moon.
        noise: standard deviation of the noise on each coordinate.
        labels_per_class: labeled points on each moon.
        placement: where the labeled points are: anywhere on their moon, or spread evenly along it.
        hidden: widths of the hidden layers.
        activation: of the hidden layers.
        init_scale: the initial weights and biases are uniform between this and its negative.
        steps: training steps; of pseudo-labels, those of the student after as many of its teacher.
        pretrain_steps: before that, steps of teacher and student on the labeled points, in Meta Pseudo Labels.
        unlabeled_batch: unlabeled points in a batch, drawn with replacement. Labeled points are always taken all.
        student_lr: learning rate of the student.
        teacher_lr: learning rate of the teacher, and of supervised learning.
        mode: how the teacher's gradient is computed: forward is the exact one, of soft labels; reinforce is that of
            Algorithm 1, of sampled labels.
        lookahead: student steps in a training step, through which the feedback looks ahead (forward).
        feedback_weight: weight of the feedback, in units of the true gradient.
        feedback_ratio: instead of a weight, the ratio of the norms of the gradients of the feedback and of the
            teacher's own losses, at the teacher's outputs.
        supervised_loss: the teacher of Meta Pseudo Labels also learns from the labeled points.
        uda_weight: weight of a consistency term (UDA) in the own losses of every teacher, and in supervised learning.
        uda_temperature: temperature of UDA's targets; a value below 1 sharpens them.
        input_noise: standard deviation of noise that is added to the unlabeled points that a student learns from, and
            that UDA compares with the points as they are.

    Raises:
        MetaplError: a value out of its range, or values that do not go together.

    Source: Meta Pseudo Labels, its experiment with two moons; ``docs/two-moons.md`` says what it leaves open.
    """

    name: ClassVar[str] = "two-moons"

    points: int = 2000
    noise: float = 0.1
    labels_per_class: int = 3
    placement: Literal["random", "spread"] = "random"
    hidden: tuple[int, ...] = (8, 8)
    activation: Activation = "sigmoid"
    init_scale: float = 0.1
    steps: int = 12_000
    pretrain_steps: int = 0
    unlabeled_batch: int = 32
    student_lr: float = 0.1
    teacher_lr: float = 0.1
    mode: Literal["forward", "reinforce"] = "forward"
    lookahead: int = 1
    feedback_weight: float = 1.0
    feedback_ratio: float | None = None
    supervised_loss: bool = True
    uda_weight: float = 0.0
    uda_temperature: float = 0.5
    input_noise: float = 0.0

    def __post_init__(self) -> None:
        for name, least, most in (
            ("points", 4, MOST_POINTS),
            ("labels_per_class", 1, MOST_LABELS),
            ("steps", 1, MOST_STEPS),
            ("pretrain_steps", 0, MOST_STEPS),
            ("unlabeled_batch", 1, MOST_IN_A_BATCH),
            ("lookahead", 1, MOST_AHEAD),
        ):
            require_within(self, name, least, most)
        require(self, self.points % 2 == 0, "points", "an even number")
        require(self, 2 * self.labels_per_class < self.points, "labels_per_class", "fewer than half of the points")
        require(self, all(1 <= width <= WIDEST for width in self.hidden), "hidden", f"widths from 1 to {WIDEST}")
        require(self, 1 <= len(self.hidden) <= MOST_LAYERS, "hidden", f"1 to {MOST_LAYERS} widths")
        for name in ("init_scale", "student_lr", "teacher_lr", "uda_temperature"):
            require(self, 0 < getattr(self, name) < float("inf"), name, "a number above 0")
        for name in ("noise", "feedback_weight", "uda_weight", "input_noise"):
            require(self, 0 <= getattr(self, name) < float("inf"), name, "a number of 0 or more")
        ratio = self.feedback_ratio
        require(self, ratio is None or 0 < ratio < float("inf"), "feedback_ratio", "a number above 0")
        self._check_together()

    def _check_together(self) -> None:
        """Refuse values that do not go together."""
        if self.mode == "reinforce" and self.lookahead > 1:
            raise MetaplError(
                f"TwoMoons(lookahead={self.lookahead}): mode 'reinforce' looks one student step ahead; expected "
                "lookahead=1, or mode 'forward'."
            )
        if self.uda_weight and not self.input_noise:
            raise MetaplError(
                f"TwoMoons(uda_weight={self.uda_weight}): UDA compares a point with its noisy copy, and input_noise is "
                "0; expected an input_noise above 0, such as 0.1, or uda_weight=0."
            )
        if self.feedback_ratio is not None and self.lookahead > 1:
            raise MetaplError(
                f"TwoMoons(feedback_ratio={self.feedback_ratio}, lookahead={self.lookahead}): the ratio is measured on "
                "one student step; expected lookahead=1, or a feedback_weight."
            )
        if self.feedback_ratio is not None and not (self.supervised_loss or self.uda_weight):
            raise MetaplError(
                f"TwoMoons(feedback_ratio={self.feedback_ratio}): the ratio is to the teacher's own losses, and it "
                "has none; expected supervised_loss=True or a uda_weight above 0, or a feedback_weight instead."
            )
        if self.feedback_ratio is not None and self.feedback_weight != 1.0:
            raise MetaplError(
                f"TwoMoons(feedback_ratio={self.feedback_ratio}, feedback_weight={self.feedback_weight}): the ratio "
                "takes the place of the weight; expected one of them."
            )
