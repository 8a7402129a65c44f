"""Training: the trainers, and the loop around their steps."""

from metapl.feedback.report import Report, Say
from metapl.training.base import Trainer
from metapl.training.loop import Callback, FitResult, Interrupted, StopFit
from metapl.training.options import FitOptions

__all__ = [
    "Callback",
    "FitOptions",
    "FitResult",
    "Interrupted",
    "Report",
    "Say",
    "StopFit",
    "Trainer",
]
__dir__ = __all__.copy
