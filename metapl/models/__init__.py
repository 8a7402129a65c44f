"""Networks for teachers and students."""

from typing import Any

from metapl import moved
from metapl.models.label_adjuster import label_adjuster
from metapl.models.logits import Logits
from metapl.models.mlp import mlp
from metapl.models.small_cnn import small_cnn
from metapl.models.wide_resnet import wide_resnet, wide_resnet28_2, wide_resnet28_10

__all__ = [
    "Logits",
    "label_adjuster",
    "mlp",
    "small_cnn",
    "wide_resnet",
    "wide_resnet28_2",
    "wide_resnet28_10",
]


def __getattr__(name: str) -> Any:
    """What the application has under this name."""
    return moved.attribute(__name__, name)
