"""Meta Pseudo Labels and other bilevel label methods, with gradients that are checked."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from metapl import feedback, problems
from metapl.core.lookahead import Lookahead
from metapl.errors import MetaplError
from metapl.feedback import MODES
from metapl.feedback.hypergradient import Hypergradient
from metapl.feedback.report import StepReport
from metapl.guards.verification import check_gradient
from metapl.problems import BilevelProblem, PseudoLabels, Signal
from metapl.problems.losses import UDA, CrossEntropy
from metapl.training.hypergradient import hypergradient
from metapl.training.loss_trainer import LossTrainer
from metapl.training.trainer import BilevelTrainer
from metapl.updates import scheduled_settings
from metapl.words import did_you_mean

if TYPE_CHECKING:
    from metapl import (  # noqa: F401
        ablation,
        data,
        distributed,
        functional,
        integrations,
        labels,
        metrics,
        models,
        networks,
        noisy_student,
        pictures,
        robustness,
        run_folder,
    )
    from metapl.ablation import ablate
    from metapl.attribution.attribute import attribute, metasmoothness
    from metapl.attribution.recording import Recording, record
    from metapl.attribution.reliability import reliability
    from metapl.training.loop import StopFit

__version__ = "0.3.0"

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
    "Recording",
    "Signal",
    "StepReport",
    "StopFit",
    "ablate",
    "attribute",
    "check_gradient",
    "feedback",
    "hypergradient",
    "metasmoothness",
    "models",
    "problems",
    "record",
    "reliability",
    "scheduled_settings",
]

# Modules, and the modules of functions, that are loaded when they are first used, so that
# ``import metapl`` loads little beside torch.
_LAZY_MODULES = (
    "ablation",
    "apps",
    "data",
    "distributed",
    "functional",
    "integrations",
    "labels",
    "metrics",
    "models",
    "networks",
    "noisy_student",
    "pictures",
    "robustness",
    "run_folder",
)
_MODULES_OF_LAZY_FUNCTIONS = {
    "Recording": "metapl.attribution.recording",
    "StopFit": "metapl.training.loop",
    "ablate": "metapl.ablation",
    "attribute": "metapl.attribution.attribute",
    "metasmoothness": "metapl.attribution.attribute",
    "record": "metapl.attribution.recording",
    "reliability": "metapl.attribution.reliability",
}


def __dir__() -> list[str]:
    return [*__all__, *_LAZY_MODULES, "__version__"]


# A type checker would take it for a module that has every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        if name in _MODULES_OF_LAZY_FUNCTIONS:
            return getattr(import_module(_MODULES_OF_LAZY_FUNCTIONS[name]), name)
        if name in _LAZY_MODULES:
            return import_module(f"metapl.{name}")
        question = did_you_mean(name, [*__all__, *_LAZY_MODULES])
        raise AttributeError(f"module 'metapl' has no attribute {name!r}{question}")
