"""Networks by name, from here, torchvision and timm."""

from metapl.apps.networks.architecture import NAMES, Architecture, create
from metapl.apps.networks.tuned import Tuned, Tuning, begin_as, merged
from metapl.apps.networks.weights import Normalized, head_outputs, load_weights, parameter_groups

__all__ = ["NAMES", "Architecture", "Normalized", "Tuned", "Tuning", "begin_as", "create", "head_outputs"]
__all__ += ["load_weights", "merged", "parameter_groups"]
