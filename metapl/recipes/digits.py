"""Handwritten digits with a few labels a class: the recipe that runs anywhere, in seconds."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor, nn

from metapl.data import (
    Identity,
    LabeledBatches,
    ShiftNoiseCutout,
    StepSampler,
    UnlabeledBatches,
    load_digits_split,
)
from metapl.data.fingerprint import hashes
from metapl.data.images.reader import SUFFIXES, gray_image
from metapl.data.tables import csv_rows
from metapl.models import mlp
from metapl.problems.losses import UDA, CrossEntropy, TeacherLoss
from metapl.recipes.base import Feedback, Optimizer, Role, Say, Task, require
from metapl.training import FitOptions


@dataclass(frozen=True, kw_only=True)
class Digits:
    """1,797 real 8x8 images: 1,200 to train on (a few labelled), 197 to select on, 400 to report on, split per seed.

    The teacher sees clean unlabelled images and learns from augmented labelled ones; the student learns its labels on
    augmented images.

    Args:
        seed: of the split, the weights and every draw.
        labels_per_class: labelled images of each class.
        steps: training steps.
        labeled_batch: labelled examples a step.
        unlabeled_batch: unlabelled examples a step.
        hidden: widths of the hidden layers of teacher and student.
        dropout: in both.
        view: how the student's, and the teacher's labelled, images are altered.
        label_smoothing: of the teacher's supervised loss.
        uda_weight: weight of UDA among the teacher's losses; 0 leaves it out.
        uda_temperature: of UDA's target; below 1 sharpens it.
        uda_threshold: UDA leaves out examples whose greatest probability does not exceed it.
        feedback: how the teacher is told; its weight is in units of the true gradient, which carries η/B.
        student: its optimiser.
        teacher: its optimiser.
        schedule: of both learning rates.
        warmup: steps over which both learning rates grow from 0.
        ema_decay: of an average of the student that is then what is kept.
        finetune_steps: on the labelled data, after the rest.
        finetune: its optimiser.
        validate_every: steps between validations.
        log_every: steps between rows of metrics.
        save_every: steps between checkpoints.
        exact_every: steps between looks at the cosine of the mode's gradient with the exact one; None is never.
        keep: checkpoints kept.
        threads: of the linear algebra; more do not help networks of this size, and rounding depends on the number.
    """

    name: ClassVar[str] = "digits"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    reads: ClassVar[tuple[str, ...]] = (*SUFFIXES, ".csv")

    seed: int = 0
    labels_per_class: int = 2
    steps: int = 3000
    labeled_batch: int = 64
    unlabeled_batch: int = 64
    hidden: tuple[int, ...] = (32, 32)
    dropout: float = 0.0
    view: ShiftNoiseCutout = field(default_factory=ShiftNoiseCutout)
    label_smoothing: float = 0.0
    uda_weight: float = 0.0
    uda_temperature: float = 1.0
    uda_threshold: float = 0.0
    feedback: Annotated[Feedback, tyro.conf.arg(name="")] = field(default_factory=lambda: Feedback(feedback_weight=1.0))
    student: Optimizer = field(default_factory=lambda: Optimizer(lr=1.0))
    teacher: Optimizer = field(default_factory=lambda: Optimizer(lr=0.06, momentum=0.9))
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    ema_decay: float | None = None
    finetune_steps: int = 200
    finetune: Optimizer = field(default_factory=lambda: Optimizer(lr=0.02))
    validate_every: int = 100
    log_every: int = 20
    save_every: int = 500
    exact_every: int | None = None
    keep: int = 2
    threads: int = 1

    def __post_init__(self) -> None:
        for name in ("labels_per_class", "steps", "labeled_batch", "unlabeled_batch", "threads"):
            require(self, getattr(self, name) >= 1, name, "1 or more")
        require(self, 0 <= self.seed < 2**32, "seed", "0 to 2^32 - 1")
        require(self, all(width >= 1 for width in self.hidden), "hidden", "widths of 1 or more")
        require(self, 0 <= self.dropout < 1, "dropout", "a number in [0, 1)")
        require(self, self.finetune_steps >= 0, "finetune_steps", "0 or more")
        require(self, self.uda_weight >= 0, "uda_weight", "0 or more")
        CrossEntropy(self.label_smoothing)
        FitOptions(steps=self.steps, **self.fit_options())

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        split = load_digits_split(self.labels_per_class, self.seed)
        images, labels = split.labeled
        few = StepSampler(len(images), self.labeled_batch, seed=self.seed, stream=0)
        many = StepSampler(len(split.unlabeled), self.unlabeled_batch, seed=self.seed, stream=1)
        again = StepSampler(len(images), self.labeled_batch, seed=self.seed, stream=2)
        known = torch.cat([images, split.unlabeled]), torch.cat([labels, split.unlabeled_truth])
        all_of_them = StepSampler(len(known[0]), self.labeled_batch, seed=self.seed, stream=0)
        return Task(
            labeled=LabeledBatches(images, labels, few, self.view, self.seed),
            unlabeled=UnlabeledBatches(split.unlabeled, many, Identity(), self.view, self.seed),
            finetuning=LabeledBatches(images, labels, again, self.view, self.seed + 1),
            validation=split.validation,
            test=split.test,
            classes=self.classes,
            record={"hash": hashes(labeled=split.labeled, unlabeled=split.unlabeled, test=split.test)},
            everything=LabeledBatches(*known, all_of_them, self.view, self.seed),
            truth=(split.unlabeled, split.unlabeled_truth),
            sample=(split.unlabeled, split.unlabeled_truth),
        )

    def network(self, role: Role = "student") -> nn.Module:
        return mlp([64, *self.hidden, 10], dropout=self.dropout)

    def architecture(self) -> None:
        return None

    def read(self, path: Path) -> list[tuple[str, Tensor]]:
        if path.suffix.lower() == ".csv":
            return [(f"{path}:{line}", values.reshape(1, 8, 8) / 16.0) for line, values in csv_rows(path, 64, 16)]
        image = gray_image(path, 8)
        # The digits are bright ink on dark, paper is the other way round.
        return [(str(path), (1 - image if image.mean() > 0.5 else image)[None])]

    def teacher_losses(self, uda: bool | None = None) -> tuple[TeacherLoss, ...]:
        supervised = CrossEntropy(self.label_smoothing)
        weight = self.uda_weight if self.uda_weight > 0 else 1.0
        wanted = self.uda_weight > 0 if uda is None else uda
        return (supervised, UDA(self.uda_temperature, self.uda_threshold, weight)) if wanted else (supervised,)

    def fit_options(self) -> dict[str, Any]:
        names = ("schedule", "warmup", "ema_decay", "validate_every", "log_every", "save_every", "exact_every", "keep")
        return {name: getattr(self, name) for name in names}

    def finetune_options(self) -> dict[str, Any]:
        return {}

    def trainer_options(self) -> dict[str, Any]:
        return {"feedback_weight": self.feedback.feedback_weight}

    def place(self) -> torch.device:
        return torch.device("cpu")  # networks of this size are slower elsewhere
