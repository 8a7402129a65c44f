"""Training: the trainers, and the loop around their steps."""

from typing import TYPE_CHECKING, Any

from metapl.feedback.report import Report, Say
from metapl.training.base import Trainer

if TYPE_CHECKING:
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

# A type checker would take it for a module that has every name.
if not TYPE_CHECKING:

    def __getattr__(name: str) -> Any:
        """Load what only a fit needs where it is first used."""
        if name not in __all__:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from metapl.training import loop, options

        return getattr(options if name == "FitOptions" else loop, name)
