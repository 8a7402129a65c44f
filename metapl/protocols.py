"""What is asked of a trainer, for rooms below the one where trainers are made.

:class:`metapl.metrics.metric.Judge` is the least, what a metric reads. :class:`AnyTrainer` also
takes steps and has a state. :class:`TwoLevelTrainer` has a problem, a mode and two optimizers, as
:class:`metapl.BilevelTrainer`: its step is compiled and verified. A fit asks for
:class:`metapl.training.fittable.Fittable`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from metapl.core.size import FeedbackSize
from metapl.execution.batch import Batch
from metapl.execution.layout import Layout
from metapl.execution.ranks import Ranks
from metapl.execution.state import Slots
from metapl.feedback import Estimator
from metapl.feedback.report import Report, StepReport
from metapl.metrics.metric import Judge
from metapl.problems.base import BilevelProblem
from metapl.problems.losses import TeacherLoss
from metapl.updates import Update


class AnyTrainer(Judge, Protocol):
    """A trainer that goes step by step, and whose state can be saved between any two.

    :class:`metapl.training.Trainer` says what each member is.
    """

    teacher: nn.Module | None
    ranks: Ranks
    lookahead: int
    teacher_classifies: bool

    @property
    def dtype(self) -> torch.dtype: ...
    @property
    def networks(self) -> dict[str, nn.Module]: ...
    @property
    def optimizers(self) -> dict[str, Any]: ...
    @property
    def schedulable(self) -> list[torch.optim.Optimizer]: ...
    @property
    def reads_inner(self) -> bool: ...
    def step(self, outer: Batch, inner: Batch = None) -> Report: ...
    def settings(self) -> dict[str, Any]: ...
    def live_state(self) -> dict[str, Any]: ...
    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class TwoLevelTrainer(AnyTrainer, Protocol):
    """A trainer of a student and, where the problem has one, its teacher.

    :class:`metapl.BilevelTrainer` says what each member is that it takes as an argument.

    Attributes:
        update: the student's optimizer as a function that is differentiated, with its clip.
        layouts: where the networks' weights lie.
        teacher_layout, layout: where the teacher's do, and the student's.
        slots: the tables of the teacher and of the student, as the last step read them.
        mode_state: what the mode carries from one step to the next.
        steps_done: the number of steps so far.
        measures_feedback: whether the next step measures the feedback's size for its report.
        has_losses: whether the teacher has losses of its own.
        direct_term: whether the teacher's gradient has a direct term; "" without one.
    """

    problem: BilevelProblem
    update: Update
    layouts: list[Layout]
    teacher_layout: Layout | None
    layout: Layout
    slots: list[Slots]
    mode_state: dict[str, Tensor]
    steps_done: int
    measures_feedback: bool

    mode: Estimator
    outer_optimizer: torch.optim.Optimizer | None
    teacher_losses: Sequence[TeacherLoss] | None
    feedback_weight: float
    feedback_ratio: float | None
    feedback_bound: float | None
    generator: torch.Generator | None
    clip_norm: float | None
    precision: Literal["float32", "bfloat16"]
    accumulate: int
    compile: bool | Literal["cudagraphs"]

    @property
    def has_losses(self) -> bool: ...
    @property
    def direct_term(self) -> Literal["", "included", "left out"]: ...
    @property
    def feedback_size(self) -> FeedbackSize: ...
    def step(self, outer: Batch, inner: Batch = None) -> StepReport: ...
    def teacher_step(self, outer: Batch, inner: Batch) -> Report: ...
    def first_step(self, outer: Batch, inner: Batch) -> Report: ...


def is_two_level(trainer: AnyTrainer) -> TypeGuard[TwoLevelTrainer]:
    """Return whether a trainer has a problem and a mode, as a bilevel one has."""
    return hasattr(trainer, "measures_feedback")
