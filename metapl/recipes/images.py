"""A folder of pictures with few labels, and one with many pictures without."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import tyro
from torch import Tensor, nn

from metapl import models
from metapl.data.augment import CIFAR_OPERATIONS, SVHN_OPERATIONS, RandAugment, Weak
from metapl.data.folder_check import check_folders
from metapl.data.folders import Files, LabeledFiles, scan_labeled, scan_unlabeled
from metapl.data.image_batches import (
    ImageEvaluationBatches,
    ImageLabeledBatches,
    ImageUnlabeledBatches,
    in_unit_range,
)
from metapl.data.image_sets import FileImages, Images
from metapl.data.images import read_image
from metapl.data.samplers import StepSampler
from metapl.data.sound_files import verify_files
from metapl.data.splits import stratified_split
from metapl.errors import MetaplError
from metapl.fit import FitOptions
from metapl.losses import UDA, CrossEntropy, TeacherLoss
from metapl.recipes.base import SGD, Feedback, Say, Task, require

IN_MEMORY = 2**30
"""Bytes of decoded pictures that are kept in memory; beyond, files are read when they are drawn."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation that pretrained weights expect."""


NESTEROV = SGD(lr=0.05, momentum=0.9, nesterov=True, weight_decay=5e-4, decay_norms=False)


@dataclass(frozen=True, kw_only=True)
class Strong:
    """The student's view: RandAugment, then a square cut out.

    Args:
        operations: drawn per picture.
        magnitude: of each, on a scale of 10; 0 to 16 or so.
        cutout: side of the square in pixels.
        writing: the pictures are digits or letters: nothing is mirrored, turned or moved sideways.
    """

    operations: int = 2
    magnitude: float = 8.0
    cutout: int = 8
    writing: bool = False

    def view(self) -> RandAugment:
        """RandAugment with one of the paper's two lists of operations."""
        names = SVHN_OPERATIONS if self.writing else CIFAR_OPERATIONS
        return RandAugment(self.operations, self.magnitude, operations=names, cutout=self.cutout)


