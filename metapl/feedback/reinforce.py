"""Algorithm 1 of Meta Pseudo Labels: sampled labels and one scalar for the batch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from metapl.core.feedback import Feedback
from metapl.core.lesson import Credits
from metapl.errors import MetaplError
from metapl.feedback.base import (
    Decay,
    Estimator,
    Reduction,
    State,
    divisor,
    examples_of_mean,
)
from metapl.problems.base import Kind

if TYPE_CHECKING:
    from metapl.core.terms import StudentPath


@dataclass(frozen=True)
class Reinforce(Estimator):
    r"""Say by one scalar whether the step on the sampled labels follows the outer gradient.

    .. math:: h = -\langle w, g \rangle
              \quad (= \eta \langle \nabla L(\theta'), g \rangle \text{ for plain SGD}), \qquad
              \text{teacher: } h \cdot \tfrac1B \sum_i \mathrm{CE}(\hat y_i, T(x_i))

    with g the gradient of the inner loss, and w = (∂U/∂g)ᵀ ∇L(θ′).

    Args:
        similarity: ``"dot"`` (Algorithm 1) or ``"cosine"``, −⟨w, g⟩/(‖w‖‖g‖), in [−1, 1]: another
            weighting of the steps, so another estimator, with the sign of the first.
        baseline: decay of a moving average of h, starting at 0, whose value from *before* this step
            is subtracted; None: no baseline. The expectation does not change, since that value does
            not depend on these labels.
        normalization: ``"gradient"``, or ``"learning_rate"`` (h/η), for ``"dot"``.
        reduction: ``"mean"``, h times the mean cross-entropy of the B labels, as Algorithm 1 is
            written; or ``"sum"``, h times their sum, B times as large, whose expectation is the
            gradient of eq. (3) (see *Bias*). B counts the labels of all micro-batches and
            processes.

    Takes: hard labels. Cost: 9 student passes a step with the teacher's 3. Bias: the mean is 1/B of
    the sum, with any optimizer. The sum has, for updates affine in g (the SGD family), a bias of
    O(η) relative to the exact soft gradient, because L is differentiated at the θ′ of the sampled
    labels. For Adam and clipping the update is not linear in g, and an O(1) bias remains: the
    expectation of the sum, with B = 2 and a warmed Adam, is 0.55 times as long as the soft gradient
    and 0.49 away from it in relative norm (cosine 0.99; medians of 5 problems, the same at η = 0.01
    and 0.001). While a clip by global norm is active ⟨w, g⟩ is zero, and so is the feedback. A
    cosine holds no 1/B: its sum is B times the authors' estimator. The noise is large: all B labels
    share one number. Source: Algorithm 1, lines 2-5, and eq. (12); the cosine and the baseline from
    the paper's appendix.
    """

    shape: ClassVar[Mapping[str, Any]] = {**Estimator.shape, "similarity": "dot", "baseline": None}
    similarity: Literal["dot", "cosine"] = "dot"
    baseline: Decay | None = None
    normalization: Literal["gradient", "learning_rate"] = "gradient"
    reduction: Reduction = "mean"

    name: ClassVar[str] = "reinforce"
    labels: ClassVar[tuple[Kind, ...]] = ("hard",)
    credits: ClassVar[Credits] = "batch"
    is_pure: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.similarity == "cosine" and self.normalization != "gradient":
            raise MetaplError(
                "a cosine does not depend on the learning rate; expected normalization='gradient'."
            )

    def init(self) -> State:
        return init_baseline(self.baseline)

    def feedback(self, path: StudentPath, state: State) -> tuple[list[Feedback], State]:
        step, w = path.pullback()
        h = -step.space.dot(w, step.gradient)
        normalization = "cosine" if self.similarity == "cosine" else self.normalization
        if normalization != "gradient":
            h = h / divisor(normalization, step, w)
        h, state = subtract_baseline(h, self.baseline, state)
        labels = examples_of_mean(self.reduction, step)
        return [Feedback(h, "log_prob", mean_over=labels)], state


def init_baseline(decay: float | None) -> State:
    """Return the moving average before the first step: 0."""
    return {} if decay is None else {"baseline": torch.zeros(())}


def subtract_baseline(h: Tensor, decay: float | None, state: State) -> tuple[Tensor, State]:
    """Return h − b, and b ← decay·b + (1 − decay)·h, with the b from before this step."""
    if decay is None:
        return h, state
    b = state["baseline"].to(h)
    return h - b, {"baseline": decay * b + (1 - decay) * h}
