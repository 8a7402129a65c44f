"""Networks by name, from here, torchvision and timm."""

from metapl.apps.networks.architecture import NAMES, Architecture, create
from metapl.apps.networks.groups import parameter_groups
from metapl.apps.networks.normalized import Normalized, normalized
from metapl.apps.networks.weights import LoadedWeights, head_outputs, load_weights

__all__ = [
    "NAMES",
    "Architecture",
    "LoadedWeights",
    "Normalized",
    "create",
    "head_outputs",
    "load_weights",
    "normalized",
    "parameter_groups",
]
