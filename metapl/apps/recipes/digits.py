"""Handwritten digits with a few labels a class: the recipe that runs anywhere, in seconds."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from metapl.apps.pictures import Identity, LabeledBatches, ShiftNoiseCutout, UnlabeledBatches, load_digits_split
from metapl.apps.pictures.card import NetworkCard
from metapl.apps.pictures.folders import hashes
from metapl.apps.pictures.input import Input
from metapl.apps.recipes.base import Recipe, Role, Task
from metapl.apps.recipes.methods import OF_PICTURES
from metapl.apps.recipes.settings import Optimizer, require
from metapl.data import StepSampler
from metapl.errors import MetaplError
from metapl.models import mlp
from metapl.runs.fields import Range
from metapl.training import Say

MOST_LAYERS, WIDEST, MOST_THREADS = 64, 2**14, 1024


@dataclass(frozen=True, kw_only=True)
class Digits(Recipe):
    """1,797 real 8x8 images: 1,200 to train on (a few labeled), 197 to select on, 400 to report on, split per seed.

    The teacher sees clean unlabeled images and learns from augmented labeled ones; the student learns its labels on
    augmented images. The feedback's weight is in units of the true gradient, which carries η/B.

    Args:
        labels_per_class: labeled images of each class.
        hidden: widths of the hidden layers of teacher and student.
        view: how the student's, and the teacher's labeled, images are altered.
        threads: of the linear algebra; more do not help networks of this size, and rounding depends on the number.
    """

    name: ClassVar[str] = "digits"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    input: ClassVar[Input] = Input(kind="digit", channels=1, size=8)

    known = OF_PICTURES
    settings: ClassVar[dict[str, Any]] = {
        "label_smoothing": 0.0,
        "uda_weight": 0.0,
        "uda_temperature": 1.0,
        "uda_threshold": 0.0,
        "student": Optimizer(lr=1.0),
        "teacher": Optimizer(lr=0.06, momentum=0.9),
    }

    labels_per_class: Annotated[int, Range(1)] = 2
    steps: int = 6000
    labeled_batch: int = 64
    hidden: tuple[int, ...] = (32, 32)
    view: ShiftNoiseCutout = field(default_factory=ShiftNoiseCutout)
    finetune: Optimizer = field(default_factory=lambda: Optimizer(lr=0.02))
    threads: Annotated[int, Range(1, most=MOST_THREADS)] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        # A square, or a shift, of the picture's side would leave nothing of it.
        side = self.input.size
        for name in ("shift", "cutout"):
            fits = getattr(self.view, name) < side
            require(self, fits, f"view.{name}", f"fewer pixels than the pictures' {side} a side")
        require(self, all(width >= 1 for width in self.hidden), "hidden", "widths of 1 or more")
        wide = len(self.hidden) > MOST_LAYERS or max(self.hidden, default=0) > WIDEST
        require(self, not wide, "hidden", f"{MOST_LAYERS} widths at most, of {WIDEST:,} at most")

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        split = load_digits_split(self.labels_per_class, self.seed)
        images, labels = split.labeled
        truth = (split.unlabeled, split.unlabeled_truth)

        def labeled(images: Tensor, labels: Tensor, stream: int, seed: int) -> LabeledBatches:
            sampler = StepSampler(len(images), self.labeled_batch, seed=self.seed, stream=stream)
            return LabeledBatches(images, labels, sampler, self.view, seed)

        many = StepSampler(len(split.unlabeled), self.unlabeled_batch, seed=self.seed, stream=1)
        return Task(
            labeled=labeled(images, labels, 0, self.seed),
            unlabeled=UnlabeledBatches(split.unlabeled, many, Identity(), self.view, self.seed),
            finetuning=labeled(images, labels, 2, self.seed + 1),
            validation=split.validation,
            test=split.test,
            classes=self.classes,
            record={"hash": hashes(labeled=split.labeled, unlabeled=split.unlabeled, test=split.test)},
            everything=labeled(torch.cat([images, truth[0]]), torch.cat([labels, truth[1]]), 0, self.seed),
            truth=truth,
        )

    def network(self, role: Role = "student") -> nn.Module:
        return mlp([64, *self.hidden, 10], dropout=self.dropout)

    def card(self, role: Role, title: str) -> NetworkCard:
        return NetworkCard(title=title, input=self.input, widths=(64, *self.hidden, 10), dropout=self.dropout)

    def with_network(self, name: str) -> Digits:
        widths = name.split("x")
        if not all(width.isascii() and width.isdigit() for width in widths):
            raise MetaplError(f"--networks {name}: expected widths of hidden layers, such as 32x32, or 64 for one.")
        return dataclasses.replace(self, hidden=tuple(map(int, widths)))
