"""Sampled labels, rewarded by the decrease of the outer loss."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.lesson import Credits
from metapl.feedback.base import (
    Decay,
    Estimator,
    Reduction,
    State,
    divisor,
    examples_of_mean,
)
from metapl.feedback.reinforce import init_baseline, subtract_baseline
from metapl.problems.base import Kind

if TYPE_CHECKING:
    from metapl.core.terms import StudentPath


@dataclass(frozen=True)
class LossDifference(Estimator):
    r"""Reward the labels by the old loss minus the new one, on the same outer batch.

    .. math:: h = L(\theta) - L(\theta'), \qquad
              \text{teacher: } h \cdot \tfrac1B \sum_i \mathrm{CE}(\hat y_i, T(x_i))

    Args:
        baseline, normalization: as in :class:`~metapl.feedback.Reinforce`.
        reduction: ``"mean"``, or ``"sum"``, B times as large; as in
            :class:`~metapl.feedback.Reinforce`.

    Takes: hard labels. Cost: 8 student passes a step with the teacher's 3: two outer forward
    passes, no outer backward pass. Bias: the sum has none for the objective E_ŷ[L(θ′(ŷ))], with
    any optimizer; the mean is 1/B of it. That gradient is the one of the soft step up to O(η) for
    the SGD family; for Adam and clipping a difference remains. Noisy, with momentum more so (the
    velocity's own effect is in h). Source: a first-order form of eq. (12), L(θ) − L(θ − ηg) = η⟨∇L,
    g⟩ + O(η²); the public implementations use it, with the opposite sign.
    """

    shape: ClassVar[Mapping[str, Any]] = {**Estimator.shape, "baseline": None}
    baseline: Decay | None = None
    normalization: Literal["gradient", "learning_rate"] = "gradient"
    reduction: Reduction = "mean"

    name: ClassVar[str] = "loss_difference"
    labels: ClassVar[tuple[Kind, ...]] = ("hard",)
    credits: ClassVar[Credits] = "batch"
    takes_outer_losses: ClassVar[bool] = True
    is_pure: ClassVar[bool] = True

    def init(self) -> State:
        return init_baseline(self.baseline)

    def h_of_losses(self, before: Tensor, after: Tensor) -> Tensor:
        return before - after

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step = path.steps[0]
        h = self.h_of_losses(path.outer_loss_before, path.outer_loss)
        h = h / divisor(self.normalization, step)
        h, state = subtract_baseline(h, self.baseline, state)
        labels = examples_of_mean(self.reduction, step)
        return [Feedback(h, "log_prob", mean_over=labels)], state
