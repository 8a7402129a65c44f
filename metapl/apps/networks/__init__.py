"""Networks by name, from here, torchvision and timm."""

from metapl.apps.networks.architecture import NAMES, Architecture, create
from metapl.apps.networks.tuned import Tuned, Tuning, begin_as, merged
from metapl.apps.networks.weights import Normalized, load_weights, parameter_groups, read_weights

__all__ = ["NAMES", "Architecture", "Normalized", "Tuned", "Tuning", "begin_as", "create", "load_weights", "merged"]
__all__ += ["parameter_groups", "read_weights"]
