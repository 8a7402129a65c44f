"""Which mode for a model: how far each is from the exact gradient, how noisy it is, and what it costs.

study       `ablate`: the modes at several points of a training
gradients   a mode's gradients beside the exact one, and what a call costs
stability   the same over step sizes, temperatures and batch sizes
trainings   short trainings by each mode, over seeds
recommend   the sentence that recommends a mode
figures     what is found of a mode
results     what is returned, as values, JSON and tables
"""

from metapl.ablation.figures import Distance, ModeCost, Outcome, Sweep, Trainings
from metapl.ablation.recommend import recommendation
from metapl.ablation.results import Ablation
from metapl.ablation.study import ablate

__all__ = ["Ablation", "Distance", "ModeCost", "Outcome", "Sweep", "Trainings", "ablate", "recommendation"]
