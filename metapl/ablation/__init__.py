"""Which mode for a model: how far each is from the exact gradient, how noisy it is, and what it costs.

study       `ablate`: the modes at several points of a training, and short trainings by each
gradients   a mode's gradients beside the exact one, what a call costs, and both over varied settings
results     what is returned, as values, JSON and tables, and the sentence that recommends a mode
"""

from metapl.ablation.results import Ablation, Distance, ModeCost, Outcome, Sweep, Trainings, recommendation
from metapl.ablation.study import ablate

__all__ = ["Ablation", "Distance", "ModeCost", "Outcome", "Sweep", "Trainings", "ablate", "recommendation"]
__dir__ = __all__.copy
