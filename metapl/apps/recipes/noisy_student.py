"""The protocols of Noisy Student, and any split of the data sets that torchvision knows, trained by it.

Every field can be changed. What the paper does not tell, the optimizer beside its learning rate among it, is that of
``imagenet-10pct``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from metapl.apps.pictures.folders import scan_unlabeled
from metapl.apps.pictures.hashes import hash_files, hashes
from metapl.apps.pictures.store import FileImages
from metapl.apps.recipes.base import Optimizer, Task, require
from metapl.apps.recipes.image_recipe import ImageParts, Strong, whole
from metapl.apps.recipes.protocols import Names, Vision
from metapl.apps.recipes.self_training import SelfTraining
from metapl.data.sampler import StepSampler
from metapl.training import Say

SCALE = 10 / 30
"""Of RandAugment's magnitudes: the paper's 27 and 9 are taken to be of 30, ours are of 10."""

IMAGENET_TRAIN, LABELED_BATCH, EPOCHS = 1_281_167, 2_048, 350


def steps_of(epochs: int, examples: int = IMAGENET_TRAIN, batch: int = LABELED_BATCH) -> int:
    """Steps of so many passes over the labeled examples.

    >>> steps_of(350)
    218949
    """
    return round(epochs * examples / batch)


def noise(magnitude: float) -> Strong:
    """RandAugment with two operations, of a magnitude in the paper's scale."""
    return Strong(operations=2, magnitude=SCALE * magnitude, cutout=0, translate=100 / 224)


def _sgd(labeled_batch: int) -> Optimizer:
    """0.128 for 2,048 labeled examples."""
    rate = 0.128 * labeled_batch / LABELED_BATCH
    return Optimizer(lr=rate, momentum=0.9, nesterov=True, weight_decay=1e-5, decay_norms=False)


Schedule = Literal["cosine", "constant", "exponential"]


@dataclass(frozen=True, kw_only=True)
class NoisyVision(Vision):
    """A data set that torchvision loads, of which a few training pictures keep their labels, by Noisy Student."""

    name: ClassVar[str] = "torchvision"
    own: ClassVar[str] = "noisy_student"

    schedule: Schedule = "exponential"


@dataclass(frozen=True, kw_only=True)
class NoisyImagenet(Vision):
    """ImageNet and other pictures without labels by Noisy Student: EfficientNet-B0, 700 epochs of the labeled pictures.

    Of the paper: 2,048 labeled pictures a batch, a learning rate of 0.128 that is multiplied by 0.97 every 4.8 epochs,
    dropout 0.5, the last block kept with a probability of 0.8, RandAugment of two operations with magnitude 27 (taken
    to be of 30), one unlabeled picture for each labeled one, and 130,000 of each class. Its 130 million unlabeled
    pictures are not public, and YFCC100M is what it takes beside them; give their folder, or leave it out to take the
    labels off most of ImageNet instead.

    Args:
        unlabeled: unlabeled pictures: a folder, with or without subfolders. All of ImageNet then keeps its labels.
    """

    name: ClassVar[str] = "imagenet"
    protocol: ClassVar[str] = "imagenet-10pct"
    own: ClassVar[str] = "noisy_student"
    settings: ClassVar[dict[str, Any]] = {
        **Vision.settings,
        "student": _sgd(LABELED_BATCH),
        "teacher": _sgd(LABELED_BATCH),
        "self_training": SelfTraining(per_class=130_000, ratio=1),
    }

    data: tyro.conf.Suppress[Names] = "imagenet"
    unlabeled: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None
    labels_per_class: int = 128
    validation: int = 25_000
    image_size: int = 224
    resized_crop: bool = True
    network_name: Annotated[str, tyro.conf.arg(name="network")] = "efficientnet_b0"
    dropout: float = 0.5
    stochastic_depth: float = 0.2
    schedule: Schedule = "exponential"
    steps: int = steps_of(2 * EPOCHS)
    labeled_batch: int = LABELED_BATCH
    unlabeled_batch: int = LABELED_BATCH
    strong: Strong = field(default_factory=lambda: noise(27))
    ema_decay: float | None = 0.999
    validate_every: int = 5_000
    log_every: int = 100
    save_every: int = 5_000
    num_workers: int = 8

    def settled(self) -> NoisyImagenet:
        changed: dict[str, Any] = {**vars(super().settled()), "unlabeled": whole(self.unlabeled)}
        return type(self)(**changed)

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        if self.unlabeled is None:
            return super().task(say, progress, log)
        data, files = self._data(), scan_unlabeled(self.unlabeled)
        assert isinstance(data.train, FileImages)  # ImageNet's
        assert isinstance(data.test, FileImages)
        train, test = data.train.logged(log), data.test.logged(log)
        side = (self.image_size, self.image_size)
        many = FileImages(files.paths(), size=side, mode="L" if self.grey else "RGB", center=self.center, log=log)
        require(self, self.validation < len(train), "validation", f"fewer than the {len(train):,} training pictures")
        order = StepSampler(len(train), len(train), seed=self.seed, stream=3).indices(0)
        held_out, few = order[: self.validation].sort().values, order[self.validation :].sort().values
        pictures = ImageParts(
            few=train.select(few),
            labels=data.train_labels[few],
            many=many,
            val=(train.select(held_out), data.train_labels[held_out]),
            test=(test, data.test_labels),
        )
        if say is not None:
            say(
                f"{self.data}: {len(few):,} labeled pictures of {len(self.classes)} classes, {len(files):,} unlabeled "
                f"in {self.unlabeled}, {len(held_out):,} to select on, {len(test):,} to report on"
            )
        return Task(
            **self.batches(pictures),
            classes=self.classes,
            test_names=data.test_names,
            record={
                "data": self.data,
                "counts": {
                    "labeled": len(few),
                    "unlabeled": len(files),
                    "validation": len(held_out),
                    "test": len(test),
                },
                "hash": {"unlabeled": hash_files(files), **hashes(labels=data.train_labels, validation=held_out)},
            },
        )


