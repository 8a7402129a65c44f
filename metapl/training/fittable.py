"""What a fit asks of a trainer."""

from __future__ import annotations

from typing import Any, Protocol

from metapl.feedback.report import Say
from metapl.protocols import AnyTrainer
from metapl.training.options import FitOptions


class Fittable(AnyTrainer, Protocol):
    """A trainer whose fit may begin with steps that the student takes alone."""

    def first_steps(self, options: FitOptions) -> int: ...
    def tell_evaluation(self, warn: Say) -> None: ...
    def network_settings(self) -> dict[str, Any]: ...
    def unsaved(self, saved: dict[str, Any]) -> list[str]: ...
