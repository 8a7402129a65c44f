"""Networks for teachers and students."""

from metapl.models.architecture import NAMES, Architecture, create
from metapl.models.groups import parameter_groups
from metapl.models.label_adjuster import label_adjuster
from metapl.models.logits import Logits
from metapl.models.mlp import mlp
from metapl.models.normalized import Normalized, normalized
from metapl.models.small_cnn import small_cnn
from metapl.models.weights import LoadedWeights, head_outputs, load_weights
from metapl.models.wide_resnet import wide_resnet, wide_resnet28_2, wide_resnet28_10

__all__ = [
    "NAMES",
    "Architecture",
    "LoadedWeights",
    "Logits",
    "Normalized",
    "create",
    "head_outputs",
    "label_adjuster",
    "load_weights",
    "mlp",
    "normalized",
    "parameter_groups",
    "small_cnn",
    "wide_resnet",
    "wide_resnet28_2",
    "wide_resnet28_10",
]
