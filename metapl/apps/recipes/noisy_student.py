"""The protocols of Noisy Student, and any split of the data sets that torchvision knows, trained by it.

Every field can be changed. What the paper does not tell, the optimizer beside its learning rate among it, is that of
``imagenet-10pct``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import tyro

from metapl.apps.pictures.folders import hash_files, hashes, scan_unlabeled
from metapl.apps.pictures.sets import ImageData, Split
from metapl.apps.pictures.store import FileImages
from metapl.apps.recipes.image_recipe import ImageParts, Strong
from metapl.apps.recipes.protocols import Vision, pair, preset
from metapl.apps.recipes.ranges import require
from metapl.apps.recipes.self_training import SelfTraining
from metapl.data.sampler import StepSampler

IMAGENET_TRAIN, LABELED_BATCH, EPOCHS = 1_281_167, 2_048, 350


def steps_of(epochs: int, examples: int = IMAGENET_TRAIN, batch: int = LABELED_BATCH) -> int:
    """Steps of so many passes over the labeled examples.

    >>> steps_of(350)
    218949
    """
    return round(epochs * examples / batch)


@preset(own="noisy_student", schedule="exponential")
class NoisyVision(Vision):
    """A data set that torchvision loads, of which a few training pictures keep their labels, by Noisy Student."""


@preset(
    name="imagenet",
    protocol="imagenet-10pct",
    own="noisy_student",
    fixed={"data": "imagenet"},
    settings={**pair(0.128, 0.128, 1e-5), "self_training": SelfTraining(per_class=130_000, ratio=1)},
    labels_per_class=128,
    validation=25_000,
    image_size=224,
    resized_crop=True,
    network_name="efficientnet_b0",
    dropout=0.5,
    stochastic_depth=0.2,
    schedule="exponential",
    steps=steps_of(2 * EPOCHS),
    labeled_batch=LABELED_BATCH,
    unlabeled_batch=LABELED_BATCH,
    strong=Strong(operations=2, magnitude=10 / 30 * 27, cutout=0, translate=100 / 224),  # ours is of 10, 27 is of 30
    ema_decay=0.999,
    validate_every=5_000,
    log_every=100,
    save_every=5_000,
    num_workers=8,
)
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

    unlabeled: Annotated[str | None, tyro.conf.arg(metavar="DIR")] = None

    def divided(self, data: ImageData, log: Path | None) -> tuple[ImageParts, dict[str, str], Split | None]:
        if self.unlabeled is None:
            return super().divided(data, log)
        train, labels, files = data.train, data.train_labels, scan_unlabeled(self.unlabeled)
        require(self, self.validation < len(train), "validation", f"fewer than the {len(train):,} training pictures")
        order = StepSampler(len(train), len(train), seed=self.seed, stream=3).indices(0)
        held_out, few = order[: self.validation].sort().values, order[self.validation :].sort().values
        side = (self.image_size, self.image_size)
        many = FileImages(files.paths(), size=side, mode="L" if self.grey else "RGB", center=self.center, log=log)
        pictures = ImageParts(
            few=train.select(few),
            labels=labels[few],
            many=many,
            val=(train.select(held_out), labels[held_out]),
            test=(data.test, data.test_labels),
        )
        return pictures, {"unlabeled": hash_files(files), **hashes(labels=labels, validation=held_out)}, None


def _protocol(
    model: str, image_size: int, epochs: int, ratio: int = 3, networks: tuple[str, ...] = (), rounds: int = 1
) -> type[NoisyImagenet]:
    """A row of the paper's study of model sizes (its Figure 2 and Table 9), or of its Table 7.

    Args:
        model: an EfficientNet.
        image_size: side of the pictures in training; of B0 to B6 that of EfficientNet's paper.
        epochs: passes over the labeled pictures: 700, and 350 for models larger than B4.
        ratio: unlabeled pictures for each labeled one.
        networks: of the rounds; none: the protocol's own in each.
        rounds: students, one after another.
    """
    settings = SelfTraining(rounds=rounds, networks=networks, per_class=130_000, ratio=ratio)
    said = {"__module__": __name__, "__doc__": NoisyImagenet.__doc__}
    made: type[NoisyImagenet] = type(f"NoisyImagenet{model.upper()}", (NoisyImagenet,), said)
    return preset(
        name=f"noisy-imagenet-{model}",
        settings={"self_training": settings},
        network_name=f"efficientnet_{model}",
        image_size=image_size,
        steps=steps_of(epochs),
        unlabeled_batch=ratio * LABELED_BATCH,
    )(made)


_ROWS = (
    _protocol("b0", 224, 2 * EPOCHS, ratio=1),
    _protocol("b1", 240, 2 * EPOCHS),
    _protocol("b2", 260, 2 * EPOCHS),
    _protocol("b3", 300, 2 * EPOCHS),
    _protocol("b4", 380, 2 * EPOCHS),
    _protocol("b5", 456, EPOCHS),
    _protocol("b6", 528, EPOCHS),
    _protocol("b7", 600, EPOCHS),
    _protocol("l2", 475, EPOCHS, ratio=14, networks=("efficientnet_b7", "efficientnet_l2"), rounds=3),
)

PAPER_RECIPES: dict[str, type[NoisyImagenet]] = {kind.name: kind for kind in _ROWS}
"""The paper's protocols on ImageNet by name. B0 to B7 are teacher and student, once; L2 learns from B7, and then twice
from itself (its last round took a ratio of 28, and its teacher pictures of 600 pixels)."""

globals().update({kind.__name__: kind for kind in _ROWS})  # a worker process finds them by name

NOISY_STUDENT_RECIPES: tuple[type[Vision], ...] = (NoisyVision, NoisyImagenet, *_ROWS)
