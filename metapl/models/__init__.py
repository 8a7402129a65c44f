"""Networks for teachers and students."""

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

__all__ = ["Corrector", "LabelAdjuster", "Logits", "label_adjuster", "mlp", "small_cnn"]
__all__ += ["wide_resnet", "wide_resnet28_2", "wide_resnet28_10"]
__dir__ = __all__.copy
