"""Recipes of networks that take many machines, for ``metapl plan``: networks, batches, losses, optimizers and steps.

Their unlabeled pictures are not public: 130 million of JFT-300M, chosen and balanced by Noisy Student. So they have no
data, and ``metapl train images`` trains such a network on pictures of your own.
"""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

from metapl.apps.recipes.base import Task
from metapl.apps.recipes.image_recipe import ImageRecipe, Strong
from metapl.apps.recipes.protocols import preset
from metapl.apps.recipes.settings import Feedback, Optimizer
from metapl.errors import MetaplError
from metapl.training import Say

IMAGENET_CLASSES = tuple(map(str, range(1000)))


@preset(
    name="imagenet-l2",
    settings={
        "uda_weight": 20.0,
        "uda_temperature": 0.5,
        "uda_ramp": 50_000,
        "feedback": Feedback(mode="forward", labels="soft", pseudo_label_smoothing=0.1),
    },
    network_name="efficientnet_l2",
    image_size=512,
    resized_crop=True,
    dropout=0.5,
    stochastic_depth=0.2,
    steps=1_000_000,
    labeled_batch=2_048,
    unlabeled_batch=16_384,
    strong=Strong(magnitude=17, cutout=0, translate=100 / 224),
    warmup=5_000,
    clip_norm=5.0,
    ema_decay=0.999,
    finetune_steps=20_000,
    precision="bfloat16",
)
class ImagenetL2(ImageRecipe):
    """EfficientNet-L2 as teacher and student, on ImageNet and unlabeled pictures: the paper's largest experiment.

    Of the paper: the network, 512 pixels, 2,048 labeled and 16,384 unlabeled pictures a step, 1,000,000 steps, and
    20,000 of finetuning. Of Noisy Student: dropout and stochastic depth. Neither tells the optimizer, the losses and
    the average of the weights, which are those of imagenet-10pct, nor the precision. The feedback is the exact
    gradient.
    """

    classes: ClassVar[tuple[str, ...]] = IMAGENET_CLASSES

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        raise MetaplError(
            f"{self.name} is for metapl plan: its unlabeled pictures, of JFT-300M, are not public. Train on your own "
            f"by: metapl train images --method mpl --network {self.network_name} --image-size {self.image_size}."
        )


@preset(name="imagenet-b6-wide", network_name="efficientnet_b6_wide")
class ImagenetB6Wide(ImagenetL2):
    """EfficientNet-B6-Wide as teacher and student; everything else as imagenet-l2, as the paper has it."""


ADAMW = Optimizer(algorithm="adamw", lr=3e-4, weight_decay=0.05, decay_norms=False)


@preset(
    name="vit-1b",
    settings={"student": ADAMW, "teacher": ADAMW},
    network_name="vit_1b_14",
    image_size=224,
    dropout=0.0,
    stochastic_depth=0.0,
)
class Vit1B(ImagenetL2):
    """Two vision transformers of 1.2 billion weights, by AdamW, with the batches and losses of imagenet-l2.

    It is of no paper: the network is twice as wide as ViT-L, for pictures of 224 pixels in patches of 14.
    """


LARGE_RECIPES: tuple[type[ImagenetL2], ...] = (ImagenetL2, ImagenetB6Wide, Vit1B)
