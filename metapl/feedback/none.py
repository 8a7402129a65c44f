"""No feedback: the control."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from metapl.feedback.base import Feedback, Kind, State, only
from metapl.inner import InnerStep


@dataclass(frozen=True)
class NoFeedback:
    """h = 0: the teacher learns from its own losses alone, and with none of these it stays as it is.

    Takes: soft and hard labels.
    Cost: 6 student passes a step at most, the teacher's included.
    """

    name: ClassVar[str] = "none"
    labels: ClassVar[tuple[Kind, ...]] = ("soft", "hard")
    keep_graph: ClassVar[bool] = False

    def init(self) -> State:
        return {}

    def feedback(self, steps: Sequence[InnerStep], state: State) -> tuple[list[Feedback], State]:
        return [Feedback(only(steps, self.name).inner_loss.new_zeros(()), None)], state
