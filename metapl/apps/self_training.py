"""Self-training: a network learns labels, and a fresh one the first one's labels beside them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from metapl.apps.methods import Method, Trained, Training, labeled_loss
from metapl.apps.settings import Hidden, Share
from metapl.pictures import UnlabeledBatches
from metapl.problems.mixup import MixUp
from metapl.runs.fields import AboveZero, Range
from metapl.training.loss_trainer import LossTrainer

# Rounds of scaling after which the class shares of stored labels are those of the prior to 1e-3 or
# so on what was looked at: 6,000 pictures of ten classes.
ROUNDS_OF_BALANCING = 20


@dataclass(frozen=True, kw_only=True)
class SelfTraining(Method):
    """Train a network on labels, and a fresh one on labels and on the first one's labels.

    The first one labels all unlabeled pictures once, softly. Its labels are balanced: scaled until
    each class has the share that it has among the labeled pictures.

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
    uda_prior: Hidden[tuple[float, ...] | None] = None

    name: ClassVar[str] = "self_training"
    title: ClassVar[str] = "self-training on soft labels, with mixup"

    def train(self, t: Training) -> Trained:
        """Train the teacher, label, and train the student."""
        fitting = t.config.fitting
        steps = fitting.chosen_steps
        # Each of the two networks takes one step at least, also where one step was asked for.
        teacher_steps = max(1, round(self.teacher_share * steps))
        student_steps = max(1, steps - teacher_steps)
        warmup = fitting.warmup or 0
        loss = labeled_loss(self.label_smoothing, self.mixup)
        taught = t.alone(
            t.teacher,
            (loss,),
            phase="teacher",
            steps=teacher_steps,
            warmup=round(warmup * teacher_steps / steps),
        )
        soft_labels = balanced(t.label(t.teacher)["unlabeled"], self.uda_prior)

        # Labels of every picture are there, so that one view of it is enough.
        unlabeled = t.data.unlabeled
        assert isinstance(unlabeled, UnlabeledBatches)
        view = unlabeled.weak if unlabeled.strong is None else unlabeled.strong
        examples = dataclasses.replace(unlabeled, weak=view, strong=None, stored=soft_labels)
        trainer = LossTrainer(
            t.student,
            (MixUp(alpha=self.mixup, label_smoothing=self.label_smoothing),),
            optimizer=t.config.optimizer("student", t.student),
            **t.options,
        )
        result = t.fit(
            trainer,
            t.data.labeled,
            examples,
            steps=student_steps,
            warmup=round(warmup * student_steps / steps),
            truth=None,
        )
        return Trained(trainer, result, fallback=(t.teacher, taught.result.weights))


def balanced(distributions_NC: Tensor, shares: Sequence[float] | None) -> Tensor:
    """Return class distributions whose mean over the examples has given shares of the classes.

    Classes are scaled, and rows normalized, in turn (iterative proportional fitting), so that the
    odds of an example are changed as the odds of all others are.

    Args:
        distributions_NC: (N, C), rows that sum to 1.
        shares: of the C classes; None: equal ones.

    >>> p = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.7, 0.3], [0.4, 0.6]])
    >>> balanced(p, None).mean(0)
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
