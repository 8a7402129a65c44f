"""Networks for teachers and students."""

from typing import TYPE_CHECKING, Any

from metapl import moved
from metapl.models.networks import (
    Corrector,
    LabelAdjuster,
    Logits,
    label_adjuster,
    mlp,
    small_cnn,
    wide_resnet,
    wide_resnet28_2,
    wide_resnet28_10,
)

__all__ = [
    "Corrector",
    "LabelAdjuster",
    "Logits",
    "label_adjuster",
    "mlp",
    "small_cnn",
    "wide_resnet",
    "wide_resnet28_2",
    "wide_resnet28_10",
]
__dir__ = __all__.copy


if not TYPE_CHECKING:  # to whom these names are gone

    def __getattr__(name: str) -> Any:
        return moved.attribute(__name__, name)
