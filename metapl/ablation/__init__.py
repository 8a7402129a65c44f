"""Which mode to take for a model.

Here is how far each mode is from the exact gradient, how noisy it is, and what it costs; and
altered feedback, as a control.
"""

from metapl.ablation.altered import Altered
from metapl.ablation.mode_cost import ModeCost, ModeDistance
from metapl.ablation.study import Ablation, ablate, recommendation

__all__ = ["Ablation", "Altered", "ModeCost", "ModeDistance", "ablate", "recommendation"]
__dir__ = __all__.copy
