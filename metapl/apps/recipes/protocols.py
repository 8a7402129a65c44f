"""The papers' picture protocols, and any other split of the data sets that torchvision knows.

``Vision`` is for any of them; the recipes after it are ``Vision`` with other defaults, every one of which can be
changed. Those named after a protocol take the settings of the code that the authors published, those that end with
``Paper`` the published table, as far as each states them; what is from neither is marked so.
"""

from __future__ import annotations

import dataclasses
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

import torch
import tyro

from metapl.apps.pictures.folders import hash_files, hashes, scan_unlabeled
from metapl.apps.pictures.sets import ImageData, Split, load_image_data
from metapl.apps.pictures.store import FileImages
from metapl.apps.recipes.base import Task
from metapl.apps.recipes.image_recipe import ImageParts, ImageRecipe, Strong, whole
from metapl.apps.recipes.settings import Feedback, Optimizer, SelfTraining, require
from metapl.data.sampler import StepSampler
from metapl.runs.fields import Range
from metapl.training import Say

Names = Literal["cifar10", "cifar100", "svhn", "imagenet", "imagefolder"]

IMAGENET_CLASSES = tuple(map(str, range(1000)))
IMAGENET_TRAIN, LABELED_BATCH, EPOCHS = 1_281_167, 2_048, 350  # of Noisy Student

# As published: sampled labels, the cosine of the two gradients, and a moving average taken off.
ALGORITHM_1 = Feedback(mode="reinforce", normalization="cosine", baseline=0.99, pseudo_label_smoothing=0.1)

K = TypeVar("K", bound=ImageRecipe)


def preset(
    *, settings: Mapping[str, Any] | None = None, fixed: Mapping[str, Any] | None = None, **defaults: Any
) -> Callable[[type[K]], type[K]]:
    """A recipe that is the one that it is derived from with other defaults, of fields and of what its type says.

    ``settings`` are those of the methods, and ``fixed`` fields are no flags any more.
    """

    def made(kind: type[K]) -> type[K]:
        hints: Any = typing.get_type_hints(kind, include_extras=True)
        suppressed: Any = tyro.conf.Suppress
        hints |= {name: suppressed[hints[name]] for name in fixed or {}}
        values = {**defaults, **(fixed or {}), "settings": {**kind.settings, **(settings or {})}}
        names = {each.name for each in dataclasses.fields(kind)} & values.keys()
        kind.__annotations__ = {**vars(kind).get("__annotations__", {}), **{name: hints[name] for name in names}}
        for name, value in values.items():
            setattr(kind, name, value)
        return dataclass(frozen=True, kw_only=True)(kind)

    return made


def pair(student: float, teacher: float, weight_decay: float) -> dict[str, Optimizer]:
    """The optimizers of student and teacher by their learning rates, with Nesterov's momentum."""
    usual = Optimizer(momentum=0.9, nesterov=True, weight_decay=weight_decay, decay_norms=False)
    return {"student": dataclasses.replace(usual, lr=student), "teacher": dataclasses.replace(usual, lr=teacher)}


def steps_of(epochs: int, examples: int = IMAGENET_TRAIN, batch: int = LABELED_BATCH) -> int:
    """Steps of so many passes over the labeled examples.

    >>> steps_of(350)
    218949
    """
    return round(epochs * examples / batch)


# What is long, and on photographs.
IMAGENET: dict[str, Any] = {
    "image_size": 224,
    "resized_crop": True,
    "labels_per_class": 128,
    "validation": 25_000,
    "ema_decay": 0.999,
    "validate_every": 5_000,
    "log_every": 100,
    "save_every": 5_000,
    "num_workers": 8,
}
SPREAD = 100 / 224  # the greatest shift of RandAugment on such pictures
EXACT = Feedback(mode="forward", labels="soft", pseudo_label_smoothing=0.1)
AT_SCALE: dict[str, Any] = {"feedback": EXACT, "uda_weight": 20.0, "uda_temperature": 0.5, "uda_ramp": 50_000}


def published(optimizers: dict[str, Optimizer], uda_weight: float, temperature: float) -> dict[str, Any]:
    """The settings of a column of the paper's table."""
    uda = {"uda_weight": uda_weight, "uda_temperature": temperature, "uda_threshold": 0.0, "uda_ramp": 0}
    return {**optimizers, **uda, "feedback": ALGORITHM_1, "wait": 0}


@lru_cache(maxsize=1)
def _loaded(name: str, root: str, side: int, center: float, mode: Literal["RGB", "L"]) -> ImageData:
    return load_image_data(name, root, (side, side), center=center, mode=mode)


