"""Handwritten digits with a few labels a class, which run anywhere in seconds.

``metapl train digits``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from metapl.apps import methods
from metapl.apps.network_weights import parameter_groups
from metapl.apps.pictures import (
    Identity,
    LabeledBatches,
    ShiftNoiseCutout,
    UnlabeledBatches,
    load_digits_split,
)
from metapl.apps.pictures.folders import hashes
from metapl.apps.pictures.input import Input, NetworkCard
from metapl.apps.settings import Batch, Fitting, Flat, Role, Share, replaced, require
from metapl.data import StepSampler
from metapl.errors import MetaplError
from metapl.models import mlp
from metapl.runs.fields import Range, check_fields
from metapl.training import Say

MOST_LAYERS, WIDEST = 64, 2**14
VIEW = ShiftNoiseCutout()  # of what the student, and of labeled images the teacher, learns from

# SGD: learning rates of the student, of the teacher, which has momentum, and of finetuning.
STUDENT_RATE, TEACHER_RATE, MOMENTUM, FINETUNED_AT = 1.0, 0.06, 0.9, 0.02

# The networks are so small that consistency helps them little: a teacher does without it.
_UDA = methods.Consistency(
    uda_temperature=1.0, uda_threshold=0.0, uda_align=0.0, uda_start=0, uda_ramp=0
)
_OWN: dict[str, Any] = {"uda": replaced(_UDA, uda_weight=0.0), "wait": 0, "warm_start": False}

METHODS: dict[str, Any] = {
    "mpl": methods.Mpl(**_OWN),
    "supervised": methods.Supervised(),
    "pseudo_labels": methods.PseudoLabels(),
    "uda": methods.Uda(uda=_UDA),
    "fixmatch": replaced(methods.FixMatch(), uda_start=0, uda_ramp=0),
    "ent_min": methods.EntMin(),
    **{
        k: methods.Mpl(feedback=methods.Feedback(feedback=k), **_OWN)
        for k in methods.TITLES
        if k != "whole"
    },
    "reduced_mpl": methods.ReducedMpl(uda=_OWN["uda"]),
    "reduced_none": methods.ReducedMpl(feedback=methods.Feedback(feedback="none"), uda=_OWN["uda"]),
}
COMPARED = ("mpl", "none", "supervised", "pseudo_labels", "uda")


def fitting(**fields: Any) -> Fitting:
    usual: dict[str, Any] = {"steps": 6000, "labeled_batch": 64, "validate_every": 100}
    return Fitting(**{**usual, "warmup": 0, "device": "cpu", **fields})


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Train on scikit-learn's digits: 1,200 to learn from, a few of them labeled, 197 to select on, 400 to report on.

    The teacher sees clean unlabeled images and learns from augmented labeled ones; the student
    learns its labels on augmented images. The feedback's weight is in units of the true gradient,
    which carries η/B.

    Args:
        labels_per_class: labeled images of each class.
        unlabeled_batch: unlabeled images in a batch.
        hidden: widths of the hidden layers.
        dropout: dropout rate of the networks.
    """

    name: ClassVar[str] = "digits"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    input: ClassVar[Input] = Input(kind="digit", channels=1, size=8)
    places: ClassVar[tuple[str, ...]] = ()
    known: ClassVar[str] = "labeled digits"
    threads: ClassVar[int] = 1  # of the linear algebra; rounding depends on it

    labels_per_class: Annotated[int, Range(1)] = 2
    unlabeled_batch: Batch = 64
    hidden: tuple[int, ...] = (32, 32)
    dropout: Share = 0.0
    fitting: Flat[Fitting] = field(default_factory=fitting)

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, all(width >= 1 for width in self.hidden), "hidden", "widths of 1 or more")
        wide = len(self.hidden) > MOST_LAYERS or max(self.hidden, default=0) > WIDEST
        require(self, not wide, "hidden", f"{MOST_LAYERS} widths at most, of {WIDEST:,} at most")

    def data(self, say: Say, progress: bool, log: Path | None) -> methods.Data:
        fitting, seed = self.fitting, self.fitting.seed
        split = load_digits_split(self.labels_per_class, seed)
        images, labels = split.labeled
        truth = (split.unlabeled, split.unlabeled_truth)

        def labeled(images: Tensor, labels: Tensor, stream: int, own: int) -> LabeledBatches:
            sampler = StepSampler(len(images), fitting.labeled_batch, seed=seed, stream=stream)
            return LabeledBatches(images, labels, sampler, VIEW, own)

        many = StepSampler(len(split.unlabeled), self.unlabeled_batch, seed=seed, stream=1)
        return methods.Data(
            labeled=labeled(images, labels, 0, seed),
            unlabeled=UnlabeledBatches(split.unlabeled, many, Identity(), VIEW, seed),
            finetuning=labeled(images, labels, 2, seed + 1),
            validation=split.validation,
            test=split.test,
            classes=self.classes,
            record={
                "hash": hashes(labeled=split.labeled, unlabeled=split.unlabeled, test=split.test)
            },
            truth=truth,
        )

    def network(self) -> nn.Module:
        return mlp([64, *self.hidden, 10], dropout=self.dropout)

    def card(self, title: str) -> NetworkCard:
        return NetworkCard(
            title=title, input=self.input, widths=(64, *self.hidden, 10), dropout=self.dropout
        )

    def optimizer(
        self, role: Role, module: nn.Module, lr: float | None = None
    ) -> torch.optim.Optimizer:
        groups = parameter_groups(module, 0.0)
        if role == "student":
            return torch.optim.SGD(groups, lr=lr or STUDENT_RATE)
        return torch.optim.SGD(groups, lr=self.fitting.lr or TEACHER_RATE, momentum=MOMENTUM)

    def finetuner(self, module: nn.Module) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameter_groups(module, 0.0), lr=FINETUNED_AT)

    def trainer_options(self) -> dict[str, Any]:
        return {"accumulate": self.fitting.accumulate, "precision": self.fitting.precision}

    def finetuning(self) -> dict[str, Any]:
        return self.fitting.finetuning(schedule=self.fitting.schedule)

    def with_network(self, name: str) -> Digits:
        """With other widths of hidden layers, such as 32x32."""
        widths = name.split("x")
        if not all(width.isascii() and width.isdigit() for width in widths):
            raise MetaplError(
                f"--networks {name}: expected widths of hidden layers, such as 32x32, or 64 for "
                "one."
            )
        found: Digits = replaced(self, hidden=tuple(map(int, widths)))
        return found

    def at_size(self, size: int) -> Digits:
        raise MetaplError(
            f"--finetune-size {size}: the pictures of digits have one size; leave it out."
        )
