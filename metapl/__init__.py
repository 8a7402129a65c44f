"""Meta Pseudo Labels and other bilevel label methods, with gradients that are checked."""

import sys
from importlib import import_module
from os import path
from typing import TYPE_CHECKING, Any

from metapl import moved

moved.install()

try:
    from metapl import feedback, models, problems
    from metapl.errors import MetaplError
    from metapl.feedback import MODES
    from metapl.feedback.hypergradient import Hypergradient, hypergradient
    from metapl.feedback.lookahead import Lookahead
    from metapl.problems import BilevelProblem, PseudoLabels, Signal
    from metapl.problems.losses import UDA, CrossEntropy
    from metapl.training import StopFit
    from metapl.training.contract import StepReport
    from metapl.training.loss_trainer import LossTrainer
    from metapl.training.trainer import BilevelTrainer
    from metapl.training.verify import check_gradient
    from metapl.words import did_you_mean
except KeyboardInterrupt:
    # The command has not begun yet, and a traceback through the imports would say nothing.
    if path.basename(sys.argv[0]).removesuffix(".exe") not in ("metapl", "-m"):
        raise
    raise SystemExit(130) from None

__version__ = "0.2.0"

__all__ = [
    "MODES",
    "UDA",
    "BilevelProblem",
    "BilevelTrainer",
    "CrossEntropy",
    "Hypergradient",
    "Lookahead",
    "LossTrainer",
    "MetaplError",
    "PseudoLabels",
    "Signal",
    "StepReport",
    "StopFit",
    "ablate",
    "attribute",
    "check_gradient",
    "feedback",
    "hypergradient",
    "models",
    "problems",
]


_FUNCTIONS = {"ablate": "metapl.ablation", "attribute": "metapl.training.attribution"}
_ON_FIRST_USE = ("ablation", "apps", "data", "distributed", "metrics", "sklearn")


def __dir__() -> list[str]:
    return [*__all__, *_ON_FIRST_USE, "__version__"]


if TYPE_CHECKING:  # which would take __getattr__ for one that knows every name
    from metapl import ablation as ablation
    from metapl import data as data
    from metapl import distributed as distributed
    from metapl import metrics as metrics
    from metapl import sklearn as sklearn
    from metapl.ablation import ablate
    from metapl.training.attribution import attribute
else:

    def __getattr__(name: str) -> Any:
        """Import a subpackage when it is first used, so that ``import metapl`` loads little beside torch."""
        if name in _FUNCTIONS:
            return getattr(import_module(_FUNCTIONS[name]), name)
        if name in _ON_FIRST_USE:
            return import_module(f"metapl.{name}")
        if f"metapl.{name}" in moved.MODULES:
            return moved.attribute(__name__, name)
        raise AttributeError(
            f"module 'metapl' has no attribute {name!r}{did_you_mean(name, [*__all__, *_ON_FIRST_USE])}"
        )