@dataclass(frozen=True, kw_only=True)
class Vision(ImageRecipe):
    """A data set that torchvision loads, of which a few training pictures keep their labels.

    Args:
        data: cifar10, cifar100, svhn, imagenet, or imagefolder: a folder with train, and test or val, each with one
            folder a class.
        data_root: the folder that torchvision calls so; nothing is downloaded.
        labels_per_class: training pictures of each class that keep their labels.
        validation: training pictures that are selected on, and not trained on.
        split: file with a split that is used instead of drawing one from the seed; each run leaves its own behind.
        class_names: found in the data.
    """

    name: ClassVar[str] = "torchvision"
    protocol: ClassVar[str] = "own"

    data: Names
    data_root: Annotated[str, tyro.conf.arg(metavar="DIR")]
    labels_per_class: Annotated[int, Range(1)] = 400
    validation: Annotated[int, Range(1)] = 5000
    split: Annotated[str | None, tyro.conf.arg(metavar="FILE")] = None
    class_names: tyro.conf.Suppress[tuple[str, ...]] = ()
    network_name: Annotated[str, tyro.conf.arg(name="network")] = "wide_resnet28_2"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.data not in ("imagenet", "imagefolder"):
            what = f"False: {self.data} is held in memory, and it is for pictures in files"
            require(self, not self.resized_crop, "resized_crop", what)
            require(self, not self.grey, "grey", what)
            require(self, self.image_size == 32, "image_size", f"32, the size of {self.data}")

    @property
    def center(self) -> float:  # type: ignore[override]  # follows from the rest
        """What crops are trained on is evaluated on a center of 224/256, as usual for ImageNet."""
        return 224 / 256 if self.resized_crop else 1.0

    @property
    def classes(self) -> tuple[str, ...]:
        return self.class_names or self._data().classes

    def _data(self) -> ImageData:
        return _loaded(self.data, self.data_root, self.image_size, self.center, "L" if self.grey else "RGB")

    def settled(self) -> Vision:
        places = [name for name in ("data_root", "split", "weights", "unlabeled") if hasattr(self, name)]
        changes: dict[str, Any] = {name: whole(getattr(self, name)) for name in places}
        return dataclasses.replace(self, **changes, class_names=self._data().classes)

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        data = self._data()
        train, test = (
            images.logged(log) if isinstance(images, FileImages) else images for images in (data.train, data.test)
        )
        pictures, hashed, split = self.divided(dataclasses.replace(data, train=train, test=test), log)
        assert pictures.val is not None
        assert pictures.test is not None
        sides = {"labeled": pictures.few, "unlabeled": pictures.many}
        sides |= {"validation": pictures.val[0], "test": pictures.test[0]}
        counts, names = {name: len(images) for name, images in sides.items()}, data.test_names
        if say is not None:
            folder = getattr(self, "unlabeled", None)
            say(
                f"{self.data}: {counts['labeled']:,} labeled pictures of {len(self.classes)} classes, "
                f"{counts['unlabeled']:,} unlabeled{f' in {folder}' if folder else ''}, {counts['validation']:,} to "
                f"select on, {counts['test']:,} to report on"
            )
        return Task(
            **self.batches(pictures),
            classes=self.classes,
            test_names=names if names is None or split is None else tuple(names[i] for i in split.test.tolist()),
            split=split,
            record={"data": self.data, "counts": counts, "hash": hashed},
        )

    def divided(self, data: ImageData, log: Path | None) -> tuple[ImageParts, dict[str, str], Split | None]:
        """The pictures, the hashes that say which they are, and how they were drawn."""
        if self.split:
            split = Split.load(self.split, data.train_labels, data.test_labels)
        else:
            split = data.split(self.protocol, self.seed, self.labels_per_class, self.validation)

        def part(rows: torch.Tensor) -> tuple[Any, torch.Tensor]:
            return data.train.select(rows), data.train_labels[rows]

        (few, labels), (many, hidden) = part(split.labeled), part(split.unlabeled)
        test = data.test.select(split.test), data.test_labels[split.test]
        known = part(torch.cat([split.labeled, split.unlabeled]))
        pictures = ImageParts(few, labels, many, part(split.validation), test, hidden, known)
        return pictures, {"labels": split.labels_hash, "split": split.hash}, split


