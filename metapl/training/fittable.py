"""What a fit asks of a trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from metapl.execution.ranks import Ranks
from metapl.feedback.report import Report
from metapl.metrics.metric import Term
from metapl.training.options import FitOptions


class Fittable(Protocol):
    """A trainer that goes step by step, as :class:`metapl.training.Trainer` says what its members are.

    One with a teacher also has ``teacher_step`` and ``first_step``, which a fit takes instead of
    ``step`` while the student waits and while it learns alone.
    """

    student: nn.Module
    teacher: nn.Module | None
    device: torch.device
    ranks: Ranks
    lookahead: int
    classifies: bool
    teacher_classifies: bool

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def networks(self) -> dict[str, nn.Module]: ...
    @property
    def schedulable(self) -> list[torch.optim.Optimizer]: ...
    def first_steps(self, options: FitOptions) -> int: ...
    def step(self, labeled: Any, unlabeled: Any = None) -> Report: ...
    def read_outer(self, batch: Any, name: str) -> tuple[Any, Any]: ...
    def outer_terms(self) -> Sequence[Term]: ...
    def settings(self) -> dict[str, Any]: ...
    def live_state(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...
