"""Recipes of networks that take many machines, for ``metapl plan``: networks, batches, losses, optimizers and steps.

Their unlabeled pictures are not public: 130 million of JFT-300M, chosen and balanced by Noisy Student. So they have no
data, and ``metapl train images`` trains such a network on pictures of your own.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import tyro

from metapl.apps.recipes.base import Feedback, Optimizer, Task
from metapl.apps.recipes.image_recipe import ImageRecipe, Strong
from metapl.errors import MetaplError
from metapl.training import Say

IMAGENET_CLASSES = tuple(map(str, range(1000)))


@dataclass(frozen=True, kw_only=True)
class ImagenetL2(ImageRecipe):
    """EfficientNet-L2 as teacher and student, on ImageNet and unlabeled pictures: the paper's largest experiment.

    Of the paper: the network, 512 pixels, 2,048 labeled and 16,384 unlabeled pictures a step, 1,000,000 steps, and
    20,000 of finetuning. Of Noisy Student: dropout and stochastic depth. Neither tells the optimizer, the losses and
    the average of the weights, which are those of imagenet-10pct, nor the precision. The feedback is the exact
    gradient.
    """

    name: ClassVar[str] = "imagenet-l2"
    classes: ClassVar[tuple[str, ...]] = IMAGENET_CLASSES
    settings: ClassVar[dict[str, Any]] = {
        **ImageRecipe.settings,
        "uda_weight": 20.0,
        "uda_temperature": 0.5,
        "uda_ramp": 50_000,
        "feedback": Feedback(mode="forward", labels="soft", pseudo_label_smoothing=0.1),
    }

    network_name: Annotated[str, tyro.conf.arg(name="network")] = "efficientnet_l2"
    image_size: int = 512
    resized_crop: bool = True
    dropout: float = 0.5
    stochastic_depth: float = 0.2
    steps: int = 1_000_000
    labeled_batch: int = 2_048
    unlabeled_batch: int = 16_384
    strong: Strong = field(default_factory=lambda: Strong(magnitude=17, cutout=0, translate=100 / 224))
    warmup: int = 5_000
    clip_norm: float | None = 5.0
    ema_decay: float | None = 0.999
    finetune_steps: int = 20_000
    precision: Literal["float32", "bfloat16"] = "bfloat16"

    def task(self, say: Say | None = None, progress: bool = False, log: Path | None = None) -> Task:
        raise MetaplError(
            f"{self.name} is for metapl plan: its unlabeled pictures, of JFT-300M, are not public. Train on your own "
            f"by: metapl train images --method mpl --network {self.network_name} --image-size {self.image_size}."
        )


@dataclass(frozen=True, kw_only=True)
class ImagenetB6Wide(ImagenetL2):
    """EfficientNet-B6-Wide as teacher and student; everything else as imagenet-l2, as the paper has it."""

    name: ClassVar[str] = "imagenet-b6-wide"

    network_name: Annotated[str, tyro.conf.arg(name="network")] = "efficientnet_b6_wide"


ADAMW = Optimizer(algorithm="adamw", lr=3e-4, weight_decay=0.05, decay_norms=False)


@dataclass(frozen=True, kw_only=True)
class Vit1B(ImagenetL2):
    """Two vision transformers of 1.2 billion weights, by AdamW, with the batches and losses of imagenet-l2.

    It is of no paper: the network is twice as wide as ViT-L, for pictures of 224 pixels in patches of 14.
    """

    name: ClassVar[str] = "vit-1b"
    settings: ClassVar[dict[str, Any]] = {
        **ImagenetL2.settings,
        "student": ADAMW,
        "teacher": ADAMW,
    }

    network_name: Annotated[str, tyro.conf.arg(name="network")] = "vit_1b_14"
    image_size: int = 224
    dropout: float = 0.0
    stochastic_depth: float = 0.0


LARGE_RECIPES: tuple[type[ImagenetL2], ...] = (ImagenetL2, ImagenetB6Wide, Vit1B)