@preset(
    name="cifar10-4k",
    protocol="cifar10-4k",
    fixed={"data": "cifar10"},
    settings={
        **pair(0.025, 0.025, 5e-4),
        "feedback": Feedback(mode="forward", labels="soft", pseudo_label_smoothing=0.15),
        "wait": 3_000,
        "label_smoothing": 0.15,
        "uda_weight": 8.0,
        "uda_ramp": 5_000,
    },
    dropout=0.2,
    steps=300_000,
    labeled_batch=128,
    unlabeled_batch=7 * 128,
    strong=Strong(magnitude=16, cutout=16, again=True),
    warmup=5_000,
    finetune_steps=1_000,
    finetune_batch=512,
    finetune=Optimizer(lr=1e-5),
    validate_every=1_000,
    log_every=100,
    save_every=5_000,
    num_workers=2,
)
class Cifar10(Vision):
    """CIFAR-10-4K with the settings of the authors' code: WRN-28-2, 300,000 steps, seven times as many unlabeled.

    Labels are kept by 4,000 pictures; 41,000 are unlabeled, 5,000 are selected on. The learning rates are those of the
    authors, 0.05 for 256 labeled pictures, for 128. The feedback is the exact gradient with a weight of 1 (theirs has
    no gradient at all: compare it with mode none). Finetuning is the paper's.
    """


@preset(
    name="cifar10-4k-paper",
    settings={**published(pair(0.3, 0.125, 5e-4), uda_weight=1.0, temperature=0.8), "label_smoothing": 0.1},
    dropout=0.35,
    teacher_dropout=0.5,
    steps=1_000_000,
    warmup=2_000,
)
class Cifar10Paper(Cifar10):
    """CIFAR-10-4K with the paper's table: 1,000,000 steps, Algorithm 1 with the cosine and a moving-average baseline.

    The unlabeled batch, the magnitude of RandAugment and the average of the weights, which the paper does not tell, are
    the authors' code's. The feedback has a weight of 1 on the cosine.
    """


@preset(
    name="svhn-1k",
    protocol="svhn-1k",
    fixed={"data": "svhn"},
    settings={**pair(0.15, 0.05, 5e-4), "uda_weight": 2.5, "uda_temperature": 1.25},
    labels_per_class=100,
    dropout=0.45,
    teacher_dropout=0.65,
    strong=Strong(magnitude=16, cutout=16, again=True, writing=True),
)
class Svhn(Cifar10Paper):
    """SVHN-1K with the paper's table: WRN-28-2, 1,000 labels, core and extra pictures unlabeled.

    Selected on are 5,000 pictures. Its column of the table was noted from memory and is to be checked. RandAugment
    takes the paper's list for SVHN, and nothing is mirrored. What the paper does not tell is as for CIFAR-10.
    """


@preset(
    name="imagenet-10pct",
    protocol="imagenet-10pct",
    fixed={"data": "imagenet"},
    settings={**pair(1.6, 2.4, 1e-4), **AT_SCALE, "wait": 20_000},
    network_name="resnet50",
    dropout=0.1,
    channels_last=True,
    steps=700_000,
    labeled_batch=1_024,
    unlabeled_batch=15 * 1_024,
    strong=Strong(magnitude=17, cutout=0, translate=SPREAD),
    warmup=5_000,
    clip_norm=5.0,
    finetune_steps=2_000,
    finetune_batch=512,
    finetune=Optimizer(lr=1e-5),
    **IMAGENET,
)
class Imagenet10(Vision):
    """ImageNet-10% with the settings of the authors' code: ResNet-50 at 224 pixels, 700,000 steps.

    Reported on are the 50,000 validation pictures of ILSVRC 2012, at a center crop of 224 of 256. The learning rates
    are the authors' 0.4 and 0.6 for 256 labeled pictures, for 1,024. The feedback is the exact gradient with a weight
    of 1. Batches of 1,024 and 15,360 are for many machines: on one GPU, accumulate them, or lower batches and rates.
    """


@preset(
    name="imagenet-10pct-paper",
    settings=published(pair(0.8, 0.5, 2e-4), uda_weight=16.0, temperature=0.75),
    steps=500_000,
    labeled_batch=2_048,
    unlabeled_batch=15 * 2_048,
    warmup=1_000,
)
class Imagenet10Paper(Imagenet10):
    """ImageNet-10% with the paper's table: 500,000 steps, Algorithm 1 with the cosine and a moving-average baseline.

    Its column of the table was noted from memory and is to be checked. The unlabeled batch, RandAugment, clipping and
    the average of the weights are the authors' code's. The feedback has a weight of 1 on the cosine.
    """


PROTOCOL_RECIPES: tuple[type[Vision], ...] = (Vision, Cifar10, Cifar10Paper, Svhn, Imagenet10, Imagenet10Paper)