@dataclass(frozen=True)
class Protocol:
    """A row of the paper's study of model sizes (its Figure 2 and Table 9), or of its Table 7.

    Args:
        image_size: side of the pictures in training; of B0 to B6 that of EfficientNet's paper.
        epochs: passes over the labeled pictures: 700, and 350 for models larger than B4.
        ratio: unlabeled pictures for each labeled one.
        networks: of the rounds; none: the protocol's own in each.
        rounds: students, one after another.
    """

    image_size: int
    epochs: int = EPOCHS
    ratio: int = 3
    networks: tuple[str, ...] = ()
    rounds: int = 1


PROTOCOLS: dict[str, Protocol] = {
    "b0": Protocol(224, 2 * EPOCHS, ratio=1),
    "b1": Protocol(240, 2 * EPOCHS),
    "b2": Protocol(260, 2 * EPOCHS),
    "b3": Protocol(300, 2 * EPOCHS),
    "b4": Protocol(380, 2 * EPOCHS),
    "b5": Protocol(456),
    "b6": Protocol(528),
    "b7": Protocol(600),
    "l2": Protocol(475, ratio=14, networks=("efficientnet_b7", "efficientnet_l2"), rounds=3),
}
"""The paper's protocols on ImageNet by the name of the EfficientNet. B0 to B7 are teacher and student, once; L2 learns
from B7, and then twice from itself (its last round took a ratio of 28, and its teacher pictures of 600 pixels)."""


def _protocol(model: str, protocol: Protocol) -> type[NoisyImagenet]:
    """The recipe of a protocol."""
    rounds = SelfTraining(rounds=protocol.rounds, networks=protocol.networks, per_class=130_000, ratio=protocol.ratio)
    network = Annotated[str, tyro.conf.arg(name="network")]
    fields: list[tuple[str, Any, Any]] = [
        ("network_name", network, f"efficientnet_{model}"),
        ("image_size", int, protocol.image_size),
        ("steps", int, steps_of(protocol.epochs)),
        ("unlabeled_batch", int, protocol.ratio * LABELED_BATCH),
    ]
    name = f"noisy-imagenet-{model}"
    return dataclasses.make_dataclass(
        f"NoisyImagenet{model.upper()}",
        fields,
        bases=(NoisyImagenet,),
        frozen=True,
        kw_only=True,
        namespace={
            "name": name,
            "settings": {**NoisyImagenet.settings, "self_training": rounds},
            "__module__": __name__,
            "__doc__": NoisyImagenet.__doc__,
        },
    )


PAPER_RECIPES: dict[str, type[NoisyImagenet]] = {
    f"noisy-imagenet-{model}": _protocol(model, protocol) for model, protocol in PROTOCOLS.items()
}
"""The protocols as recipes, by name."""

globals().update({kind.__name__: kind for kind in PAPER_RECIPES.values()})  # a worker process finds them by name

NOISY_STUDENT_RECIPES: tuple[type[Vision], ...] = (NoisyVision, NoisyImagenet, *PAPER_RECIPES.values())