@dataclass(frozen=True, kw_only=True)
class ImageFolders:
    """One folder a class for labelled pictures, any folder tree for unlabelled ones.

    The teacher labels weakly augmented pictures and learns from labelled ones, from consistency (UDA) and from the
    student's feedback; the student learns its labels on strongly augmented pictures.

    Args:
        labeled: folder with one folder a class.
        unlabeled: folder with pictures, in any tree.
        val: as labeled, to select on; without it a part of labeled is set aside.
        test: as labeled, to report on; without it the result is that on validation.
        val_fraction: part of each class that is set aside where there is no val.
        class_names: found in labeled.
        seed: of the split, the weights and every draw.
        image_size: side that every picture is brought to, in pixels.
        grey: read pictures without colours.
        network: small_cnn, wide_resnet28_2, resnet50, efficientnet_b0, vit_b_16, timm:NAME, ...
        weights: file with pretrained weights of it.
        dropout: in both networks.
        steps: training steps.
        labeled_batch: labelled pictures a step.
        unlabeled_batch: unlabelled pictures a step.
        pad: by how many pixels the weak view moves a picture at most.
        strong: the student's view.
        label_smoothing: of the teacher's supervised loss.
        uda_weight: weight of UDA among the teacher's losses; 0 leaves it out.
        uda_temperature: of UDA's target; below 1 sharpens it.
        uda_threshold: UDA leaves out pictures whose greatest probability does not exceed it.
        uda_ramp: steps over which its weight grows from 0.
        feedback: how the teacher is told.
        feedback_ratio: instead of feedback_weight: the size of the feedback's gradient in units of that of the
            teacher's own losses, at every step.
        student: its optimiser.
        teacher: its optimiser.
        schedule: of both learning rates.
        warmup: steps over which both learning rates grow from 0.
        clip_norm: greatest norm of either network's gradient.
        accumulate: micro-batches a batch is taken in, to save memory.
        precision: bfloat16 runs the networks' passes under autocast.
        ema_decay: of an average of the student that is then what is kept.
        finetune_steps: on the labelled data, after the rest.
        finetune: its optimiser.
        validate_every: steps between validations.
        log_every: steps between rows of metrics.
        save_every: steps between checkpoints.
        exact_every: steps between looks at the cosine of the mode's gradient with the exact one; None is never.
        keep: checkpoints kept.
        num_workers: processes that read pictures; changes nothing but speed.
        device: auto takes a GPU where there is one.
    """

    name: ClassVar[str] = "images"
    reads: ClassVar[tuple[str, ...]] = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".tif", ".tiff", ".webp", ".ppm")

    labeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    unlabeled: Annotated[str, tyro.conf.arg(metavar="DIR")]
    val: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    test: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    val_fraction: float = 0.2
    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()
    seed: int = 0
    image_size: int = 32
    grey: bool = False
    network_name: Annotated[str, tyro.conf.arg(name="network")] = "small_cnn"
    weights: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    dropout: float = 0.0
    steps: int = 3000
    labeled_batch: int = 64
    unlabeled_batch: int = 128
    pad: int = 4
    strong: Strong = field(default_factory=Strong)
    label_smoothing: float = 0.1
    uda_weight: float = 1.0
    uda_temperature: float = 0.7
    uda_threshold: float = 0.6
    uda_ramp: int = 500
    feedback: Annotated[Feedback, tyro.conf.arg(name="")] = field(default_factory=Feedback)
    feedback_ratio: float | None = None
    student: SGD = field(default_factory=lambda: NESTEROV)
    teacher: SGD = field(default_factory=lambda: NESTEROV)
    schedule: Literal["cosine", "constant"] = "cosine"
    warmup: int = 0
    clip_norm: float | None = None
    accumulate: int = 1
    precision: Literal["float32", "bfloat16"] = "float32"
    ema_decay: float | None = 0.995
    finetune_steps: int = 200
    finetune: SGD = field(default_factory=lambda: SGD(lr=1e-3))
    validate_every: int = 100
    log_every: int = 20
    save_every: int = 500
    exact_every: int | None = None
    keep: int = 2
    num_workers: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"

    def __post_init__(self) -> None:
        for name in ("image_size", "steps", "labeled_batch", "unlabeled_batch"):
            require(self, getattr(self, name) >= 1, name, "1 or more")
        require(self, 0 <= self.seed < 2**32, "seed", "0 to 2^32 - 1")
        require(self, 0 < self.val_fraction < 1, "val_fraction", "a number between 0 and 1")
        require(self, self.finetune_steps >= 0, "finetune_steps", "0 or more")
        require(self, self.uda_weight >= 0, "uda_weight", "0 or more")
        require(self, self.num_workers >= 0, "num_workers", "0 or more")
        CrossEntropy(self.label_smoothing)
        FitOptions(steps=self.steps, **self.fit_options())

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names or scan_labeled(self.labeled).classes

    def settled(self) -> ImageFolders:
        """The recipe as it can be stored: whole paths, and the classes that are found."""
        return dataclasses.replace(
            self,
            labeled=_whole(self.labeled),
            unlabeled=_whole(self.unlabeled),
            val=None if self.val is None else _whole(self.val),
            test=None if self.test is None else _whole(self.test),
            weights=None if self.weights is None else _whole(self.weights),
            class_names=scan_labeled(self.labeled).classes,
        )

    def task(self, say: Say | None = None) -> Task:
        tell = say or (lambda text: None)
        labeled = _sound(scan_labeled(self.labeled), "labeled", tell)
        unlabeled = _sound(scan_unlabeled(self.unlabeled), "unlabeled", tell)
        held_out = {
            name: _sound(scan_labeled(folder), name, tell)
            for name, folder in (("val", self.val), ("test", self.test))
            if folder is not None
        }
        _check(labeled, unlabeled, held_out.get("val"), held_out.get("test"), tell)
        val = held_out.get("val")
        if val is None:
            train, aside = stratified_split(labeled.targets(), self.val_fraction, self.seed)
            labeled, val = labeled.keep(train.tolist()), labeled.keep(aside.tolist())
        test = held_out.get("test", val)
        return self._task(labeled, unlabeled, val, test, tell)

    def _task(self, labeled: LabeledFiles, unlabeled: Files, val: LabeledFiles, test: LabeledFiles, tell: Say) -> Task:
        few, many = self._images(labeled), self._images(unlabeled)
        labels = labeled.targets()
        samplers = [
            StepSampler(len(images), size, seed=self.seed, stream=stream)
            for stream, (images, size) in enumerate(
                ((few, self.labeled_batch), (many, self.unlabeled_batch), (few, self.labeled_batch))
            )
        ]
        weak, strong = Weak(self.pad, flip=not self.strong.writing), self.strong.view()
        tell(
            f"{len(labeled)} labelled pictures of {len(self.classes)} classes, {len(unlabeled)} unlabelled, "
            f"{len(val)} to select on, {len(test)} to report on"
            + ("" if self.test else " (the same: no --test was given)")
        )
        return Task(
            labeled=ImageLabeledBatches(few, labels, samplers[0], weak, self.seed),
            unlabeled=ImageUnlabeledBatches(many, samplers[1], weak, strong, self.seed),
            finetuning=ImageLabeledBatches(few, labels, samplers[2], weak, self.seed + 1),
            validation=ImageEvaluationBatches(self._images(val), val.targets(), 256),
            test=ImageEvaluationBatches(self._images(test), test.targets(), 256),
            classes=self.classes,
            record={
                "labeled": list(labeled.names),
                "validation": list(val.names),
                "test": list(test.names),
                "unlabeled": len(unlabeled),
                "test_is_validation": self.test is None,
            },
        )

    def _images(self, files: Files) -> Images:
        """In memory where they fit; files were read whole before, so that none is lost here."""
        side = self.image_size
        images = FileImages(files.paths(), size=(side, side), mode="L" if self.grey else "RGB")
        if len(images) * side * side * images.shape[0] > IN_MEMORY:
            return images
        loaded, kept = images.load()
        return loaded if len(kept) == len(images) else images

    def network(self) -> nn.Module:
        channels = 1 if self.grey else 3
        network = models.create(
            self.network_name,
            len(self.classes),
            dropout=self.dropout,
            in_channels=channels,
            weights=self.weights,
            image_size=self.image_size,
        )
        mean, std = IMAGENET if self.weights and not self.grey else ((0.5,) * channels, (0.25,) * channels)
        return models.normalized(network, mean, std)

    def read(self, path: Path) -> list[tuple[str, Tensor]]:
        side = self.image_size
        image = read_image(path, mode="L" if self.grey else "RGB", size=(side, side))
        return [(str(path), in_unit_range(image))]

    def teacher_losses(self, uda: bool | None = None) -> tuple[TeacherLoss, ...]:
        supervised = CrossEntropy(self.label_smoothing)
        weight = self.uda_weight if self.uda_weight > 0 else 1.0
        wanted = self.uda_weight > 0 if uda is None else uda
        consistency = UDA(self.uda_temperature, self.uda_threshold, weight, self.uda_ramp)
        return (supervised, consistency) if wanted else (supervised,)

    def fit_options(self) -> dict[str, Any]:
        names = ("schedule", "warmup", "ema_decay", "validate_every", "log_every", "save_every", "exact_every", "keep")
        return {name: getattr(self, name) for name in (*names, "num_workers")}

    def trainer_options(self) -> dict[str, Any]:
        options = {name: getattr(self, name) for name in ("clip_norm", "accumulate", "precision")}
        weight = {"feedback_weight": self.feedback.feedback_weight}
        return options | (weight if self.feedback_ratio is None else {"feedback_ratio": self.feedback_ratio})

    def place(self) -> torch.device:
        if self.device == "cuda" and not torch.cuda.is_available():
            raise MetaplError("device=cuda was asked for, and PyTorch sees no GPU; use --device auto or cpu.")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")


def _whole(path: str) -> str:
    return str(Path(path).resolve())


def _sound(files: Any, name: str, tell: Say) -> Any:
    """The files that can be read; says what is left out, and why."""
    found = verify_files(files)
    if found.skipped:
        tell(f"{name}: {len(found.skipped)} of {len(files)} files are left out\n{found.summary()}")
    if not found.sound:
        raise MetaplError(f"none of the {len(files)} pictures in {files.root} can be read.")
    return files.keep(found.sound) if found.skipped else files


def _check(
    labeled: LabeledFiles, unlabeled: Files, val: LabeledFiles | None, test: LabeledFiles | None, tell: Say
) -> None:
    """Refuse folders that would spoil the training; say what a user should know."""
    findings = check_folders(labeled, unlabeled, val, test)
    errors = [one.message for one in findings if one.level == "error"]
    if errors:
        raise MetaplError("\n".join(errors))
    for one in findings:
        tell(f"note: {one.message}")