# ------------------------------------------------------------------------------------------------------ Noisy Student


@preset(own="noisy_student", schedule="exponential")
class NoisyVision(Vision):
    """A data set that torchvision loads, of which a few training pictures keep their labels, by Noisy Student."""


@preset(
    name="imagenet",
    protocol="imagenet-10pct",
    own="noisy_student",
    fixed={"data": "imagenet"},
    settings={**pair(0.128, 0.128, 1e-5), "self_training": SelfTraining(per_class=130_000, ratio=1)},
    network_name="efficientnet_b0",
    dropout=0.5,
    stochastic_depth=0.2,
    schedule="exponential",
    steps=steps_of(2 * EPOCHS),
    labeled_batch=LABELED_BATCH,
    unlabeled_batch=LABELED_BATCH,
    strong=Strong(operations=2, magnitude=10 / 30 * 27, cutout=0, translate=SPREAD),  # ours is of 10, 27 is of 30
    **IMAGENET,
)
class NoisyImagenet(Vision):
    """ImageNet and other pictures without labels by Noisy Student: EfficientNet-B0, 700 epochs of the labeled pictures.

    Of the paper: batches, the learning rate and its decay by 0.97 every 4.8 epochs, dropout, the last block kept with a
    probability of 0.8, RandAugment with magnitude 27 (taken to be of 30), one unlabeled picture for each labeled one,
    and 130,000 of each class; the rest is of imagenet-10pct. Its 130 million unlabeled pictures are not public: give a
    folder such as YFCC100M, or none to take the labels off most of ImageNet instead.

    Args:
        unlabeled: unlabeled pictures: a folder, with or without subfolders. All of ImageNet then keeps its labels.
    """

    unlabeled: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None

    def divided(self, data: ImageData, log: Path | None) -> tuple[ImageParts, dict[str, str], Split | None]:
        if self.unlabeled is None:
            return super().divided(data, log)
        train, labels, files = data.train, data.train_labels, scan_unlabeled(self.unlabeled)
        require(self, self.validation < len(train), "validation", f"fewer than the {len(train):,} training pictures")
        order = StepSampler(len(train), len(train), seed=self.seed, stream=3).indices(0)
        held_out, few = order[: self.validation].sort().values, order[self.validation :].sort().values
        side = (self.image_size, self.image_size)
        many = FileImages(files.paths(), size=side, mode=self.colors, center=self.center, log=log)
        val, test = (train.select(held_out), labels[held_out]), (data.test, data.test_labels)
        pictures = ImageParts(train.select(few), labels[few], many, val, test)
        return pictures, {"unlabeled": hash_files(files), **hashes(labels=labels, validation=held_out)}, None


def _row(
    model: str, image_size: int, epochs: int, ratio: int = 3, networks: tuple[str, ...] = (), rounds: int = 1
) -> type[NoisyImagenet]:
    """A row of the paper's study of model sizes (its Figure 2 and Table 9), or of its Table 7."""
    said = {"__module__": __name__, "__doc__": NoisyImagenet.__doc__}
    made: type[NoisyImagenet] = type(f"NoisyImagenet{model.upper()}", (NoisyImagenet,), said)
    rounds_of = SelfTraining(rounds=rounds, networks=networks, per_class=130_000, ratio=ratio)
    return preset(
        name=f"noisy-imagenet-{model}",
        settings={"self_training": rounds_of},
        network_name=f"efficientnet_{model}",
        image_size=image_size,
        steps=steps_of(epochs),
        unlabeled_batch=ratio * LABELED_BATCH,
    )(made)


_ROWS = (
    _row("b0", 224, 2 * EPOCHS, ratio=1),
    *(_row(model, side, 2 * EPOCHS) for model, side in (("b1", 240), ("b2", 260), ("b3", 300), ("b4", 380))),
    *(_row(model, side, EPOCHS) for model, side in (("b5", 456), ("b6", 528), ("b7", 600))),
    _row("l2", 475, EPOCHS, ratio=14, networks=("efficientnet_b7", "efficientnet_l2"), rounds=3),
)

# The paper's protocols on ImageNet. B0 to B7 are teacher and student, once; L2 learns from B7, and then twice from
# itself (its last round took a ratio of 28, and its teacher pictures of 600 pixels).
PAPER_RECIPES: dict[str, type[NoisyImagenet]] = {kind.name: kind for kind in _ROWS}

globals().update({kind.__name__: kind for kind in _ROWS})  # a worker process finds them by name

NOISY_STUDENT_RECIPES: tuple[type[Vision], ...] = (NoisyVision, NoisyImagenet, *_ROWS)
