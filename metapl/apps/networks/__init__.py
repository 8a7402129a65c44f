"""Networks by name, from here, torchvision and timm."""

from metapl.apps.networks.architecture import NAMES, Architecture, create
from metapl.apps.networks.tuned import Tuned, Tuning, begin_as, merged
from metapl.apps.networks.weights import (
    LoadedWeights,
    Normalized,
    head_outputs,
    load_weights,
    normalized,
    parameter_groups,
)

__all__ = ["NAMES", "Architecture", "LoadedWeights", "Normalized", "create", "head_outputs", "load_weights"]
__all__ += ["Tuned", "Tuning", "begin_as", "merged", "normalized", "parameter_groups"]
