"""Networks for teachers and students."""

from metapl.models.mlp import mlp
from metapl.models.wide_resnet import wide_resnet, wide_resnet28_2, wide_resnet28_10

__all__ = ["mlp", "wide_resnet", "wide_resnet28_2", "wide_resnet28_10"]
