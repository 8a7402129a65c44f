"""Self-training: a network learns labels, and a fresh one learns the first one's labels too.

The labels may be those of one network, or of two that were trained in two ways.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
import tyro
from torch import Tensor, nn

from metapl.apps.methods import (
    Consistency,
    Method,
    Trained,
    Training,
    drawn_positions,
    labeled_loss,
    picked,
)
from metapl.apps.settings import Share, with_flags
from metapl.errors import MetaplError
from metapl.networks.tuned import begin_as
from metapl.pictures import UnlabeledBatches
from metapl.problems.mixup import MixUp
from metapl.runs.fields import AboveZero, Range
from metapl.training import FitResult
from metapl.training.loss_trainer import LossTrainer

# Rounds of scaling after which the class shares of stored labels are those of the prior to 1e-3 or
# so on what was looked at: 6,000 pictures of ten classes.
ROUNDS_OF_BALANCING = 20

# How often a student passes over a picture that was labeled for it, at the least. Labels of more
# pictures than that would cost time which is worth more as steps.
LEAST_PASSES = 4


@dataclass(frozen=True, kw_only=True)
class SelfTraining(Method):
    """Train a network on labels, and a fresh one on labels and on the first one's labels.

    The first one labels the unlabeled pictures once, softly: all of them, or of very many as many
    as the student passes over four times (:data:`LEAST_PASSES`). Its labels are balanced: scaled
    until each class has the share that it has among the labeled pictures.

    Args:
        mixup: how much pairs of pictures are mixed: the parameter of the Beta distribution of
            mixup.
        label_smoothing: label smoothing of the labeled pictures, from 0 to 1.
        teacher_share: share of the steps in which the first network is trained.
        uda_prior: shares of the classes to which labels are balanced; None: equal ones.
    """

    mixup: AboveZero = 0.4
    label_smoothing: Share = 0.1
    teacher_share: Annotated[float, Range(above=0, below=1)] = 0.4
    uda_prior: tyro.conf.Suppress[tuple[float, ...] | None] = None

    name: ClassVar[str] = "self_training"
    title: ClassVar[str] = "self-training on soft labels, with mixup"

    def train(self, t: Training) -> Trained:
        """Train the teacher, label, and train the student."""
        steps = t.config.fitting.chosen_steps
        # Each of the two networks takes one step at least, also where one step was asked for.
        teacher_steps = max(1, round(self.teacher_share * steps))
        student_steps = max(1, steps - teacher_steps)
        taught = self.trained_teacher(t, teacher_steps)
        labels = labels_for_student(t, t.teacher, student_steps)
        soft_labels = with_class_shares(labels, self.uda_prior)
        trainer, result = self.trained_student(t, soft_labels, student_steps)
        return Trained(trainer, result, fallback=(t.teacher, taught.result.weights))

    def trained_teacher(self, t: Training, steps: int) -> Trained:
        """Train the teacher on the labeled pictures alone, for some of the steps."""
        loss = labeled_loss(self.label_smoothing, self.mixup)
        return t.alone(t.teacher, (loss,), phase="teacher", steps=steps, warmup=warmup_of(t, steps))

    def trained_student(
        self, t: Training, soft_labels_NC: Tensor, steps: int
    ) -> tuple[LossTrainer, FitResult]:
        """Train the student on labeled pictures, and on unlabeled ones with labels of a teacher.

        Args:
            t: the training.
            soft_labels_NC: (N, C), a distribution over the classes for each unlabeled picture that
                is labeled.
            steps: of the student, some of those of the training.
        """
        # Labels of every picture are there, so that one view of it is enough.
        unlabeled = t.data.unlabeled
        assert isinstance(unlabeled, UnlabeledBatches)
        view = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
        limit = label_limit(t, steps)
        positions = drawn_positions(len(unlabeled.images), limit, t.config.fitting.seed)
        examples = dataclasses.replace(
            unlabeled,
            images=picked(unlabeled.images, positions),
            sampler=dataclasses.replace(unlabeled.sampler, size=len(positions)),
            weak=view,
            strong=None,
            stored=soft_labels_NC,
        )
        trainer = LossTrainer(
            t.student,
            (MixUp(alpha=self.mixup, label_smoothing=self.label_smoothing),),
            optimizer=t.config.optimizer("student", t.student),
            **t.options,
        )
        result = t.fit(
            trainer, t.data.labeled, examples, steps=steps, warmup=warmup_of(t, steps), truth=None
        )
        return trainer, result


@dataclass(frozen=True, kw_only=True)
class TwoTeachers(SelfTraining):
    """Train two networks in two ways, and a fresh one on labels and on the labels of both.

    The first one learns the labeled pictures with mixup, augmented as the settings say: mildly,
    unless they say something else. The second one is trained by UDA with strong augmentation. They
    err on different pictures, so that, where labels are few, the mean of their soft labels is right
    about as often as the better one or more often, and whoever does not know which of the two ways
    suits the pictures need not choose. The mean is balanced as the labels of one teacher are. The
    student takes less than half of the steps. docs/images.md has what both and the student reach.

    Args:
        teacher_share: share of the steps in which the first network is trained.
        second_share: share of the steps in which the second network is trained.
    """

    teacher_share: Annotated[float, Range(above=0, below=1)] = 0.25
    second_share: Annotated[float, Range(above=0, below=1)] = 0.3

    name: ClassVar[str] = "two_teachers"
    title: ClassVar[str] = "self-training on the soft labels of two teachers, with mixup"
    usual_augment: ClassVar[str] = "mild"

    def __post_init__(self) -> None:
        super().__post_init__()
        shares = self.teacher_share + self.second_share
        if shares >= 1:
            raise MetaplError(
                f"--teacher-share {self.teacher_share:g} and --second-share "
                f"{self.second_share:g}: the two teachers have {shares:g} of the steps; expected "
                "less than 1, so that some are left for the student."
            )

    def train(self, t: Training) -> Trained:
        """Train both teachers, label by each, and train the student."""
        steps = t.config.fitting.chosen_steps
        teacher_steps = max(1, round(self.teacher_share * steps))
        second_steps = max(1, round(self.second_share * steps))
        student_steps = max(1, steps - teacher_steps - second_steps)

        # It is built before anything is trained, so that a resumed run has the same fresh weights.
        second = t.lay_out(t.config.network().to(t.place))
        begin_as(t.teacher, second)

        taught = self.trained_teacher(t, teacher_steps)
        first_labels = labels_for_student(t, t.teacher, student_steps)

        consistency = Consistency(uda_prior=self.uda_prior).scheduled(second_steps)
        with_strong_augmentation(t).alone(
            second,
            consistency.losses(),
            phase="second-teacher",
            steps=second_steps,
            warmup=warmup_of(t, second_steps),
        )
        second_labels = labels_for_student(t, second, student_steps, name="second-teacher")

        soft_labels = with_class_shares((first_labels + second_labels) / 2, self.uda_prior)
        trainer, result = self.trained_student(t, soft_labels, student_steps)
        return Trained(trainer, result, fallback=(t.teacher, taught.result.weights))

    def with_one_teacher(self) -> SelfTraining:
        """Return the same method without the second teacher."""
        return SelfTraining(
            mixup=self.mixup, label_smoothing=self.label_smoothing, uda_prior=self.uda_prior
        )


def label_limit(t: Training, student_steps: int) -> int:
    """Return the most unlabeled pictures that are labeled for a student of so many steps."""
    unlabeled = t.data.unlabeled
    assert isinstance(unlabeled, UnlabeledBatches)
    return max(1, student_steps * unlabeled.sampler.batch_size // LEAST_PASSES)


def labels_for_student(
    t: Training, teacher: nn.Module, student_steps: int, name: str = ""
) -> Tensor:
    """Return a teacher's labels, (n, C), of the unlabeled pictures that a student learns.

    Args:
        t: the training.
        teacher: that labels.
        student_steps: of the student.
        name: of the teacher, where several label.
    """
    limit = label_limit(t, student_steps)
    return t.label(teacher, name=name, parts=("unlabeled",), limit=limit)["unlabeled"]


def warmup_of(t: Training, steps: int) -> int:
    """Return the steps of warm-up of a phase of a training: the same share as of the whole."""
    return round((t.config.fitting.warmup or 0) * steps / t.config.fitting.chosen_steps)


def with_strong_augmentation(t: Training) -> Training:
    """Return a training on the same pictures with strong augmentation, whatever was asked for."""
    config: Any = with_flags(t.config, augment="strong")
    labeled = t.data.labeled
    batches = config.batches(labeled.images, labeled.labels, t.data.unlabeled.images)
    return dataclasses.replace(t, config=config, data=dataclasses.replace(t.data, **batches))


def with_class_shares(distributions_NC: Tensor, shares: Sequence[float] | None) -> Tensor:
    """Return class distributions whose mean over the examples has given shares of the classes.

    Classes are scaled, and rows normalized, in turn (iterative proportional fitting), so that the
    odds of an example are changed as the odds of all others are.

    Args:
        distributions_NC: (N, C), rows that sum to 1.
        shares: of the C classes; None: equal ones.

    >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    >>> with_class_shares(p, None).mean(0)
    tensor([0.5000, 0.5000])
    """
    classes = distributions_NC.shape[1]
    if shares is None:
        shares = (1 / classes,) * classes
    share_C = torch.tensor(shares, dtype=torch.float64)
    scaled_NC = distributions_NC.double()
    for _ in range(ROUNDS_OF_BALANCING):
        mean_C = scaled_NC.mean(0).clamp_min(torch.finfo(torch.float32).tiny)
        scaled_NC = scaled_NC * (share_C / mean_C)
        scaled_NC = scaled_NC / scaled_NC.sum(1, keepdim=True)
    return scaled_NC.to(distributions_NC.dtype)
