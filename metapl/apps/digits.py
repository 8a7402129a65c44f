"""``metapl train digits``: handwritten digits with a few labels a class, in seconds anywhere."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

import torch
from torch import nn

from metapl.apps.data import Data
from metapl.apps.methods.base import Method
from metapl.apps.methods.feedback import Feedback
from metapl.apps.methods.fixmatch import FixMatch
from metapl.apps.methods.mpl import Mpl
from metapl.apps.methods.pseudo_labels import PseudoLabels
from metapl.apps.methods.reduced_mpl import ReducedMpl
from metapl.apps.methods.supervised import Supervised
from metapl.apps.methods.uda import Consistency, Uda
from metapl.apps.settings import USUAL_FINETUNING, Batch, Fitting, Role, Share, require
from metapl.data import StepSampler
from metapl.errors import MetaplError
from metapl.models import mlp
from metapl.networks.card import Input, NetworkCard
from metapl.networks.weights import parameter_groups
from metapl.pictures import (
    Identity,
    LabeledBatches,
    ShiftNoiseCutout,
    UnlabeledBatches,
    load_digits_split,
)
from metapl.pictures.folders import hashes
from metapl.runs.fields import Range, check_fields
from metapl.training import Say

# The most hidden layers, and the most units of one.
MOST_LAYERS = 64
WIDEST = 2**14

# What is done to the images that the student learns from, and to labeled ones of the teacher.
VIEW = ShiftNoiseCutout()

# Learning rates of SGD: the student's, the teacher's, which has momentum, and that of finetuning.
STUDENT_RATE = 1.0
TEACHER_RATE = 0.06
MOMENTUM = 0.9
FINETUNING_RATE = 0.02

# The networks are so small that consistency helps them little: a teacher does without it.
_UDA = Consistency(uda_temperature=1.0, uda_threshold=0.0, uda_align=0.0, uda_start=0, uda_ramp=0)
_NO_UDA = dataclasses.replace(_UDA, uda_weight=0.0)
_NO_FEEDBACK = Feedback(learns_from_student=False)
MPL = Mpl(uda=_NO_UDA, wait=0, warm_start=False)

METHODS: dict[str, Method] = {
    "mpl": MPL,
    "supervised": Supervised(),
    "pseudo_labels": PseudoLabels(),
    "uda": Uda(uda=_UDA),
    "fixmatch": FixMatch(uda=dataclasses.replace(FixMatch().uda, uda_start=0, uda_ramp=0)),
    "none": dataclasses.replace(MPL, feedback=_NO_FEEDBACK),
    "reduced_mpl": ReducedMpl(uda=_NO_UDA),
    "reduced_none": ReducedMpl(feedback=_NO_FEEDBACK, uda=_NO_UDA),
}
COMPARED = ("mpl", "none", "supervised", "pseudo_labels", "uda")


def fitting(**fields: Any) -> Fitting:
    """Return how long, how fast and in what batches digits are trained on, with other fields."""
    usual: dict[str, Any] = {
        "steps": 6000,
        "labeled_batch": 64,
        "schedule": "cosine",
        "validate_every": 100,
        "warmup": 0,
        "finetune_steps": USUAL_FINETUNING,
        "device": "cpu",
    }
    return Fitting(**{**usual, **fields})


@dataclass(frozen=True, kw_only=True)
class Digits:
    """Train on scikit-learn's handwritten digits, of which a few are labeled.

    There are 1,200 to learn from, 197 to select on and 400 to report on. The teacher sees clean
    unlabeled images and learns from augmented labeled ones; the student learns its labels on
    augmented images. The feedback's weight is in units of the true gradient, which carries η/B.

    Args:
        labels_per_class: number of labeled images of each class.
        unlabeled_batch: number of unlabeled images in each step.
        hidden: number of units of each hidden layer.
        dropout: dropout rate of the networks.
    """

    name: ClassVar[str] = "digits"
    classes: ClassVar[tuple[str, ...]] = tuple("0123456789")
    input: ClassVar[Input] = Input(kind="digit", channels=1, size=8)
    places: ClassVar[tuple[str, ...]] = ()
    # Threads of the linear algebra, on whose number rounding depends.
    threads: ClassVar[int] = 1
    has_frozen_layers: ClassVar[bool] = False

    labels_per_class: Annotated[int, Range(1)] = 2
    unlabeled_batch: Batch = 64
    hidden: tuple[int, ...] = (32, 32)
    dropout: Share = 0.0
    fitting: Fitting = field(default_factory=fitting)

    def __post_init__(self) -> None:
        check_fields(self)
        require(self, all(width >= 1 for width in self.hidden), "hidden", "widths of 1 or more")
        fits = len(self.hidden) <= MOST_LAYERS and max(self.hidden, default=0) <= WIDEST
        require(self, fits, "hidden", f"{MOST_LAYERS} widths at most, of {WIDEST:,} at most")

    def data(self, say: Say, progress: bool, log: Path | None) -> Data:
        """Return the digits as the seed splits them, in batches that follow from seed and step."""
        seed = self.fitting.seed
        split = load_digits_split(self.labels_per_class, seed)
        images, labels = split.labeled

        def labeled(*, stream: int, view_seed: int) -> LabeledBatches:
            batch_size = self.fitting.chosen_batch
            sampler = StepSampler(len(images), batch_size, seed=seed, stream=stream)
            return LabeledBatches(images, labels, sampler, VIEW, view_seed)

        unlabeled = StepSampler(len(split.unlabeled), self.unlabeled_batch, seed=seed, stream=1)
        return Data(
            labeled=labeled(stream=0, view_seed=seed),
            unlabeled=UnlabeledBatches(split.unlabeled, unlabeled, Identity(), VIEW, seed),
            finetuning=labeled(stream=2, view_seed=seed + 1),
            validation=split.validation,
            test=split.test,
            classes=self.classes,
            record={
                "hash": hashes(labeled=split.labeled, unlabeled=split.unlabeled, test=split.test)
            },
            truth=(split.unlabeled, split.unlabeled_truth),
        )

    def network(self) -> nn.Module:
        """Build a multilayer perceptron."""
        return mlp([64, *self.hidden, 10], dropout=self.dropout)

    def card(self, title: str) -> NetworkCard:
        """Describe the network for network.json."""
        return NetworkCard(
            title=title, input=self.input, widths=(64, *self.hidden, 10), dropout=self.dropout
        )

    def optimizer(
        self, role: Role, module: nn.Module, lr: float | None = None
    ) -> torch.optim.Optimizer:
        """Build SGD, with momentum for the teacher."""
        groups = parameter_groups(module, 0.0)
        if role == "student":
            return torch.optim.SGD(groups, lr=lr or STUDENT_RATE)
        return torch.optim.SGD(groups, lr=self.fitting.lr or TEACHER_RATE, momentum=MOMENTUM)

    def finetuner(self, module: nn.Module) -> torch.optim.Optimizer:
        """Build SGD for finetuning."""
        return torch.optim.SGD(parameter_groups(module, 0.0), lr=FINETUNING_RATE)

    def trainer_options(self) -> dict[str, Any]:
        """Return the options of every trainer."""
        return {"accumulate": self.fitting.accumulate, "precision": self.fitting.precision}

    def finetuning(self) -> dict[str, Any]:
        """Return the options of the fit that finetunes, on the same schedule as the training."""
        return self.fitting.finetuning(schedule=self.fitting.schedule)

    def scan(self, name: str) -> Any:
        """Refuse what is read from files."""
        raise MetaplError(
            "a store of --labels is of pictures in folders, and digits have none; leave it out."
        )

    def with_network(self, name: str) -> Self:
        """Return the settings with other widths of hidden layers, such as 32x32."""
        widths = name.split("x")
        if not all(width.isascii() and width.isdigit() for width in widths):
            raise MetaplError(
                f"--networks {name}: expected widths of hidden layers, such as 32x32, or 64 for "
                "one."
            )
        return dataclasses.replace(self, hidden=tuple(int(width) for width in widths))
